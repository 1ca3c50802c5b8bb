"""Rolling statistics of the rows of instruments compared with pandas, which Qlib uses."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfast import _backend
from qfast.data.rolling import STATISTICS, _pandas_rolling, rolling
from qfast.errors import ConfigError, DataError

PAIRS = ("cov", "corr")
MOMENTS = ("skew", "kurt")
SINGLE = [kind for kind in STATISTICS if kind not in PAIRS]
WINDOWS = [5, 10, 20, 60]
needs_native = pytest.mark.skipif(_backend.native is None, reason="compares the native code with pandas")


def series(seed: int, rows: int, missing: float = 0.1, level: float = 50.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = level + rng.standard_normal(rows).cumsum()
    values[rng.random(rows) < missing] = np.nan
    return values


def bounds(*lengths: int) -> tuple[np.ndarray, np.ndarray]:
    ends = np.cumsum(lengths)
    return ends - lengths, ends


def definition(kind: str, x: np.ndarray, rows: tuple[np.ndarray, np.ndarray], windows: list[int], y=None):  # type: ignore[no-untyped-def]
    """skew, kurt, cov or corr from the deviations of each window. pandas' running sums lose digits in some versions."""
    out = np.full((len(windows), len(x)), np.nan)
    for (start, stop), (w, window) in product(zip(*rows, strict=True), enumerate(windows)):
        views = [windows_of(part[start:stop], window) for part in ((x,) if y is None else (x, y))]
        out[w, start:stop] = {"skew": skew, "kurt": kurt, "cov": cov, "corr": corr}[kind](*views)
    return out


def windows_of(values: np.ndarray, window: int) -> np.ndarray:
    """[rows, window], filled with NaN before the first row."""
    return np.lib.stride_tricks.sliding_window_view(np.r_[np.full(window, np.nan), values], window)[1:]


def deviations(view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of values, and deviations from the mean; exactly 0 if all values are equal."""
    count = np.maximum((~np.isnan(view)).sum(1, keepdims=True), 1)
    least = np.nanmin(np.c_[view, np.full(len(view), np.inf)], 1, keepdims=True)
    centered = view - least
    return count[:, 0], centered - np.nansum(centered, 1, keepdims=True) / count


def skew(view: np.ndarray) -> np.ndarray:
    n, d = deviations(view)
    square, cube = np.nansum(d**2, 1), np.nansum(d**3, 1)
    return np.where((n > 2) & (square > 0), n * np.sqrt(n - 1) / (n - 2) * cube / square**1.5, np.nan)


def kurt(view: np.ndarray) -> np.ndarray:
    n, d = deviations(view)
    square, fourth = np.nansum(d**2, 1), np.nansum(d**4, 1)
    excess = (n + 1) * n * fourth / square**2 - 3 * (n - 1)
    return np.where((n > 3) & (square > 0), (n - 1) / ((n - 2) * (n - 3)) * excess, np.nan)


def cov(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    hole = np.isnan(x + y)
    (n, dx), (_, dy) = (deviations(np.where(hole, np.nan, part)) for part in (x, y))
    return np.where(n > 1, np.nansum(dx * dy, 1) / (n - 1), np.nan)


def corr(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return cov(x, y) / np.sqrt(cov(np.where(np.isnan(y), np.nan, x), x) * cov(y, np.where(np.isnan(x), np.nan, y)))


def both(kind: str, x: np.ndarray, rows: tuple[np.ndarray, np.ndarray], windows: list[int], y=None, parameter=0.0):  # type: ignore[no-untyped-def]
    """The result, and the expected one from pandas. skew, kurt, cov and corr are computed from their definitions."""
    result = rolling(kind, x, *rows, windows, other=y, parameter=parameter)
    if kind in (*MOMENTS, *PAIRS):
        with np.errstate(all="ignore"):
            return result, definition(kind, x.astype(np.float64), rows, windows, y)
    return result, _pandas_rolling(kind, x.astype(np.float64), None, *rows, np.asarray(windows), parameter)


def options(kind: str) -> dict[str, object]:
    return {"windows": [1] if kind == "ema" else WINDOWS, "parameter": {"quantile": 0.8, "ema": 0.1}.get(kind, 0.0)}


def assert_same(result: np.ndarray, expected: np.ndarray, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    np.testing.assert_array_equal(np.isnan(result), np.isnan(expected))
    np.testing.assert_allclose(result, expected, rtol=rtol, atol=atol)


@needs_native
@pytest.mark.parametrize("missing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("kind", SINGLE)
def test_as_pandas(kind: str, missing: float, isa: str) -> None:
    x = series(1, 1200, missing)
    assert_same(
        *both(kind, x, bounds(700, 1, 0, 3, 496), **options(kind)), rtol=1e-7 if kind in ("skew", "kurt") else 1e-9
    )


@needs_native
@pytest.mark.parametrize("kind", ["cov", "corr"])
def test_pairs_as_pandas(kind: str) -> None:
    x, y = series(2, 900), series(3, 900, 0.2, level=1e6)
    assert_same(*both(kind, x, bounds(500, 400), WINDOWS, y), rtol=1e-8)


@pytest.mark.parametrize("kind", [*MOMENTS, *PAIRS])
def test_the_twin_follows_the_definition(kind: str) -> None:
    """Within the accuracy of the running sums of any supported pandas. Equal values have no skew and no kurtosis."""
    level = 50.0 if kind in MOMENTS else 0.0
    x, y = series(2, 600, level=level), series(3, 600, 0.2, level=level)
    if kind in MOMENTS:
        x[100:180] = 0.3
    other = y if kind in PAIRS else None
    rows = bounds(400, 200)
    twin = _pandas_rolling(kind, x, other, *rows, np.asarray([5, 60]), 0.0)
    with np.errstate(all="ignore"):
        expected = definition(kind, x, rows, [5, 60], other)
    assert_same(twin, expected, rtol=1e-4, atol=1e-6)


@needs_native
@pytest.mark.parametrize("kind", SINGLE)
def test_values_that_repeat(kind: str) -> None:
    """Ties and runs of equal values."""
    x = np.repeat(np.random.default_rng(4).integers(1, 4, 60), 7) * 0.1
    assert_same(*both(kind, x, bounds(len(x)), **options(kind)), rtol=1e-6, atol=1e-12)


def test_constant_values_have_no_spread() -> None:
    x = np.full(50, 0.1)
    rows = bounds(50)
    assert np.all(rolling("std", x, *rows, [5, 20])[:, 1:] == 0)
    assert np.all(rolling("slope", x, *rows, [5])[:, 1:] == 0)
    assert np.isnan(rolling("rsquare", x, *rows, [5])).all()
    assert np.isnan(rolling("corr", x, *rows, [5], other=series(1, 50, 0.0))).all()


@pytest.mark.parametrize("kind", SINGLE)
def test_an_infinite_value_is_gone_with_its_window(kind: str) -> None:
    x = series(5, 200, 0.0)
    x[70] = np.inf
    with_hole = x.copy()
    with_hole[70] = np.nan
    result, expected = (rolling(kind, part, *bounds(200), **options(kind)) for part in (x, with_hole))
    if kind in ("slope", "rsquare", "resi"):  # NaN while the value is in the window, as in Qlib
        for w, window in enumerate(WINDOWS):
            assert np.isnan(result[w, 70 : 70 + window]).all()
            np.testing.assert_allclose(
                np.delete(result[w], range(70, 70 + window)), np.delete(expected[w], range(70, 70 + window))
            )
    else:
        np.testing.assert_array_equal(result, expected)


@needs_native
def test_running_sums_do_not_drift() -> None:
    """A value of 1e12 leaves no trace once it is outside the window, unlike in pandas' running sums."""
    x = series(6, 400, 0.0, level=1.0)
    spiked = x.copy()
    spiked[100] = 1e12
    for kind in ("mean", "std", "slope", "resi"):
        result, expected = (rolling(kind, part, *bounds(400), [20]) for part in (spiked, x))
        np.testing.assert_array_equal(result[:, 121:], expected[:, 121:])


def test_instruments_do_not_meet() -> None:
    x = series(7, 300)
    rows = bounds(100, 200)
    for kind in SINGLE:
        whole = rolling(kind, x, *rows, **options(kind))
        alone = rolling(kind, x[100:], *bounds(200), **options(kind))
        np.testing.assert_array_equal(whole[:, 100:], alone)
    outside = rolling("mean", x, np.array([10]), np.array([20]), [3])
    assert np.isnan(outside[0, :10]).all()
    assert np.isnan(outside[0, 20:]).all()


@needs_native
def test_float32_and_strides() -> None:
    x = series(8, 600).astype(np.float32)
    expected = rolling("std", x[::2].copy(), *bounds(300), [5])
    np.testing.assert_array_equal(rolling("std", x[::2], *bounds(300), [5]), expected)
    assert_same(*both("std", x, bounds(600), [5, 20]), rtol=1e-9)


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(SINGLE),
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=5),
    windows=st.sets(st.integers(4, 40), min_size=1, max_size=4),
    missing=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_any_panel(kind: str, lengths: list[int], windows: set[int], missing: float, seed: int) -> None:
    x = series(seed, sum(lengths), missing)
    given_windows = sorted(windows)[:1] if kind == "ema" else sorted(windows)
    parameter = {"quantile": 0.2, "ema": 0.3}.get(kind, 0.0)
    assert_same(*both(kind, x, bounds(*lengths), given_windows, parameter=parameter), rtol=1e-6, atol=1e-8)


def test_threads_change_no_bit() -> None:
    torch = pytest.importorskip("torch")
    x, rows, before = series(9, 4000), bounds(*[400] * 10), torch.get_num_threads()
    try:
        result = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            result.append([rolling(kind, x, *rows, **options(kind)) for kind in SINGLE])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*result, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("kind", "windows", "others", "message"),
    [
        ("meen", [5], {}, "got 'meen'.*Did you mean 'mean'"),
        ("mean", [], {}, "of at least 1, got \\[\\]"),
        ("mean", [5, 5], {}, "of at least 1, got \\[5, 5\\]"),
        ("mean", [0], {}, "of at least 1, got \\[0\\]"),
        ("mean", [2.5], {}, "whole numbers .* got \\[2.5\\]"),
        ("skew", [2], {}, "of at least 3, got \\[2\\]"),
        ("corr", [5], {}, "needs a second series"),
        ("mean", [5], {"other": np.zeros(3)}, "does not accept `other`"),
        ("quantile", [5], {"parameter": 1.5}, "must be in \\[0, 1\\], got 1.5"),
        ("ema", [5], {}, "in \\(0, 1\\]"),
    ],
)
def test_wrong_arguments(kind: str, windows: list[float], others: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rolling(kind, np.zeros(3), *bounds(3), windows, **others)  # type: ignore[arg-type]


def test_rows_beyond_the_series() -> None:
    with pytest.raises(DataError, match=r"rows from 0 to 3.*stop at most 4"):
        rolling("mean", np.zeros(3), np.array([0]), np.array([4]), [2])
    with pytest.raises(DataError, match="equally long, got shapes"):
        rolling("cov", np.zeros(3), *bounds(3), [2], other=np.zeros(4))


@pytest.mark.parametrize("kind", ["var", "std"])
def test_squares_beyond_float64_are_infinite(kind: str, isa: str) -> None:
    """pandas returns infinity. Infinity minus infinity was treated as a variance of 0."""
    bounds = np.array([0]), np.array([7])
    x = np.array([1.0, 2.0, 1e200, -1e200, 3.0, 1e155, 1e155])
    result = rolling(kind, x, *bounds, windows=[2])[0]
    expected = [getattr(pd.Series(x[max(0, row - 1) : row + 1]), kind)() for row in range(7)]
    np.testing.assert_allclose(result, expected, rtol=1e-12)
    assert np.isinf(result[[2, 3, 4, 5]]).all()
    # The square of the sum overflows, but not the sum of squares.
    x = np.array([0.0, 6e153, 6e153, 6e153, 6e153, 6e153, 6e153])
    result = rolling(kind, x, *bounds, windows=[7])[0]
    np.testing.assert_allclose(result[-1], getattr(pd.Series(x / 1e153), kind)() * {"var": 1e306, "std": 1e153}[kind])
