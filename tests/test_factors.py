"""Factors compared with pandas, instrument by instrument, and with pyqlib's engine."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfast.data import FactorHandler
from qfast.data.expression import fields, reach
from qfast.data.factor_graph import Graph
from qfast.data.factors import ROW_CHUNK, evaluate, evaluate_all, register_function, unregister_function
from qfast.data.panel import Panel
from qfast.data.rolling import ema_over_all
from qfast.data.sources import load_prices, read_prices
from qfast.errors import ConfigError, DataError
from support.pandas_factors import by_pandas
from support.stores import FIELDS, read_series, write_store

ELEMENTWISE = [
    "Abs($close - $open)",
    "Sign($close - $open)",
    "Log($volume)",
    "Power($close, 2)",
    "$close ** 0.5",
    "2 ** ($close / 20)",
    "Greater($close, $open)",
    "Less($close, 20)",
    "If($close > $open, $high, $low)",
    "If($close > $open, 1, 0)",
    "Not($close > $open) * 1",
    "($close > $open) & ($volume > 10)",
    "Or($close >= $open, $high <= $low) + 0",
    "And($close == $open, $vwap != $close) + 0",
    "Gt($close, 20)",
    "Ge($close, $open)",
    "Lt($close, $open)",
    "Le($close, 20)",
    "Eq($volume, 0)",
    "Ne($volume, 0)",
    "Add($close, Sub($open, Mul($high, Div($low, 2))))",
    "Delta($close, 3)",
    "Delta($close > $open, 2)",
    "Ref($close, 3)",
    "Ref($close > $open, 1)",
    "-$close",
    "1 / $volume",
]
WINDOWED = [
    "Mean",
    "Sum",
    "Std",
    "Var",
    "Max",
    "Min",
    "Med",
    "Mad",
    "Rank",
    "Count",
    "IdxMax",
    "IdxMin",
    "WMA",
    "Slope",
    "Rsquare",
    "Resi",
    "EMA",
    "Skew",
    "Kurt",
]
ROLLING = [
    *(f"{name}($close, {n})" for name in WINDOWED for n in (4, 7, 60)),
    *(f"Quantile($close, {n}, {q})" for n in (1, 5, 30) for q in (0, 0.2, 0.8, 1)),
    "Mean($close, 1)",
    "Std($close, 1)",
    "Std($close, 2)",
    "Max($open, 1)",
    "Slope($close, 2)",
    "WMA($volume, 3)",
    *(f"{name}($close, $volume, {n})" for name in ("Corr", "Cov") for n in (2, 5, 30)),
    "Mean($close > Ref($close, 1), 5)",
    "Count($volume / 0, 5)",
    "IdxMax(Ref($high, 2), 10)",
    "Mean(Mean($close, 3), 4)",
    "Std(Abs($close / Ref($close, 1) - 1) * $volume, 5)",
    "Corr($close / Ref($close, 1), Log($volume / Ref($volume, 1) + 1), 20)",
    "Sum(If($close > $open, $volume, -$volume), 5)",
    "Mean(Ref($close, -2), 5)",
    "Max($close, 5) - Min($close, 5)",
]
MEMORY = [
    *(f"{name}($close, 0)" for name in WINDOWED),
    "Ref($close, 0)",
    "Delta($close, 0)",
    "Quantile($close, 0, 0.3)",
    "Corr($close, $volume, 0)",
    "Cov($close, $open, 0)",
    "Mean($close, 0.2)",
    "Max($close, 0.5)",
    "EMA($close, 0.1)",
    "EMA($close / $open, 12) - EMA($close / $open, 26)",
    "EMA($close, 0)",
    "EMA(1 / $volume, 0)",
]


# ---------------------------------------------------------------- compared with pandas
def price_panel(seed: int = 0, n_days: int = 80, names: str = "ABC", specials: bool = False) -> Panel:
    """Prices with holes, flat stretches, zero volume and instruments of different lengths."""
    rng = np.random.default_rng(seed)
    days = pd.bdate_range("2024-01-01", periods=n_days)
    frames = []
    for place, name in enumerate(names):
        dates = days[rng.integers(0, n_days // 2) if place else 0 :]
        close = 20 * np.exp(np.cumsum(0.02 * rng.standard_normal(len(dates))))
        close[10:25] = close[10]  # flat
        frame = pd.DataFrame({"datetime": dates, "instrument": name, "close": close})
        for field in ("open", "high", "low", "vwap"):
            frame[field] = close * (1 + 0.01 * rng.standard_normal(len(dates)))
        frame["volume"] = np.where(rng.random(len(dates)) < 0.1, 0, rng.lognormal(10, 1, len(dates)))
        values = frame.iloc[:, 2:].to_numpy()
        values[rng.random(values.shape) < 0.06] = np.nan
        if specials:
            values[rng.random(values.shape) < 0.02] = np.inf
            values[rng.random(values.shape) < 0.02] = 0
        frame.iloc[:, 2:] = values
        frames.append(frame)
    return load_prices(pd.concat(frames))


def assert_same(panel: Panel, text: str, ours: np.ndarray) -> None:
    for code in range(len(panel.instruments)):
        rows = np.flatnonzero(panel.instrument_codes == code)
        series = {f: pd.Series(panel.column(f)[rows], index=rows) for f in panel.columns("price")}
        expected = by_pandas(text, series).to_numpy()
        np.testing.assert_allclose(ours[rows], expected, rtol=2e-5, atol=1e-6, equal_nan=True, err_msg=text)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", [*ELEMENTWISE, *ROLLING, *MEMORY])
def test_every_operator_equals_pandas(text):
    panel = price_panel(1)
    assert_same(panel, text, evaluate(text, panel))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "text", [t for t in [*ELEMENTWISE, *ROLLING] if not any(w in t for w in ("Slope", "Rs", "Resi"))]
)
def test_infinite_and_zero_prices(text):
    """Without the functions of a fitted line: Qlib's running sums are NaN forever after an infinite value."""
    panel = price_panel(2, specials=True)
    assert_same(panel, text, evaluate(text, panel))


def test_a_line_forgets_an_infinite_value():
    panel = price_panel(2, specials=True)
    result = evaluate("Slope($close, 5)", panel)
    last = pd.Series(np.isinf(panel.column("close"))).groupby(panel.instrument_codes).rolling(5, min_periods=1).max()
    touched = last.to_numpy() > 0
    assert np.isnan(result[touched]).all()
    assert np.isfinite(result[~touched]).mean() > 0.9


leaves = st.sampled_from(["$close", "$open", "$volume", "$high"])
numbers = st.sampled_from(["2", "0.5", "1e-12", "3"])


def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    window = st.integers(1, 9)
    return st.one_of(
        st.builds(lambda a, op, b: f"({a} {op} {b})", inner, st.sampled_from("+-*/"), inner | numbers),
        st.builds(
            lambda f, a, n: f"{f}({a}, {n})", st.sampled_from(["Mean", "Max", "Min", "Std", "Sum"]), inner, window
        ),
        st.builds(lambda f, a, b: f"{f}({a}, {b})", st.sampled_from(["Greater", "Less"]), inner, inner | numbers),
        st.builds(lambda a, n: f"Ref({a}, {n})", inner, st.integers(-4, 4)),
        st.builds(lambda a, b: f"If({a} > {b}, {a}, {b})", inner, inner),
        st.builds(lambda a: f"Abs({a})", inner),
    )


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.recursive(leaves, grow, max_leaves=5), min_size=1, max_size=5), seed=st.integers(0, 20))
@pytest.mark.filterwarnings("ignore")
def test_expressions_together_equal_each_alone(texts, seed):
    """Neither shared subexpressions nor the number of instruments in a pass changes a bit."""
    panel = price_panel(seed, 30)
    together = evaluate_all(texts, panel)
    for place, text in enumerate(texts):
        np.testing.assert_array_equal(together[:, place], evaluate(text, panel))
    some = np.flatnonzero(np.random.default_rng(seed).random(panel.n_rows) < 0.3)
    np.testing.assert_array_equal(evaluate_all(texts, panel, rows=some), together[some])


def test_passes_over_a_few_instruments_have_the_same_results(monkeypatch):
    panel = price_panel(5, 60, "ABCDEFG")
    texts = [*ELEMENTWISE, *ROLLING]
    whole = evaluate_all(texts, panel)
    assert panel.n_rows < ROW_CHUNK
    for rows in (1, 70, 200):
        monkeypatch.setattr("qfast.data.factors.ROW_CHUNK", rows)
        np.testing.assert_array_equal(evaluate_all(texts, panel), whole)


def test_what_is_written_to():
    panel = price_panel()
    table = np.zeros((panel.n_rows, 3), dtype=np.float32)
    assert evaluate_all(["$close", "$open"], panel, out=table[:, 1:]) is not None
    np.testing.assert_array_equal(table[:, 1], panel.column("close"))
    assert evaluate_all([], panel).shape == (panel.n_rows, 0)
    assert evaluate_all(["$close"], panel, rows=np.arange(0)).shape == (0, 1)


def test_another_instruments_series():
    panel = price_panel(3, 40)
    ours = evaluate("$close / Mask(Mean($close, 3), 'a')", panel)
    assert ours.dtype == np.float32
    rows = np.flatnonzero(panel.instrument_codes == 0)
    index = pd.Series(panel.column("close")[rows]).rolling(3, min_periods=1).mean().to_numpy()
    by_day = np.full(len(panel.datetimes), np.nan)
    by_day[panel.date_codes[rows]] = index
    np.testing.assert_allclose(ours, panel.column("close") / by_day[panel.date_codes], rtol=1e-6)
    np.testing.assert_array_equal(ours, evaluate("$close / ChangeInstrument('A', Mean($close, 3))", panel))
    with pytest.raises(DataError, match=r"there is no instrument 'Z' in the data"):
        evaluate("Mask($close, 'Z')", panel)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("market", ["all", "mixed"])
def test_masks_of_another_instrument_equal_qlib(tmp_path, market):
    """Windows and shifts over a Mask see the other instrument's days, also before the instrument's own listing (BBB,
    EEE)."""
    qlib = pytest.importorskip("qlib", reason="pyqlib is not installed")
    root = write_store(tmp_path / "store")
    qlib.init(provider_uri=str(root), region="us", kernels=1, logging_level=logging.ERROR)
    from qlib.data import D

    forms = [
        "Ref({m}, 1)",
        "Ref({m}, -3)",
        "Ref({m}, 0)",
        "Mean({m}, 5)",
        "Std({m} / 2 + 1, 7)",
        "Mean({m} > 20, 4)",
        "Mean(Ref({m}, 2), 4)",
        "Corr({m}, Ref({m}, 1), 6)",
        "Abs(Mean({m}, 3)) + 1",
        "EMA({m}, 5)",
        "Mean({m}, 0)",
        "If({m} > 20, 1, 0)",
        "{m} == {m}",
        "Mask(Mean(Mask($close, 'AAA'), 3), '{who}')",
        "Mask(Mean($close, 0) / Mask(EMA($close, 9), 'BBB'), '{who}')",
    ]
    masks = {who: f"Mask($close, '{who}')" for who in ("AAA", "BBB", "CCC")}
    texts = [form.format(m=mask, who=who) for who, mask in masks.items() for form in forms]
    texts.append("Mean($close, 60)")  # more days are read than an EMA needs at its start
    for start, end in (("2020-02-26", "2020-05-20"), ("2020-06-10", "2020-06-16")):  # with the first days of BBB, EEE
        theirs = D.features(D.instruments(market), texts, start, end).swaplevel().sort_index()
        ours = through_the_handler(root, texts, market, start_time=start, end_time=end)
        theirs = theirs.reindex(ours.index)  # Qlib adds days of the other instrument that this one lacks
        for text in texts:
            expected = theirs[text].to_numpy(np.float32)
            np.testing.assert_allclose(ours[text], expected, rtol=2e-5, atol=1e-6, err_msg=text)


def test_one_mask_is_computed_once():
    texts = [f"$close / Mask($close, 'A') + {n}" for n in range(9)]
    assert len(Graph(texts, price_panel(3, 40), {}, frozenset(), None, {}).masks) == 1


def test_custom_functions():
    panel = price_panel(4, 20)
    register_function("Range", lambda high, low, scale: (high - low) * scale, series=2, settings=1)
    register_function("Fresh", lambda x, n: np.arange(len(x)) >= n, settings=1, reach=lambda n: (n, 0))
    try:
        np.testing.assert_allclose(
            evaluate("Range($high, $low, 2)", panel), 2 * evaluate("$high - $low", panel), rtol=1e-6
        )
        assert reach("Fresh(Ref($close, 2), 5)") == (7, 0)
        assert evaluate("Fresh($close, 5)", panel).sum() == panel.n_rows - 5 * len(panel.instruments)
        with pytest.raises(ConfigError, match="needs 3 argument"):
            evaluate("Range($high, $low)", panel)
        register_function("Range", lambda x: x[:-1])
        with pytest.raises(ConfigError, match=r"'Range' failed for \w+: ValueError: expected one value for each row"):
            evaluate("Range($high)", panel)
        register_function("Range", np.ndarray.fill, settings=1)  # modifies its argument
        before = panel.values("price").copy()
        with pytest.raises(ConfigError, match=r"function 'Range' failed for .*read-only") as caught:
            evaluate("$high - Range($low, 0)", panel)
        assert isinstance(caught.value.__cause__, ValueError)
        assert str(caught.value).endswith("    $high - Range($low, 0)\n            ^")
        np.testing.assert_array_equal(panel.values("price"), before)
        register_function("Range", lambda x: x, reach=lambda: None)
        with pytest.raises(ConfigError, match="reach of function 'Range' returned None for the settings"):
            reach("Range($high)")
        register_function("Range", lambda x: x, reach=lambda n: (n, 0))
        with pytest.raises(ConfigError, match=r"reach of function 'Range' failed for the settings \(\): TypeError"):
            reach("Range($high)")
        register_function("Range", lambda x: x, reach=(np.int64(3), 0))
        assert reach("Range($high)") == (3, 0)
    finally:
        unregister_function("Range")
        unregister_function("Fresh")
    with pytest.raises(ConfigError, match="function 'Range' is not available"):
        evaluate("Range($high)", panel)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Mean", abs), "function 'Mean' is built in"),
        (("My op", abs), "must be an identifier"),
        (("Mine", 3), "must be callable"),
        (("Mine", abs, {"series": 0}), "series of function 'Mine' must be a whole number of at least 1"),
        (("Mine", abs, {"settings": -1}), "settings of function 'Mine' must be a whole number of at least 0"),
        (("Mine", abs, {"reach": (1, -1)}), "must be .rows before, rows after."),
        (("Mine", abs, {"reach": 5}), "must be .rows before, rows after., two whole .* got 5"),
        (("Mine", abs, {"reach": ("a", 1)}), "must be .rows before, rows after."),
    ],
)
def test_registering_refuses(arguments, message):
    name, function, *rest = arguments
    with pytest.raises(ConfigError, match=message):
        register_function(name, function, **(rest[0] if rest else {}))
    with pytest.raises(ConfigError, match="not a registered function"):
        unregister_function("Mean")


# ---------------------------------------------------------------- stores, and comparison with pyqlib
def test_an_unknown_field_lists_the_fields_of_the_store(tmp_path):
    root = write_store(tmp_path / "store")
    for source in ({"provider_uri": root}, {"provider_uri": {"day": str(root)}}, {"data": root}):
        with pytest.raises(DataError, match=r"no column 'opne'; it has \[.*'close'.*'open'.*\]. Did you mean 'open'"):
            FactorHandler(["$close", "Mean($opne, 5)"], learn_processors=[], **source)
    handler = FactorHandler(["$close"], provider_uri=root, learn_processors=[], drop_raw=True)
    assert handler.price_fields() == sorted(FIELDS)
    frame = pd.DataFrame(price_panel().to_frame("price"))
    assert FactorHandler(["$close"], data=frame, learn_processors=[]).price_fields() == sorted(FIELDS)
    with pytest.raises(DataError, match="prices were dropped"):
        FactorHandler(["$close"], data=frame, learn_processors=[], drop_raw=True).price_fields()


@pytest.mark.filterwarnings("ignore")
def test_ema_over_all_equals_qlib():
    """Series with holes and infinite values, also at the beginning."""
    pytest.importorskip("qlib", reason="pyqlib is not installed")
    from qlib.data.base import Feature
    from qlib.data.ops import EMA

    class Given(Feature):
        def load(self, instrument: str, start: int, end: int, *rest: object) -> pd.Series:
            return pd.Series(values)

    for seed in range(60):
        rng = np.random.default_rng(seed)
        values = rng.standard_normal(int(rng.integers(1, 40))).astype(np.float32)
        values[rng.random(len(values)) < 0.3] = np.nan
        values[rng.random(len(values)) < 0.2] = rng.choice([np.inf, -np.inf])
        theirs = EMA(Given("x"), 0)._load_internal("A", 0, len(values))
        np.testing.assert_allclose(ema_over_all(values), theirs, rtol=1e-5, atol=1e-7)


def through_the_handler(root: Path, texts: list[str], market: str = "all", **times: str) -> pd.DataFrame:
    handler = FactorHandler(texts, market, provider_uri=root, learn_processors=[], label=["$close"], **times)
    return handler.fetch(col_set="feature")


@pytest.mark.filterwarnings("ignore")
def test_files_of_different_length_equal_pandas(tmp_path):
    """Fields whose files begin and end on different days, compared with pandas over the union of the days."""
    root = write_store(tmp_path / "store")
    texts = [*ELEMENTWISE, *ROLLING]
    ours = through_the_handler(root, texts)
    prices = read_prices(provider_uri=root)
    compared = 0
    for code in prices.panel.instruments:
        series = {field: read_series(root, str(code), field) for field in FIELDS}
        mine = ours.xs(code, level="instrument")
        for text in texts:
            try:
                expected = by_pandas(text, series)
            except (ValueError, TypeError, IndexError):
                continue  # Qlib raises pandas' errors: comparisons of unequal lengths, empty series
            compared += 1
            expected = expected.set_axis(prices.panel.datetimes[expected.index]).reindex(mine.index).to_numpy()
            np.testing.assert_allclose(mine[text], expected, rtol=2e-5, atol=1e-6, err_msg=f"{code} {text}")
    assert compared > 3 * len(texts)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("market", ["all", "mixed"])
def test_every_operator_equals_qlib(tmp_path, market):
    qlib = pytest.importorskip("qlib", reason="pyqlib is not installed")
    root = write_store(tmp_path / "store")
    qlib.init(provider_uri=str(root), region="us", kernels=1, logging_level=logging.ERROR)
    from qlib.data import D

    # Qlib raises an error for series of unequal length, which the test above has, for a negated
    # field, and for Delta(x, 0) of an instrument without rows.
    alone = [t for t in [*ELEMENTWISE, *ROLLING, *MEMORY] if len(set(fields(t))) == 1 and "-$" not in t]
    alone.remove("Delta($close, 0)")
    start, end = "2020-03-02", "2020-05-20"
    theirs = D.features(D.instruments(market), alone, start, end).swaplevel().sort_index()
    ours = through_the_handler(root, alone, market, start_time=start, end_time=end)
    assert ours.index.tolist() == theirs.index.tolist()
    for text in alone:
        mine, expected = ours[text].to_numpy(), theirs[text].to_numpy(np.float32)
        if text.startswith("Delta"):  # Qlib reads one row too few: NaN on the first requested day
            mine = np.where(ours.index.get_level_values("datetime") == pd.Timestamp(start), expected, mine)
        np.testing.assert_allclose(mine, expected, rtol=2e-5, atol=1e-6, equal_nan=True, err_msg=text)
