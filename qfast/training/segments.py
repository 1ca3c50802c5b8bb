"""Loads the samples of a segment for training, with checks of labels, weights and features."""

from __future__ import annotations

import logging
from collections.abc import Callable
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
    """Object that computes the sample weights of the training loss."""

    def reweight(self, samples: Any, /) -> ArrayLike:
        """Return the weights [n] of n samples, finite and at least 0.

        `samples` is a DataFrame for flat data and a TSDataSampler for rolling windows.
        """


def learning_samples(
    dataset: Dataset,
    segment: str,
    reweighter: Reweighter | None = None,
    *,
    label_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    drop_incomplete: bool = False,
    sharing: Callable[[WindowSet], WindowSet] | None = None,
) -> WindowSet:
    """Load the samples of one segment for training or validation.

    Parameters
    ----------
    dataset : Dataset
    segment : str
        Name of the segment.
    reweighter : Reweighter, optional
        Computes the sample weights.
    label_dtype : torch.dtype, optional
        Labels are converted to this dtype; None keeps their own.
    weight_dtype : torch.dtype, optional
        Dtype of the sample weights; None means that of the labels.
    drop_incomplete : bool
        Whether to leave out flat samples with NaN in features or label, with a log message.
    sharing : callable, optional
        Selects the features of this process before they are checked, see `qfast.training.distributed.Sharing`.

    Returns
    -------
    WindowSet
        On the CPU.

    Raises
    ------
    ConfigError
        `reweighter` has no method `reweight`.
    DataError
        No label column, no finite label, NaN or infinity in the features, or weights that do not fit.
    """
    windows = windows_of(dataset, segment, "learn")
    if windows.label is None:
        raise DataError(f"segment {segment!r} has no label column; training needs one.")
    windows.label = windows.label.to(label_dtype or windows.label.dtype)
    if reweighter is not None:
        windows.weight = sample_weights(reweighter, windows, weight_dtype or windows.label.dtype)
    if drop_incomplete and windows.index is None:
        complete = windows.complete_samples()
        if not bool(complete.all()):
            count = int((~complete).sum())
            logging.getLogger("qfast").info("%d rows of segment %r contain NaN and are left out", count, segment)
            windows = windows.select(complete)
    windows = windows if sharing is None else sharing(windows)
    windows.require_finite_features()
    if windows.label is not None and len(windows) and not bool(torch.isfinite(windows.label).any()):
        raise DataError(
            f"segment {segment!r} has {len(windows)} samples but no finite label. Remedy: check the label "
            "expression and the segment's dates, or leave the valid segment out to train without validation."
        )
    return windows


def sample_weights(reweighter: Reweighter, windows: WindowSet, dtype: torch.dtype) -> Tensor:
    """Compute the weights of the samples of a segment.

    Parameters
    ----------
    reweighter : Reweighter
    windows : WindowSet
        n samples.
    dtype : torch.dtype
        Dtype of the result.

    Returns
    -------
    Tensor
        [n].

    Raises
    ------
    ConfigError
        `reweighter` has no method `reweight`.
    DataError
        The number of weights is not n, or a weight is negative or not finite.
    """
    if not hasattr(reweighter, "reweight"):
        raise ConfigError(
            f"reweighter must have a method reweight(samples) -> array [n], got {type(reweighter).__name__}."
        )
    weight = torch.as_tensor(np.asarray(reweighter.reweight(windows.source()))).to(dtype).reshape(-1)
    if len(weight) != len(windows):
        raise DataError(
            f"reweighter returned {len(weight)} weights for the {len(windows)} samples of segment {windows.name!r}."
        )
    invalid = weight[~(torch.isfinite(weight) & (weight >= 0))]
    if len(invalid):
        raise DataError(
            f"reweighter returned {len(invalid)} weights for segment {windows.name!r} that are negative or not finite, "
            f"the first is {float(invalid[0])}."
        )
    return weight
