"""Synthetic markets with a planted signal of known strength, for tests, benchmarks and the demo.

Some instruments are listed late, are delisted early or pause, and some cells are missing. All random numbers come from
one seeded `numpy.random.Generator`; the global random state is not used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from qfast.dates import DateLike
from qfast.errors import ConfigError

__all__ = ["factors", "prices"]

SIGNAL_LAG = 5  # days that the planted signals look back
LABEL_DELAY = 2  # the label at day t is the return from t + 1 to t + 2
PAUSE_DAYS = 8  # longest pause of trading
MARKET_VOLATILITY = 0.008  # daily standard deviation of the return that all instruments share


def factors(
    n_instruments: int = 300,
    n_days: int = 750,
    n_features: int = 20,
    *,
    ic: float = 0.1,
    persistence: float = 0.9,
    seed: int = 0,
    start: DateLike = "2015-01-01",
    freq: str = "B",
    late: float = 0.1,
    delisted: float = 0.1,
    holes: float = 0.01,
    missing: float = 0.01,
    with_signal: bool = False,
) -> pd.DataFrame:
    """Features and a label, shaped like the factors of Alpha158.

    The features are independent standard normal AR(1) series x with coefficient `persistence`. With random orthogonal
    unit vectors w and v, the planted signal is the standardized

        s[t] = sqrt(1/2) w.x[t] + sqrt(1/2) v.(x[t] - x[t-5]) / sqrt(2 (1 - persistence^5))

    and the label is ic s + sqrt(1 - ic^2) e with standard normal e. The expected correlation of s and label across
    instruments is therefore `ic` on every day, which is the best that a model can reach. Half of the signal depends on
    earlier rows.

    Parameters
    ----------
    n_instruments, n_days, n_features : int
        N, D and F. F is at least 2.
    ic : float in [-1, 1]
        Daily Pearson correlation of signal and label.
    persistence : float in [0, 1)
        Correlation of a feature with its value on the previous day.
    seed : int
    start : date-like
        First date.
    freq : str
        Frequency of the calendar, as in pandas: "B" business days, "D" days, "5min", ...
    late, delisted : float in [0, 1]
        Fraction of instruments that start after the first day, or end before the last.
    holes : float in [0, 1)
        Fraction of missing rows, in pauses of up to 8 days.
    missing : float in [0, 1)
        Fraction of feature cells that are NaN. The last two labels of each instrument are always NaN.
    with_signal : bool
        Add the column ("signal", "S").

    Returns
    -------
    DataFrame
        float32, sorted by (datetime, instrument), with columns ("feature", "F000"), ... and ("label", "LABEL0").

    Raises
    ------
    ConfigError
        A number is out of range.

    Examples
    --------
    >>> frame = factors(5, 10, 3, seed=1)
    >>> list(frame["label"].columns), frame["feature"].shape[1]
    (['LABEL0'], 3)
    """
    _check(n_instruments=n_instruments, n_days=n_days)
    _check_shares(late=late, delisted=delisted, holes=holes, missing=missing)
    if not -1 <= ic <= 1 or not 0 <= persistence < 1 or n_features < 2:
        raise ConfigError(
            "factors needs -1 <= ic <= 1, 0 <= persistence < 1 and n_features >= 2, "
            f"got ic={ic}, persistence={persistence}, n_features={n_features}."
        )
    rng = np.random.default_rng(seed)
    shape = (n_days + SIGNAL_LAG, n_instruments, n_features)
    x = rng.standard_normal(shape, dtype=np.float32)
    fresh = np.float32(np.sqrt(1 - persistence**2))
    for t in range(1, len(x)):
        x[t] *= fresh
        x[t] += np.float32(persistence) * x[t - 1]
    directions, _ = np.linalg.qr(rng.standard_normal((n_features, 2)))
    now, change = (x @ directions.astype(np.float32)).transpose(2, 0, 1)
    spread = np.sqrt(2 * (1 - persistence**SIGNAL_LAG))
    signal = np.sqrt(0.5) * (now[SIGNAL_LAG:] + (change[SIGNAL_LAG:] - change[:-SIGNAL_LAG]) / spread)
    noise = rng.standard_normal(signal.shape, dtype=np.float32)
    label = ic * signal + np.sqrt(1 - ic**2) * noise

    present = _presence(rng, n_days, n_instruments, late, delisted, holes)
    label[_last_rows(present, LABEL_DELAY)] = np.nan
    features = x[SIGNAL_LAG:][present]
    if missing > 0:
        cells = rng.integers(0, features.size, size=int(missing * features.size))
        features.reshape(-1)[cells] = np.nan
    columns = [("feature", f"F{j:03d}") for j in range(n_features)] + [("label", "LABEL0")]
    parts = [features, label[present][:, None].astype(np.float32)]
    if with_signal:
        columns.append(("signal", "S"))
        parts.append(signal[present][:, None].astype(np.float32))
    return pd.DataFrame(
        np.concatenate(parts, axis=1), index=_index(present, start, freq), columns=pd.MultiIndex.from_tuples(columns)
    )


def prices(
    n_instruments: int = 300,
    n_days: int = 750,
    *,
    ic: float = 0.1,
    volatility: float = 0.02,
    seed: int = 0,
    start: DateLike = "2015-01-01",
    freq: str = "B",
    late: float = 0.1,
    delisted: float = 0.1,
    holes: float = 0.01,
    missing: float = 0.002,
    with_signal: bool = False,
) -> pd.DataFrame:
    """Open, high, low, close, volume and vwap with returns that depend on past returns.

    The planted signal s[t] is minus the return of the last 5 days, standardized across instruments. The idiosyncratic
    return of day t + 2 is volatility (ic s[t] + sqrt(1 - ic^2) e) with standard normal e. The daily correlation of s
    with the label Ref($close, -2) / Ref($close, -1) - 1 is therefore about `ic`; it differs because prices follow
    logarithmic returns. A model that reads past closes, for example on Alpha360 features, can learn the signal.

    Parameters
    ----------
    n_instruments, n_days : int
        N and D.
    ic : float in [-1, 1]
        Daily Pearson correlation of signal and label.
    volatility : float > 0
        Daily standard deviation of the idiosyncratic return.
    seed, start, freq, late, delisted, holes
        As in `factors`.
    missing : float in [0, 1)
        Fraction of open, high, low and vwap cells that are NaN. The same fraction of volumes is 0.
    with_signal : bool
        Add the column "signal".

    Returns
    -------
    DataFrame
        float32, sorted by (datetime, instrument).

    Raises
    ------
    ConfigError
        A number is out of range.

    Examples
    --------
    >>> prices(5, 10, seed=1).columns.tolist()
    ['open', 'high', 'low', 'close', 'volume', 'vwap']
    """
    _check(n_instruments=n_instruments, n_days=n_days)
    _check_shares(late=late, delisted=delisted, holes=holes, missing=missing)
    if not -1 <= ic <= 1 or not volatility > 0:
        raise ConfigError(f"prices needs -1 <= ic <= 1 and volatility > 0, got ic={ic}, volatility={volatility}.")
    rng = np.random.default_rng(seed)
    returns, signal = _returns(rng, n_days, n_instruments, ic, volatility)
    path = np.cumsum(returns, axis=0)
    first_price = np.exp(rng.normal(3.0, 0.7, size=n_instruments))
    close = first_price * np.exp(path)
    before = np.concatenate([first_price[None], close[:-1]])
    open_ = before * np.exp(0.3 * volatility * rng.standard_normal(close.shape))
    up, down = (np.abs(rng.standard_normal(close.shape)) * 0.5 * volatility for _ in range(2))
    high, low = np.maximum(open_, close) * np.exp(up), np.minimum(open_, close) * np.exp(-down)
    usual_volume = np.exp(rng.normal(13.0, 1.0, size=n_instruments))
    volume = usual_volume * np.exp(0.3 * rng.standard_normal(close.shape) + np.abs(returns) / volatility * 0.2)
    vwap = low + (high - low) * rng.beta(4, 4, size=close.shape)

    present = _presence(rng, n_days, n_instruments, late, delisted, holes)
    table = {"open": open_, "high": high, "low": low, "close": close, "volume": np.floor(volume), "vwap": vwap}
    if with_signal:
        table["signal"] = signal
    values = np.stack([part[present] for part in table.values()], axis=1).astype(np.float32)
    if missing > 0:
        for j, name in enumerate(table):
            cells = rng.integers(0, len(values), size=int(missing * len(values)))
            if name not in ("close", "signal"):
                values[cells, j] = 0.0 if name == "volume" else np.nan
    return pd.DataFrame(values, index=_index(present, start, freq), columns=list(table))


def _returns(
    rng: np.random.Generator, n_days: int, n_instruments: int, ic: float, volatility: float
) -> tuple[np.ndarray, np.ndarray]:
    """Logarithmic returns [D, N] and the signal [D, N] that precedes them by two days."""
    warm_up = SIGNAL_LAG + LABEL_DELAY
    idiosyncratic = rng.standard_normal((n_days + warm_up, n_instruments))
    signal = np.zeros_like(idiosyncratic)
    for t in range(SIGNAL_LAG - 1, len(idiosyncratic)):
        if t >= warm_up:
            idiosyncratic[t] = ic * signal[t - LABEL_DELAY] + np.sqrt(1 - ic**2) * idiosyncratic[t]
        past = -idiosyncratic[t - SIGNAL_LAG + 1 : t + 1].sum(axis=0)
        spread = past.std()
        signal[t] = (past - past.mean()) / spread if spread > 0 else 0.0
    market = MARKET_VOLATILITY * rng.standard_normal((len(idiosyncratic), 1))
    return (volatility * idiosyncratic + market)[warm_up:], signal[warm_up:]


def _presence(
    rng: np.random.Generator, n_days: int, n_instruments: int, late: float, delisted: float, holes: float
) -> np.ndarray:
    """bool [D, N]: True on the days on which an instrument has a row, at least one for each."""
    day = np.arange(n_days)[:, None]
    first = np.where(rng.random(n_instruments) < late, rng.integers(0, n_days, n_instruments), 0)
    stop = np.where(rng.random(n_instruments) < delisted, rng.integers(1, n_days + 1, n_instruments), n_days)
    stop = np.maximum(stop, first + 1)
    present = (day >= first) & (day < stop)
    n_pauses = round(holes * n_days * n_instruments / ((PAUSE_DAYS + 1) / 2))
    begin, who = rng.integers(0, n_days, n_pauses), rng.integers(0, n_instruments, n_pauses)
    length = rng.integers(1, PAUSE_DAYS + 1, n_pauses)
    for step in range(PAUSE_DAYS):
        hit = (length > step) & (begin + step < n_days)
        # Keep the first and last day of each instrument, so every instrument has a row.
        hit &= (begin + step != first[who]) & (begin + step != stop[who] - 1)
        present[begin[hit] + step, who[hit]] = False
    return np.asarray(present)


def _last_rows(present: np.ndarray, count: int) -> np.ndarray:
    """bool [D, N]: True for the last `count` rows of each instrument."""
    remaining = np.cumsum(present[::-1], axis=0)[::-1]
    return np.asarray(present & (remaining <= count))


def _index(present: np.ndarray, start: DateLike, freq: str) -> pd.MultiIndex:
    n_days, n_instruments = present.shape
    days, who = np.nonzero(present)
    width = len(str(n_instruments - 1))
    names = pd.Index([f"S{i:0{width}d}" for i in range(n_instruments)])
    levels: list[Any] = [pd.date_range(start, periods=n_days, freq=freq), names]
    codes: list[Any] = [days, who]
    return pd.MultiIndex(levels=levels, codes=codes, names=["datetime", "instrument"])


def _check(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}.")


def _check_shares(**shares: float) -> None:
    for name, value in shares.items():
        if not 0 <= value <= 1 or (name in ("holes", "missing") and value == 1):
            raise ConfigError(f"{name} must be a fraction from 0 to 1 (holes and missing: less than 1), got {value!r}.")
