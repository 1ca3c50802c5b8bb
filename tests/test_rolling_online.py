"""Row-by-row rolling statistics: bits of pandas and Qlib, the same from the native kernel and from the twin."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qfast import _backend
from qfast.data.rolling_online import KINDS, WITHOUT_ROUNDING, ema_over_all_online, rolling_online
from qfast.data.rolling_online_twin import rolling_updates
from qfast.errors import ConfigError, DataError

PAIRS = ("cov", "corr")
LINES = ("slope", "rsquare", "resi")
SHORTEST = {"skew": 3, "kurt": 4}
needs_native = pytest.mark.skipif(_backend.native is None, reason="needs the native library")
needs_pandas_3_1 = pytest.mark.skipif(
    tuple(map(int, pd.__version__.split(".")[:2])) != (3, 1),
    reason=f"the updates are those of pandas 3.1; pandas {pd.__version__} has others",
)
FLAT = 2e-5


# ---------------------------------------------------------------- the definition: pandas as Qlib calls it
def by_pandas(kind: str, x: np.ndarray, y: np.ndarray, window: int, parameter: float) -> np.ndarray:
    series, other = pd.Series(x), pd.Series(y)
    windows = series.expanding(min_periods=1) if window == 0 else series.rolling(window, min_periods=1)
    if kind == "ema":
        return series.ewm(com=parameter, min_periods=1).mean().to_numpy()
    if kind == "quantile":
        return windows.quantile(parameter).to_numpy()
    if kind == "rank":
        return windows.rank(pct=True).to_numpy()
    if kind == "count":
        return series.where(np.isfinite(series)).rolling(window or len(x), min_periods=0).count().to_numpy()
    if kind in ("idxmax", "idxmin"):
        return windows.apply(lambda v: getattr(v, kind.replace("idx", "arg"))() + 1, raw=True).to_numpy()
    if kind == "mad":
        return windows.apply(mad, raw=True).to_numpy()
    if kind == "wma":
        return windows.apply(wma, raw=True).to_numpy()
    if kind in PAIRS:
        result = getattr(windows, kind)(other)
        if kind == "corr" and window > 0:
            deviations = [side.rolling(window, min_periods=1).std() for side in (series, other)]
            result[np.logical_or(*(np.isclose(d, 0, atol=FLAT) for d in deviations))] = np.nan
        return result.to_numpy()
    return getattr(windows, kind)().to_numpy()


def mad(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return np.mean(np.abs(present - present.mean()))


def wma(values: np.ndarray) -> float:
    weights = np.arange(len(values)) + 1
    weights = weights / weights.sum()
    return np.nanmean(weights * values)


def options(kind: str, windows: list[int]) -> tuple[list[int], float]:
    if kind == "ema":
        return [1], 2.5
    return [w for w in windows if w == 0 or w >= SHORTEST.get(kind, 1)], 0.8 if kind == "quantile" else 0.0


def bits(values: np.ndarray) -> np.ndarray:
    """The bits, with one pattern for every NaN."""
    return np.where(np.isnan(values), np.nan, values).view(np.int64)


def assert_same_bits(result: np.ndarray, expected: np.ndarray, text: str) -> None:
    differ = np.flatnonzero((bits(result) != bits(expected)) & ~(np.isnan(result) & np.isnan(expected)))
    assert not len(differ), f"{text}, row {differ[0]}: {result[differ[0]]!r}, expected {expected[differ[0]]!r}"


# ---------------------------------------------------------------- hostile series
def hostile(seed: int, rows: int) -> np.ndarray:
    """Flat stretches, steps of many magnitudes, zeros of both signs, missing and infinite values."""
    rng = np.random.default_rng(seed)
    x = 50 + rng.standard_normal(rows).cumsum()
    for _ in range(rows // 30):
        begin, length = rng.integers(0, rows), rng.integers(2, 40)
        kind = rng.integers(0, 8)
        part = slice(begin, begin + length)
        if kind < 3:
            x[part] = x[begin]
        elif kind == 3:
            x[part] = 0
        elif kind == 4:
            x[part] *= 10.0 ** rng.integers(-12, 12)
        elif kind == 5:
            x[part] = np.nan
        elif kind == 6:
            x[part] *= -1
        else:
            x[begin] = rng.choice([1e300, -1e200, 1e-300, 5e-324, -0.0, 1e15, 1.7e308])
    return x


def with_infinities(x: np.ndarray, seed: int) -> np.ndarray:
    x = x.copy()
    x[np.random.default_rng(seed).integers(len(x) // 2, len(x), 2)] = [np.inf, -np.inf]
    return x


WINDOWS = [0, 1, 2, 3, 4, 5, 10, 20, 60]
CASES = [kind for kind in KINDS if kind not in LINES]


@needs_pandas_3_1
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.filterwarnings("ignore")
def test_bits_of_pandas(kind: str, seed: int) -> None:
    x, y = with_infinities(hostile(seed, 400), seed), hostile(seed + 100, 400)
    windows, parameter = options(kind, WINDOWS)
    result = rolling_online(
        kind, x, np.array([0]), np.array([400]), windows, other=y if kind in PAIRS else None, parameter=parameter
    )
    for place, window in enumerate(windows):
        expected = by_pandas(kind, x, y, window, parameter)
        assert_same_bits(result[place], expected, f"{kind} of {window} rows, seed {seed}")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", LINES)
@pytest.mark.filterwarnings("ignore")
def test_bits_of_qlib(kind: str, seed: int) -> None:
    """Qlib's compiled regressions; rsquare without the rule for flat series, which needs pandas."""
    pytest.importorskip("qlib", reason="pyqlib is not installed")
    from qlib.data._libs import expanding as expanding_functions
    from qlib.data._libs import rolling as rolling_functions

    x = hostile(seed, 400)
    x = with_infinities(x, seed) if seed % 2 else x
    result = rolling_online(kind, x, np.array([0]), np.array([400]), WINDOWS)
    for place, window in enumerate(WINDOWS):
        if window == 0:
            expected = getattr(expanding_functions, f"expanding_{kind}")(x)
        else:
            expected = getattr(rolling_functions, f"rolling_{kind}")(x, window)
            if kind == "rsquare":
                deviation = rolling_online("std", x, np.array([0]), np.array([400]), [window])[0]
                expected[deviation <= FLAT] = np.nan
        assert_same_bits(result[place], expected, f"{kind} of {window} rows, seed {seed}")


values = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True, width=64),
    st.sampled_from([0.0, -0.0, 0.1, 0.1, 1e6, 1e12, -3.0, float("nan"), float("inf")]),
    st.floats(-100, 100, width=32),
)
runs = st.lists(st.tuples(values, st.integers(1, 12)), min_size=1, max_size=12)


def expanded(pairs: list[tuple[float, int]]) -> np.ndarray:
    return np.concatenate([np.full(length, value) for value, length in pairs])


@needs_pandas_3_1
@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(CASES), x=runs, y=runs, window=st.integers(0, 15))
@example(kind="std", x=[(1e7, 3), (0.0, 20), (0.1, 10), (0.3, 10)], y=[(1.0, 1)], window=5)
@pytest.mark.filterwarnings("ignore")
def test_bits_of_pandas_for_any_series(kind: str, x: list, y: list, window: int) -> None:
    left = expanded(x)
    right = np.resize(expanded(y), len(left))
    windows, parameter = options(kind, [window])
    if not windows:
        return
    result = rolling_online(
        kind,
        left,
        np.array([0]),
        np.array([len(left)]),
        windows,
        other=right if kind in PAIRS else None,
        parameter=parameter,
    )
    assert_same_bits(result[0], by_pandas(kind, left, right, windows[0], parameter), f"{kind} of {windows[0]} rows")


# ---------------------------------------------------------------- native kernel and twin
@needs_native
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WITHOUT_ROUNDING])
def test_native_and_twin_have_the_same_bits(kind: str, isa: str) -> None:
    lengths = np.array([150, 1, 0, 3, 90])
    stop = np.cumsum(lengths)
    x = with_infinities(hostile(3, int(stop[-1])), 3)
    y = hostile(4, len(x)) if kind in PAIRS else None
    windows, parameter = options(kind, WINDOWS)
    arguments = (kind, x, y, stop - lengths, stop, np.array(windows), parameter)
    native, twin = _backend.native.rolling_online(*arguments), rolling_updates(*arguments)
    for place, window in enumerate(windows):
        assert_same_bits(native[place], twin[place], f"{kind} of {window} rows")


def test_rows_outside_the_instruments_and_threads() -> None:
    torch = pytest.importorskip("torch")
    x, before = hostile(5, 900), torch.get_num_threads()
    start, stop = np.array([10, 310, 610]), np.array([300, 600, 890])
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(rolling_online("std", x, start, stop, [5, 20]))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(bits(results[0]), bits(results[1]))
    assert np.isnan(results[0][:, :10]).all()
    alone = rolling_online("std", x[310:600], np.array([0]), np.array([290]), [5, 20])
    np.testing.assert_array_equal(bits(results[0][:, 310:600]), bits(alone))


def test_updates_leave_rounding_errors() -> None:
    """The reason for this module: the deviation of equal values depends on the values before them."""
    x = np.array([2.2, 7.9, 0.5, 0.3, 0.3, 0.3])
    result = rolling_online("std", x, np.array([0]), np.array([6]), [3])[0, -1]
    assert result == 7.220002801460886e-08
    assert rolling_online("std", x[3:], np.array([0]), np.array([3]), [3])[0, -1] == 0


def test_ema_over_all_rows() -> None:
    x = with_infinities(hostile(6, 80), 6)
    expected = pd.Series(x).expanding(min_periods=1).apply(exponential, raw=True).to_numpy()
    assert_same_bits(ema_over_all_online(x), expected, "EMA over all rows")


def exponential(values: np.ndarray) -> float:
    a = 1 - 2 / (1 + len(values))
    w = a ** np.arange(len(values))[::-1]
    w /= w.sum()
    return np.nansum(w * values)


@pytest.mark.parametrize(
    ("kind", "windows", "others", "message"),
    [
        ("meen", [5], {}, "got 'meen'.*Did you mean 'mean'"),
        ("mean", [-1], {}, "of at least 0, got \\[-1\\]"),
        ("corr", [5], {}, "needs a second series"),
        ("quantile", [5], {"parameter": 1.5}, "must be in \\[0, 1\\], got 1.5"),
        ("ema", [5], {"parameter": -1.0}, "center of mass of at least 0"),
    ],
)
def test_wrong_arguments(kind: str, windows: list[int], others: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rolling_online(kind, np.zeros(3), np.array([0]), np.array([3]), windows, **others)  # type: ignore[arg-type]


def test_rows_beyond_the_series() -> None:
    with pytest.raises(DataError, match=r"rows from 0 to 3.*stop at most 4"):
        rolling_online("mean", np.zeros(3), np.array([0]), np.array([4]), [2])
