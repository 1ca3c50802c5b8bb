"""Expressions compared with pandas, and error messages that point at the mistake."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfast.data.expression import fields, reach
from qfast.data.factors import evaluate
from qfast.data.panel import Panel
from qfast.data.prices import Extent
from qfast.errors import ConfigError, DataError


def price_panel(seed: int = 0, n_days: int = 12) -> Panel:
    rng = np.random.default_rng(seed)
    index = pd.MultiIndex.from_product(
        [pd.date_range("2024-01-01", periods=n_days), ["A", "B", "C"]], names=["datetime", "instrument"]
    )
    values = np.exp(rng.standard_normal((len(index), 3))).astype(np.float32)
    values[rng.random(values.shape) < 0.1] = np.nan
    frame = pd.DataFrame(values, index=index, columns=["close", "Open", "volume"])
    return Panel.from_frame(frame[rng.random(len(frame)) < 0.9], group="price")


class Column:
    """The same expressions by pandas. Python evaluates the text; Ref shifts within an instrument."""

    def __init__(self, series: pd.Series) -> None:
        self.s = series

    def _with(self, other: object, how: str) -> Column:
        return Column(getattr(self.s, how)(other.s if isinstance(other, Column) else other))

    def __getattr__(self, name: str):
        raise AttributeError(name)


for _op in ("add", "sub", "mul", "truediv", "pow", "radd", "rsub", "rmul", "rtruediv", "rpow"):
    setattr(Column, f"__{_op}__", lambda self, other, how=f"__{_op}__": self._with(other, how))
Column.__neg__ = lambda self: Column(-self.s)


def by_pandas(text: str, panel: Panel) -> np.ndarray:
    rows = np.arange(panel.n_rows)
    who = panel.instrument_codes
    names = {c.lower(): Column(pd.Series(panel.column(c), index=rows)) for c in panel.columns("price")}
    scope = {
        **{f"_{k}": v for k, v in names.items()},
        "Ref": lambda x, n: Column(x.s.groupby(who).shift(n)),
        "Abs": lambda x: Column(x.s.abs()),
        "Log": lambda x: Column(np.log(x.s)),
    }
    with np.errstate(all="ignore"):
        return eval(text.replace("$", "_"), scope).s.to_numpy(np.float32)


leaves = st.sampled_from(["$close", "$open", "$volume"])
numbers = st.sampled_from(["2", "0.5", "1e-12", "3"])


def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    binary = st.builds(lambda a, op, b: f"({a} {op} {b})", inner, st.sampled_from("+-*/"), inner | numbers)
    return st.one_of(
        binary,
        st.builds(lambda a, op, b: f"({a} {op} {b})", numbers, st.sampled_from("+-*/"), inner),
        st.builds(lambda a, n: f"Ref({a}, {n})", inner, st.integers(-4, 4).filter(bool)),
        st.builds(lambda a: f"Abs({a})", inner),
        st.builds(lambda a: f"Log({a})", inner),
        st.builds(lambda a, n: f"-{a} ** {n}", inner, st.sampled_from(["2", "0.5", "3"])),
    )


@settings(max_examples=120, deadline=None)
@given(text=st.recursive(leaves, grow, max_leaves=6), seed=st.integers(0, 50))
@pytest.mark.filterwarnings("ignore")
def test_equals_pandas_bit_for_bit(text, seed):
    panel = price_panel(seed)
    ours = evaluate(text, panel)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, by_pandas(text, panel))


def test_shift_stays_inside_the_instrument_and_its_stored_rows():
    panel = price_panel()
    bounds = np.searchsorted(panel.instrument_codes, np.arange(4))
    stored = {"close": Extent(bounds[:-1] + 2, bounds[1:] - 1)}
    shifted = evaluate("Ref($close, -1)", panel, extents=stored)
    mixed = evaluate("Ref($close, -1) / $open", panel, extents=stored)
    for first, stop in itertools.pairwise(bounds):
        assert np.isnan(shifted[first : first + 2]).all()
        assert np.isnan(shifted[stop - 2 : stop]).all()
        assert np.isnan(mixed[first : first + 2]).all()
        np.testing.assert_array_equal(shifted[first + 2 : stop - 2], panel.column("close")[first + 3 : stop - 1])


def test_fields_and_reach():
    assert fields("Ref($Close, -2) / $open + $close") == ["close", "open"]
    assert reach("Ref($close, -2)/Ref($close, -1) - 1") == (0, 2)
    assert reach("Ref(Ref($close, 3) - $open, 2) + Ref($close, -4)") == (5, 4)
    assert reach("Ref(Ref($close, 2), -1)") == (2, 1)
    assert reach("EMA($close, 1e-300)") == (10**9 - 1, 0)  # no weight ever becomes 0


def test_optional_fields_are_nan():
    assert np.isnan(evaluate("Ref($vwap, 1) / $close", price_panel(), optional={"vwap"})).all()


@pytest.mark.parametrize(
    ("text", "message", "caret"),
    [
        ("$close + Meen($close, 5)", r"function 'Meen' is not available. Did you mean 'Mean'\?", 9),
        ("$close + Xyzzy($close)", r"function 'Xyzzy' is not available; available are \['Abs', 'Add', .*'WMA'\]", 9),
        ("TResample($close, '1d', 'sum')", "needs series indexed by time and is not available", 0),
        ("Mean($close, 0.5) + Rank($close, 0.5)", r"Rank needs a whole number of rows of at least 1 \(0: all rows", 33),
        ("Mean($close, -5)", "whole number of rows of at least 1 .* or a weight between 0 and 1", 13),
        ("Skew($close, 2)", "Skew needs a whole number of rows of at least 3", 13),
        ("Mean($close, $open)", "Mean needs a number here, got an expression", 13),
        ("Quantile($close, 5, 1.5)", "Quantile needs a share from 0 to 1, got 1.5", 20),
        ("Mask($close, SPY)", "Mask needs the name of an instrument in quotes", 13),
        ("1 < $close < 3", r"chained comparison; write \(a < b\) & \(b < c\)", 0),
        ("$close > 1 and $open > 1", r"'and' cannot be used on series; write \(a\) & \(b\)", 0),
        ("$close & $open", "ufunc 'bitwise_and' not supported", 0),
        ("If(1, $close, $open)", "If needs an expression with a field here, got the number 1", 3),
        ("Greater(1, 2) + $close", "Greater needs an expression with a field here, got the number 1", 8),
        ("(1 < 2) * $close", "'<' between two numbers", 1),
        ("Mean(feature=$close, N=5)", r"Mean needs 2 argument\(s\), got 2", 0),
        ("$$roe_q", "point-in-time data", 0),
        ("1 + close", r"unknown name 'close'; a field is written \$close", 4),
        ("Ref($close, 1.5)", "needs a whole number n, got 1.5", 12),
        ("  Ref($close)", r"Ref needs 2 argument\(s\), got 1", 2),
        ("$close $open", "does not parse", None),
        ("$close * (1 / 0)", "division by zero", 10),
        ("$close if $open else 1", "only fields, numbers", 0),
        ("$收 + close", "unknown name 'close'", 5),
        ("Ref(1, 2)", "Ref needs an expression with a field here, got the number 1", 4),
        ("Ref($close, 99999999999999999999999)", r"Ref\(x, n\): n is limited to 1,000,000,000", 12),
        ("Mean($close, 99999999999999999999999)", r"n is limited to 1,000,000,000", 13),
        ("$close * 10 ** 400", "the number is too large for a float", 9),
        ("$close * 9 ** 9 ** 9", "the number is too large for a float", 9),
        ("$close * " + "9" * 400, "the number is too large for a float", 9),
        ("$close * (-1) ** 0.5", r"^expression: the result .* is not a real number\n", 9),
        ("1 + ($close > 1) * 10 ** 30", r"too large .* Remedy: write the number with a point", 4),
        ("(($close > 1) * 2) ** -1", r"negative integer powers .* Remedy: write the number with a point", 0),
        ("If($close > 1, 2 ** 70, 0)", r"too large .* Remedy: write the number with a point", 0),
        ("($close > 1) - ($open > 1)", r"cannot be subtracted; write If\(a > b, 1, 0\)", 0),
    ],
)
def test_mistakes_are_pointed_at(text, message, caret):
    with pytest.raises(ConfigError, match=message) as caught:
        evaluate(text, price_panel(), optional={"收"})
    written, pointer = str(caught.value).splitlines()[-2:]
    assert written.strip() == (text if len(text) < 300 else text[: 9 + 300] + "...").strip()
    assert pointer.strip() == "^"
    if caret is not None:  # where Python itself stops parsing differs between its versions
        assert pointer.index("^") - 4 == caret


def test_long_sums():
    panel = price_panel()
    expected = 200 * panel.column("close")
    np.testing.assert_allclose(evaluate(" + ".join(["$close"] * 200), panel), expected, rtol=1e-5)
    groups = " + ".join("(" + " + ".join(["$close"] * 100) + ")" for _ in range(2))
    np.testing.assert_allclose(evaluate(groups, panel), expected, rtol=1e-5)
    for terms in (2_000, 100_000):
        with pytest.raises(ConfigError, match=r"nested more than 250 deep.* Remedy: put groups of terms") as caught:
            evaluate(" + ".join(["$close"] * terms), panel)
        assert len(str(caught.value)) < 1_000


def test_of_a_long_text_the_place_is_shown():
    text = " + ".join(f"Mean($close, {n})" for n in range(1, 100)) + " + Meen($close, 5)"
    with pytest.raises(ConfigError, match="function 'Meen'") as caught:
        evaluate(text, price_panel())
    written, pointer = str(caught.value).splitlines()[-2:]
    assert len(written) < 400
    assert written[pointer.index("^") :] == "Meen($close, 5)"


def test_line_breaks_of_any_kind():
    panel = price_panel()
    result = evaluate("Mean($close,\r\n\t5) /\n$close", panel)
    np.testing.assert_array_equal(result, evaluate("Mean($close, 5) / $close", panel))


def test_other_refusals():
    with pytest.raises(DataError, match=r"no column 'clos'; it has .* Did you mean 'close'\?"):
        evaluate("$clos", price_panel())
    with pytest.raises(ConfigError, match="contains no field"):
        evaluate("1 + 2", price_panel())
    with pytest.raises(ConfigError, match="must be a string such as"):
        evaluate("  ", price_panel())
    for attack in ("__import__('os')", "$close.__class__", "[x for x in $close]", "(lambda: 1)()", "'a'"):
        with pytest.raises(ConfigError, match=r"not available|only fields|unknown name"):
            evaluate(attack, price_panel())
