"""The merged graph of factor expressions: which steps compute them, and in which order.

Several expressions become one graph, so that what they share is one step. `qfast.data.factor_chunk` runs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qfast.data.expression import Call, Field, Node, Number, masked_last, parse, pointed, reach
from qfast.data.expression_functions import FUNCTIONS
from qfast.data.panel import Panel
from qfast.data.prices import Extent, Prices
from qfast.errors import DataError, suggest

ROLLING = {  # the kernels' names
    "Mean": "mean", "Sum": "sum", "Std": "std", "Var": "var", "Skew": "skew", "Kurt": "kurt", "Max": "max",
    "Min": "min", "Med": "quantile", "Mad": "mad", "Quantile": "quantile", "Rank": "rank", "IdxMax": "idxmax",
    "IdxMin": "idxmin", "Slope": "slope", "Rsquare": "rsquare", "Resi": "resi", "WMA": "wma", "EMA": "ema",
    "Corr": "corr", "Cov": "cov",
}  # fmt: skip

# Kinds of steps besides the functions. No function has such a name.
FIELD, NUMBER, OTHER = "a field", "a number", "another instrument"
SWEEP, WINDOW = "all windows of a function", "one window of a sweep"
KNOWN, EMA, EMA_OVER_ALL, FROM_THE_START = "not NaN", "ema", "ema of growing span", "a window of all rows so far"


@dataclass(frozen=True)
class Step:
    """One node of the merged graph: what it computes from which earlier steps."""

    kind: str  # a function, or one of the kinds below
    inputs: tuple[int, ...]
    settings: tuple[Any, ...]


class Graph:
    """Expressions merged; `steps` in an order in which inputs come first."""

    def __init__(
        self,
        texts: Sequence[str],
        panel: Panel,
        extents: Mapping[str, Extent],
        optional: Collection[str],
        start_time: Any,
        others: Mapping[str, Prices],
    ) -> None:
        self.panel, self.extents, self.optional, self.others = panel, extents, optional, others
        self.columns = {c.lower(): c for block in panel.blocks.values() for c in block.columns}
        self.steps: list[Step] = []
        self.source: list[tuple[str, Node]] = []  # a place to point at, by step
        self.windows: dict[int, set[int]] = {}  # by sweep
        self._known: dict[tuple[Any, ...], int] = {}
        self.masks: dict[tuple[Call, int], str] = {}  # (call of Mask, first date code that is read) -> the expression
        self._first_day = 0 if start_time is None else panel.date_code_range(start_time)[0]
        self.results = [self._expression(text) for text in texts]
        self.count_uses()

    def add_expression(self, text: str, node: Node, begin: int) -> None:
        """One more result: a node whose fields are read from date code `begin` on."""
        self.results.append(self._node(text, node, begin))
        self.count_uses()

    def count_uses(self) -> None:
        self.uses = Counter(i for step in self.steps for i in step.inputs) + Counter(self.results)

    def _expression(self, text: str) -> int:
        tree = parse(text)
        begin = max(0, self._first_day - reach(text)[0]) if looks_back_without_end(tree) else 0
        return self._node(text, tree, begin)

    def _node(self, text: str, node: Node, begin: int) -> int:
        """Number of the step of a node whose fields are read from date code `begin` on."""
        if isinstance(node, Number):
            return self._add(text, node, NUMBER, (), (node.value,))
        if isinstance(node, Field):
            self._check_field(text, node)
            return self._add(text, node, FIELD, (), (node.name, begin))
        function = FUNCTIONS[node.function]
        if function.form not in ("elementwise", "condition"):  # what looks at more than the row
            node = masked_last(node)
        if node.function == "Mask":
            self.masks.setdefault((node, begin), text)
            return self._add(text, node, OTHER, (), (node, begin))
        inputs = tuple(self._node(text, part, begin) for part in node.series)
        if function.form not in ("rolling", "pair"):
            return self._add(text, node, node.function, inputs, node.settings)
        kind, window, parameter = _sweep_of(node)
        if kind in (EMA, EMA_OVER_ALL, FROM_THE_START):  # depends on more than the window
            return self._add(text, node, kind, inputs, (node.function, window, parameter))
        if node.function == "Count":
            inputs = (self._add(text, node, KNOWN, inputs, ()),)
        sweep = self._add(text, node, SWEEP, inputs, (kind, parameter))
        self.windows.setdefault(sweep, set()).add(window)
        return self._add(text, node, WINDOW, (sweep,), (window,))

    def _add(self, text: str, node: Node, kind: str, inputs: tuple[int, ...], settings: tuple[Any, ...]) -> int:
        typed = tuple(type(part).__name__ for part in settings)  # 1 and 1.0 are equal, but not the same
        key = (kind, inputs, settings, typed)
        if key not in self._known:
            self._known[key] = len(self.steps)
            self.steps.append(Step(kind, inputs, settings))
            self.source.append((text, node))
        return self._known[key]

    def _check_field(self, text: str, node: Field) -> None:
        if node.name not in self.columns and node.name not in self.optional:
            raise no_such_field(text, node, self.columns)


def no_such_field(text: str, node: Field, known: Collection[str]) -> DataError:
    """The error of an expression whose field is none of those known."""
    problem = f"the data has no column {node.name!r}; it has {sorted(known)}.{suggest(node.name, known)}"
    return DataError(pointed(text, node, problem))


def looks_back_without_end(node: Node) -> bool:
    if not isinstance(node, Call):
        return False
    return FUNCTIONS[node.function].from_the_first_row(node.settings) or any(map(looks_back_without_end, node.series))


def _sweep_of(node: Call) -> tuple[str, Any, float]:
    """(kernel, window, parameter) of a rolling call."""
    window = node.settings[0]
    if node.function == "EMA" or 0 < window < 1:
        if window == 0:
            return EMA_OVER_ALL, window, 0.0
        return EMA, window, float(window if window < 1 else 2 / (window + 1))
    if window == 0:
        return FROM_THE_START, window, 0.5 if node.function == "Med" else float((*node.settings, 0.0)[1])
    if node.function == "Count":
        return "sum", window, 0.0
    parameter = 0.5 if node.function == "Med" else node.settings[1] if node.function == "Quantile" else 0.0
    return ROLLING[node.function], window, float(parameter)
