"""Panels, datasets, handlers, processors and sources: from prices to batches."""

from qfast.data.dataset import DatasetH, TSDataSampler, TSDatasetH
from qfast.data.handlers import Alpha158, Alpha158vwap, Alpha360, Alpha360vwap, DataHandlerLP, FactorHandler
from qfast.data.panel import Panel
from qfast.data.protocols import Dataset, Handler, HandlerDataset
from qfast.data.sources import load_prices

__all__ = [
    "Alpha158",
    "Alpha158vwap",
    "Alpha360",
    "Alpha360vwap",
    "DataHandlerLP",
    "Dataset",
    "DatasetH",
    "FactorHandler",
    "Handler",
    "HandlerDataset",
    "Panel",
    "TSDataSampler",
    "TSDatasetH",
    "load_prices",
]
