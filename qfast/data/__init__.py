"""Panels, datasets, handlers, processors and sources: from prices to batches."""

from qfast.data.dataset import DatasetH, TSDataSampler, TSDatasetH
from qfast.data.panel import Panel

__all__ = ["DatasetH", "Panel", "TSDataSampler", "TSDatasetH"]
