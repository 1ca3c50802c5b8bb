"""Losses and scores, masked and weighted in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qfast.errors import ConfigError, DataError, suggest

if TYPE_CHECKING:
    from qfast.data.windows import WindowSet

__all__ = ["LOSSES", "METRICS", "loss_function", "masked_mse", "metric_function", "sample_weights"]

Loss = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def masked_mse(prediction: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of weight * (prediction - label)^2 over the samples whose label is finite.

    Parameters
    ----------
    prediction, label : Tensor
        [B]; the label may be float64, the loss then is too (the reference's time-series models).
    weight : Tensor, optional
        [B]. The mean divides by the number of finite labels, not by the sum of the weights.

    Returns
    -------
    Tensor
        0-d; exactly 0 with zero gradient when no label is finite. No boolean indexing, hence no device
        synchronisation. Source: loss_fn of the reference's models, which lets an infinite label through.

    Examples
    --------
    >>> masked_mse(torch.tensor([1.0, 2.0]), torch.tensor([0.0, float("nan")]))
    tensor(1.)
    """
    finite = torch.isfinite(label)
    error = torch.where(finite, prediction - torch.where(finite, label, 0.0), 0.0)
    squared = error * error if weight is None else weight * error * error
    return squared.sum() / finite.sum().clamp(min=1)


LOSSES: dict[str, Loss] = {"mse": masked_mse}
METRICS: dict[str, Loss] = {"": masked_mse, "loss": masked_mse, "mse": masked_mse}


def loss_function(name: str) -> Loss:
    """The training loss called `name`; a ConfigError lists the known ones."""
    if not isinstance(name, str) or name not in LOSSES:
        raise ConfigError(f"loss must be one of {sorted(LOSSES)}, got {name!r}." + suggest(name, LOSSES))
    return LOSSES[name]


def metric_function(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Score of a batch, higher is better: minus the loss, NaN where no label is finite."""
    if not isinstance(name, str) or name not in METRICS:
        raise ConfigError(f"metric must be one of {sorted(METRICS)}, got {name!r}." + suggest(name, METRICS))
    loss = METRICS[name]

    def score(prediction: Tensor, label: Tensor) -> Tensor:
        value = -loss(prediction, label, None)
        return torch.where(torch.isfinite(label).any(), value, torch.nan)

    return score


def sample_weights(reweighter: Any, windows: WindowSet, dtype: torch.dtype) -> Tensor:
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
