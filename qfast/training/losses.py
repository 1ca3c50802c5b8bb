"""Losses and scores. Samples without a finite label do not count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qfast._renamed import renamed_names
from qfast.errors import ConfigError, suggest

if TYPE_CHECKING:
    from qfast.data.batching import Batches

__all__ = ["LOSSES", "METRICS", "batch_scores", "loss_function", "masked_mse", "metric_function"]

__getattr__ = renamed_names(__name__, {"sample_weights": "qfast.training.segments.sample_weights"})

BLOCK_SAMPLES = 1 << 16  # samples whose errors are in memory at the same time, unless a single batch is larger

Loss = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def masked_mse(prediction: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of weight * (prediction - label)^2 over the samples with a finite label.

    It uses no boolean indexing and therefore never waits for the device.

    Parameters
    ----------
    prediction, label : Tensor
        [B]. With a float64 label the loss is float64, as in Qlib's time-series models.
    weight : Tensor, optional
        [B]. The sum is divided by the number of finite labels, not by the sum of the weights.

    Returns
    -------
    Tensor
        0-d. Exactly 0, with zero gradient, if no label is finite.

    Source
    ------
    `loss_fn` of Qlib's models, which masks NaN but not infinity.

    Examples
    --------
    >>> masked_mse(torch.tensor([1.0, 2.0]), torch.tensor([0.0, float("nan")]))
    tensor(1.)
    """
    squared, finite = _masked_squares(prediction, label, weight)
    return squared.sum() / finite.sum().clamp(min=1)


def _masked_squares(prediction: Tensor, label: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Terms [B] of the sum of `masked_mse`, and bool [B], True for finite labels."""
    finite = torch.isfinite(label)
    error = torch.where(finite, prediction - torch.where(finite, label, 0.0), 0.0)
    return error * error if weight is None else weight * error * error, finite


LOSSES: dict[str, Loss] = {"mse": masked_mse}
METRICS: dict[str, Loss] = {"": masked_mse, "loss": masked_mse, "mse": masked_mse}
# Losses and metrics of whole days are in daily_losses.py.
LOSS_NAMES = ("mse", "ic", "rank_ic", "listnet", "mse+ic")
METRIC_NAMES = ("", "loss", "mse", "ic", "rank_ic")


def loss_function(name: object) -> Loss:
    """Return the training loss with this name.

    Raises
    ------
    ConfigError
        `name` is not in `LOSSES`.
    """
    if not isinstance(name, str) or name not in LOSSES:
        raise ConfigError(
            f"loss must be one of {list(LOSS_NAMES)} or, in Python, a function of (pred, label) or (pred, label, "
            f"weight), got {name!r}." + suggest(name, LOSS_NAMES)
        )
    return LOSSES[name]


def metric_function(name: object) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that scores a batch: predictions [B], labels [B] -> minus the loss, 0-d.

    Higher is better. The score is NaN if no label is finite.

    Raises
    ------
    ConfigError
        `name` is not in `METRICS`.
    """
    if not isinstance(name, str) or name not in METRICS:
        raise ConfigError(
            f"metric must be one of {list(METRIC_NAMES)} or, in Python, a function of (pred, label), got {name!r}."
            + suggest(name, METRIC_NAMES)
        )
    loss = METRICS[name]

    def score(prediction: Tensor, label: Tensor) -> Tensor:
        value = -loss(prediction, label, None)
        return torch.where(torch.isfinite(label).any(), value, torch.nan)

    return score


def batch_scores(
    predictions: Tensor, labels: Tensor, batches: Batches, metric: str, *, skip_unlabelled: bool = True
) -> tuple[float, float]:
    """Compute the mean of the batch scores, and the score over all samples.

    Parameters
    ----------
    predictions, labels : Tensor
        [n], in the order of `batches`.
    batches : Batches
        The first `batches.whole` batches count in the mean, each with the same weight.
    metric : str
        A name in `METRICS`.
    skip_unlabelled : bool
        True leaves batches without a finite label out of the mean. With False they make it NaN, as in Qlib.

    Returns
    -------
    tuple of float
        The mean and the score over all samples. Higher is better; NaN if no label is finite.
    """
    score = metric_function(metric)
    if METRICS[metric] is masked_mse:
        scores, counts = _squared_error_scores(predictions, labels, batches)
    else:
        parts = [(predictions[begin:end], labels[begin:end]) for begin, end in pairwise(batches.bounds.tolist())]
        scores = torch.stack([score(prediction, label) for prediction, label in parts])
        counts = torch.stack([torch.isfinite(label).sum() for _, label in parts])
    values = scores.cpu().numpy().astype(np.float64)
    weights = counts.cpu().numpy()
    labelled = weights > 0
    overall = float(np.sum(values[labelled] * weights[labelled]) / weights.sum()) if labelled.any() else float("nan")
    full = values[: batches.whole]
    if skip_unlabelled:
        full = full[~np.isnan(full)]
        return float(full.mean()) if len(full) else float("nan"), overall
    return float(np.mean(full)), overall


def _squared_error_scores(predictions: Tensor, labels: Tensor, batches: Batches) -> tuple[Tensor, Tensor]:
    """Score and number of finite labels of each batch, bitwise equal to minus `masked_mse` in separate calls."""
    sums, counts = [], []
    for bounds in _blocks(batches.bounds.tolist()):
        begin, end = bounds[0], bounds[-1]
        sizes = [after - before for before, after in pairwise(bounds)]
        squared, finite = _masked_squares(predictions[begin:end], labels[begin:end])
        sums += [part.sum() for part in squared.split(sizes)]
        counts += [part.sum() for part in finite.split(sizes)]
    count = torch.stack(counts)
    means = torch.stack(sums) / count.clamp(min=1)
    return torch.where(count > 0, -means, torch.nan), count


def _blocks(bounds: Sequence[int]) -> Iterator[Sequence[int]]:
    """Divide ascending bounds of batches into parts of at most BLOCK_SAMPLES samples, or of one larger batch.

    >>> list(_blocks([0, 40_000, 60_000, 70_000, 200_000]))
    [[0, 40000, 60000], [60000, 70000], [70000, 200000]]
    """
    first = 0
    for last in range(1, len(bounds)):
        if last + 1 == len(bounds) or bounds[last + 1] - bounds[first] > BLOCK_SAMPLES:
            yield bounds[first : last + 1]
            first = last
