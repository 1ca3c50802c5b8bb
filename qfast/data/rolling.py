"""Rolling statistics of series that lie instrument after instrument, several windows at once.

The native code is csrc/rolling/rolling_kernels.h; the pandas twin below serves where it is not loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from qfast import _backend
from qfast.errors import ConfigError, DataError, suggest

__all__ = ["STATISTICS", "ema_over_all", "rolling"]

PAIRS = ("cov", "corr")
FLAT = 2e-5  # a standard deviation up to here counts as none: the reference's rule for corr and rsquare
FEWEST = {"skew": 3, "kurt": 4}


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

    A window is shorter where an instrument begins. Missing values are left out; without any value the result is
    NaN, that of count 0.

    Parameters
    ----------
    kind : str
        "count", "sum", "mean"; "var", "std" (of a sample: one value gives NaN), "skew", "kurt", "mad" (mean absolute
        deviation from the mean); "max", "min", "rank" (share of values up to the current one), "quantile" (linear
        between values; `parameter` from 0 to 1); "idxmax", "idxmin" (place of the oldest extreme, counted from 1 at the
        oldest row; a missing value, the oldest, wins over all); "slope", "resi", "rsquare" (of a straight line over the
        rows; resi: current value less the line); "wma" (weights 1, 2, ... from the oldest row, over their sum; the mean
        of the products, as the reference has it); "ema" (one window; `parameter` is the weight of the newest value);
        "cov", "corr" (with `other`).
    x, other : floating [R]
        Infinite values are missing, except for the line, whose result is NaN while one is in the window.
    start, stop : int [N]
        Rows start[i] to stop[i] - 1 are instrument i's.
    windows : sequence of int
        W window lengths in rows, ascending, from 1; skew from 3, kurt from 4.

    Returns
    -------
    float64 [W, R]
        NaN outside the instruments' rows. rsquare and corr are NaN where a standard deviation is at most 2e-5.

    Raises
    ------
    ConfigError
        No such statistic, windows that are too short or do not ascend, parameter or `other` missing.
    DataError
        Series of different lengths, rows beyond them.

    Source
    ------
    The rolling operators of pyqlib 0.9.7, qlib/data/ops.py, which are pandas' and its own. No sum is corrected by
    subtraction here, so nothing drifts.

    Examples
    --------
    >>> rows = np.array([0]), np.array([4])
    >>> rolling("mean", np.array([1.0, 3.0, np.nan, 5.0]), *rows, windows=[2]).tolist()
    [[1.0, 2.0, 3.0, 5.0]]
    """
    lengths = _checked(kind, windows, other, parameter)
    x, start, stop = (np.ascontiguousarray(part) for part in (x, start, stop))
    if x.ndim != 1 or (other is not None and np.shape(other) != x.shape):
        shapes = x.shape if other is None else (x.shape, np.shape(other))
        raise DataError(f"rolling: expected series [R] of one length, got {shapes}.")
    if start.shape != stop.shape or (len(start) and (start.min() < 0 or stop.max() > len(x))):
        raise DataError(f"rolling: start and stop must be rows of one length within the {len(x)} rows of x.")
    bounds = start.astype(np.int64), stop.astype(np.int64)
    series = x.astype(np.float64)
    beside = None if other is None else np.ascontiguousarray(other, dtype=np.float64)
    if _backend.native is None:
        return _twin(kind, series, beside, *bounds, lengths, parameter)
    found: np.ndarray = _backend.native.rolling(kind, series, beside, *bounds, lengths, float(parameter))
    return found


def ema_over_all(values: np.ndarray) -> np.ndarray:
    """The reference's EMA(x, 0): at row n the mean of all rows so far, with the weights of a span of n.

    Parameters
    ----------
    values : floating [L]
        Of one instrument; NaN and infinite values are missing, and count as 0 after the first that is not.

    Returns
    -------
    float64 [L]
        NaN before the first value.

    Examples
    --------
    >>> ema_over_all(np.array([np.nan, 2.0, 2.0])).round(2).tolist()
    [nan, 1.5, 1.71]
    """
    out = np.full(len(values), np.nan)
    known = np.isfinite(values)
    there = np.where(known, values, 0)
    for n in range(1 + int(np.argmax(known)) if known.any() else len(values) + 1, len(values) + 1):
        weights = (1 - 2 / (1 + n)) ** np.arange(n)[::-1]
        out[n - 1] = weights @ there[:n] / weights.sum()
    return out


def _checked(kind: str, windows: Sequence[int], other: np.ndarray | None, parameter: float) -> np.ndarray:
    if kind not in STATISTICS:
        raise ConfigError(
            f"rolling: there is no statistic {kind!r}; known: {list(STATISTICS)}." + suggest(kind, STATISTICS)
        )
    lengths = np.asarray(list(windows))
    least = FEWEST.get(kind, 1)
    whole = len(lengths) and lengths.dtype.kind in "iu" and lengths.ndim == 1
    if not whole or lengths[0] < least or (np.diff(lengths) <= 0).any():
        raise ConfigError(
            f"rolling: windows of {kind!r} must be whole numbers, ascending from {least}, got {list(windows)!r}."
        )
    if (kind in PAIRS) != (other is not None):
        raise ConfigError(f"rolling: {list(PAIRS)} need a second series `other`, and no other statistic takes one.")
    if kind == "quantile" and not 0 <= parameter <= 1:
        raise ConfigError(f"rolling: the quantile `parameter` must lie in [0, 1], got {parameter!r}.")
    if kind == "ema" and not (0 < parameter <= 1 and len(lengths) == 1):
        raise ConfigError(f"rolling: ema wants a `parameter` in (0, 1] and one window, got {parameter!r}, {lengths}.")
    return lengths.astype(np.int64)


# ---------------------------------------------------------------- the meaning, by pandas
def _twin(
    kind: str, x: np.ndarray, other: np.ndarray | None, start: np.ndarray, stop: np.ndarray, windows: np.ndarray,
    parameter: float,
) -> np.ndarray:  # fmt: skip
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


def _applied(function: Callable[[np.ndarray], float], series: pd.Series, window: int, parameter: float) -> Any:
    return _finite(series).rolling(window, min_periods=1).apply(function, raw=True)


def _finite(series: Any) -> Any:
    return series.where(np.isfinite(series))


def _mad(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(np.abs(known - known.mean()).mean())


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
    both = finite.dropna().reindex(finite.index)
    found = getattr(both["x"].rolling(window, min_periods=1), name)(both["y"])
    if name == "corr":
        found[(sides[0].std() <= FLAT) | (sides[1].std() <= FLAT)] = np.nan
    return found


def _line(name: str, series: pd.Series, window: int, parameter: float) -> np.ndarray:
    values, out = series.to_numpy(), np.full(len(series), np.nan)
    for row in range(len(values)):
        y = values[max(0, row - window + 1) : row + 1]
        back = np.arange(1 - len(y), 1, dtype=np.float64)
        known = ~np.isnan(y)
        y, back = y[known], back[known]
        if len(y) < 2 or not np.isfinite(y).all():
            continue
        apart, time = y - y.mean(), back - back.mean()
        slope = (apart @ time) / (time @ time)
        if name == "slope":
            out[row] = slope
        elif name == "resi":
            out[row] = values[row] - (y.mean() - slope * back.mean())
        elif np.sqrt(apart @ apart / (len(y) - 1)) > FLAT:
            out[row] = (apart @ time) ** 2 / ((time @ time) * (apart @ apart))
    return out


STATISTICS: dict[str, Callable[[Any, int, float], Any]] = {
    **{name: partial(_pandas, name) for name in ("count", "sum", "mean", "var", "std", "skew", "kurt", "max", "min")},
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
