"""Factors: expressions of Qlib's language over a panel, all of them in one pass.

Expressions are merged into one graph, so that what several of them share is computed once, and all windows of
one function on one series are one sweep of a native kernel (`qfast.data.rolling`). The graph is run over a few
instruments at a time, whose series stay in the cache; what leaves is the float32 table of the results.

    >>> import pandas as pd
    >>> from qfast.data.panel import Panel
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=3), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"close": [1.0, 2.0, 6.0]}, index=index), group="price")
    >>> evaluate_all(["Mean($close, 2)", "$close > Ref($close, 1)"], panel).tolist()
    [[1.0, 0.0], [1.5, 1.0], [4.0, 1.0]]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from qfast._renamed import renamed_names
from qfast.data.expression import Call, ExpressionError, Field, Node, Number, masked_last, parse, pointed, reach
from qfast.data.expression_functions import FUNCTIONS, register_function, unregister_function
from qfast.data.panel import Panel
from qfast.data.prices import Extent, Prices
from qfast.data.rolling import ema_over_all, rolling
from qfast.errors import ConfigError, DataError, suggest

__all__ = ["depends_on_the_start", "evaluate", "evaluate_all", "register_function", "unregister_function"]

ROW_CHUNK = 1 << 15  # rows of one pass: their results and intermediate series fit the caches

BINARY: Mapping[str, Callable[[Any, Any], Any]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Power": np.power,
    "Gt": np.greater, "Ge": np.greater_equal, "Lt": np.less, "Le": np.less_equal, "Eq": np.equal, "Ne": np.not_equal,
    "And": np.bitwise_and, "Or": np.bitwise_or, "Greater": np.maximum, "Less": np.minimum,
}  # fmt: skip
UNARY: Mapping[str, Callable[[Any], Any]] = {
    "Abs": np.abs, "Log": np.log, "Not": np.bitwise_not,
    "Sign": lambda x: np.sign(x.astype(np.float32)),
}  # fmt: skip
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


def evaluate(
    text: str,
    panel: Panel,
    *,
    extents: Mapping[str, Extent] | None = None,
    optional: Collection[str] = frozenset(),
) -> np.ndarray:
    """Value of one expression at every row of a panel; arguments and errors as in `evaluate_all`.

    Parameters
    ----------
    text : str
        For instance "Ref($close, -2) / Ref($close, -1) - 1".
    panel, extents, optional
        As in `evaluate_all`.

    Returns
    -------
    float32 [R]

    Examples
    --------
    >>> import pandas as pd
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=3), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"close": [1.0, 2.0, 3.0]}, index=index), group="price")
    >>> evaluate("Ref($close, -1) / $close - 1", panel).tolist()
    [1.0, 0.5, nan]
    """
    return evaluate_all([text], panel, extents=extents, optional=optional)[:, 0]


def evaluate_all(
    texts: Sequence[str],
    panel: Panel,
    *,
    rows: np.ndarray | None = None,
    extents: Mapping[str, Extent] | None = None,
    optional: Collection[str] = frozenset(),
    start_time: Any = None,
    others: Mapping[str, Prices] | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Values of expressions at rows of a panel.

    `Ref(x, n)` is the value n rows of the same instrument earlier (later for negative n), NaN where there is none;
    a window of n is the last n rows, fewer where an instrument begins; missing values are left out of it.

    Parameters
    ----------
    texts : sequence of str
        C expressions.
    panel : Panel
        `$name` is its column `name`, in whatever case.
    rows : int64 [M], optional
        Panel rows wanted, ascending. Default: all R. Values look at all rows of the panel.
    extents : mapping, optional
        Field -> rows in which that field is stored. Default: all rows of each instrument. A series
        has no value outside the rows in which one of its fields is stored.
    optional : collection of str
        Fields that are NaN where the panel has no such column; any other missing field is an error.
    start_time : date-like, optional
        The first day wanted. Only what looks back without end depends on it (EMA, a window of 0 rows): as in
        the reference that begins as many rows before this day as the function's window has.
    others : mapping, optional
        Prices of instruments that `Mask` names and the panel has not.
    out : float32 [M, C], optional
        Written to, and returned.

    Returns
    -------
    float32 [M, C]
        Computed like the reference: float32 fields, numbers do not widen them, windows in float64.

    Raises
    ------
    ExpressionError
        Not an expression, or a function that is not available; the message points at the place.
    DataError
        A field or instrument that the data has not.

    Source
    ------
    The expression engine of pyqlib 0.9.7 (qlib/data/ops.py).
    """
    rows = np.arange(panel.n_rows) if rows is None else rows
    if out is None:
        out = np.empty((len(rows), len(texts)), dtype=np.float32)
    graph = _Graph(texts, panel, extents or {}, optional, start_time, others or {})
    bounds = np.searchsorted(panel.instrument_codes, np.arange(len(panel.instruments) + 1))
    begin = 0
    while begin < len(panel.instruments):
        end = int(np.searchsorted(bounds, bounds[begin] + ROW_CHUNK, side="right")) - 1
        end = min(max(end, begin + torch.get_num_threads()), len(panel.instruments))  # threads share out instruments
        low, high = bounds[begin], bounds[end]
        first, stop = np.searchsorted(rows, [low, high])
        if first < stop:
            wanted = rows[first:stop] - low
            chunk = _Chunk(graph, begin, end, bounds)
            whole = len(wanted) == high - low
            with np.errstate(all="ignore"):
                table = chunk.run()
            out[first:stop] = (table if whole else table[:, wanted]).T
        begin = end
    return out


@dataclass(frozen=True)
class _Step:
    """One node of the merged graph: what it computes from which earlier steps."""

    kind: str  # a function, or one of the kinds below
    inputs: tuple[int, ...]
    settings: tuple[Any, ...]


class _Graph:
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
        self.steps: list[_Step] = []
        self.source: list[tuple[str, Node]] = []  # a place to point at, by step
        self.windows: dict[int, set[int]] = {}  # by sweep
        self._known: dict[tuple[Any, ...], int] = {}
        self.by_day: dict[tuple[Any, ...], tuple[np.ndarray, int, int]] = {}  # of (Mask, begin)
        self._first_day = 0 if start_time is None else panel.date_code_range(start_time)[0]
        self.results = [self._expression(text) for text in texts]
        self.uses = Counter(i for step in self.steps for i in step.inputs) + Counter(self.results)

    def _expression(self, text: str) -> int:
        tree = parse(text)
        begin = max(0, self._first_day - reach(text)[0]) if _from_the_first_row(tree) else 0
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
            if (node, begin) not in self.by_day:
                self.by_day[node, begin] = self._other(text, node, begin)
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
            self.steps.append(_Step(kind, inputs, settings))
            self.source.append((text, node))
        return self._known[key]

    def _check_field(self, text: str, node: Field) -> None:
        if node.name not in self.columns and node.name not in self.optional:
            raise no_such_field(text, node, self.columns)

    def _other(self, text: str, node: Call, begin: int) -> tuple[np.ndarray, int, int]:
        """Of another instrument: float32 or float64 [D] by date code of this panel, and its first and last day."""
        name = node.settings[0]
        known = {str(i).lower(): str(i) for i in self.panel.instruments}
        prices = next((p for key, p in self.others.items() if key.lower() == name.lower()), None)
        if prices is None and name.lower() not in known:
            raise DataError(
                pointed(text, node, f"there is no instrument {name!r} in the data.") + suggest(name, known.values())
            )
        panel, extents = (self.panel, self.extents) if prices is None else prices
        code = [str(i).lower() for i in panel.instruments].index(name.lower())
        here = Prices(self.panel, dict(self.extents))
        others = self.others if prices is None else {**dict.fromkeys(known.values(), here), **self.others}
        graph = _Graph((), panel, extents, self.optional, None, others)
        day = panel.datetimes.searchsorted(self.panel.datetimes[begin]) if begin else 0
        graph.results = [graph._node(text, node.series[0], int(day))]
        graph.uses = Counter(i for step in graph.steps for i in step.inputs) + Counter(graph.results)
        bounds = np.searchsorted(panel.instrument_codes, np.arange(len(panel.instruments) + 1))
        chunk = _Chunk(graph, code, code + 1, bounds)
        with np.errstate(all="ignore"):
            series = next(chunk.series())
        extent = chunk.whole if series.extent is None else series.extent
        rows = slice(int(extent.start[0]), int(extent.stop[0]))
        values, place = series.values[rows], self.panel.datetimes.get_indexer(panel.datetimes[chunk.days[rows]])
        values, place = values[place >= 0], place[place >= 0]
        by_day = np.full(len(self.panel.datetimes), np.nan, dtype=np.result_type(values, np.float32))
        by_day[place] = values
        return (by_day, int(place[0]), int(place[-1]) + 1) if len(place) else (by_day, 0, 0)


def no_such_field(text: str, node: Field, known: Collection[str]) -> DataError:
    """The error of an expression whose field is none of those known."""
    problem = f"the data has no column {node.name!r}; it has {sorted(known)}.{suggest(node.name, known)}"
    return DataError(pointed(text, node, problem))


def depends_on_the_start(text: str) -> bool:
    """True for an expression that looks back without end (EMA, a window of 0 rows): the first day of the data counts.

    >>> depends_on_the_start("EMA($close, 5)"), depends_on_the_start("Mean($close, 5)")
    (True, False)
    """
    return _from_the_first_row(parse(text))


def _from_the_first_row(node: Node) -> bool:
    if not isinstance(node, Call):
        return False
    return FUNCTIONS[node.function].from_the_first_row(node.settings) or any(map(_from_the_first_row, node.series))


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


@dataclass(frozen=True)
class _Series:
    """Values of the chunk's rows, NaN (False) outside `extent`; None: in all rows of every instrument."""

    values: np.ndarray
    extent: Extent | None


class _Chunk:
    """The graph over the rows of instruments [begin, end)."""

    def __init__(self, graph: _Graph, begin: int, end: int, bounds: np.ndarray) -> None:
        self.graph = graph
        self.low, self.high = int(bounds[begin]), int(bounds[end])
        self.who = slice(begin, end)
        self.whole = Extent(bounds[begin:end] - self.low, bounds[begin + 1 : end + 1] - self.low)
        self.codes = graph.panel.instrument_codes[self.low : self.high] - begin
        self.days = graph.panel.date_codes[self.low : self.high]
        self.rows = np.arange(self.high - self.low)

    def run(self) -> np.ndarray:
        """float32 [C, rows]."""
        out = np.empty((len(self.graph.results), len(self.rows)), dtype=np.float32)
        for place, series in enumerate(self.series()):
            if series.extent is None or series.values.dtype.kind == "f":
                out[place] = series.values
            else:
                out[place] = np.where(self._inside(series.extent), series.values, np.float32(np.nan))
        return out

    def series(self) -> Iterator[_Series]:
        """Results in order; each step's value is given up when nothing needs it any more."""
        graph, left = self.graph, dict(self.graph.uses)
        found: dict[int, Any] = {}
        ready = 0
        for result in graph.results:
            for step in range(ready, result + 1):
                inputs = graph.steps[step].inputs
                found[step] = self._step(step, [found[i] for i in inputs])
                for i in inputs:
                    _used(i, left, found)
            ready = max(ready, result + 1)
            series = found[result]
            _used(result, left, found)
            yield series

    def _step(self, number: int, inputs: list[Any]) -> Any:
        kind, settings = self.graph.steps[number].kind, self.graph.steps[number].settings
        if kind == NUMBER:
            return settings[0]
        if kind == FIELD:
            return self._field(*settings)
        if kind == SWEEP:
            kernel, parameter = settings
            return self._sweep(kernel, parameter, sorted(self.graph.windows[number]), inputs)
        if kind == WINDOW:
            return inputs[0][settings[0]]
        if kind == KNOWN:
            return replace(inputs[0], values=~np.isnan(inputs[0].values))
        if kind == OTHER:
            by_day, first, stop = self.graph.by_day[settings]
            return _Series(by_day[self.days], Extent(self._rows_before(first), self._rows_before(stop)))
        if kind == EMA:
            return self._sweep("ema", settings[2], [max(1, int(settings[1]))], inputs)[max(1, int(settings[1]))]
        if kind == EMA_OVER_ALL:
            return self._each(number, inputs, ema_over_all)
        if kind == FROM_THE_START:
            return self._from_the_start(settings[0], settings[2], inputs)
        return self._call(number, FUNCTIONS[kind], settings, inputs)

    def _call(self, number: int, function: Any, settings: tuple[Any, ...], inputs: list[Any]) -> _Series:
        if function.form in ("shift", "delta"):
            shifted = self._shifted(inputs[0], settings[0])
            if function.form == "shift":
                return shifted
            return replace(shifted, values=inputs[0].values - shifted.values)
        if function.form == "user":
            return self._each(number, inputs, lambda *parts: function.function(*parts, *settings))
        try:
            return self._elementwise(function, inputs)
        except (TypeError, ValueError, OverflowError) as error:  # of truth values and whole numbers: NumPy says which
            said = f"{error}"
            if not isinstance(error, TypeError):
                said += " Remedy: write the number with a point, such as 2.0"
            elif function.name == "Sub":  # NumPy would have it written with a sign that the language has not
                said = "comparisons cannot be subtracted; write If(a > b, 1, 0) - If(c > d, 1, 0)"
            raise ExpressionError(pointed(*self.graph.source[number], said)) from None

    def _elementwise(self, function: Any, inputs: list[Any]) -> _Series:
        series = [part for part in inputs if isinstance(part, _Series)]
        plain = [part.values if isinstance(part, _Series) else part for part in inputs]
        if function.form == "condition":
            return self._cut(np.where(*plain), series[0].extent)
        extent = series[0].extent
        for other in series[1:]:
            extent = self._union(extent, other.extent)
        compute = UNARY[function.name] if function.series == 1 else BINARY[function.name]
        return self._cut(compute(*plain), extent)

    # ---------------------------------------------------------------- rows of a series
    def _cut(self, values: np.ndarray, extent: Extent | None) -> _Series:
        """A series with nothing outside its extent: `NaN != 1` would be something."""
        if extent is not None:
            values = np.where(self._inside(extent), values, np.nan if values.dtype.kind == "f" else False)
        return _Series(values, extent)

    def _inside(self, extent: Extent) -> np.ndarray:
        return (self.rows >= extent.start[self.codes]) & (self.rows < extent.stop[self.codes])

    def _union(self, a: Extent | None, b: Extent | None) -> Extent | None:
        if a is None or b is None:
            return None
        if a is b:
            return a
        empty_a, empty_b = a.start >= a.stop, b.start >= b.stop
        start = np.where(empty_a, b.start, np.where(empty_b, a.start, np.minimum(a.start, b.start)))
        stop = np.where(empty_a, b.stop, np.where(empty_b, a.stop, np.maximum(a.stop, b.stop)))
        return Extent(start, stop)

    def _field(self, name: str, begin: int) -> _Series:
        panel = self.graph.panel
        if name not in self.graph.columns:
            nothing = Extent(self.whole.start, self.whole.start)
            return _Series(np.full(len(self.rows), np.nan, dtype=np.float32), nothing)
        values = np.ascontiguousarray(panel.column(self.graph.columns[name])[self.low : self.high])
        extent: Extent | None = None
        if name in self.graph.extents:
            stored = self.graph.extents[name]
            extent = Extent(stored.start[self.who] - self.low, stored.stop[self.who] - self.low)
            if np.array_equal(extent.start, self.whole.start) and np.array_equal(extent.stop, self.whole.stop):
                extent = None
        if begin > 0:
            whole = self.whole if extent is None else extent
            extent = Extent(np.maximum(whole.start, self._rows_before(begin)), whole.stop)
        return self._cut(values, extent)

    def _rows_before(self, day: int) -> np.ndarray:
        """int64 [N]: the first row of each instrument that is not before a date code."""
        return self.whole.start + np.bincount(self.codes[self.days < day], minlength=len(self.whole.start))

    def _shifted(self, series: _Series, n: int) -> _Series:
        values = series.values if series.values.dtype.kind == "f" else series.values.astype(np.float64)
        out = np.full(len(self.rows), np.nan, dtype=values.dtype)
        extent = self.whole if series.extent is None else series.extent
        if n == 0:
            for start, stop in zip(extent.start.tolist(), extent.stop.tolist(), strict=True):
                out[start:stop] = values[start : start + 1]
            return replace(series, values=out)
        if abs(n) < len(out):
            out[max(n, 0) : len(out) + min(n, 0)] = values[max(-n, 0) : len(out) - max(n, 0)]
        # What came over an instrument's edge, and where the series has no row.
        first, stop = extent.start[self.codes], extent.stop[self.codes]
        edge = self.rows < first + n if n > 0 else self.rows >= stop + n
        if series.extent is not None:
            edge |= ~self._inside(extent)
        out[edge] = np.nan
        return replace(series, values=out)

    # ---------------------------------------------------------------- windows
    def _sweep(self, kind: str, parameter: float, windows: list[int], inputs: list[_Series]) -> dict[int, _Series]:
        extent = inputs[0].extent
        if len(inputs) == 2:
            extent = self._union(extent, inputs[1].extent)
        bounds = self.whole if extent is None else extent
        out = rolling(
            kind, inputs[0].values, bounds.start, np.maximum(bounds.start, bounds.stop), windows,
            other=inputs[1].values if len(inputs) == 2 else None, parameter=parameter,
        )  # fmt: skip
        return {window: _Series(out[place], extent) for place, window in enumerate(windows)}

    def _from_the_start(self, name: str, parameter: float, inputs: list[_Series]) -> _Series:
        """A window of all rows so far."""
        longest = max(4, len(self.rows))
        if name == "Count":
            known = replace(inputs[0], values=~np.isnan(inputs[0].values))
            return self._sweep("sum", 0.0, [longest], [known])[longest]
        if name not in ("Corr", "Rsquare"):
            return self._sweep(ROLLING[name], parameter, [longest], inputs)[longest]
        # The reference's 2e-5 rule is for windows of some rows alone, so neither kernel will do.
        x, y = inputs if name == "Corr" else (replace(inputs[0], values=self.rows.astype(np.float64)), inputs[0])
        both = np.isfinite(x.values) & np.isfinite(y.values)
        pair = [replace(side, values=np.where(both, side.values, np.nan)) for side in (x, y)]
        cov = self._sweep("cov", 0.0, [longest], pair)[longest]
        spread = [self._sweep("var", 0.0, [longest], [side])[longest].values for side in pair]
        found = cov.values / np.sqrt(spread[0] * spread[1])
        return replace(cov, values=found if name == "Corr" else found**2)

    def _each(self, number: int, inputs: list[_Series], function: Callable[..., Any]) -> _Series:
        """A function of one instrument's series at a time."""
        extent = inputs[0].extent
        for other in inputs[1:]:
            extent = self._union(extent, other.extent)
        bounds = self.whole if extent is None else extent
        out = np.full(len(self.rows), np.nan)
        for who, (start, stop) in enumerate(zip(bounds.start.tolist(), bounds.stop.tolist(), strict=True)):
            if start < stop:
                out[start:stop] = self._called(number, who, function, [part.values[start:stop] for part in inputs])
        return _Series(out, extent)

    def _called(self, number: int, who: int, function: Callable[..., Any], parts: list[np.ndarray]) -> np.ndarray:
        for part in parts:
            part.setflags(write=False)  # a view of ours: what it shows may be the caller's prices
        try:
            found = np.asarray(function(*parts), dtype=np.float64)
            if found.shape != parts[0].shape:
                raise ValueError(f"it must give one value a row, shape {parts[0].shape}, got {found.shape}")
        except Exception as error:
            name, called = self.graph.panel.instruments[self.who.start + who], self.graph.steps[number].kind
            said = f"function {called!r} failed for {name}: {type(error).__name__}: {error}"
            raise ConfigError(pointed(*self.graph.source[number], said)) from error
        return found


def _used(step: int, left: dict[int, int], found: dict[int, Any]) -> None:
    left[step] -= 1
    if not left[step]:
        del found[step]


__getattr__ = renamed_names(
    __name__,
    {
        "register_operator": "qfast.data.expression_functions.register_function",
        "unregister_operator": "qfast.data.expression_functions.unregister_function",
    },
)
