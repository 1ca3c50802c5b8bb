"""Rolling statistics of series that are stored instrument by instrument, for several windows at once.

The kernel is csrc/rolling/rolling_kernels.h. If the native library is not loaded, the pandas implementation below
computes the same statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from qfast import _backend
from qfast.errors import ConfigError, DataError, suggest

__all__ = ["STATISTICS", "ema_over_all", "rolling"]

Frame = TypeVar("Frame", pd.Series, pd.DataFrame)

PAIRS = ("cov", "corr")
FLAT = 2e-5  # Qlib's rule for corr and rsquare: a standard deviation of at most this counts as 0
SHORTEST_WINDOW = {"skew": 3, "kurt": 4}  # rows; 1 for every other statistic


def rolling(
    kind: str,
    x: np.ndarray,
    start: np.ndarray,
    stop: np.ndarray,
    windows: Sequence[int],
    *,
    other: np.ndarray | None = None,
    parameter: float = 0.0,
) -> np.ndarray:
    """A statistic of the last `window` rows of each instrument, for every window and row.

    Windows are shorter at the start of an instrument and ignore missing values. A window without any value has the
    result NaN, except for "count", whose result is 0.

    Parameters
    ----------
    kind : str
        The statistic:

        - "count", "sum", "mean".
        - "var", "std" (of a sample, NaN for one value), "skew", "kurt".
        - "mad": mean absolute deviation from the mean.
        - "max", "min".
        - "rank": fraction of values that are at most the current one.
        - "quantile": interpolated linearly; `parameter` is from 0 to 1.
        - "idxmax", "idxmin": position of the oldest extreme, 1 for the oldest row. If values are missing, the oldest
          missing value wins.
        - "slope", "resi", "rsquare": of a straight line fitted over the rows. "resi" is the current value minus the
          line.
        - "wma": the values times weights 1, 2, ... from the oldest row, divided by the sum of the weights; like Qlib,
          the mean of these products instead of their sum.
        - "ema": exponential mean; exactly one window, `parameter` is the weight of the newest value.
        - "cov", "corr": of x and `other`.
    x, other : floating [R]
        Infinite values are missing. Only the straight line is NaN while its window contains one.
    start, stop : int [N]
        Rows start[i] to stop[i] - 1 belong to instrument i.
    windows : sequence of int
        W ascending window lengths in rows, at least 1; at least 3 for "skew" and 4 for "kurt".
    parameter : float
        See "quantile" and "ema".

    Returns
    -------
    float64 [W, R]
        NaN outside the rows of the instruments. "rsquare" and "corr" are NaN if a standard deviation is at most 2e-5.

    Raises
    ------
    ConfigError
        The statistic is unknown, a window is too short, the windows do not ascend, or `parameter` or `other` does not
        fit the statistic.
    DataError
        The series differ in length, or `start` and `stop` are not rows of them.

    Notes
    -----
    Source: the rolling functions of pyqlib 0.9.7, qlib/data/ops.py, which are pandas' and Qlib's own. Unlike pandas,
    qfast sums every window anew instead of updating a running sum, so rounding errors do not accumulate.

    Examples
    --------
    >>> rows = np.array([0]), np.array([4])
    >>> rolling("mean", np.array([1.0, 3.0, np.nan, 5.0]), *rows, windows=[2]).tolist()
    [[1.0, 2.0, 3.0, 5.0]]
    """
    lengths = checked_windows(kind, windows, other, kinds=tuple(STATISTICS), least=SHORTEST_WINDOW.get(kind, 1))
    if kind == "quantile" and not 0 <= parameter <= 1:
        raise ConfigError(f"rolling: `parameter` of quantile must be in [0, 1], got {parameter!r}.")
    if kind == "ema" and not (0 < parameter <= 1 and len(lengths) == 1):
        raise ConfigError(
            f"rolling: ema needs a `parameter` in (0, 1] and one window, got {parameter!r} and windows {lengths}."
        )
    series, second, first, end = checked_series(x, other, start, stop)
    if _backend.native is None:
        return _pandas_rolling(kind, series, second, first, end, lengths, parameter)
    result: np.ndarray = _backend.native.rolling(kind, series, second, first, end, lengths, float(parameter))
    return result


def ema_over_all(values: np.ndarray) -> np.ndarray:
    """Qlib's EMA(x, 0): at row n, the exponential mean of all rows so far with a span of n.

    Parameters
    ----------
    values : floating [L]
        Series of one instrument. After the first finite value, NaN and infinite values count as 0.

    Returns
    -------
    float64 [L]
        NaN before the first finite value.

    Notes
    -----
    Source: EMA in qlib/data/ops.py of pyqlib 0.9.7.

    Examples
    --------
    >>> ema_over_all(np.array([np.nan, 2.0, 2.0])).round(2).tolist()
    [nan, 1.5, 1.71]
    """
    out = np.full(len(values), np.nan)
    finite = np.isfinite(values)
    filled = np.where(finite, values, 0)
    for n in range(1 + int(np.argmax(finite)) if finite.any() else len(values) + 1, len(values) + 1):
        weights = (1 - 2 / (1 + n)) ** np.arange(n)[::-1]
        out[n - 1] = weights @ filled[:n] / weights.sum()
    return out


def checked_windows(
    kind: str, windows: Sequence[int], other: np.ndarray | None, *, kinds: Sequence[str], least: int
) -> np.ndarray:
    """The windows as int64 [W].

    Raises
    ------
    ConfigError
        The statistic is none of `kinds`, the windows are not ascending whole numbers of at least `least`, or `other`
        does not fit the statistic.
    """
    if kind not in kinds:
        raise ConfigError(f"rolling: kind must be one of {list(kinds)}, got {kind!r}." + suggest(kind, kinds))
    lengths = np.asarray(list(windows))
    whole = len(lengths) and lengths.dtype.kind in "iu" and lengths.ndim == 1
    if not whole or lengths[0] < least or (np.diff(lengths) <= 0).any():
        raise ConfigError(
            f"rolling: windows of {kind!r} must be ascending whole numbers of at least {least}, got {list(windows)!r}."
        )
    if (kind in PAIRS) != (other is not None):
        problem = "needs a second series `other`" if kind in PAIRS else "does not accept `other`"
        raise ConfigError(f"rolling: {kind!r} {problem}; only {list(PAIRS)} are statistics of two series.")
    return lengths.astype(np.int64)


def checked_series(
    x: np.ndarray, other: np.ndarray | None, start: np.ndarray, stop: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
    """The series as contiguous float64 and the bounds as int64.

    Raises
    ------
    DataError
        The series differ in length, or `start` and `stop` are not rows of them.
    """
    x, start, stop = (np.ascontiguousarray(part) for part in (x, start, stop))
    if x.ndim != 1 or (other is not None and np.shape(other) != x.shape):
        shapes = x.shape if other is None else (x.shape, np.shape(other))
        raise DataError(f"rolling: x and other must be one-dimensional and equally long, got shapes {shapes}.")
    if start.shape != stop.shape or (len(start) and (start.min() < 0 or stop.max() > len(x))):
        limits = f"; start is at least {start.min()}, stop at most {stop.max()}" if len(start) and len(stop) else ""
        raise DataError(
            f"rolling: start and stop must have one shape and rows from 0 to {len(x)}, the length of x; got shapes "
            f"{start.shape} and {stop.shape}{limits}."
        )
    second = None if other is None else np.ascontiguousarray(other, dtype=np.float64)
    return x.astype(np.float64), second, start.astype(np.int64), stop.astype(np.int64)


# ---------------------------------------------------------------- the same statistics by pandas
def _pandas_rolling(
    kind: str,
    x: np.ndarray,
    other: np.ndarray | None,
    start: np.ndarray,
    stop: np.ndarray,
    windows: np.ndarray,
    parameter: float,
) -> np.ndarray:
    out = np.full((len(windows), len(x)), np.nan)
    statistic = STATISTICS[kind]
    for begin, end in zip(start.tolist(), stop.tolist(), strict=True):
        rows = slice(begin, end)
        series = pd.Series(x[rows])
        if kind in PAIRS and other is not None:
            series = pd.DataFrame({"x": x[rows], "y": other[rows]})
        for w, window in enumerate(windows.tolist()):
            out[w, rows] = statistic(series, window, parameter)
    return out


def _pandas(name: str, series: pd.Series, window: int, parameter: float) -> Any:
    return getattr(_finite(series).rolling(window, min_periods=1), name)()


def _moment(name: str, series: pd.Series, window: int, parameter: float) -> Any:
    """skew or kurt. Equal values have neither: pandas before 3 returns 0 and -3 for them."""
    windows = _finite(series).rolling(window, min_periods=1)
    return getattr(windows, name)().where(windows.max() > windows.min())


def _applied(function: Callable[[np.ndarray], float], series: pd.Series, window: int, parameter: float) -> Any:
    return _finite(series).rolling(window, min_periods=1).apply(function, raw=True)


def _finite(series: Frame) -> Frame:
    return series.where(np.isfinite(series))


def _mad(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(np.abs(present - present.mean()).mean())


def _wma(values: np.ndarray) -> float:
    weights = np.arange(1, len(values) + 1)
    return float(np.nanmean(weights / weights.sum() * values))


def _quantile(series: pd.Series, window: int, parameter: float) -> Any:
    return _finite(series).rolling(window, min_periods=1).quantile(parameter)


def _rank(series: pd.Series, window: int, parameter: float) -> Any:
    return _finite(series).rolling(window, min_periods=1).rank(pct=True)


def _ema(series: pd.Series, window: int, parameter: float) -> Any:
    return _finite(series).ewm(alpha=parameter, min_periods=1).mean()


def _pair(name: str, frame: pd.DataFrame, window: int, parameter: float) -> Any:
    finite = _finite(frame)
    sides = [finite[side].rolling(window, min_periods=1) for side in ("x", "y")]
    complete = finite.dropna().reindex(finite.index)
    result = getattr(complete["x"].rolling(window, min_periods=1), name)(complete["y"])
    if name == "corr":
        result[(sides[0].std() <= FLAT) | (sides[1].std() <= FLAT)] = np.nan
    return result


def _line(name: str, series: pd.Series, window: int, parameter: float) -> np.ndarray:
    values, out = series.to_numpy(), np.full(len(series), np.nan)
    for row in range(len(values)):
        y = values[max(0, row - window + 1) : row + 1]
        t = np.arange(1 - len(y), 1, dtype=np.float64)  # 0 is the current row
        present = ~np.isnan(y)
        y, t = y[present], t[present]
        if len(y) < 2 or not np.isfinite(y).all():
            continue
        centered_y, centered_t = y - y.mean(), t - t.mean()
        slope = (centered_y @ centered_t) / (centered_t @ centered_t)
        if name == "slope":
            out[row] = slope
        elif name == "resi":
            out[row] = values[row] - (y.mean() - slope * t.mean())
        elif np.sqrt(centered_y @ centered_y / (len(y) - 1)) > FLAT:
            products = centered_y @ centered_t
            out[row] = products**2 / ((centered_t @ centered_t) * (centered_y @ centered_y))
    return out


STATISTICS: dict[str, Callable[[Any, int, float], Any]] = {
    **{name: partial(_pandas, name) for name in ("count", "sum", "mean", "var", "std", "max", "min")},
    **{name: partial(_moment, name) for name in ("skew", "kurt")},
    "mad": partial(_applied, _mad),
    "idxmax": partial(_applied, lambda values: float(values.argmax() + 1)),
    "idxmin": partial(_applied, lambda values: float(values.argmin() + 1)),
    "rank": _rank,
    "quantile": _quantile,
    "slope": partial(_line, "slope"),
    "rsquare": partial(_line, "rsquare"),
    "resi": partial(_line, "resi"),
    "wma": partial(_applied, _wma),
    "ema": _ema,
    "cov": partial(_pair, "cov"),
    "corr": partial(_pair, "corr"),
}
