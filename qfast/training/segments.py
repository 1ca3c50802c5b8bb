"""The samples of a segment, checked before training: labels, weights and finite features."""

from __future__ import annotations

import logging
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from qfast.data.adapt import windows_of
from qfast.data.protocols import Dataset
from qfast.data.windows import WindowSet
from qfast.errors import ConfigError, DataError

__all__ = ["Reweighter", "learning_samples", "sample_weights"]


class Reweighter(Protocol):
    """Computes sample weights of the training loss."""

    def reweight(self, samples: Any, /) -> ArrayLike:
        """Weights [n] of the n samples of a frame or TSDataSampler, finite and at least 0."""


def learning_samples(
    dataset: Dataset,
    segment: str,
    reweighter: Reweighter | None = None,
    *,
    label_dtype: torch.dtype | None = None,
    drop_incomplete: bool = False,
) -> WindowSet:
    """Samples of one segment with labels, weights and finite features.

    Parameters
    ----------
    dataset : Dataset
    segment : str
    reweighter : Reweighter, optional
    label_dtype : torch.dtype, optional
        Labels are converted to it; None: they keep their own.
    drop_incomplete : bool
        Leave out flat samples with NaN in features or label.

    Raises
    ------
    DataError
        No label column, no finite label, or NaN or infinity in the features.
    """
    windows = windows_of(dataset, segment, "learn")
    if windows.label is None:
        raise DataError(f"segment {segment!r} has no label column; training needs one.")
    windows.label = windows.label.to(label_dtype or windows.label.dtype)
    if reweighter is not None:
        windows.weight = sample_weights(reweighter, windows, windows.label.dtype)
    if drop_incomplete and windows.index is None:
        complete = windows.complete_samples()
        if not bool(complete.all()):
            count = int((~complete).sum())
            logging.getLogger("qfast").info("%d rows of segment %r with a NaN are left out", count, segment)
            windows = windows.select(complete)
    windows.require_finite_features()
    if windows.label is not None and len(windows) and not bool(torch.isfinite(windows.label).any()):
        raise DataError(
            f"segment {segment!r} has {len(windows)} samples but no finite label. Remedy: check the label "
            "expression and the segment's dates, or leave the valid segment out to train without validation."
        )
    return windows


def sample_weights(reweighter: Reweighter, windows: WindowSet, dtype: torch.dtype) -> Tensor:
    """Weights [n] that an object with `reweight(samples)` gives the samples of a segment.

    Raises
    ------
    ConfigError
        There is no such method.
    DataError
        Another number of weights, or one that is not finite or below 0.
    """
    if not hasattr(reweighter, "reweight"):
        raise ConfigError(
            f"reweighter must have a method reweight(samples) -> array [n], got {type(reweighter).__name__}."
        )
    weight = torch.as_tensor(np.asarray(reweighter.reweight(windows.source()))).to(dtype).reshape(-1)
    if len(weight) != len(windows):
        raise DataError(
            f"reweighter gave {len(weight)} weights for the {len(windows)} samples of segment {windows.name!r}."
        )
    wrong = weight[~(torch.isfinite(weight) & (weight >= 0))]
    if len(wrong):
        raise DataError(
            f"reweighter gave {len(wrong)} weights for segment {windows.name!r} that are not finite or below 0, "
            f"the first is {float(wrong[0])}."
        )
    return weight
