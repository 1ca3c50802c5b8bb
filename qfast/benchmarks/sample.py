"""A part of the training and validation samples that stands for the whole epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qfast.data.windows import WindowSet
from qfast.errors import DataError
from qfast.training.estimator import Estimator

__all__ = ["FEWEST_SAMPLES", "Sample", "Segments"]

FEWEST_SAMPLES = 64


@dataclass(frozen=True)
class Segments:
    """All samples of an epoch.

    Attributes
    ----------
    train, valid : WindowSet
    by_day : bool
        Whether the batches of the model are whole days.
    batch_size : int
        Samples of a batch; for days, of an average day.
    """

    train: WindowSet
    valid: WindowSet
    by_day: bool
    batch_size: int

    @classmethod
    def of(cls, estimator: Estimator, train: WindowSet, valid: WindowSet) -> Segments:
        """Check the segments for a model.

        Raises
        ------
        DataError
            A segment has fewer than FEWEST_SAMPLES samples.
        """
        for name, windows in (("train", train), ("valid", valid)):
            if len(windows) < FEWEST_SAMPLES:
                raise DataError(
                    f"segment {name!r} has {len(windows)} samples, qfast bench needs at least {FEWEST_SAMPLES}. "
                    "Remedy: data with more rows, or longer segments."
                )
        params = estimator.get_params()
        by_day = bool(type(estimator).batches_are_days) or params.get("batch_by") == "day"
        average = -(-len(train) // len(train.days))
        return cls(train, valid, by_day, average if by_day else int(params["batch_size"]))

    def sample(self, batches: int) -> Sample:
        """About `batches` training batches, and the same share of the validation samples, but at least one batch.

        Samples of whole days, or of whole instruments for all other models, whose consecutive windows share work when
        they are scored. They are spread evenly over the segment.
        """
        train = _part(self.train, self.by_day, batches * self.batch_size)
        share = len(train) / len(self.train)
        fewest = min(len(self.valid), self.batch_size)
        valid = _part(self.valid, self.by_day, max(fewest, round(share * len(self.valid))))
        return Sample(self, train, valid)


@dataclass(frozen=True)
class Sample:
    """The part of `segments` that is timed."""

    segments: Segments
    train: WindowSet
    valid: WindowSet

    @property
    def scale(self) -> dict[str, float]:
        """Samples of each segment per sample of the part."""
        whole = {"train": self.segments.train, "valid": self.segments.valid}
        part = {"train": self.train, "valid": self.valid}
        return {name: len(whole[name]) / len(part[name]) for name in whole}

    @property
    def batches(self) -> float:
        """Training batches of the part."""
        return len(self.train.days) if self.segments.by_day else len(self.train) / self.segments.batch_size

    @property
    def is_whole(self) -> bool:
        """Whether the part is the whole epoch."""
        return len(self.train) == len(self.segments.train) and len(self.valid) == len(self.segments.valid)


def _part(windows: WindowSet, by_day: bool, count: int) -> WindowSet:
    """Days, or instruments, that together have at least `count` samples. Instruments are cut to exactly `count`."""
    if count >= len(windows):
        return windows
    labels = windows.keys().get_level_values("datetime" if by_day else "instrument")
    codes, names = pd.factorize(labels, sort=True)
    sizes = np.bincount(codes, minlength=len(names))
    order = _evenly_spread(len(names))
    needed = int(np.searchsorted(np.cumsum(sizes[order]), count)) + 1
    chosen = np.zeros(len(names), dtype=bool)
    chosen[order[:needed]] = True
    keep = chosen[codes]
    if not by_day:
        surplus = int(keep.sum()) - count
        last = np.flatnonzero(codes == order[needed - 1])
        keep[last[len(last) - surplus :]] = False
    return windows.select(_on(windows, keep))


def _evenly_spread(count: int) -> np.ndarray:
    """0 to count - 1 in an order whose first elements are spread over the whole range, the same in every run.

    >>> _evenly_spread(5)
    array([0, 3, 1, 4, 2])
    """
    golden = (np.arange(count) * 0.6180339887498949) % 1.0
    out: np.ndarray = np.argsort(np.argsort(golden, kind="stable"), kind="stable")
    return out


def _on(windows: WindowSet, keep: np.ndarray) -> Tensor:
    return torch.from_numpy(keep).to(windows.device)
