"""Which samples stand in which batch, draw for draw as the reference does it.

A pass over a segment is `Batches`: an order of samples, cut at boundaries. Models over single samples cut a shuffled
order into equal pieces; models over days cut at the days and shuffle those. The draws come from the reference's
*global* generators in its order, so that the same seed gives the same batches (source: pyqlib 0.9.7,
qlib/contrib/model/pytorch_lstm.py, pytorch_gats.py and torch.utils.data.dataloader / sampler).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["BatchOrder", "Batches", "Call", "LoaderOrder", "NumpyOrder", "SequenceOrder", "UnshuffledLoaderOrder"]


class BatchOrder(Protocol):
    """Order of each pass over n samples, or over n days; every method returns int64 numbers [n]."""

    def train(self, n: int) -> Tensor: ...
    def train_score(self, n: int) -> Tensor: ...
    def valid_score(self, n: int) -> Tensor: ...
    def predict(self, n: int) -> Tensor: ...


class SequenceOrder:
    """As they stand; nothing is drawn."""

    def train(self, n: int) -> Tensor:
        return torch.arange(n)

    train_score = train
    valid_score = train
    predict = train


class NumpyOrder(SequenceOrder):
    """Flat models: `np.random.shuffle` before each training pass, dataset order everywhere else."""

    def train(self, n: int) -> Tensor:
        order = np.arange(n)
        np.random.shuffle(order)  # noqa: NPY002 - the global generator is what makes the order reproducible
        return torch.from_numpy(order)


class UnshuffledLoaderOrder:
    """What a torch DataLoader that does not shuffle draws: one base seed for its workers, whatever their number."""

    def train(self, n: int) -> Tensor:
        _draw()
        return torch.arange(n)

    train_score = train
    valid_score = train
    predict = train


class LoaderOrder(UnshuffledLoaderOrder):
    """Time-series models: the draws of a torch DataLoader, whatever its number of workers.

    A pass over a shuffled loader draws the workers' base seed and then the sampler's seed from
    torch's default generator; a sequential one draws only the base seed. Scores of the training set
    are taken on a second, different shuffle.
    """

    def train(self, n: int) -> Tensor:
        _draw()
        generator = torch.Generator()
        generator.manual_seed(_draw())
        return torch.randperm(n, generator=generator)

    train_score = train


def _draw() -> int:
    return int(torch.empty((), dtype=torch.int64).random_().item())


class Call(NamedTuple):
    """Consecutive batches that go through the network together.

    Attributes
    ----------
    rows : slice
        Of `Batches.order`.
    offsets : Tensor
        int64 [batches + 1] on the CPU, where the batches begin and end within `rows`.
    """

    rows: slice
    offsets: Tensor


@dataclass(frozen=True)
class Batches:
    """One pass: batch b is the samples order[bounds[b]] to order[bounds[b + 1]].

    Attributes
    ----------
    order : Tensor
        int64 [n'], sample numbers, wherever the samples live.
    bounds : Tensor
        int64 [batches + 1] on the CPU, ascending from 0 to n'.
    whole : int
        The leading batches that decide: a short tail may follow, which is scored but neither trained on nor counted.
    """

    order: Tensor
    bounds: Tensor
    whole: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @classmethod
    def of_size(cls, order: Tensor, size: int, *, drop_last: bool) -> Batches:
        """Pieces of `size`; the short tail is left out with `drop_last`.

        >>> Batches.of_size(torch.arange(5), 2, drop_last=False)
        Batches(order=tensor([0, 1, 2, 3, 4]), bounds=tensor([0, 2, 4, 5]), whole=2)
        """
        n = len(order)
        whole = n // size
        bounds = torch.arange(whole + 1) * size
        if n % size and not drop_last:
            bounds = torch.cat((bounds, torch.tensor([n])))
        return cls(order[: int(bounds[-1])], bounds, whole)

    def __iter__(self) -> Iterator[Tensor]:
        """The samples of each batch that is trained on."""
        for begin, end in pairwise(self.bounds[: self.whole + 1].tolist()):
            yield self.order[begin:end]

    def taken(self, numbers: Tensor) -> Batches:
        """The batches of these numbers (int64 [k]), in this order.

        >>> Batches(torch.arange(5), torch.tensor([0, 2, 5]), 2).taken(torch.tensor([1, 0]))
        Batches(order=tensor([2, 3, 4, 0, 1]), bounds=tensor([0, 3, 5]), whole=2)
        """
        sizes = self.bounds.diff()[numbers]
        bounds = torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)))
        moved = torch.repeat_interleave(self.bounds[:-1][numbers] - bounds[:-1], sizes)
        where = torch.arange(int(bounds[-1])) + moved
        return Batches(self.order[where.to(self.order.device)], bounds, len(numbers))

    def calls(self, rows: int) -> Iterator[Call]:
        """All batches, as many at a time as have at most `rows` samples together, but at least one.

        >>> [call.offsets.tolist() for call in Batches(torch.arange(9), torch.tensor([0, 2, 4, 9]), 3).calls(4)]
        [[0, 2, 4], [0, 5]]
        """
        bounds = self.bounds.numpy()
        first = 0
        while first < len(self):
            last = int(np.searchsorted(bounds, bounds[first] + rows, side="right")) - 1
            last = max(last, first + 1)
            yield Call(slice(int(bounds[first]), int(bounds[last])), self.bounds[first : last + 1] - bounds[first])
            first = last
