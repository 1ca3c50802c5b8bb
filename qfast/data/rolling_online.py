"""Rolling statistics with the row-by-row updates of pandas 3.1 and of Qlib, bit for bit (`compat="qlib"`).

pandas and Qlib add each new row to running sums and remove the row that leaves the window. Rounding errors therefore
depend on all earlier rows, and a window of equal values can have a deviation of 1e-5 in place of 0.
`qfast.data.rolling` computes every window anew; use this module only to reproduce Qlib's values.

The kernel is csrc/rolling/rolling_online.cpp. If the native library is not loaded, `rolling_updates` in
`qfast.data.rolling_online_twin` computes the same bits with NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qfast import _backend
from qfast.data.rolling import STATISTICS, checked_series, checked_windows, rolling
from qfast.data.rolling_online_twin import rolling_updates
from qfast.errors import ConfigError

__all__ = ["ema_over_all_online", "rolling_online"]

WITHOUT_ROUNDING = ("count", "rank", "idxmax", "idxmin")  # every way to compute them has the same result
KINDS = (*STATISTICS, "median")


def rolling_online(
    kind: str,
    x: np.ndarray,
    start: np.ndarray,
    stop: np.ndarray,
    windows: Sequence[int],
    *,
    other: np.ndarray | None = None,
    parameter: float = 0.0,
) -> np.ndarray:
    """A statistic of the last `window` rows of each instrument, with the bits of pandas 3.1 and Qlib 0.9.7.

    Parameters
    ----------
    kind : str
        As in `qfast.data.rolling.rolling`, or "median", which pandas computes without interpolation.
    x, other : floating [R]
        Infinite values are missing. In "slope", "rsquare" and "resi" they make all later rows NaN.
    start, stop : int [N]
        Rows start[i] to stop[i] - 1 belong to instrument i. The first row matters: sums begin there.
    windows : sequence of int
        W ascending window lengths in rows. 0 means all rows so far.
    parameter : float
        Of "quantile", from 0 to 1. Of "ema", pandas' center of mass: (n - 1) / 2 for a span of n rows, or
        (1 - w) / w for a newest weight of w.

    Returns
    -------
    float64 [W, R]
        NaN outside the rows of the instruments. "rsquare" and "corr" are NaN if a standard deviation is at most 2e-5,
        except for window 0.

    Raises
    ------
    ConfigError, DataError
        As in `qfast.data.rolling.rolling`.

    Notes
    -----
    Source: pandas/_libs/window/aggregations.pyx of pandas 3.1.1 and qlib/data/_libs of pyqlib 0.9.7. The same bits
    result on every CPU, with or without the native library.

    Examples
    --------
    The deviation of the last three values is 0. The updates leave a rounding error of the earlier ones.

    >>> x, rows = np.array([2.2, 7.9, 0.5, 0.3, 0.3, 0.3]), (np.array([0]), np.array([6]))
    >>> [f"{f('std', x, *rows, windows=[3])[0, -1]:.1e}" for f in (rolling, rolling_online)]
    ['0.0e+00', '7.2e-08']
    """
    lengths = checked_windows(kind, windows, other, kinds=KINDS, least=0)
    if kind == "quantile" and not 0 <= parameter <= 1:
        raise ConfigError(f"rolling: `parameter` of quantile must be in [0, 1], got {parameter!r}.")
    if kind == "ema" and not (parameter >= 0 and len(lengths) == 1):
        raise ConfigError(
            f"rolling: ema needs a center of mass of at least 0 and one window, got {parameter!r} and {lengths}."
        )
    series, second, first_rows, end_rows = checked_series(x, other, start, stop)
    if kind in WITHOUT_ROUNDING:
        # Window 0 becomes the longest, so it must come last.
        longest = max(1, len(series), int(lengths[-1]) + 1)
        ascending = [*lengths[lengths > 0].tolist(), *([longest] if lengths[0] == 0 else [])]
        return np.roll(rolling(kind, series, first_rows, end_rows, ascending), int(lengths[0] == 0), axis=0)
    run = rolling_updates if _backend.native is None else _backend.native.rolling_online
    result: np.ndarray = run(kind, series, second, first_rows, end_rows, lengths, float(parameter))
    return result


def ema_over_all_online(values: np.ndarray) -> np.ndarray:
    """Qlib's EMA(x, 0) with the order of its additions: weights are normalized before the products are summed.

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
    >>> ema_over_all_online(np.array([np.nan, 2.0, 2.0])).round(2).tolist()
    [nan, 1.5, 1.71]
    """
    out = np.full(len(values), np.nan)
    finite = np.isfinite(values)
    filled = np.where(finite, values.astype(np.float64), 0)
    for n in range(1 + int(np.argmax(finite)) if finite.any() else len(values) + 1, len(values) + 1):
        weights = (1 - 2 / (1 + n)) ** np.arange(n)[::-1]
        out[n - 1] = np.sum(weights / weights.sum() * filled[:n])
    return out
