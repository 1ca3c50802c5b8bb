"""NumPy twin of csrc/rolling/rolling_online.cpp: the same operations in the same order, hence the same bits.

All windows of all instruments advance together, row by row. One window of one instrument is a lane, so the arrays of a
state have shape [L] with L = W * N lanes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

FLAT = 2e-5  # Qlib's rule for corr and rsquare: a standard deviation of at most this counts as 0
CANCELLED = float(np.finfo(np.float64).eps) * 1e3  # relative size of a sum of squares that has cancelled
LARGEST_DEVIATION = float(np.finfo(np.float64).eps) / CANCELLED  # of squares, relative to their sum
ANCHOR_DRIFT = 1 / 16  # squared distance of mean and anchor relative to the sum of squares
LARGEST_ANCHOR = math.sqrt(float(np.finfo(np.float64).max))
ROW_BLOCK = 256  # rows whose windows are sorted at a time

Array = np.ndarray


def rolling_updates(
    kind: str, x: Array, other: Array | None, start: Array, stop: Array, windows: Array, parameter: float
) -> Array:
    """The statistic of every window and row, float64 [W, R]. See `qfast.data.rolling_online.rolling_online`."""
    out = np.full((len(windows), len(x)), np.nan)
    lengths = np.maximum(stop - start, 0)
    if not len(start) or not lengths.max():
        return out
    bounds = [(int(begin), int(begin + length)) for begin, length in zip(start, lengths, strict=True)]
    raw = _by_row(x, bounds)
    finite = np.where(np.isfinite(raw), raw, np.nan)
    second = finite if other is None else _by_row(other, bounds)
    second = np.where(np.isfinite(second), second, np.nan)
    with np.errstate(all="ignore"):
        result = _statistic(kind, raw, finite, second, windows, parameter)
    for i, (begin, end) in enumerate(bounds):
        out[:, begin:end] = result[: end - begin, :, i].T
    return out


def _by_row(values: Array, bounds: list[tuple[int, int]]) -> Array:
    """Values [T, N] by row of the instrument; NaN after its end."""
    out = np.full((max(end - begin for begin, end in bounds), len(bounds)), np.nan)
    for i, (begin, end) in enumerate(bounds):
        out[: end - begin, i] = values[begin:end]
    return out


def _statistic(kind: str, raw: Array, x: Array, y: Array, windows: Array, parameter: float) -> Array:
    """float64 [T, W, N]."""
    if kind in UPDATES:
        result = _updated(UPDATES[kind], x, y, windows)
        for side in (x, y) if kind == "corr" else ():
            _remove_flat(result, side, windows)
        return result
    if kind in LINES:
        result = _regression(LINES[kind], raw, windows)
        if kind == "rsquare":
            _remove_flat(result, x, windows)
        return result
    if kind == "ema":
        return _exponential(x, parameter)
    if kind in APPLIED:
        return _per_window(APPLIED[kind], x, windows)
    return _ordered(kind, x, windows, parameter)


# ---------------------------------------------------------------- states
class _State:
    """The sums of all lanes. Attributes are arrays [L]; `x` and `y` are the first values of the windows."""

    def __init__(self, x: Array, y: Array) -> None:
        self.n = np.zeros(len(x))
        self.unstable = np.zeros(len(x), dtype=bool)

    def add(self, x: Array, y: Array) -> None:
        """Add a value to each lane; NaN changes nothing."""
        raise NotImplementedError

    def remove(self, x: Array, y: Array) -> None:
        """Remove a value from each lane; NaN changes nothing."""
        raise NotImplementedError

    def result(self) -> Array:
        """The statistic of each lane."""
        raise NotImplementedError

    def set(self, where: Array, **values: Array) -> None:
        """Replace attributes in some lanes."""
        for name, value in values.items():
            setattr(self, name, np.where(where, value, getattr(self, name)))

    def clear(self, where: Array, *names: str) -> None:
        """Set attributes to 0 in some lanes."""
        if where.any():
            for name in names:
                self.set(where, **{name: np.zeros(1, dtype=getattr(self, name).dtype)})

    def put(self, lanes: Array, part: _State) -> None:
        """Replace the state of some lanes."""
        for name, values in vars(part).items():
            getattr(self, name)[lanes] = values


class _Sum(_State):
    """Kahan's sum, with separate compensations for additions and removals."""

    def __init__(self, x: Array, y: Array) -> None:
        super().__init__(x, y)
        self.negative, self.equal, self.sum = np.zeros(len(x)), np.zeros(len(x)), np.zeros(len(x))
        self.added, self.removed = np.zeros(len(x)), np.zeros(len(x))
        self.latest = x.copy()

    def add(self, x: Array, y: Array) -> None:
        corrected = x - self.added
        total = self.sum + corrected
        self.set(
            ~np.isnan(x),
            n=self.n + 1,
            negative=self.negative + np.signbit(x),
            equal=np.where(x == self.latest, self.equal + 1, 1),
            latest=x,
            added=total - self.sum - corrected,
            sum=total,
        )

    def remove(self, x: Array, y: Array) -> None:
        corrected = -x - self.removed
        total = self.sum + corrected
        self.set(
            ~np.isnan(x),
            n=self.n - 1,
            negative=self.negative - np.signbit(x),
            removed=total - self.sum - corrected,
            sum=total,
        )

    def result(self) -> Array:
        return np.where(self.n < 1, np.nan, np.where(self.equal >= self.n, self.latest * self.n, self.sum))


class _Mean(_Sum):
    """Mean of values without a sign that none of them has."""

    def result(self) -> Array:
        mean = self.sum / self.n
        wrong_sign = ((self.negative == 0) & (mean < 0)) | ((self.negative == self.n) & (mean > 0))
        return np.where(
            self.n < 1, np.nan, np.where(self.equal >= self.n, self.latest, np.where(wrong_sign, 0.0, mean))
        )


class _Variance(_State):
    """Welford's variance, whose mean has Kahan's compensation."""

    def __init__(self, x: Array, y: Array) -> None:
        super().__init__(x, y)
        self.mean, self.squares = np.zeros(len(x)), np.zeros(len(x))
        self.added, self.removed = np.zeros(len(x)), np.zeros(len(x))

    def add(self, x: Array, y: Array) -> None:
        valid, n = ~np.isnan(x), self.n + 1
        mean_before = self.mean - self.added
        corrected = x - self.added
        difference = corrected - self.mean
        mean = self.mean + difference / n
        squares = self.squares + (x - mean_before) * (x - mean)
        unstable = self.unstable | (self.squares * CANCELLED > squares)
        added = difference + self.mean - corrected
        self.set(valid, n=n, mean=mean, squares=squares, added=added, unstable=unstable)

    def remove(self, x: Array, y: Array) -> None:
        n = self.n - 1
        mean_before = self.mean - self.removed
        corrected = x - self.removed
        difference = corrected - self.mean
        mean = self.mean - difference / n
        squares = self.squares - (x - mean_before) * (x - mean)
        unstable = self.unstable | (self.squares * CANCELLED > squares)
        removed = difference + self.mean - corrected
        valid = ~np.isnan(x)
        last = valid & (n == 0)
        self.set(valid & ~last, mean=mean, squares=squares, removed=removed, unstable=unstable)
        self.set(valid, n=n)
        self.clear(last, "mean", "squares", "unstable")

    def result(self) -> Array:
        return np.where(self.n <= 1, np.nan, self.squares / (self.n - 1))


class _Deviation(_Variance):
    """Standard deviation; that of a negative variance is 0."""

    def result(self) -> Array:
        variance = super().result()
        return np.where(variance < 0, 0.0, np.sqrt(variance))


class _Moments(_State):
    """Sums of powers of the deviations from the mean, for values relative to an anchor."""

    order = 4
    names = ("mean", "origin", "second", "third", "fourth", "largest")

    def __init__(self, x: Array, y: Array) -> None:
        super().__init__(x, y)
        self.mean, self.origin, self.second = np.zeros(len(x)), np.zeros(len(x)), np.zeros(len(x))
        self.third, self.fourth, self.largest = np.zeros(len(x)), np.zeros(len(x)), np.zeros(len(x))

    def add(self, x: Array, y: Array) -> None:
        valid = ~np.isnan(x)
        self.set(valid & (self.n == 0), origin=_anchor(x))
        shifted, n = x - self.origin, self.n + 1
        difference = shifted - self.mean
        step = difference / n
        term = difference * step * (n - 1)
        if self.order == 4:
            inner = 6 * self.second + term * (n * n - 3 * n + 3)
            self.set(valid, fourth=self.fourth + step * (-4 * self.third + step * inner))
        third = self.third + step * (term * (n - 2) - 3 * self.second)
        self.set(valid, n=n, third=third, second=self.second + term, mean=self.mean + step)
        self._check(valid, shifted)

    def remove(self, x: Array, y: Array) -> None:
        valid, n = ~np.isnan(x), self.n - 1
        last = valid & (n == 0)
        rest = valid & ~last
        shifted = x - self.origin
        difference = shifted - self.mean
        step = difference / n
        term = step * difference * (n + 1)
        if self.order == 4:
            inner = 6 * self.second - term * (n * n + 3 * n + 3)
            self.set(rest, fourth=self.fourth + step * (4 * self.third + step * inner))
        third = self.third - step * (term * (n + 2) - 3 * self.second)
        self.set(rest, third=third, second=self.second - term, mean=self.mean - step)
        self.set(valid, n=n)
        self._check(rest, shifted)
        self.clear(last, *self.names, "unstable")

    def _check(self, where: Array, shifted: Array) -> None:
        distance = np.abs(shifted - self.mean)
        self.set(where & (distance > self.largest), largest=distance)
        missing = np.isnan(self.second) | np.isnan(self.third) | np.isnan(self.fourth)
        drifted = self.mean * self.mean * ANCHOR_DRIFT > self.second
        cancelled = self.largest * self.largest * LARGEST_DEVIATION > self.second
        self.set(where & (missing | drifted | cancelled), unstable=np.ones(1, dtype=bool))


class _Kurtosis(_Moments):
    """Kurtosis of a sample."""

    def result(self) -> Array:
        n = self.n
        ratio = self.fourth / (self.second * self.second)
        value = (n - 1) / ((n - 2) * (n - 3)) * (n * (n + 1) * ratio - 3 * (n - 1))
        return np.where(n < 4, np.nan, value)


class _Skewness(_Moments):
    """Skewness of a sample."""

    order = 3

    def result(self) -> Array:
        n = self.n
        value = self.third / (self.second * np.sqrt(self.second)) * (n * np.sqrt(n - 1) / (n - 2))
        return np.where(n < 3, np.nan, value)


class _Covariance(_State):
    """Products and squares of deviations of the rows in which both series have a value, relative to anchors."""

    names = ("mean_x", "mean_y", "origin_x", "origin_y", "products", "squares_x", "squares_y", "largest_x", "largest_y")

    def __init__(self, x: Array, y: Array) -> None:
        super().__init__(x, y)
        self.mean_x, self.mean_y, self.origin_x, self.origin_y = (np.zeros(len(x)) for _ in range(4))
        self.products, self.squares_x, self.squares_y = (np.zeros(len(x)) for _ in range(3))
        self.largest_x, self.largest_y = np.zeros(len(x)), np.zeros(len(x))

    def add(self, x: Array, y: Array) -> None:
        valid, n = ~np.isnan(x) & ~np.isnan(y), self.n + 1
        self.set(valid & (n == 1), origin_x=_anchor(x), origin_y=_anchor(y))
        self._move(valid, valid, x, y, n, 1.0)

    def remove(self, x: Array, y: Array) -> None:
        valid, n = ~np.isnan(x) & ~np.isnan(y), self.n - 1
        last = valid & (n == 0)
        self._move(valid, valid & ~last, x, y, n, -1.0)
        self.clear(last, *self.names, "unstable")

    def _move(self, valid: Array, where: Array, x: Array, y: Array, n: Array, sign: float) -> None:
        p, q = x - self.origin_x, y - self.origin_y
        dx, dy = p - self.mean_x, q - self.mean_y
        mean_x, mean_y = self.mean_x + sign * (dx / n), self.mean_y + sign * (dy / n)
        products = self.products + sign * ((p - mean_x) * dy)
        squares_x, squares_y = (
            self.squares_x + sign * ((p - mean_x) * dx),
            self.squares_y + sign * ((q - mean_y) * dy),
        )
        self.set(where, mean_x=mean_x, mean_y=mean_y, products=products, squares_x=squares_x, squares_y=squares_y)
        self.set(valid, n=n)
        distance_x, distance_y = np.abs(p - self.mean_x), np.abs(q - self.mean_y)
        self.set(where & (distance_x > self.largest_x), largest_x=distance_x)
        self.set(where & (distance_y > self.largest_y), largest_y=distance_y)
        missing = np.isnan(self.products) | np.isnan(self.squares_x) | np.isnan(self.squares_y)
        cancelled = (
            (self.largest_x * self.largest_y * CANCELLED > np.abs(self.products))
            | (self.largest_x * self.largest_x * CANCELLED > self.squares_x)
            | (self.largest_y * self.largest_y * CANCELLED > self.squares_y)
        )
        self.set(where & (missing | cancelled), unstable=np.ones(1, dtype=bool))

    def result(self) -> Array:
        return np.where(self.n <= 1, np.nan, self.products / (self.n - 1))


class _Correlation(_Covariance):
    """Correlation, limited to -1 and 1."""

    def result(self) -> Array:
        value = self.products / _power_of_half(self.squares_x * self.squares_y)
        undefined = (self.n <= 0) | (self.squares_x == 0) | (self.squares_y == 0)
        return np.where(undefined, np.nan, np.where(value > 1, 1.0, np.where(value < -1, -1.0, value)))


UPDATES: dict[str, type[_State]] = {
    "sum": _Sum,
    "mean": _Mean,
    "var": _Variance,
    "std": _Deviation,
    "skew": _Skewness,
    "kurt": _Kurtosis,
    "cov": _Covariance,
    "corr": _Correlation,
}


def _anchor(values: Array) -> Array:
    """The values, or 0 for those so large that a difference from them could overflow."""
    return np.where(np.abs(values) < LARGEST_ANCHOR, values, 0.0)


def _power_of_half(values: Array) -> Array:
    """C's pow(x, 0.5), as in pandas. It does not always round like the square root, which NumPy would use."""
    return np.array([math.pow(v, 0.5) if v >= 0 else math.nan for v in values.tolist()])


def _updated(make: type[_State], x: Array, y: Array, windows: Array) -> Array:
    rows, instruments = x.shape
    lane_windows, columns = np.repeat(windows, instruments), np.tile(np.arange(instruments), len(windows))
    out = np.empty((rows, len(windows), instruments))
    state = make(x[0, columns], y[0, columns])
    state.add(x[0, columns], y[0, columns])
    for row in range(rows):
        if row > 0:
            leaving = row - lane_windows
            has_left = (leaving >= 0) & (lane_windows > 0)
            oldest = [np.where(has_left, side[leaving, columns], np.nan) for side in (x, y)]
            state.remove(oldest[0], oldest[1])
            state.add(x[row, columns], y[row, columns])
            lanes = np.flatnonzero(state.unstable | (lane_windows == 1))
            if len(lanes):
                state.put(lanes, _computed_again(make, x, y, row, lane_windows[lanes], columns[lanes]))
        state.unstable[:] = False
        out[row] = state.result().reshape(len(windows), instruments)
    return out


def _computed_again(make: type[_State], x: Array, y: Array, row: int, windows: Array, columns: Array) -> _State:
    """The state of lanes from the values of their windows, which end at `row`."""
    lengths = np.where((windows == 0) | (windows > row), row + 1, windows)
    first = row + 1 - lengths
    part = make(x[first, columns], y[first, columns])
    for back in range(int(lengths.max()) - 1, -1, -1):
        inside = back < lengths
        values = [np.where(inside, side[row - back, columns], np.nan) for side in (x, y)]
        part.add(values[0], values[1])
    return part


def _remove_flat(result: Array, values: Array, windows: Array) -> None:
    deviation = _updated(_Deviation, values, values, windows)
    result[(deviation <= FLAT) & (windows > 0)[:, None]] = np.nan


# ---------------------------------------------------------------- regression on the position, exponential mean
def _slope(n: Array, sums: Array, newest: Array, position: Array) -> Array:
    x, xx, y, _, xy = sums
    return (n * xy - x * y) / (n * xx - x * x)


def _rsquare(n: Array, sums: Array, newest: Array, position: Array) -> Array:
    x, xx, y, yy, xy = sums
    correlation = (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))
    return correlation * correlation


def _residual(n: Array, sums: Array, newest: Array, position: Array) -> Array:
    slope = _slope(n, sums, newest, position)
    return newest - (slope * position + (sums[2] / n - slope * (sums[0] / n)))


LINES: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    "slope": _slope,
    "rsquare": _rsquare,
    "resi": _residual,
}


def _regression(statistic: Callable[[Array, Array, Array, Array], Array], values: Array, windows: Array) -> Array:
    rows, instruments = values.shape
    out = np.empty((rows, len(windows), instruments))
    for w, window in enumerate(windows.tolist()):
        n, x, xx, y, yy, xy = np.zeros((6, instruments))
        for row in range(rows):
            if window > 0:
                xy, xx, x = xy - y, xx + n - 2 * x, x - n
                if row >= window:
                    old = values[row - window]
                    left = ~np.isnan(old)
                    n = np.where(left, n - 1, n)
                    y, yy = np.where(left, y - old, y), np.where(left, yy - old * old, yy)
            new, position = values[row], np.float64(window if window > 0 else row + 1)
            valid = ~np.isnan(new)
            n, x = np.where(valid, n + 1, n), np.where(valid, x + position, x)
            xx, xy = np.where(valid, xx + position * position, xx), np.where(valid, xy + position * new, xy)
            y, yy = np.where(valid, y + new, y), np.where(valid, yy + new * new, yy)
            out[row, w] = statistic(n, np.stack([x, xx, y, yy, xy]), new, position)
    return out


def _exponential(x: Array, center_of_mass: float) -> Array:
    fading = 1 - 1 / (1 + center_of_mass)
    mean, weight = np.full(x.shape[1], np.nan), np.ones(x.shape[1])
    out = np.empty((len(x), 1, x.shape[1]))
    for row, value in enumerate(x):
        is_first, has_value = np.isnan(mean), ~np.isnan(value)
        weight = np.where(is_first, weight, weight * fading)
        mixed = np.where(mean == value, mean, (weight * mean + value) / (weight + 1))
        weight = np.where(~is_first & has_value, weight + 1, weight)
        mean = np.where(is_first, value, np.where(has_value, mixed, mean))
        out[row, 0] = mean
    return out


# ---------------------------------------------------------------- order statistics, functions of a window
def _windows_of(values: Array, window: int) -> Iterator[tuple[slice, Array]]:
    """Blocks of rows, and their windows [rows, width] with NaN before the first row."""
    width = len(values) if window == 0 else min(window, len(values))
    padded = np.concatenate([np.full(width - 1, np.nan), values])
    views = np.lib.stride_tricks.sliding_window_view(padded, width)
    for begin in range(0, len(values), ROW_BLOCK):
        rows = slice(begin, min(begin + ROW_BLOCK, len(values)))
        yield rows, views[rows]


def _ordered(kind: str, x: Array, windows: Array, fraction: float) -> Array:
    out = np.empty((len(x), len(windows), x.shape[1]))
    kind = {0.0: "min", 1.0: "max"}.get(fraction, kind) if kind == "quantile" else kind
    for i in range(x.shape[1]):
        for w, window in enumerate(windows.tolist()):
            for rows, views in _windows_of(x[:, i], window):
                # A stable sort keeps equal values in order. Of equal smallest values the newest counts.
                values = np.sort(views[:, ::-1] if kind == "min" else views, axis=1, kind="stable")
                out[rows, w, i] = _of_sorted(kind, values, np.sum(~np.isnan(views), axis=1), fraction)
    return out


def _of_sorted(kind: str, values: Array, n: Array, fraction: float) -> Array:
    """A statistic of sorted rows, whose first n values are not NaN."""

    def at(place: Array) -> Array:
        column = np.clip(place, 0, values.shape[1] - 1)[:, None]
        return np.where(n > 0, np.take_along_axis(values, column, axis=1)[:, 0], np.nan)

    if kind in ("min", "max"):
        return at(n - 1 if kind == "max" else np.zeros_like(n))
    if kind == "median":
        return np.where(n % 2 == 1, at(n // 2), (at(n // 2 - 1) + at(n // 2)) / 2)
    position = fraction * (n - 1)
    low = np.trunc(position).astype(np.int64)
    beyond = position - low
    return np.where(beyond == 0, at(low), at(low) + (at(low + 1) - at(low)) * beyond)


def _per_window(function: Callable[[Array], float], x: Array, windows: Array) -> Array:
    out = np.full((len(x), len(windows), x.shape[1]), np.nan)
    for row, w, i in np.ndindex(out.shape):
        window = int(windows[w])
        values = x[max(0, row + 1 - window) if window else 0 : row + 1, i]
        if not np.isnan(values).all():
            out[row, w, i] = function(np.ascontiguousarray(values))
    return out


def _mad(values: Array) -> float:
    present = values[~np.isnan(values)]
    return float(np.mean(np.abs(present - present.mean())))


def _wma(values: Array) -> float:
    weights = np.arange(1, len(values) + 1)
    return float(np.nanmean(weights / weights.sum() * values))


APPLIED: dict[str, Callable[[Array], float]] = {"mad": _mad, "wma": _wma}
