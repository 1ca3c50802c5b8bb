"""Factor expressions: the small subset that the Alpha360 handlers and labels need.

`$field`, numbers, `+ - * / **`, unary minus, `Ref(x, n)`, `Abs(x)`, `Log(x)`. Text is parsed with
Python's own grammar, as the reference does, so precedence and number forms are Python's.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from qfast.data.panel import Panel
from qfast.errors import ConfigError, DataError, suggest

__all__ = ["ExpressionError", "Extent", "evaluate", "fields", "reach"]

FIELD_MARK = "_"  # stands in for "$" while Python parses, so that positions stay the same

BINARY: Mapping[type[ast.operator], tuple[Callable[[Any, Any], Any], np.ufunc]] = {
    ast.Add: (operator.add, np.add),
    ast.Sub: (operator.sub, np.subtract),
    ast.Mult: (operator.mul, np.multiply),
    ast.Div: (operator.truediv, np.divide),
    ast.Pow: (operator.pow, np.power),
}
ELEMENTWISE: Mapping[str, np.ufunc] = {"Abs": np.abs, "Log": np.log}
FUNCTIONS = ("Abs", "Log", "Ref")


class ExpressionError(ConfigError):
    """An expression does not parse or uses an operator that is not available."""


class Extent(NamedTuple):
    """Panel rows [start[i], stop[i]) of each instrument in which a series exists; int64 [N] each."""

    start: np.ndarray
    stop: np.ndarray


class _Series(NamedTuple):
    values: np.ndarray
    extent: Extent


def evaluate(
    text: str,
    panel: Panel,
    *,
    extents: Mapping[str, Extent] | None = None,
    optional: frozenset[str] | set[str] = frozenset(),
) -> np.ndarray:
    """Value of an expression at every row of a panel.

    Parameters
    ----------
    text : str
        For instance "Ref($close, -2) / Ref($close, -1) - 1". `Ref(x, n)` is the value n rows of the
        same instrument earlier (later for negative n), NaN where there is none.
    panel : Panel
        `$name` is its column `name`.
    extents : mapping, optional
        Field -> rows in which that field is stored. Default: all rows of each instrument. A series
        has no value outside the rows in which one of its fields is stored.
    optional : set of str
        Fields that are NaN where the panel has no such column; any other missing field is an error.

    Returns
    -------
    float32 [R]
        Computed like the reference: float32 leaves, numbers do not widen them.

    Raises
    ------
    ExpressionError
        Not an expression, or an operator that is not available; the message points at the place.
    DataError
        A field that the panel has not.

    Examples
    --------
    >>> import pandas as pd
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=3), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"close": [1.0, 2.0, 3.0]}, index=index), group="price")
    >>> evaluate("Ref($close, -1) / $close - 1", panel).tolist()
    [1.0, 0.5, nan]
    """
    tree = _parse(text)
    walker = _Evaluator(text, panel, extents or {}, optional)
    with np.errstate(all="ignore"):
        result = walker.value(tree)
    if not isinstance(result, _Series):
        raise ExpressionError(f"expression {text!r} holds no field; a field is written $close.")
    out = np.asarray(result.values, dtype=np.float32)
    if result.extent is not walker.whole:
        out = np.where(walker.inside(result.extent), out, np.float32(np.nan))
    return out


def fields(text: str) -> list[str]:
    """Field names of an expression, without "$", in order of first appearance.

    >>> fields("($high - $low) / Ref($close, 1)")
    ['high', 'low', 'close']
    """
    nodes = ast.walk(_parse(text))
    found = sorted((n.col_offset, _field_name(n)) for n in nodes if isinstance(n, ast.Name) and _is_field(text, n))
    return list(dict.fromkeys(name for _, name in found))


def reach(text: str) -> tuple[int, int]:
    """Rows before and after the current one that an expression looks at.

    >>> reach("Ref($close, -2) / Ref($close, 5) - 1")
    (5, 2)
    """

    def of(node: ast.AST) -> tuple[int, int]:
        left = right = 0
        for child in ast.iter_child_nodes(node):
            low, high = of(child)
            left, right = max(left, low), max(right, high)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Ref":
            shift = _shift(text, node)
            left, right = max(left + shift, left), max(right - shift, right)
        return left, right

    return of(_parse(text))


class _Evaluator:
    def __init__(
        self, text: str, panel: Panel, extents: Mapping[str, Extent], optional: frozenset[str] | set[str]
    ) -> None:
        self.text, self.panel, self.extents, self.optional = text, panel, extents, optional
        bounds = np.searchsorted(panel.instrument_codes, np.arange(len(panel.instruments) + 1))
        self.whole = Extent(bounds[:-1], bounds[1:])

    def value(self, node: ast.expr) -> Any:
        """A `_Series` or a Python number."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self._field(node)
        if isinstance(node, ast.UnaryOp):
            operand = self.value(node.operand)
            sign = -1 if isinstance(node.op, ast.USub) else 1
            return operand._replace(values=operand.values * sign) if isinstance(operand, _Series) else operand * sign
        if isinstance(node, ast.BinOp):
            return self._binary(node)
        assert isinstance(node, ast.Call)  # _parse lets nothing else through
        assert isinstance(node.func, ast.Name)
        operand = self.value(node.args[0])
        if not isinstance(operand, _Series):
            raise ExpressionError(_pointed(self.text, node.args[0], f"{node.func.id} needs a field to work on"))
        if node.func.id == "Ref":
            return self._shifted(operand, _shift(self.text, node))
        return operand._replace(values=ELEMENTWISE[node.func.id](operand.values))

    def inside(self, extent: Extent) -> np.ndarray:
        """bool [R]: rows that lie in `extent`."""
        codes = self.panel.instrument_codes
        rows = np.arange(self.panel.n_rows)
        return (rows >= extent.start[codes]) & (rows < extent.stop[codes])

    def _field(self, node: ast.Name) -> _Series:
        name = _field_name(node)
        known = {c.lower(): c for block in self.panel.blocks.values() for c in block.columns}
        if name in known:
            return _Series(self.panel.column(known[name]), self.extents.get(name, self.whole))
        if name in self.optional:
            nothing = Extent(self.whole.start, self.whole.start)
            return _Series(np.full(self.panel.n_rows, np.nan, dtype=np.float32), nothing)
        raise DataError(
            _pointed(
                self.text, node, f"the data has no column {name!r}; it has {sorted(known)}." + suggest(name, known)
            )
        )

    def _binary(self, node: ast.BinOp) -> Any:
        plain, ufunc = BINARY[type(node.op)]
        left, right = self.value(node.left), self.value(node.right)
        if isinstance(left, _Series) and isinstance(right, _Series):
            return _Series(ufunc(left.values, right.values), self._union(left.extent, right.extent))
        if isinstance(left, _Series):
            return left._replace(values=ufunc(left.values, right))
        if isinstance(right, _Series):
            return right._replace(values=ufunc(left, right.values))
        try:
            return plain(left, right)
        except (ArithmeticError, ValueError) as error:
            raise ExpressionError(_pointed(self.text, node, str(error))) from None

    def _union(self, a: Extent, b: Extent) -> Extent:
        if a is b:
            return a
        empty_a, empty_b = a.start >= a.stop, b.start >= b.stop
        start = np.where(empty_a, b.start, np.where(empty_b, a.start, np.minimum(a.start, b.start)))
        stop = np.where(empty_a, b.stop, np.where(empty_b, a.stop, np.maximum(a.stop, b.stop)))
        return Extent(start, stop)

    def _shifted(self, series: _Series, n: int) -> _Series:
        codes = self.panel.instrument_codes
        rows = np.arange(self.panel.n_rows)
        start, stop = series.extent.start[codes], series.extent.stop[codes]
        source = rows - n
        valid = (source >= start) & (source < stop) & (rows >= start) & (rows < stop)
        out = np.full(self.panel.n_rows, np.nan, dtype=series.values.dtype)
        out[valid] = series.values[source[valid]]
        return series._replace(values=out)


# ---------------------------------------------------------------- parsing
def _parse(text: str) -> ast.expr:
    if not isinstance(text, str) or not text.strip():
        raise ExpressionError(f"an expression must be a text such as '$close', got {text!r}.")
    line = " ".join(text.split("\n"))
    lead = len(line) - len(line.lstrip())
    try:
        tree = ast.parse(line.strip().replace("$", FIELD_MARK), mode="eval").body
    except SyntaxError as error:
        at = max(0, min((error.offset or 1) - 1 + lead, len(line)))
        raise ExpressionError(_caret(text, at, f"does not parse: {error.msg}")) from None
    code = line.strip().encode()
    for node in ast.walk(tree):  # Python counts bytes, the caret counts characters
        if hasattr(node, "col_offset"):
            node.col_offset = lead + len(code[: node.col_offset].decode(errors="ignore"))
    _check(text, tree)
    return tree


def _check(text: str, node: ast.expr) -> None:
    """Refuse everything but numbers, fields, arithmetic and the known functions."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return
    if isinstance(node, ast.Name):
        if not _is_field(text, node):
            raise ExpressionError(_pointed(text, node, f"unknown name {node.id!r}; a field is written ${node.id}"))
        return
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        _check(text, node.left)
        _check(text, node.right)
        return
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        _check(text, node.operand)
        return
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        _check_call(text, node, node.func.id)
        return
    raise ExpressionError(_pointed(text, node, "only fields, numbers, + - * / ** and functions can be used"))


def _check_call(text: str, node: ast.Call, name: str) -> None:
    if name not in FUNCTIONS:
        raise ExpressionError(
            _pointed(text, node, f"operator {name!r} is not available; there are {list(FUNCTIONS)}")
            + suggest(name, FUNCTIONS)
        )
    wanted = 2 if name == "Ref" else 1
    if node.keywords or len(node.args) != wanted:
        raise ExpressionError(_pointed(text, node, f"{name} takes {wanted} argument(s), got {len(node.args)}"))
    _check(text, node.args[0])
    if name == "Ref":
        _shift(text, node)


def _shift(text: str, node: ast.Call) -> int:
    try:
        n = ast.literal_eval(node.args[1])
    except ValueError:
        n = None
    if not isinstance(n, int) or isinstance(n, bool) or n == 0:
        raise ExpressionError(_pointed(text, node.args[1], "Ref(x, n) needs a whole number n other than 0"))
    return n


def _is_field(text: str, node: ast.Name) -> bool:
    return text[node.col_offset : node.col_offset + 1] == "$"


def _field_name(node: ast.Name) -> str:
    return node.id[len(FIELD_MARK) :].lower()


def _pointed(text: str, node: ast.AST, problem: str) -> str:
    return _caret(text, getattr(node, "col_offset", 0), problem)


def _caret(text: str, at: int, problem: str) -> str:
    line = " ".join(text.split("\n"))
    return f"expression: {problem}\n    {line}\n    {' ' * at}^"
