"""Evaluates a graph of factor expressions over the rows of a few instruments, whose series stay in the cache."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qfast.data.expression import Call, ExpressionError, pointed
from qfast.data.expression_functions import FUNCTIONS, ExpressionFunction
from qfast.data.factor_graph import STATISTIC_OF, Graph, StepKind
from qfast.data.prices import Extent, Prices
from qfast.data.rolling import ema_over_all, rolling
from qfast.data.rolling_online import ema_over_all_online, rolling_online
from qfast.errors import ConfigError, DataError, suggest

BINARY: Mapping[str, Callable[..., np.ndarray]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Power": operator.pow,  # as in pandas: NumPy squares for an exponent of 2, which may differ from np.power by a bit
    "Gt": np.greater,
    "Ge": np.greater_equal,
    "Lt": np.less,
    "Le": np.less_equal,
    "Eq": np.equal,
    "Ne": np.not_equal,
    "And": np.bitwise_and,
    "Or": np.bitwise_or,
    "Greater": np.maximum,
    "Less": np.minimum,
}
UNARY: Mapping[str, Callable[..., np.ndarray]] = {
    "Abs": np.abs,
    "Log": np.log,
    "Not": np.bitwise_not,
    "Sign": lambda x: np.sign(x.astype(np.float32)),
}

LARGEST_INTEGER = 2**63 - 1

MaskValues = tuple[np.ndarray, int, int]
"""Values of another instrument: float32 or float64 [D] by date code of the panel, the first date code and the end."""


@dataclass(frozen=True)
class Series:
    """Values at the rows of a chunk.

    Attributes
    ----------
    values : ndarray
        [rows], floating or bool; NaN or False outside `extent`.
    extent : Extent or None
        Rows in which the series exists, by instrument; None means all rows.
    """

    values: np.ndarray
    extent: Extent | None


class Chunk:
    """The rows of the instruments with codes from `begin` to `end - 1`.

    Parameters
    ----------
    graph : Graph
    masks : mapping
        From `mask_values`.
    begin, end : int
        Instrument codes.
    bounds : int64 [N + 1]
        Panel rows bounds[i] to bounds[i + 1] - 1 are those of instrument i.
    """

    def __init__(
        self, graph: Graph, masks: Mapping[tuple[Call, int], MaskValues], begin: int, end: int, bounds: np.ndarray
    ) -> None:
        self.graph, self.masks = graph, masks
        self.low, self.high = int(bounds[begin]), int(bounds[end])
        self.instruments = slice(begin, end)
        self.whole = Extent(bounds[begin:end] - self.low, bounds[begin + 1 : end + 1] - self.low)
        self.codes = graph.panel.instrument_codes[self.low : self.high] - begin
        self.days = graph.panel.date_codes[self.low : self.high]
        self.rows = np.arange(self.high - self.low)

    def table(self) -> np.ndarray:
        """Values of all expressions, float32 [C, rows]."""
        out = np.empty((len(self.graph.results), len(self.rows)), dtype=np.float32)
        for place, series in enumerate(self.results()):
            if series.extent is None or series.values.dtype.kind == "f":
                out[place] = series.values
            else:
                out[place] = np.where(self._inside(series.extent), series.values, np.float32(np.nan))
        return out

    def results(self) -> Iterator[Series]:
        """The series of each expression in order. The value of a step is freed after its last use."""
        graph, uses_left = self.graph, dict(self.graph.uses)
        values: dict[int, Any] = {}

        def use(step: int) -> Any:
            value = values[step]
            uses_left[step] -= 1
            if not uses_left[step]:
                del values[step]
            return value

        computed = 0
        for result in graph.results:
            for step in range(computed, result + 1):
                inputs = graph.steps[step].inputs
                values[step] = self._compute(step, [values[i] for i in inputs])
                for i in inputs:
                    use(i)
            computed = max(computed, result + 1)
            yield use(result)

    def _compute(self, number: int, inputs: list[Any]) -> Any:
        """Value of a step: a Series, a number, or for a sweep a mapping from window to Series."""
        step = self.graph.steps[number]
        match step.kind:
            case StepKind.NUMBER:
                return step.settings[0]
            case StepKind.FIELD:
                return self._field(*step.settings)
            case StepKind.OTHER_INSTRUMENT:
                by_day, first, end = self.masks[step.settings[0], step.settings[1]]
                return Series(by_day[self.days], Extent(self._first_rows_from(first), self._first_rows_from(end)))
            case StepKind.SWEEP:
                statistic, parameter = step.settings
                return self._sweep(statistic, parameter, sorted(self.graph.windows[number]), inputs)
            case StepKind.WINDOW:
                return inputs[0][step.settings[0]]
            case StepKind.NOT_NAN:
                return _not_nan(inputs[0])
            case StepKind.EMA:
                return self._exponential_mean(step.settings[0], step.settings[1], inputs)
            case StepKind.EMA_OVER_ALL:
                over_all = ema_over_all if self.graph.compat is None else ema_over_all_online
                return self._by_instrument(number, inputs, over_all)
            case StepKind.ALL_ROWS_SO_FAR:
                return self._over_all_rows_so_far(step.function, step.settings[1], inputs)
            case StepKind.FUNCTION:
                return self._function(number, FUNCTIONS[step.function], step.settings, inputs)

    # ---------------------------------------------------------------- functions of single rows, shifts
    def _function(
        self, number: int, function: ExpressionFunction, settings: tuple[Any, ...], inputs: list[Any]
    ) -> Series:
        if function.form in ("shift", "delta"):
            shifted = self._shifted(inputs[0], settings[0])
            if function.form == "shift":
                return shifted
            return replace(shifted, values=inputs[0].values - shifted.values)
        if function.function is not None:
            registered = function.function
            return self._by_instrument(number, inputs, lambda *parts: registered(*parts, *settings))
        try:
            return self._elementwise(function, inputs)
        except (
            TypeError,
            ValueError,
            OverflowError,
        ) as error:  # subtracted comparisons, large integers
            problem = f"{error}"
            if not isinstance(error, TypeError):
                problem += " Remedy: write the number with a point, such as 2.0"
            elif function.name == "Sub":  # NumPy suggests an operator that the language does not have
                problem = "comparisons cannot be subtracted; write If(a > b, 1, 0) - If(c > d, 1, 0)"
            raise ExpressionError(pointed(*self.graph.places[number], problem)) from None

    def _elementwise(self, function: ExpressionFunction, inputs: list[Any]) -> Series:
        series = [value for value in inputs if isinstance(value, Series)]
        is_floating = any(value.values.dtype.kind == "f" for value in series)
        arrays = [value.values if isinstance(value, Series) else _number(value, is_floating) for value in inputs]
        if function.form == "condition":
            return self._within(np.where(*arrays), series[0].extent)
        compute = UNARY[function.name] if function.series == 1 else BINARY[function.name]
        return self._within(compute(*arrays), self._union(series))

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
        # Remove values of the neighbouring instrument, and rows in which the series does not exist.
        first, stop = extent.start[self.codes], extent.stop[self.codes]
        edge = self.rows < first + n if n > 0 else self.rows >= stop + n
        if series.extent is not None:
            edge |= ~self._inside(extent)
        out[edge] = np.nan
        return replace(series, values=out)

    def _by_instrument(self, number: int, inputs: list[Series], function: Callable[..., Any]) -> Series:
        """A function that is called with the series of one instrument at a time."""
        extent = self._union(inputs)
        bounds = self.whole if extent is None else extent
        out = np.full(len(self.rows), np.nan)
        for code, (start, stop) in enumerate(zip(bounds.start.tolist(), bounds.stop.tolist(), strict=True)):
            if start < stop:
                arrays = [series.values[start:stop] for series in inputs]
                out[start:stop] = self._call(number, code, function, arrays)
        return Series(out, extent)

    def _call(self, number: int, code: int, function: Callable[..., Any], arrays: list[np.ndarray]) -> np.ndarray:
        for array in arrays:
            array.setflags(write=False)  # it may be a view of the caller's prices
        try:
            values = np.asarray(function(*arrays), dtype=np.float64)
            if values.shape != arrays[0].shape:
                raise ValueError(f"expected one value for each row, shape {arrays[0].shape}, got shape {values.shape}")
        except Exception as error:
            instrument = self.graph.panel.instruments[self.instruments.start + code]
            name = self.graph.steps[number].function
            problem = f"function {name!r} failed for {instrument}: {type(error).__name__}: {error}"
            raise ConfigError(pointed(*self.graph.places[number], problem)) from error
        return values

    # ---------------------------------------------------------------- windows
    def _sweep(self, statistic: str, parameter: float, windows: list[int], inputs: list[Series]) -> dict[int, Series]:
        extent = self._union(inputs)
        bounds = self.whole if extent is None else extent
        compute = rolling if self.graph.compat is None else rolling_online
        out = compute(
            statistic,
            inputs[0].values,
            bounds.start,
            np.maximum(bounds.start, bounds.stop),
            windows,
            other=inputs[1].values if len(inputs) == 2 else None,
            parameter=parameter,
        )
        return {window: Series(out[place], extent) for place, window in enumerate(windows)}

    def _exponential_mean(self, window: float, weight: float, inputs: list[Series]) -> Series:
        rows = max(1, int(window))
        if self.graph.compat is not None:  # pandas derives the weight from the center of mass
            weight = (window - 1) / 2 if window >= 1 else (1 - window) / window
        return self._sweep("ema", weight, [rows], inputs)[rows]

    def _over_all_rows_so_far(self, function: str, parameter: float, inputs: list[Series]) -> Series:
        if function == "Count":
            inputs = [_not_nan(inputs[0])]
        if self.graph.compat is not None:
            return self._sweep(self.graph.statistic_of(function), parameter, [0], inputs)[0]
        longest = max(4, len(self.rows))
        if function not in ("Corr", "Rsquare"):
            return self._sweep(STATISTIC_OF[function], parameter, [longest], inputs)[longest]
        # Qlib's rule that a standard deviation of at most 2e-5 gives NaN does not apply here, and the kernels of corr
        # and rsquare contain it.
        x, y = inputs if function == "Corr" else (replace(inputs[0], values=self.rows.astype(np.float64)), inputs[0])
        finite = np.isfinite(x.values) & np.isfinite(y.values)
        pair = [replace(side, values=np.where(finite, side.values, np.nan)) for side in (x, y)]
        covariance = self._sweep("cov", 0.0, [longest], pair)[longest]
        variances = [self._sweep("var", 0.0, [longest], [side])[longest].values for side in pair]
        correlation = covariance.values / np.sqrt(variances[0] * variances[1])
        return replace(covariance, values=correlation if function == "Corr" else correlation**2)

    # ---------------------------------------------------------------- fields, and the rows in which a series exists
    def _field(self, name: str, begin: int) -> Series:
        """A column of the panel; rows before date code `begin` do not exist."""
        panel = self.graph.panel
        if name not in self.graph.columns:
            nowhere = Extent(self.whole.start, self.whole.start)
            return Series(np.full(len(self.rows), np.nan, dtype=np.float32), nowhere)
        values = np.ascontiguousarray(panel.column(self.graph.columns[name])[self.low : self.high])
        extent: Extent | None = None
        if name in self.graph.extents:
            stored = self.graph.extents[name]
            extent = Extent(stored.start[self.instruments] - self.low, stored.stop[self.instruments] - self.low)
            if np.array_equal(extent.start, self.whole.start) and np.array_equal(extent.stop, self.whole.stop):
                extent = None
        if begin > 0:
            whole = self.whole if extent is None else extent
            extent = Extent(np.maximum(whole.start, self._first_rows_from(begin)), whole.stop)
        return self._within(values, extent)

    def _first_rows_from(self, day: int) -> np.ndarray:
        """int64 [N]: the first row of each instrument whose date code is at least `day`."""
        return self.whole.start + np.bincount(self.codes[self.days < day], minlength=len(self.whole.start))

    def _within(self, values: np.ndarray, extent: Extent | None) -> Series:
        """A series that is NaN or False outside its extent, where for example `NaN != 1` would be True."""
        if extent is not None:
            values = np.where(self._inside(extent), values, np.nan if values.dtype.kind == "f" else False)
        return Series(values, extent)

    def _inside(self, extent: Extent) -> np.ndarray:
        return (self.rows >= extent.start[self.codes]) & (self.rows < extent.stop[self.codes])

    def _union(self, series: list[Series]) -> Extent | None:
        """For each instrument the rows from the first to the last one in which one of the series exists."""
        extent = series[0].extent
        for other in series[1:]:
            extent = _union(extent, other.extent)
        return extent


def _union(a: Extent | None, b: Extent | None) -> Extent | None:
    if a is None or b is None:
        return None
    if a is b:
        return a
    empty_a, empty_b = a.start >= a.stop, b.start >= b.stop
    start = np.where(empty_a, b.start, np.where(empty_b, a.start, np.minimum(a.start, b.start)))
    stop = np.where(empty_a, b.stop, np.where(empty_b, a.stop, np.maximum(a.stop, b.stop)))
    return Extent(start, stop)


def _not_nan(series: Series) -> Series:
    return replace(series, values=~np.isnan(series.values))


# ---------------------------------------------------------------- Mask
def mask_values(graph: Graph) -> dict[tuple[Call, int], MaskValues]:
    """Values of every `Mask` in a graph, by its call and the first date code that it reads.

    Raises
    ------
    DataError
        A `Mask` names an instrument that the data does not have.
    """
    return {(call, begin): _mask(graph, text, call, begin) for (call, begin), text in graph.masks.items()}


def _mask(outer: Graph, text: str, call: Call, begin: int) -> MaskValues:
    name = call.settings[0]
    names = {str(i).lower(): str(i) for i in outer.panel.instruments}
    prices = next((p for key, p in outer.others.items() if key.lower() == name.lower()), None)
    if prices is None and name.lower() not in names:
        raise DataError(
            pointed(text, call, f"there is no instrument {name!r} in the data.") + suggest(name, names.values())
        )
    panel, extents = (outer.panel, outer.extents) if prices is None else prices
    code = [str(i).lower() for i in panel.instruments].index(name.lower())
    outer_prices = Prices(outer.panel, dict(outer.extents))
    others = outer.others if prices is None else {**dict.fromkeys(names.values(), outer_prices), **outer.others}
    graph = Graph((), panel, extents, outer.optional, None, others, outer.compat)
    first_day = panel.datetimes.searchsorted(outer.panel.datetimes[begin]) if begin else 0
    graph.add_result(text, call.series[0], int(first_day))
    bounds = np.searchsorted(panel.instrument_codes, np.arange(len(panel.instruments) + 1))
    chunk = Chunk(graph, mask_values(graph), code, code + 1, bounds)
    with np.errstate(all="ignore"):
        series = next(chunk.results())
    extent = chunk.whole if series.extent is None else series.extent
    rows = slice(int(extent.start[0]), int(extent.stop[0]))
    values, days = series.values[rows], outer.panel.datetimes.get_indexer(panel.datetimes[chunk.days[rows]])
    values, days = values[days >= 0], days[days >= 0]
    by_day = np.full(len(outer.panel.datetimes), np.nan, dtype=np.result_type(values, np.float32))
    by_day[days] = values
    return (by_day, int(days[0]), int(days[-1]) + 1) if len(days) else (by_day, 0, 0)


def _number(value: float, is_floating: bool) -> float:
    """A number for NumPy, whose old versions would compute with integers beyond 64 bits as Python objects.

    Raises
    ------
    OverflowError
        The integer needs more than 64 bits, and no other operand is floating.
    """
    if not isinstance(value, int) or -LARGEST_INTEGER - 1 <= value <= LARGEST_INTEGER:
        return value
    if not is_floating:
        raise OverflowError("an integer is too large for 64 bits.")
    return float(value)
