"""The language of factor expressions: parses text into a tree. Error messages point at the mistake.

An expression contains `$field`, numbers, `+ - * / ** & |`, comparisons, and the functions of
`qfast.data.expression_functions`. Like in Qlib, it is parsed with Python's grammar, so precedence and the format of
numbers are Python's. Nothing is executed.
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qfast.data.expression_functions import FUNCTIONS, SYMBOLS, Reach, check_setting
from qfast.errors import ConfigError, shown, suggest

__all__ = [
    "Call",
    "ExpressionError",
    "Field",
    "Node",
    "Number",
    "fields",
    "instruments",
    "masked_last",
    "node_reach",
    "parse",
    "pointed",
    "reach",
]

MAX_DEPTH = 250  # nested calls; Python's recursion limit would be reached soon after
TOO_DEEP = f"nested more than {MAX_DEPTH} deep, as is a sum of many terms. Remedy: put groups of terms in parentheses"
CONTEXT = 300  # characters of a long text that a message shows before and after the place
FIELD_MARK = "_"  # replaces "$" while Python parses; one character for another keeps all positions

BINARY: Mapping[type[ast.AST], str] = {
    ast.Add: "Add",
    ast.Sub: "Sub",
    ast.Mult: "Mul",
    ast.Div: "Div",
    ast.Pow: "Power",
    ast.BitAnd: "And",
    ast.BitOr: "Or",
    ast.Gt: "Gt",
    ast.GtE: "Ge",
    ast.Lt: "Lt",
    ast.LtE: "Le",
    ast.Eq: "Eq",
    ast.NotEq: "Ne",
}
ARITHMETIC: Mapping[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": operator.truediv,
    "Power": operator.pow,
}
UNAVAILABLE = {  # function of Qlib -> the data it needs, which a panel does not contain
    "P": "point-in-time data",
    "PRef": "point-in-time data",
    "PFeature": "point-in-time data",
    "TResample": "series indexed by time",
}


class ExpressionError(ConfigError):
    """An expression does not parse or uses a function that is not available."""


@dataclass(frozen=True)
class Number:
    """A constant; `at` is its character position in the text, as in `Field` and `Call`."""

    value: Any
    at: int = field(compare=False)


@dataclass(frozen=True)
class Field:
    """A field `$name`; the name is in lower case."""

    name: str
    at: int = field(compare=False)


@dataclass(frozen=True)
class Call:
    """A call of a function on the expressions `series`, with the constants `settings`."""

    function: str
    series: tuple[Node, ...]
    settings: tuple[Any, ...]
    at: int = field(compare=False)

    @property
    def operator(self) -> str:
        """Earlier name of `function`."""
        warnings.warn("Call.operator has been renamed to Call.function.", DeprecationWarning, stacklevel=2)
        return self.function


Node = Number | Field | Call


def parse(text: str) -> Node:
    """The tree of an expression.

    Parameters
    ----------
    text : str

    Returns
    -------
    Field or Call

    Raises
    ------
    ExpressionError
        The text is not an expression, calls a function that is not available or with wrong arguments, or contains no
        field. The message points at the place.

    Examples
    --------
    >>> parse("Ref($close, 2)")
    Call(function='Ref', series=(Field(name='close', at=4),), settings=(2,), at=0)
    """
    if not isinstance(text, str) or not text.strip():
        raise ExpressionError(f"an expression must be a string such as '$close', got {text!r}.")
    line = _one_line(text)
    lead = len(line) - len(line.lstrip())
    try:
        tree = ast.parse(line.strip().replace("$", FIELD_MARK), mode="eval").body
    except SyntaxError as error:
        at = max(0, min((error.offset or 1) - 1 + lead, len(line)))
        raise ExpressionError(_caret(text, at, f"does not parse: {error.msg}")) from None
    except (RecursionError, MemoryError):  # Python's own limit; the error has no position
        raise ExpressionError(f"expression: {TOO_DEEP}\n    {shown(text)}") from None
    except ValueError as error:
        raise ExpressionError(f"expression: does not parse: {error}\n    {shown(text)}") from None
    code = line.strip().encode()
    for node in ast.walk(tree):  # Python's offsets count bytes, the caret counts characters
        if hasattr(node, "col_offset"):
            node.col_offset = lead + len(code[: node.col_offset].decode(errors="ignore"))
    expression = _Reader(text).node(tree)
    if isinstance(expression, Number):
        raise ExpressionError(f"expression {text!r} contains no field. Remedy: write a field as $close.")
    return expression


def fields(text: str) -> list[str]:
    """Field names of an expression, without "$", in order of first appearance.

    >>> fields("($high - $low) / Ref($close, 1)")
    ['high', 'low', 'close']
    """
    places = sorted((node.at, node.name) for node in walk(parse(text)) if isinstance(node, Field))
    return list(dict.fromkeys(name for _, name in places))


def instruments(text: str) -> list[str]:
    """Names of the instruments in the `Mask` calls of an expression, as they are written.

    >>> instruments("$close / Mask($close, 'SPY')")
    ['SPY']
    """
    masks = [node for node in walk(parse(text)) if isinstance(node, Call) and node.function == "Mask"]
    return list(dict.fromkeys(node.settings[0] for node in masks))


def reach(text: str) -> Reach:
    """Rows before and after the current one that an expression reads.

    Exponential means are counted with the rows that Qlib loads for them, although older rows have weight too.

    >>> reach("Ref($close, -2) / Ref($close, 5) - 1")
    (5, 2)
    >>> reach("Mean(Ref($close, 3), 10)")
    (12, 0)
    """
    return node_reach(parse(text))


def node_reach(node: Node) -> Reach:
    """`reach` of a tree."""
    if not isinstance(node, Call):
        return 0, 0
    before, after = (max(side) for side in zip((0, 0), *map(node_reach, node.series), strict=True))
    return FUNCTIONS[node.function].widened(node.settings, (before, after))


def walk(node: Node) -> Iterator[Node]:
    """A node and all nodes below it."""
    yield node
    if isinstance(node, Call):
        for child in node.series:
            yield from walk(child)


def masked_last(node: Call) -> Call:
    """A call that reads only one other instrument, rewritten with a single `Mask` around the whole call.

    Like in Qlib, windows and shifts then use the days of that instrument instead of the days of the instrument whose
    value is computed. Of nested masks the innermost counts. Any other call is returned unchanged.

    >>> masked_last(parse("Mean(Mask($close, 'A') / 2, 5)")) == parse("Mask(Mean($close / 2, 5), 'A')")
    True
    """
    sources = [source for part in node.series for source in _sources(part)]
    names = {source.settings[0].lower() if isinstance(source, Call) else None for source in sources}
    if len(names) != 1 or not isinstance(sources[0], Call):
        return node
    whole = node.series[0] if node.function == "Mask" else node
    return masked_last(replace(sources[0], series=(_without_mask(whole),)))


def _sources(node: Node) -> Iterator[Node]:
    """The fields that a node reads; a `Mask` represents all fields below it."""
    if isinstance(node, Field) or (isinstance(node, Call) and node.function == "Mask"):
        yield node
    elif isinstance(node, Call):
        for part in node.series:
            yield from _sources(part)


def _without_mask(node: Node) -> Node:
    if not isinstance(node, Call):
        return node
    return node.series[0] if node.function == "Mask" else replace(node, series=tuple(map(_without_mask, node.series)))


def pointed(text: str, node: Node, problem: str) -> str:
    """A message followed by the text, with a caret below the position of `node`."""
    return _caret(text, node.at, problem)


def _one_line(text: str) -> str:
    """Replace line breaks and tabs by blanks, one for one, which keeps all positions."""
    return re.sub(r"\s", " ", text)


def _caret(text: str, at: int, problem: str) -> str:
    line = _one_line(text)
    first, stop = max(0, at - CONTEXT), at + CONTEXT
    before, after = "..." if first else "", "..." if stop < len(line) else ""
    return f"expression: {problem}\n    {before}{line[first:stop]}{after}\n    {' ' * (len(before) + at - first)}^"


class _Reader:
    """Turns Python's syntax tree into nodes, and raises an error for everything that is not part of the language."""

    def __init__(self, text: str) -> None:
        self.text, self.line = text, _one_line(text)
        self.depth = 0

    def node(self, node: ast.expr) -> Node:
        """The node of a Python expression, with a limit on the depth."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self._error(node, TOO_DEEP)
        result = self._node(node)
        self.depth -= 1
        return result

    def _node(self, node: ast.expr) -> Node:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return Number(self._finite(node, lambda: node.value), node.col_offset)
        if isinstance(node, ast.Name):
            return self._name(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            return self._signed(node)
        if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
            return self._binary(BINARY[type(node.op)], node.left, node.right, node)
        if isinstance(node, ast.Compare):
            if len(node.ops) > 1:
                raise self._error(node, "chained comparison; write (a < b) & (b < c)")
            if type(node.ops[0]) in BINARY:
                return self._binary(BINARY[type(node.ops[0])], node.left, node.comparators[0], node)
        if isinstance(node, ast.BoolOp):
            word, sign = ("and", "&") if isinstance(node.op, ast.And) else ("or", "|")
            raise self._error(node, f"'{word}' cannot be used on series; write (a) {sign} (b)")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self._call(node, node.func.id)
        raise self._error(node, "only fields, numbers, + - * / ** & |, comparisons and functions are allowed")

    def _name(self, node: ast.Name) -> Field:
        at = node.col_offset
        if self.line[at : at + 2] == "$$":
            raise self._error(node, "fields of point-in-time data ($$name) are not available, only with --engine qlib")
        if self.line[at : at + 1] != "$":
            raise self._error(node, f"unknown name {node.id!r}; a field is written ${node.id}")
        return Field(node.id[len(FIELD_MARK) :].lower(), at)

    def _signed(self, node: ast.UnaryOp) -> Node:
        operand = self.node(node.operand)
        if isinstance(operand, Number):
            return Number(-operand.value if isinstance(node.op, ast.USub) else operand.value, node.col_offset)
        if isinstance(node.op, ast.UAdd):
            return operand
        return Call("Mul", (operand, Number(-1, node.col_offset)), (), node.col_offset)

    def _binary(self, name: str, left: ast.expr, right: ast.expr, node: ast.expr) -> Node:
        sides = self.node(left), self.node(right)
        if not all(isinstance(side, Number) for side in sides):
            return Call(name, sides, (), node.col_offset)
        if name not in ARITHMETIC:
            raise self._error(node, f"{SYMBOLS[name]!r} between two numbers; one side must contain a field")
        values = [side.value for side in sides if isinstance(side, Number)]
        if name == "Power" and abs(values[1]) > 1024:  # a power of two integers could have billions of digits
            values = [float(value) for value in values]
        return Number(self._finite(node, lambda: ARITHMETIC[name](*values)), node.col_offset)

    def _finite(self, node: ast.expr, compute: Callable[[], Any]) -> Any:
        try:
            value = compute()
            if not isinstance(value, complex):
                float(value)
        except OverflowError:
            raise self._error(node, "the number is too large for a float") from None
        except ArithmeticError as error:
            raise self._error(node, str(error)) from None
        if isinstance(value, complex):
            raise self._error(node, f"the result {value} is not a real number")
        return value

    def _call(self, node: ast.Call, name: str) -> Node:
        arguments = node.args
        if name == "ChangeInstrument":  # Qlib's other spelling of Mask, with the arguments reversed
            name, arguments = "Mask", arguments[::-1]
        if name in UNAVAILABLE and name not in FUNCTIONS:
            raise self._error(
                node, f"function {name!r} needs {UNAVAILABLE[name]} and is not available, only with --engine qlib"
            )
        if name not in FUNCTIONS:
            suggestion = suggest(name, FUNCTIONS)
            hint = "." + suggestion if suggestion else f"; available are {sorted(FUNCTIONS)}"
            raise self._error(node, f"function {name!r} is not available{hint}")
        function = FUNCTIONS[name]
        count = function.series + len(function.settings)
        if node.keywords or len(arguments) != count:
            raise self._error(node, f"{name} needs {count} argument(s), got {len(arguments) + len(node.keywords)}")
        series = tuple(self.node(argument) for argument in arguments[: function.series])
        if function.form == "condition":
            self._needs_field(name, series[0])
        elif function.form != "elementwise" or all(isinstance(part, Number) for part in series):
            for part in series:
                self._needs_field(name, part)
        pairs = zip(function.settings, arguments[function.series :], strict=True)
        return Call(name, series, tuple(self._setting(name, kind, a) for kind, a in pairs), node.col_offset)

    def _needs_field(self, name: str, part: Node) -> None:
        if isinstance(part, Number):
            raise ExpressionError(
                _caret(self.text, part.at, f"{name} needs an expression with a field here, got the number {part.value}")
            )

    def _setting(self, name: str, kind: str, argument: ast.expr) -> Any:
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            value: Any = argument.value
        elif kind == "instrument":
            value = None
        else:
            constant = self.node(argument)
            value = constant.value if isinstance(constant, Number) else "an expression"
        problem = check_setting(FUNCTIONS[name], kind, value)
        if problem is not None:
            raise self._error(argument, problem)
        return value

    def _error(self, node: ast.expr, problem: str) -> ExpressionError:
        return ExpressionError(_caret(self.text, node.col_offset, problem))
