"""The merged graph of factor expressions: which steps compute them, and in which order.

All expressions become one graph, in which a part that several of them share is one step. `qfast.data.factor_chunk`
evaluates the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from enum import Enum, auto
from typing import Any, NamedTuple

from qfast.data.expression import Call, Field, Node, Number, masked_last, node_reach, parse, pointed
from qfast.data.expression_functions import FUNCTIONS
from qfast.data.panel import Panel
from qfast.data.prices import Extent, Prices
from qfast.dates import DateLike
from qfast.errors import DataError, suggest

# Function of the language -> statistic of qfast.data.rolling.
STATISTIC_OF = {
    "Mean": "mean",
    "Sum": "sum",
    "Std": "std",
    "Var": "var",
    "Skew": "skew",
    "Kurt": "kurt",
    "Max": "max",
    "Min": "min",
    "Med": "quantile",
    "Mad": "mad",
    "Quantile": "quantile",
    "Rank": "rank",
    "IdxMax": "idxmax",
    "IdxMin": "idxmin",
    "Slope": "slope",
    "Rsquare": "rsquare",
    "Resi": "resi",
    "WMA": "wma",
    "EMA": "ema",
    "Corr": "corr",
    "Cov": "cov",
    "Count": "sum",  # of the values that are not NaN
}

# Functions whose value in Qlib depends on the first row that is loaded: pandas and Qlib update sums row by row, and
# Delta reads one row too few.
FROM_THE_FIRST_ROW_IN_QLIB = frozenset(
    ("Mean", "Sum", "Std", "Var", "Skew", "Kurt", "Slope", "Rsquare", "Resi", "Corr", "Cov", "Delta")
)


class StepKind(Enum):
    """How a step of the graph computes its value. The settings of each kind are in parentheses."""

    NUMBER = auto()
    """A number (value)."""
    FIELD = auto()
    """A column of the panel (name, first date code that is read)."""
    OTHER_INSTRUMENT = auto()
    """A `Mask` (its call, first date code that is read)."""
    FUNCTION = auto()
    """A function that looks at single rows or shifts, or a registered function (the settings of the call)."""
    SWEEP = auto()
    """One statistic for several windows at once (statistic, parameter); a mapping from window to series."""
    WINDOW = auto()
    """The series of one window of a sweep (window)."""
    NOT_NAN = auto()
    """True where the input is not NaN ()."""
    EMA = auto()
    """An exponential mean (window, weight of the newest value)."""
    EMA_OVER_ALL = auto()
    """An exponential mean whose span grows with the rows so far (window, parameter)."""
    ALL_ROWS_SO_FAR = auto()
    """A statistic over all rows so far (window, parameter)."""


class Step(NamedTuple):
    """One node of the graph.

    Attributes
    ----------
    kind : StepKind
    inputs : tuple of int
        Numbers of the earlier steps that it reads.
    settings : tuple
        Its constants, see `StepKind`.
    function : str
        The function of the language that it computes; empty if the kind already determines it.
    """

    kind: StepKind
    inputs: tuple[int, ...] = ()
    settings: tuple[Any, ...] = ()
    function: str = ""


class Graph:
    """Expressions merged into steps, each after the steps that it reads.

    The arguments are those of `qfast.data.factors.evaluate_all`.

    Attributes
    ----------
    steps : list of Step
    places : list of (str, Node)
        For each step, the expression and node that an error message points at.
    results : list of int
        Number of the step that computes each expression.
    uses : Counter
        How often each step is read, by other steps or as a result.
    windows : dict of int to set of int
        The windows of each sweep.
    masks : dict of (Call, int) to str
        (call of `Mask`, first date code that is read) -> the expression it occurs in.
    compat : str or None
    """

    def __init__(
        self,
        texts: Sequence[str],
        panel: Panel,
        extents: Mapping[str, Extent],
        optional: Collection[str],
        start_time: DateLike | None,
        others: Mapping[str, Prices],
        compat: str | None = None,
    ) -> None:
        self.panel, self.extents, self.optional, self.others = panel, extents, optional, others
        self.compat = compat
        self.columns = {c.lower(): c for block in panel.blocks.values() for c in block.columns}
        self.steps: list[Step] = []
        self.places: list[tuple[str, Node]] = []
        self.results: list[int] = []
        self.uses: Counter[int] = Counter()
        self.windows: dict[int, set[int]] = {}
        self.masks: dict[tuple[Call, int], str] = {}
        self._number_of: dict[tuple[Any, ...], int] = {}  # content of a step -> its number
        first_day = 0 if start_time is None else panel.date_code_range(start_time)[0]
        for text in texts:
            tree = parse(text)
            begin = max(0, first_day - self._rows_before(tree)) if looks_back_without_end(tree, compat) else 0
            self.add_result(text, tree, begin)

    def add_result(self, text: str, node: Node, begin: int) -> None:
        """Add a node of the expression `text` as a result; its fields are read from date code `begin` on."""
        before = len(self.steps)
        result = self._number(text, node, begin)
        self.results.append(result)
        self.uses.update([result, *(i for step in self.steps[before:] for i in step.inputs)])

    def _rows_before(self, tree: Node) -> int:
        """Number of rows that Qlib loads before the first requested day."""
        return node_reach(tree if self.compat is None else _read_by_qlib(tree))[0]

    def _number(self, text: str, node: Node, begin: int) -> int:
        """Number of the step that computes a node."""
        if isinstance(node, Number):
            return self._add(text, node, Step(StepKind.NUMBER, settings=(node.value,)))
        if isinstance(node, Field):
            if node.name not in self.columns and node.name not in self.optional:
                raise no_such_field(text, node, self.columns)
            return self._add(text, node, Step(StepKind.FIELD, settings=(node.name, begin)))
        form = FUNCTIONS[node.function].form
        if form not in ("elementwise", "condition"):  # the function looks at more than the current row
            node = masked_last(node)
        if node.function == "Mask":
            self.masks.setdefault((node, begin), text)
            return self._add(text, node, Step(StepKind.OTHER_INSTRUMENT, settings=(node, begin)))
        inputs = tuple(self._number(text, part, begin) for part in node.series)
        if form not in ("rolling", "pair"):
            return self._add(text, node, Step(StepKind.FUNCTION, inputs, node.settings, node.function))
        return self._rolling(text, node, inputs)

    def _rolling(self, text: str, node: Call, inputs: tuple[int, ...]) -> int:
        kind, window, parameter = _rolling_kind(node)
        if kind is not StepKind.SWEEP:
            return self._add(text, node, Step(kind, inputs, (window, parameter), node.function))
        if node.function == "Count":
            inputs = (self._add(text, node, Step(StepKind.NOT_NAN, inputs)),)
        statistic = self.statistic_of(node.function)
        sweep = self._add(text, node, Step(StepKind.SWEEP, inputs, (statistic, parameter)))
        self.windows.setdefault(sweep, set()).add(window)
        return self._add(text, node, Step(StepKind.WINDOW, (sweep,), (window,)))

    def statistic_of(self, function: str) -> str:
        """Statistic of `qfast.data.rolling`, or of `qfast.data.rolling_online` with compat="qlib"."""
        return "median" if function == "Med" and self.compat is not None else STATISTIC_OF[function]

    def _add(self, text: str, node: Node, step: Step) -> int:
        """Number of a step, which is added unless an equal one exists."""
        types = tuple(type(setting).__name__ for setting in step.settings)  # 1 == 1.0, but they compute differently
        key = (step, types)
        if key not in self._number_of:
            self._number_of[key] = len(self.steps)
            self.steps.append(step)
            self.places.append((text, node))
        return self._number_of[key]


def no_such_field(text: str, node: Field, columns: Collection[str]) -> DataError:
    """The error for a field that is none of `columns`."""
    problem = f"the data has no column {node.name!r}; it has {sorted(columns)}.{suggest(node.name, columns)}"
    return DataError(pointed(text, node, problem))


def looks_back_without_end(node: Node, compat: str | None = None) -> bool:
    """True if some part of the expression depends on all earlier rows (EMA, a window of 0 rows).

    With compat="qlib", sums and moments of windows do so too.
    """
    if not isinstance(node, Call):
        return False
    if compat is not None and node.function in FROM_THE_FIRST_ROW_IN_QLIB:
        return True
    if FUNCTIONS[node.function].from_the_first_row(node.settings):
        return True
    return any(looks_back_without_end(part, compat) for part in node.series)


def _read_by_qlib(node: Node) -> Node:
    """The expression with shifts in place of `Delta`, for which Qlib loads one row too few."""
    if not isinstance(node, Call):
        return node
    node = replace(node, series=tuple(map(_read_by_qlib, node.series)))
    if node.function == "Delta":
        return replace(node, function="Ref", settings=(node.settings[0] - 1,))
    return node


def _rolling_kind(node: Call) -> tuple[StepKind, Any, float]:
    """(kind, window, parameter) of a rolling call; the parameter is that of `qfast.data.rolling.rolling`."""
    window = node.settings[0]
    if node.function == "EMA" or 0 < window < 1:
        if window == 0:
            return StepKind.EMA_OVER_ALL, window, 0.0
        return StepKind.EMA, window, float(window if window < 1 else 2 / (window + 1))
    parameter = {"Med": 0.5, "Quantile": node.settings[-1]}.get(node.function, 0.0)
    return StepKind.ALL_ROWS_SO_FAR if window == 0 else StepKind.SWEEP, window, float(parameter)
