"""Which samples stand in which batch, draw for draw as the reference does it.

Two rules exist, because the reference's flat models shuffle with NumPy's global generator and its
time-series models through torch's DataLoader. Both consume the *global* generators in the reference's
order, so that the same seed gives the same batches (source: pyqlib 0.9.7,
qlib/contrib/model/pytorch_lstm.py and torch.utils.data.dataloader / sampler).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

__all__ = ["BatchOrder", "LoaderOrder", "NumpyOrder", "slices"]


class BatchOrder(Protocol):
    """Sample order of each pass over n samples; every method returns int64 sample numbers [n]."""

    def train(self, n: int) -> torch.Tensor: ...
    def train_score(self, n: int) -> torch.Tensor: ...
    def valid_score(self, n: int) -> torch.Tensor: ...
    def predict(self, n: int) -> torch.Tensor: ...


class NumpyOrder:
    """Flat models: `np.random.shuffle` before each training pass, dataset order everywhere else."""

    def train(self, n: int) -> torch.Tensor:
        order = np.arange(n)
        np.random.shuffle(order)  # noqa: NPY002 - the global generator is what makes the order reproducible
        return torch.from_numpy(order)

    def train_score(self, n: int) -> torch.Tensor:
        return torch.arange(n)

    valid_score = train_score
    predict = train_score


class LoaderOrder:
    """Time-series models: the draws of a torch DataLoader, whatever its number of workers.

    A pass over a shuffled loader draws the workers' base seed and then the sampler's seed from
    torch's default generator; a sequential one draws only the base seed. Scores of the training set
    are taken on a second, different shuffle.
    """

    @staticmethod
    def _draw() -> int:
        return int(torch.empty((), dtype=torch.int64).random_().item())

    def train(self, n: int) -> torch.Tensor:
        self._draw()
        generator = torch.Generator()
        generator.manual_seed(self._draw())
        return torch.randperm(n, generator=generator)

    train_score = train

    def valid_score(self, n: int) -> torch.Tensor:
        self._draw()
        return torch.arange(n)

    predict = valid_score


def slices(n: int, batch_size: int, drop_last: bool) -> Iterator[slice]:
    """Consecutive slices of `batch_size` over n samples; the short tail is kept unless `drop_last`.

    >>> list(slices(5, 2, drop_last=True))
    [slice(0, 2, None), slice(2, 4, None)]
    """
    stop = n - n % batch_size if drop_last else n
    for start in range(0, stop, batch_size):
        yield slice(start, min(start + batch_size, n))
