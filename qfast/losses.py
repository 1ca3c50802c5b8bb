"""Losses and scores, masked and weighted in one place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qfast.errors import ConfigError, suggest

__all__ = ["LOSSES", "METRICS", "loss_function", "masked_mse", "metric_function"]

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
