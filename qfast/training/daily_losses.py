"""Losses and scores of whole days: how well predictions rank the stocks of each day.

Only samples with a finite label count. Days with fewer than two of them, or with constant labels, have no ranking and
are left out of the mean. docs/training.md lists the definitions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qfast.training.daily import Days, day_correlation, day_ranks, day_soft_ranks
from qfast.training.losses import masked_mse

TEMPERATURE = 0.1  # of soft ranks, in standard deviations of the day's predictions
ROUNDING = 8.0  # predictions that differ by fewer epsilons of their magnitude are constant up to rounding

__all__ = ["DAILY_LOSSES", "DAILY_METRICS", "DaySamples", "daily_scores", "ic_loss", "listnet_loss", "rank_ic_loss"]


class DaySamples(NamedTuple):
    """The day of each sample of a batch.

    Attributes
    ----------
    day : Tensor
        int64 [B]. Samples with the same number belong to the same day.
    largest : int
        At least the number of samples of any day.
    """

    day: Tensor
    largest: int


class _Batch(NamedTuple):
    """Samples sorted by day. `usable` is True for days with a ranking, and `weight` is 1 without sample weights."""

    prediction: Tensor
    label: Tensor
    weight: Tensor
    days: Days
    valid: Tensor
    usable: Tensor


def ic_loss(prediction: Tensor, label: Tensor, weight: Tensor | None, samples: DaySamples) -> Tensor:
    """Mean over days of 1 - IC, where IC is Pearson's correlation of prediction and label over the stocks of a day.

    Parameters
    ----------
    prediction, label : Tensor
        [B], float32 or float64. Labels may be NaN or infinite, which means missing.
    weight : Tensor, optional
        [B], at least 0. The correlation is the weighted one, and the day counts with the mean of its weights.
    samples : DaySamples

    Returns
    -------
    Tensor
        0-d, from 0 to 2 without weights. A day with constant predictions (up to rounding) has IC 0 and zero gradient.
        Exactly 0 if no day has two different labels.

    Source
    ------
    The information coefficient of Grinold and Kahn: Active Portfolio Management, 2000, chapter 6; computed as in
    Qlib's `metric_fn` for metric "ic" (qlib/contrib/model/pytorch_hist.py), for each day of the batch.

    Examples
    --------
    >>> one_day = DaySamples(torch.zeros(3, dtype=torch.int64), 3)
    >>> ic_loss(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0]), None, one_day)
    tensor(0.)
    """
    batch = _batch(prediction, label, weight, samples)
    return _mean_over_days(1 - _correlation(batch, batch.prediction, batch.label), batch)


def rank_ic_loss(prediction: Tensor, label: Tensor, weight: Tensor | None, samples: DaySamples) -> Tensor:
    """Mean over days of 1 - rank IC, with differentiable ranks of the predictions.

    The rank IC is Pearson's correlation of the ranks of predictions and labels. The ranks of the predictions are
    `day_soft_ranks` of the standardized predictions at the temperature `TEMPERATURE`, 0.1 standard deviations of the
    day. A high temperature makes them linear, so the loss becomes that of the IC with ranked labels; a low one makes
    them exact, with gradients only between neighbours. The memory is linear in B.

    Parameters
    ----------
    prediction, label, weight, samples
        As in `ic_loss`. Weights do not change ranks.

    Returns
    -------
    Tensor
        0-d, as in `ic_loss`.

    Source
    ------
    Soft ranks of Qin, Liu and Li, Information Retrieval 13, 2010, in Spearman's correlation.

    Examples
    --------
    >>> one_day = DaySamples(torch.zeros(3, dtype=torch.int64), 3)
    >>> bool(rank_ic_loss(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.0, 2.0, 3.0]), None, one_day) < 0.02)
    True
    """
    batch = _batch(prediction, label, weight, samples)
    standardized, varies = _standardized(batch.prediction, batch)
    soft = day_soft_ranks(standardized, batch.days, batch.valid & batch.days.spread(varies).bool(), TEMPERATURE)
    return _mean_over_days(1 - _correlation(batch, soft, _label_ranks(batch)), batch)


def listnet_loss(prediction: Tensor, label: Tensor, weight: Tensor | None, samples: DaySamples) -> Tensor:
    """Mean over days of the cross-entropy between the top-one probabilities of labels and predictions.

    The top-one probabilities of a day are the softmax over its stocks. Labels are standardized within the day first,
    because raw returns of one percent would make all probabilities equal.

    Parameters
    ----------
    prediction, label, weight, samples
        As in `ic_loss`. Weights multiply the terms of the cross-entropy.

    Returns
    -------
    Tensor
        0-d, at least 0. Exactly 0 if no day has two different labels.

    Source
    ------
    Cao, Qin, Liu, Tsai and Li: Learning to rank: from pairwise approach to listwise approach, ICML 2007.

    Examples
    --------
    >>> one_day = DaySamples(torch.zeros(2, dtype=torch.int64), 2)
    >>> listnet_loss(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 2.0]), None, one_day)
    tensor(0.6931)
    """
    batch = _batch(prediction, label, weight, samples)
    target, _ = _standardized(batch.label, batch)
    entropy = -batch.days.sum(batch.weight * _log_softmax(target, batch).exp() * _log_softmax(batch.prediction, batch))
    return _mean(entropy, batch.usable)


def mse_ic_loss(prediction: Tensor, label: Tensor, weight: Tensor | None, samples: DaySamples) -> Tensor:
    """`masked_mse` plus `ic_loss`: the level of the predictions and their correlation within each day.

    Source
    ------
    The sum of a regression and a ranking loss, as in Feng et al.: Temporal relational ranking for stock prediction,
    ACM Transactions on Information Systems 37, 2019, with the IC as the ranking loss.
    """
    return masked_mse(prediction, label, weight) + ic_loss(prediction, label, weight, samples)


DailyLoss = Callable[[Tensor, Tensor, "Tensor | None", DaySamples], Tensor]
DAILY_LOSSES: dict[str, DailyLoss] = {
    "ic": ic_loss,
    "rank_ic": rank_ic_loss,
    "listnet": listnet_loss,
    "mse+ic": mse_ic_loss,
}
DAILY_METRICS = {"ic": "IC", "rank_ic": "rank IC"}
"""Metrics of whole days, with their names in log lines."""


@torch.no_grad()
def daily_scores(prediction: Tensor, label: Tensor, samples: DaySamples, metric: str) -> Tensor:
    """IC or rank IC of each day, as `qfast.metrics.daily_ic` computes them, on the device of the predictions.

    Parameters
    ----------
    prediction, label : Tensor
        [n]. Samples with a NaN prediction or without a finite label do not count.
    samples : DaySamples
    metric : {"ic", "rank_ic"}

    Returns
    -------
    Tensor
        float64 [days]: only the days whose correlation is defined, ascending by number.

    Examples
    --------
    >>> two_days = DaySamples(torch.tensor([0, 0, 0, 1, 1]), 3)
    >>> prediction, label = torch.tensor([1.0, 2.0, 4.0, 1.0, 1.0]), torch.tensor([1.0, 3.0, 2.0, 0.0, 1.0])
    >>> daily_scores(prediction, label, two_days, "rank_ic")
    tensor([0.5000], dtype=torch.float64)
    """
    valid = torch.isfinite(label) & ~torch.isnan(prediction)
    order, days = Days.of(samples.day[valid], samples.largest)
    x, y = prediction[valid][order].double(), label[valid][order].double()
    if metric == "rank_ic":
        x, y = day_ranks(x, days), day_ranks(y, days)
    correlation, defined = day_correlation(x, y, days, torch.ones_like(x, dtype=torch.bool))
    return correlation[defined].clamp(-1.0, 1.0)


# ---------------------------------------------------------------- helpers
def _batch(prediction: Tensor, label: Tensor, weight: Tensor | None, samples: DaySamples) -> _Batch:
    order, days = Days.of(samples.day, samples.largest)
    prediction, label = prediction[order], label[order].detach()
    valid = torch.isfinite(label)
    label = torch.where(valid, label, 0.0)
    ones = torch.ones_like(label)
    weight = torch.where(valid, ones if weight is None else weight[order], 0.0)
    weighty = valid & (weight > 0)
    usable = days.range(label, weighty) > 0
    return _Batch(torch.where(valid, prediction, 0.0), label, weight, days, valid, usable)


def _correlation(batch: _Batch, x: Tensor, y: Tensor) -> Tensor:
    tolerance = ROUNDING * torch.finfo(x.dtype).eps
    return day_correlation(x, y, batch.days, batch.valid, batch.weight, tolerance)[0]


def _mean_over_days(loss: Tensor, batch: _Batch) -> Tensor:
    """Mean of the losses of the usable days, each multiplied by the mean weight of its labelled samples."""
    return _mean(batch.days.mean(batch.weight, batch.valid.to(loss.dtype)) * loss, batch.usable)


def _mean(loss: Tensor, usable: Tensor) -> Tensor:
    return torch.where(usable, loss, 0.0).sum() / usable.sum().clamp(min=1)


def _standardized(values: Tensor, batch: _Batch) -> tuple[Tensor, Tensor]:
    """Deviations from the day's mean in standard deviations, and which days vary; 0 for days that do not."""
    days, count = batch.days, batch.valid.to(values.dtype)
    spread = days.range(values, batch.valid)
    magnitude = days.largest_value(torch.where(batch.valid, values, 0.0).abs()).clamp(min=0.0)
    varies = spread > ROUNDING * torch.finfo(values.dtype).eps * magnitude
    scaled = values / days.spread(torch.where(varies, spread, 1.0))  # squares cannot overflow
    deviation = torch.where(batch.valid, scaled - days.spread(days.mean(scaled, count)), 0.0)
    variance = torch.where(varies, days.mean(deviation * deviation, count), 1.0)
    return deviation / days.spread(variance.sqrt()), varies


def _label_ranks(batch: _Batch) -> Tensor:
    """Ranks of the labels of each day. Missing labels come last and do not change the ranks of others."""
    return day_ranks(batch.label.masked_fill(~batch.valid, float("inf")), batch.days)


def _log_softmax(values: Tensor, batch: _Batch) -> Tensor:
    """Logarithm of the softmax over the labelled stocks of each day; 0 for the others."""
    days = batch.days
    highest = days.largest_value(values.masked_fill(~batch.valid, -float("inf")))
    shifted = torch.where(batch.valid, values - days.spread(torch.where(highest.isfinite(), highest, 0.0)), 0.0)
    total = days.sum(batch.valid.to(values.dtype) * shifted.exp())
    return torch.where(batch.valid, shifted - days.spread(torch.where(total > 0, total, 1.0).log()), 0.0)
