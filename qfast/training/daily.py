"""Sums, ranks and correlations over the stocks of each day of a batch, for cross-sectional losses and metrics.

All days are computed at once. Nothing waits for the device: the number of days in a batch is not read on the host, so
statistics have one entry per sample, B, of which the first ones belong to the days of the batch. Sums use
`torch.segment_reduce`, whose order of additions does not change from call to call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PAIRS = 1 << 21  # pairs of stocks that soft ranks compute at a time, to bound their memory

__all__ = ["Days", "day_correlation", "day_ranks", "day_soft_ranks"]


@dataclass(frozen=True)
class Days:
    """Which of B values belong to the same day. The values are sorted by day.

    Attributes
    ----------
    number : Tensor
        int64 [B], ascending: the number of each value's day, from 0.
    offsets : Tensor
        int64 [B + 1]: the values of day d are offsets[d] to offsets[d + 1]. Numbers without a day have no values.
    largest : int
        At least the number of values of any day.

    Examples
    --------
    >>> order, days = Days.of(torch.tensor([7, 3, 7]), largest=2)
    >>> order.tolist(), days.sum(torch.tensor([1.0, 2.0, 3.0])[order])
    ([1, 0, 2], tensor([2., 4., 0.]))
    """

    number: Tensor
    offsets: Tensor
    largest: int

    @classmethod
    def of(cls, day: Tensor, largest: int) -> tuple[Tensor, Days]:
        """The order that sorts values by day, and their days.

        Parameters
        ----------
        day : Tensor
            int64 [B]. Values with the same number belong to the same day.
        largest : int
            At least the number of values of any day.
        """
        ordered, order = day.sort(stable=True)
        number = torch.zeros_like(ordered)
        number[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
        return order, cls(number, _offsets(number), min(largest, len(day)))

    def sum(self, values: Tensor) -> Tensor:
        """Sum [B] of values [B] by day, 0 for numbers without a day."""
        return cast(Tensor, _Sum.apply(values, self))

    def spread(self, by_day: Tensor) -> Tensor:
        """The entry of its day for each value: [B] -> [B]."""
        return cast(Tensor, _Spread.apply(by_day, self))

    def mean(self, values: Tensor, weight: Tensor) -> Tensor:
        """Weighted mean by day; 0 for days without weight."""
        total = self.sum(weight)
        return self.sum(weight * values) / torch.where(total > 0, total, 1.0)

    def largest_value(self, values: Tensor) -> Tensor:
        """Maximum [B] of values [B] by day, without gradient; minus infinity for numbers without a day."""
        data = values.detach()
        return torch.segment_reduce(data, "max", offsets=self.offsets, unsafe=True, initial=-float("inf"))

    def range(self, values: Tensor, valid: Tensor) -> Tensor:
        """Largest minus smallest of the valid values by day, without gradient; 0 for a day without any."""
        high = self.largest_value(values.masked_fill(~valid, -float("inf")))
        low = -self.largest_value((-values).masked_fill(~valid, -float("inf")))
        return torch.where(high >= low, high - low, 0.0)


class _Sum(torch.autograd.Function):
    """Sums by day. The gradient of a sum is spread over the values of its day."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, days: Days) -> Tensor:
        ctx.days = days
        return torch.segment_reduce(values, "sum", offsets=days.offsets, unsafe=True, initial=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.days.spread(gradient), None


class _Spread(torch.autograd.Function):
    """The inverse direction of `_Sum`, with its sum as gradient."""

    @staticmethod
    def forward(ctx: Any, by_day: Tensor, days: Days) -> Tensor:
        ctx.days = days
        return by_day[days.number]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.days.sum(gradient), None


def day_correlation(
    x: Tensor, y: Tensor, days: Days, valid: Tensor, weight: Tensor | None = None, tolerance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Pearson's correlation of two values over the stocks of each day.

    Parameters
    ----------
    x, y : Tensor
        [B], finite where `valid`.
    days : Days
    valid : Tensor
        bool [B]. Other values do not count.
    weight : Tensor, optional
        [B], at least 0: weights of means and sums.
    tolerance : float
        Values whose range is at most this fraction of their largest magnitude count as constant.

    Returns
    -------
    correlation, defined : Tensor
        [B] by day; bool [B]. A correlation is not defined, and is 0 with zero gradient, for days with fewer than two
        valid values of positive weight, and if x or y is constant.
    """
    counted = valid if weight is None else valid & (weight > 0)
    w = counted.to(x.dtype) if weight is None else torch.where(counted, weight, 0.0)
    x, x_varies = _deviations(x, days, counted, w, tolerance)
    y, y_varies = _deviations(y, days, counted, w, tolerance)
    defined = x_varies & y_varies
    norm = days.sum(w * x * x) * days.sum(w * y * y)
    correlation = days.sum(w * x * y) / torch.where(defined, norm, 1.0).sqrt()
    return torch.where(defined, correlation, 0.0), defined


def _deviations(x: Tensor, days: Days, valid: Tensor, weight: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Deviations from the day's mean divided by the day's range, and which days vary.

    Division by the range prevents overflow of the squares. Correlations do not depend on it, nor do their gradients.
    """
    x = torch.where(valid, x, 0.0)
    spread = days.range(x, valid)
    magnitude = days.largest_value(x.abs())
    varies = spread > tolerance * magnitude.clamp(min=0.0)
    scale = days.spread(torch.where(varies, spread, 1.0))
    x = x / scale
    return torch.where(valid, x - days.spread(days.mean(x, weight)), 0.0), varies


def day_ranks(values: Tensor, days: Days) -> Tensor:
    """Ranks [B] of values [B] within their day, from 1, averaged over equal values. Without gradient.

    The infinite values of a day are equal to each other. Values must not be NaN.
    """
    data = values.detach()
    order = data.sort(stable=True).indices
    order = order[days.number[order].sort(stable=True).indices]
    ordered, number = data[order], days.number[order]
    group = torch.zeros_like(number)
    group[1:] = ((ordered[1:] != ordered[:-1]) | (number[1:] != number[:-1])).cumsum(0)
    bounds = _offsets(group)
    place = (bounds[:-1] + bounds[1:] + 1).to(_real(data.dtype))[group] / 2 - days.offsets[number]
    return torch.empty_like(place).scatter_(0, order, place)


def day_soft_ranks(values: Tensor, days: Days, valid: Tensor, temperature: float) -> Tensor:
    """Differentiable ranks: 0.5 plus the sum of sigmoid((value - other) / temperature) over the stocks of the day.

    Parameters
    ----------
    values : Tensor
        [B].
    days : Days
    valid : Tensor
        bool [B]. Other values neither have a rank (theirs is 0) nor change the ranks of others.
    temperature : float
        In units of the values. At 0 the result would be `day_ranks`.

    Returns
    -------
    Tensor
        [B]. Second derivatives are not supported.

    Source
    ------
    Qin, Liu and Li: A general approximation framework for direct optimization of information retrieval measures,
    Information Retrieval 13, 2010, equation 9.
    """
    return cast(Tensor, _SoftRanks.apply(values, days, valid, temperature))


class _SoftRanks(torch.autograd.Function):
    """Pairs of stocks [B, largest day], computed in blocks of rows forward and backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, days: Days, valid: Tensor, temperature: float) -> Tensor:
        ctx.days, ctx.temperature = days, temperature
        ctx.save_for_backward(values, valid)
        ranks = torch.empty_like(values)
        for rows, _, below in _pairs(values, days, valid, temperature):
            ranks[rows] = below.sum(1) + 0.5
        return torch.where(valid, ranks, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        values, valid = ctx.saved_tensors
        gradient = torch.where(valid, gradient, 0.0)
        padded = torch.cat((gradient, gradient.new_zeros(1)))
        out = torch.empty_like(gradient)
        for rows, others, below in _pairs(values, ctx.days, valid, ctx.temperature):
            slope = below * (1 - below)  # symmetric: pair (i, j) has the slope of (j, i)
            out[rows] = (slope * (gradient[rows, None] - padded[others])).sum(1)
        return torch.where(valid, out / ctx.temperature, 0.0), None, None, None


def _pairs(values: Tensor, days: Days, valid: Tensor, temperature: float) -> Any:
    """Yield rows, the stocks of their days (B for none) and sigmoid((row - stock) / temperature), block by block."""
    size = len(values)
    # A stock that does not exist or does not count is infinitely far above all others, which makes its sigmoid 0.
    padded = torch.cat((values.masked_fill(~valid, float("inf")), values.new_full((1,), float("inf"))))
    own = torch.where(valid, values, 0.0)
    step = torch.arange(days.largest, device=values.device)
    block = max(1, PAIRS // max(1, days.largest))
    for begin in range(0, size, block):
        rows = slice(begin, min(begin + block, size))
        day = days.number[rows]
        others = days.offsets[day].unsqueeze(1) + step
        others = torch.where(others < days.offsets[day + 1].unsqueeze(1), others, size)
        yield rows, others, torch.sigmoid((own[rows, None] - padded[others]) / temperature)


def _offsets(number: Tensor) -> Tensor:
    """Boundaries int64 [B + 1] of the equal values of an ascending tensor that counts from 0."""
    return torch.searchsorted(number, torch.arange(len(number) + 1, device=number.device))


def _real(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, otherwise float32, which represents ranks up to 8 million exactly."""
    return torch.float64 if dtype == torch.float64 else torch.float32
