"""Which samples form which batch, with the same random draws as Qlib.

One pass over a segment is a `Batches`: an order of samples and the boundaries between batches. Models over single
samples cut a shuffled order into batches of equal size. Models over days use one batch per day and shuffle the days.

Orders draw from the same global generators as Qlib and in the same sequence, so the same seed gives the same batches.
Source: qlib/contrib/model/pytorch_lstm.py and pytorch_gats.py of pyqlib 0.9.7, and torch.utils.data.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["BatchOrder", "Batches", "Call", "LoaderOrder", "NumpyOrder", "SequenceOrder", "UnshuffledLoaderOrder"]


class BatchOrder(Protocol):
    """Order of the samples, or days, in each kind of pass. Every method returns a permutation of 0 to n - 1, int64."""

    def train(self, n: int) -> Tensor:
        """Order of a training pass."""

    def train_score(self, n: int) -> Tensor:
        """Order in which the training segment is scored after a training pass."""

    def valid_score(self, n: int) -> Tensor:
        """Order in which the validation segment is scored."""

    def predict(self, n: int) -> Tensor:
        """Order of a prediction."""


class SequenceOrder:
    """Ascending order. Draws no random numbers.

    >>> SequenceOrder().train(3)
    tensor([0, 1, 2])
    """

    def train(self, n: int) -> Tensor:
        """0 to n - 1."""
        return torch.arange(n)

    train_score = train
    valid_score = train
    predict = train


class NumpyOrder(SequenceOrder):
    """Order of flat models: `np.random.shuffle` for each training pass, ascending for every other pass."""

    def train(self, n: int) -> Tensor:
        """A permutation from NumPy's global generator."""
        order = np.arange(n)
        np.random.shuffle(order)  # noqa: NPY002 - Qlib draws from the global generator
        return torch.from_numpy(order)


class UnshuffledLoaderOrder:
    """Ascending order with the draw of a torch DataLoader that does not shuffle: one base seed for its workers."""

    def train(self, n: int) -> Tensor:
        """0 to n - 1, after one draw from torch's default generator."""
        _draw()
        return torch.arange(n)

    train_score = train
    valid_score = train
    predict = train


class LoaderOrder(UnshuffledLoaderOrder):
    """Order of time-series models, with the draws of a torch DataLoader that shuffles the training segment.

    A pass over a shuffling loader draws the base seed of its workers and then the seed of its sampler from torch's
    default generator. A sequential loader draws only the base seed. Neither depends on the number of workers. Scoring
    the training segment uses a second shuffle.
    """

    def train(self, n: int) -> Tensor:
        """A permutation from a generator that is seeded by torch's default generator."""
        _draw()
        generator = torch.Generator()
        generator.manual_seed(_draw())
        return torch.randperm(n, generator=generator)

    train_score = train


def _draw() -> int:
    return int(torch.empty((), dtype=torch.int64).random_().item())


class Call(NamedTuple):
    """Consecutive batches that are passed to the network in one call.

    Attributes
    ----------
    rows : slice
        Their part of `Batches.order`.
    offsets : Tensor
        int64 [batches + 1] on the CPU: boundaries of the batches, relative to the start of `rows`.
    """

    rows: slice
    offsets: Tensor


@dataclass(frozen=True)
class Batches:
    """One pass over samples; batch b contains the samples order[bounds[b] : bounds[b + 1]].

    Attributes
    ----------
    order : Tensor
        int64 [n] sample numbers, on the device of the samples.
    bounds : Tensor
        int64 [batches + 1] on the CPU, ascending from 0 to n.
    whole : int
        Number of leading batches to train on and to average scores over. A shorter last batch may follow, which is
        only predicted.
    """

    order: Tensor
    bounds: Tensor
    whole: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @classmethod
    def of_size(cls, order: Tensor, size: int, *, drop_last: bool) -> Batches:
        """Batches of `size` samples.

        Parameters
        ----------
        order : Tensor
            int64 [n].
        size : int
            Samples of a batch.
        drop_last : bool
            Leave out the last batch if it is shorter.

        Examples
        --------
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
        """The samples of each of the first `whole` batches."""
        for begin, end in pairwise(self.bounds[: self.whole + 1].tolist()):
            yield self.order[begin:end]

    def select(self, numbers: Tensor) -> Batches:
        """The batches with these numbers (int64 [k]), in this order.

        >>> Batches(torch.arange(5), torch.tensor([0, 2, 5]), 2).select(torch.tensor([1, 0]))
        Batches(order=tensor([2, 3, 4, 0, 1]), bounds=tensor([0, 3, 5]), whole=2)
        """
        sizes = self.bounds.diff()[numbers]
        bounds = torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)))
        moved = torch.repeat_interleave(self.bounds[:-1][numbers] - bounds[:-1], sizes)
        places = torch.arange(int(bounds[-1])) + moved
        return Batches(self.order[places.to(self.order.device)], bounds, len(numbers))

    def merged(self, size: int | None) -> Batches:
        """Consecutive batches combined, as long as they have at most `size` samples. None combines all.

        A batch with more samples remains as it is.

        >>> Batches(torch.arange(9), torch.tensor([0, 2, 4, 9]), 3).merged(4).bounds
        tensor([0, 4, 9])
        """
        ends = [call.rows.stop for call in self.calls(len(self.order) if size is None else size)]
        return Batches(self.order, torch.tensor([0, *ends]), len(ends))

    def taken(self, numbers: Tensor) -> Batches:
        """Earlier name of `select`."""
        warnings.warn("Batches.taken has been renamed to Batches.select.", DeprecationWarning, stacklevel=2)
        return self.select(numbers)

    def calls(self, rows: int) -> Iterator[Call]:
        """All batches, grouped into calls of at most `rows` samples and at least one batch.

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
