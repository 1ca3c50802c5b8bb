"""An epoch as a user of torch writes it: layers of torch.nn, batches by tensor indexing, and torch.optim.Adam."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qfast.benchmarks.sample import Sample
from qfast.data.windows import WindowSet
from qfast.nn import TCNModel
from qfast.nn.plain import PlainTorch
from qfast.ops import window_rows
from qfast.training.base import GRADIENT_LIMIT
from qfast.training.estimator import Estimator

__all__ = ["TorchEpoch"]


class TorchEpoch:
    """Times an epoch of the network's copy with torch's layers.

    `PlainTorch.to_reference` returns that copy: torch.nn.LSTM, GRU, Conv1d and TransformerEncoder, and for GATs dense
    attention over all pairs of stocks.

    Parameters
    ----------
    estimator : Estimator
        Its network must be one of `qfast.nn`.
    sample : Sample
    """

    title = "torch's layers"

    def __init__(self, estimator: Estimator, sample: Sample) -> None:
        assert isinstance(estimator.network, PlainTorch)
        self.network: nn.Module = estimator.network.to_reference()
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-4)
        self.sample = sample
        self.tables = {"train": _Table(sample.train), "valid": _Table(sample.valid)}

    def seconds(self) -> float:
        """CPU seconds of an epoch: a training pass, and the scores of both segments."""
        start = time.process_time()
        self._train()
        total = (time.process_time() - start) * self.sample.scale["train"]
        for segment, table in self.tables.items():
            start = time.process_time()
            self._score(table)
            total += (time.process_time() - start) * self.sample.scale[segment]
        return total

    def _train(self) -> None:
        self.network.train()
        table = self.tables["train"]
        for samples in self._batches(table.windows, shuffled=True):
            loss = self._loss(table, samples)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_value_(self.network.parameters(), GRADIENT_LIMIT)
            self.optimizer.step()

    @torch.no_grad()
    def _score(self, table: _Table) -> None:
        self.network.eval()
        for samples in self._batches(table.windows, shuffled=False):
            self._loss(table, samples).item()

    def _loss(self, table: _Table, samples: Tensor) -> Tensor:
        x, label = table.batch(samples)
        if isinstance(self.network, TCNModel) and x.dim() == 3:
            x = x.transpose(1, 2)
        known = torch.isfinite(label)
        error: Tensor = self.network(x)[known] - label[known]
        return error.square().mean()

    def _batches(self, windows: WindowSet, shuffled: bool) -> Iterator[Tensor]:
        segments = self.sample.segments
        if segments.by_day:
            days = windows.days
            yield from days.order.split(days.bounds.diff().tolist())
        else:
            order = torch.randperm(len(windows)) if shuffled else torch.arange(len(windows))
            yield from order.split(segments.batch_size)


class _Table:
    """Features and labels of a segment, ready for indexing."""

    def __init__(self, windows: WindowSet) -> None:
        self.windows = windows
        assert windows.label is not None
        self.label = windows.label.float()
        self.rows: Tensor | None = None
        if windows.index is not None and windows.step_len is not None and isinstance(windows.features, Tensor):
            self.features: Tensor = windows.features
            self.rows = window_rows(windows.index, windows.rows, windows.step_len, fill=windows.fill)
        else:
            self.features = windows.batch(torch.arange(len(windows)))

    def batch(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        rows = samples if self.rows is None else self.rows[samples]
        return self.features[rows], self.label[samples]
