"""The graph of factor expressions over the rows of a few instruments, whose series stay in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qfast.data.expression import Call, ExpressionError, pointed
from qfast.data.expression_functions import FUNCTIONS
from qfast.data.factor_graph import (
    EMA,
    EMA_OVER_ALL,
    FIELD,
    FROM_THE_START,
    KNOWN,
    NUMBER,
    OTHER,
    ROLLING,
    SWEEP,
    WINDOW,
    Graph,
)
from qfast.data.prices import Extent, Prices
from qfast.data.rolling import ema_over_all, rolling
from qfast.errors import ConfigError, DataError, suggest

BINARY: Mapping[str, Callable[[Any, Any], Any]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Power": np.power,
    "Gt": np.greater, "Ge": np.greater_equal, "Lt": np.less, "Le": np.less_equal, "Eq": np.equal, "Ne": np.not_equal,
    "And": np.bitwise_and, "Or": np.bitwise_or, "Greater": np.maximum, "Less": np.minimum,
}  # fmt: skip
UNARY: Mapping[str, Callable[[Any], Any]] = {
    "Abs": np.abs, "Log": np.log, "Not": np.bitwise_not,
    "Sign": lambda x: np.sign(x.astype(np.float32)),
}  # fmt: skip

MaskValues = tuple[np.ndarray, int, int]
"""Of another instrument: float32 or float64 [D] by date code of the panel, and its first and last day."""


@dataclass(frozen=True)
class Series:
    """Values of the chunk's rows, NaN (False) outside `extent`; None: in all rows of every instrument."""

    values: np.ndarray
    extent: Extent | None


class Chunk:
    """The graph over the rows of instruments [begin, end)."""

    def __init__(
        self, graph: Graph, masks: Mapping[tuple[Call, int], MaskValues], begin: int, end: int, bounds: np.ndarray
    ) -> None:
        self.graph, self.masks = graph, masks
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

    def series(self) -> Iterator[Series]:
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
            by_day, first, stop = self.masks[settings]
            return Series(by_day[self.days], Extent(self._rows_before(first), self._rows_before(stop)))
        if kind == EMA:
            return self._sweep("ema", settings[2], [max(1, int(settings[1]))], inputs)[max(1, int(settings[1]))]
        if kind == EMA_OVER_ALL:
            return self._each(number, inputs, ema_over_all)
        if kind == FROM_THE_START:
            return self._from_the_start(settings[0], settings[2], inputs)
        return self._call(number, FUNCTIONS[kind], settings, inputs)

    def _call(self, number: int, function: Any, settings: tuple[Any, ...], inputs: list[Any]) -> Series:
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

    def _elementwise(self, function: Any, inputs: list[Any]) -> Series:
        series = [part for part in inputs if isinstance(part, Series)]
        plain = [part.values if isinstance(part, Series) else part for part in inputs]
        if function.form == "condition":
            return self._cut(np.where(*plain), series[0].extent)
        extent = series[0].extent
        for other in series[1:]:
            extent = self._union(extent, other.extent)
        compute = UNARY[function.name] if function.series == 1 else BINARY[function.name]
        return self._cut(compute(*plain), extent)

    # ---------------------------------------------------------------- rows of a series
    def _cut(self, values: np.ndarray, extent: Extent | None) -> Series:
        """A series with nothing outside its extent: `NaN != 1` would be something."""
        if extent is not None:
            values = np.where(self._inside(extent), values, np.nan if values.dtype.kind == "f" else False)
        return Series(values, extent)

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

    def _field(self, name: str, begin: int) -> Series:
        panel = self.graph.panel
        if name not in self.graph.columns:
            nothing = Extent(self.whole.start, self.whole.start)
            return Series(np.full(len(self.rows), np.nan, dtype=np.float32), nothing)
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

    def _shifted(self, series: Series, n: int) -> Series:
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
    def _sweep(self, kind: str, parameter: float, windows: list[int], inputs: list[Series]) -> dict[int, Series]:
        extent = inputs[0].extent
        if len(inputs) == 2:
            extent = self._union(extent, inputs[1].extent)
        bounds = self.whole if extent is None else extent
        out = rolling(
            kind, inputs[0].values, bounds.start, np.maximum(bounds.start, bounds.stop), windows,
            other=inputs[1].values if len(inputs) == 2 else None, parameter=parameter,
        )  # fmt: skip
        return {window: Series(out[place], extent) for place, window in enumerate(windows)}

    def _from_the_start(self, name: str, parameter: float, inputs: list[Series]) -> Series:
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

    def _each(self, number: int, inputs: list[Series], function: Callable[..., Any]) -> Series:
        """A function of one instrument's series at a time."""
        extent = inputs[0].extent
        for other in inputs[1:]:
            extent = self._union(extent, other.extent)
        bounds = self.whole if extent is None else extent
        out = np.full(len(self.rows), np.nan)
        for who, (start, stop) in enumerate(zip(bounds.start.tolist(), bounds.stop.tolist(), strict=True)):
            if start < stop:
                out[start:stop] = self._called(number, who, function, [part.values[start:stop] for part in inputs])
        return Series(out, extent)

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


def mask_values(graph: Graph) -> dict[tuple[Call, int], MaskValues]:
    """The values of every `Mask` of a graph."""
    return {(node, begin): _mask(graph, text, node, begin) for (node, begin), text in graph.masks.items()}


def _mask(outer: Graph, text: str, node: Call, begin: int) -> MaskValues:
    """Of another instrument: float32 or float64 [D] by date code of this panel, and its first and last day."""
    name = node.settings[0]
    known = {str(i).lower(): str(i) for i in outer.panel.instruments}
    prices = next((p for key, p in outer.others.items() if key.lower() == name.lower()), None)
    if prices is None and name.lower() not in known:
        raise DataError(
            pointed(text, node, f"there is no instrument {name!r} in the data.") + suggest(name, known.values())
        )
    panel, extents = (outer.panel, outer.extents) if prices is None else prices
    code = [str(i).lower() for i in panel.instruments].index(name.lower())
    here = Prices(outer.panel, dict(outer.extents))
    others = outer.others if prices is None else {**dict.fromkeys(known.values(), here), **outer.others}
    graph = Graph((), panel, extents, outer.optional, None, others)
    day = panel.datetimes.searchsorted(outer.panel.datetimes[begin]) if begin else 0
    graph.add_expression(text, node.series[0], int(day))
    bounds = np.searchsorted(panel.instrument_codes, np.arange(len(panel.instruments) + 1))
    chunk = Chunk(graph, mask_values(graph), code, code + 1, bounds)
    with np.errstate(all="ignore"):
        series = next(chunk.series())
    extent = chunk.whole if series.extent is None else series.extent
    rows = slice(int(extent.start[0]), int(extent.stop[0]))
    values, place = series.values[rows], outer.panel.datetimes.get_indexer(panel.datetimes[chunk.days[rows]])
    values, place = values[place >= 0], place[place >= 0]
    by_day = np.full(len(outer.panel.datetimes), np.nan, dtype=np.result_type(values, np.float32))
    by_day[place] = values
    return (by_day, int(place[0]), int(place[-1]) + 1) if len(place) else (by_day, 0, 0)
