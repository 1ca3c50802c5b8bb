"""PriceWindows: the columns of Alpha360 as a view of prices, computed whenever values are read.

The columns of Alpha360 are 60 lags of six prices, so 360 numbers repeat what 6 numbers and their neighbours contain.
A `PriceWindows` keeps the prices and the constants of the processors. It behaves like an array [R, C] that can only be
read, and reads some rows or some columns at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qfast.data.column_maps import ColumnMap
from qfast.data.prices import Prices
from qfast.ops.price_windows import FILL, LIMIT, SCALE, SHIFT, neutral_stage, price_windows

__all__ = ["LaterMap", "PriceWindows", "StoredRows"]

ROW_CHUNK = 4096  # rows computed at a time


@dataclass(frozen=True, eq=False)
class LaterMap:
    """A map of some columns that is not a stage of the operator, or is applied after such a map.

    Attributes
    ----------
    function : ColumnMap
    positions : ndarray
        int [c], the columns.
    """

    function: ColumnMap
    positions: np.ndarray

    def apply(self, values: np.ndarray) -> None:
        """Replace the columns in `values` [n, C]."""
        if len(self.positions) == values.shape[1]:
            values[:] = self.function(values)
        else:
            values[:, self.positions] = self.function(values[:, self.positions])

    def within(self, positions: np.ndarray) -> LaterMap | None:
        """The map for a table that consists of the columns at `positions` (int [c], ascending). None: it has none."""
        numbers = np.flatnonzero(np.isin(self.positions, positions))
        places = np.searchsorted(positions, self.positions[numbers])
        return LaterMap(self.function.select(numbers), places) if len(numbers) else None

    def apply_to_column(self, values: np.ndarray, position: int) -> None:
        """Replace the values [n] of the column at `position`."""
        number = np.flatnonzero(self.positions == position)
        if len(number):
            values[:] = self.function.select(number)(values[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows whose values are in memory, because they do not follow from the prices of the row alone.

    Attributes
    ----------
    rows : Tensor
        int64 [n], ascending.
    values : Tensor
        float32 [n, C].
    """

    rows: Tensor
    values: Tensor

    def find(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """For each row (int64 [m]), whether it is stored (bool [m]), and its number if it is (int64 [m])."""
        numbers = torch.searchsorted(self.rows, rows).clamp(max=len(self.rows) - 1)
        return self.rows[numbers] == rows, numbers


@dataclass(frozen=True, eq=False)
class PriceWindows:
    """R rows of C columns: the last T values of F prices, divided by a price of the row, and then normalized.

    Attributes
    ----------
    series, ends, divisors, divisor_of, stages, window
        The arguments of `qfast.ops.price_windows`, which computes F * T columns.
    later : tuple of LaterMap
        Maps of the computed columns after the stages, which NumPy applies.
    selected : Tensor or None
        int64 [C], ascending: the computed columns that this table has. None: all of them.
    stored : StoredRows or None
        Rows whose final values are in memory.
    required : bool
        A processor that needs the columns in memory is refused.

    Examples
    --------
    >>> import pandas as pd
    >>> from qfast.data import load_prices
    >>> dates = pd.date_range("2024-01-01", periods=3)
    >>> frame = pd.DataFrame({"datetime": dates, "instrument": "A", "close": [1.0, 2.0, 4.0]})
    >>> windows = PriceWindows.of_prices(Prices(load_prices(frame), {}), np.arange(3), ["close"], 2)
    >>> windows.shape, windows[1:].tolist()
    ((3, 2), [[0.5, 1.0], [0.5, 1.0]])
    """

    series: Tensor
    ends: Tensor
    divisors: Tensor
    divisor_of: Tensor
    stages: Tensor
    window: int
    later: tuple[LaterMap, ...] = ()
    selected: Tensor | None = None
    stored: StoredRows | None = None
    required: bool = False

    @classmethod
    def of_prices(cls, prices: Prices, rows: np.ndarray, names: Sequence[str], window: int) -> PriceWindows:
        """The windows of some rows of a price panel, before any processor.

        Parameters
        ----------
        prices : Prices
        rows : int64 [R]
            Panel rows.
        names : sequence of str
            F field names. "volume" is divided by today's volume + 1e-12, every other field by today's close.
        window : int
            T.
        """
        panel, extents = prices
        codes = panel.instrument_codes
        # With window - 1 rows of NaN before each instrument, every window is a contiguous slice.
        place = np.arange(panel.n_rows) + (window - 1) * (codes.astype(np.int64) + 1)
        length = panel.n_rows + (window - 1) * len(panel.instruments)
        series = np.full((len(names), length), np.nan, dtype=np.float32)
        divisors: dict[object, np.ndarray] = {}
        divisor_of = []
        for f, name in enumerate(names):
            key: object = "volume" if name == "volume" else "close"
            if name in panel.columns("price"):
                series[f, place] = panel.column(name, "price")
                base = panel.column("close", "price")[rows]
                if name == "volume":
                    base = panel.column("volume", "price")[rows] + np.float32(1e-12)
                if name in extents:  # like in Qlib, a field has no windows on days that its file does not cover
                    stored = extents[name]
                    outside = (rows < stored.start[codes[rows]]) | (rows >= stored.stop[codes[rows]])
                    if outside.any():
                        key, base = name, np.where(outside, np.float32(np.nan), base)
                divisors.setdefault(key, base)
            divisor_of.append(key)
        numbers = {key: number for number, key in enumerate(divisors)}
        ends = place[rows]
        return cls(
            series=torch.from_numpy(series),
            ends=torch.from_numpy(ends.astype(np.int32) if length < 2**31 else ends),
            divisors=torch.from_numpy(np.stack(list(divisors.values()) or [np.full(len(rows), np.float32(np.nan))])),
            divisor_of=torch.tensor([numbers.get(key, 0) for key in divisor_of]),
            stages=torch.empty(0, 4, len(names) * window),
            window=window,
        )

    # ---------------------------------------------------------------- shape
    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        return len(self.ends), self.computed if self.selected is None else len(self.selected)

    @property
    def computed(self) -> int:
        """F * T, the number of columns that are computed for a row."""
        return self.stages.shape[2]

    @property
    def dtype(self) -> np.dtype:
        """float32."""
        return np.dtype(np.float32)

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return 4

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        tensors = [self.series, self.ends, self.divisors, self.divisor_of, self.stages]
        tensors += [] if self.stored is None else [self.stored.rows, self.stored.values]
        tensors += [] if self.selected is None else [self.selected]
        return sum(tensor.nbytes for tensor in tensors)

    def __len__(self) -> int:
        return len(self.ends)

    # ---------------------------------------------------------------- reading
    def gather(self, rows: Tensor) -> Tensor:
        """float32 [*B, C]: the columns of rows (int64 [*B], on `device`), NaN for row -1."""
        flat = rows.reshape(-1)
        out = price_windows(self.series, self.ends, self.divisors, self.divisor_of, flat, self.stages, self.window)
        for change in self.later:
            change.apply(out.numpy())
        if self.later:
            out[flat < 0] = torch.nan  # a map that fills does not fill a row that does not exist
        if self.selected is not None:
            out = out.index_select(1, self.selected)  # several times as fast as out[:, selected]
        if self.stored is not None:
            is_stored, numbers = self.stored.find(flat)
            out[is_stored] = self.stored.values[numbers[is_stored]]
        return out.reshape(*rows.shape, self.shape[1])

    def __getitem__(self, key: Any) -> np.ndarray:
        """Values: `windows[rows]` (a slice or an array), `windows[rows, column]` or `windows[slice, columns]`."""
        if isinstance(key, tuple):
            rows, position = key
            if isinstance(position, np.ndarray):  # as in NumPy, an array of columns is combined with a slice of rows
                return self.columns(position, np.arange(len(self))[rows]).T
            return self.column(position, rows)
        numbers = np.arange(len(self))[key] if isinstance(key, slice) else np.asarray(key)
        return self.gather(torch.from_numpy(numbers.astype(np.int64))).numpy()

    def columns(self, positions: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """float32 [c, rows]: some columns at `rows`, by default at all rows."""
        out = np.empty((len(positions), len(self) if rows is None else len(rows)), dtype=np.float32)
        for number, position in enumerate(positions):
            out[number] = self.column(int(position), slice(None) if rows is None else rows)
        return out

    def column(self, position: int, rows: slice | np.ndarray) -> np.ndarray:
        """One column at `rows`, without computing the others. The steps are those of the operator."""
        place = int(self._places(np.array([position]))[0])
        field, lag = divmod(place, self.window)
        places = self.ends.numpy()[rows].astype(np.int64) + (lag - self.window + 1)
        with np.errstate(all="ignore"):
            out: np.ndarray = self.series[field].numpy()[places]
            out /= self.divisors[int(self.divisor_of[field])].numpy()[rows]
            for stage in self.stages[:, :, place].numpy():
                out -= stage[SHIFT]
                out /= stage[SCALE]
                np.clip(out, -stage[LIMIT], stage[LIMIT], out=out)
                out[np.isnan(out)] = stage[FILL]
        for change in self.later:
            change.apply_to_column(out, place)
        if self.stored is not None:
            is_stored, numbers = self.stored.find(torch.from_numpy(np.arange(len(self))[rows]))
            out[is_stored.numpy()] = self.stored.values[:, position].numpy()[numbers[is_stored].numpy()]
        return out

    def never_nan(self) -> bool:
        """True if no value can be NaN, whatever the prices. No value is read."""
        if self.later or not len(self.stages) or self._of_last_stage(FILL).isnan().any():
            return False
        return self.stored is None or not bool(self.stored.values.isnan().any())

    def always_finite(self) -> bool:
        """True if every value is finite, whatever the prices. No value is read."""
        if not self.never_nan() or any(self._of_last_stage(part).isinf().any() for part in (LIMIT, FILL)):
            return False
        return self.stored is None or bool(self.stored.values.isfinite().all())

    def _of_last_stage(self, part: int) -> Tensor:
        """A part of the last stage, for the columns of this table."""
        constants = self.stages[-1, part]
        return constants if self.selected is None else constants[self.selected]

    def _places(self, positions: np.ndarray) -> np.ndarray:
        """Places of columns of this table among the computed columns."""
        return positions if self.selected is None else self.selected.numpy()[positions]

    # ---------------------------------------------------------------- derived views
    def mapped(self, function: ColumnMap, positions: np.ndarray) -> PriceWindows:
        """The same windows with a map applied to the columns at `positions`."""
        out, places = self, self._places(positions)
        if self.stored is not None:
            values = self.stored.values.numpy().copy()
            LaterMap(function, positions).apply(values)
            out = replace(self, stored=StoredRows(self.stored.rows, torch.from_numpy(values)))
        stage = None if self.later else function.stage(places, self.computed)
        change = LaterMap(function, places)
        return replace(out, later=(*self.later, change)) if stage is None else out._with_stage(stage)

    def _with_stage(self, stage: Tensor) -> PriceWindows:
        last = self.stages[-1:]
        # A fill directly after a normalization needs no stage of its own, because a stage fills after it normalizes.
        only_fills = torch.equal(stage[:, :FILL], neutral_stage(self.computed)[:, :FILL])
        if len(last) and only_fills and bool(last[:, FILL].isnan().all()):
            merged = last.clone()
            merged[:, FILL] = stage[:, FILL]
            return replace(self, stages=torch.cat((self.stages[:-1], merged)))
        return replace(self, stages=torch.cat((self.stages, stage)))

    def select(self, positions: np.ndarray) -> PriceWindows:
        """The same rows with the columns at `positions` (int [c], ascending). Prices that none needs are left out."""
        places = self._places(positions)
        fields = np.unique(places // self.window)
        columns = (fields[:, None] * self.window + np.arange(self.window)).reshape(-1)
        later = (change.within(columns) for change in self.later)
        stored = self.stored
        if stored is not None:
            stored = StoredRows(stored.rows, stored.values[:, torch.from_numpy(positions)])
        return replace(
            self,
            series=self.series[torch.from_numpy(fields)],
            divisor_of=self.divisor_of[torch.from_numpy(fields)],
            stages=self.stages[:, :, torch.from_numpy(columns)],
            later=tuple(change for change in later if change is not None),
            selected=None if len(places) == len(columns) else torch.from_numpy(np.searchsorted(columns, places)),
            stored=stored,
        )

    def part(self, rows: slice | np.ndarray) -> PriceWindows:
        """The windows of some rows (a slice, or int64, ascending), with the prices that they read only.

        A slice does not copy the prices and divisors.
        """
        ends, series, stored = self.ends[rows], self.series, self.stored
        if len(ends):
            first, last = int(ends.min()) - self.window + 1, int(ends.max())
            ends, series = ends - first, series[:, first : last + 1]
        if stored is not None:
            place = torch.full((len(self),), -1)
            place[rows] = torch.arange(len(ends))
            places = place[stored.rows]
            remains = places >= 0
            stored = StoredRows(places[remains], stored.values[remains]) if bool(remains.any()) else None
        return replace(self, series=series, ends=ends, divisors=self.divisors[:, rows], stored=stored)

    def with_stored(self, rows: np.ndarray, values: np.ndarray) -> PriceWindows:
        """The same windows, except that `rows` (int64 [n], ascending) have the values float32 [n, C]."""
        stored = StoredRows(torch.from_numpy(rows), torch.from_numpy(values))
        if self.stored is not None and len(self.stored.rows):
            is_new = ~stored.find(self.stored.rows)[0] if len(rows) else torch.ones(len(self.stored.rows)).bool()
            merged, order = torch.cat((stored.rows, self.stored.rows[is_new])).sort()
            stored = StoredRows(merged, torch.cat((stored.values, self.stored.values[is_new]))[order])
        return replace(self, stored=stored if len(stored.rows) else None)

    @property
    def device(self) -> torch.device:
        """Device of the prices."""
        return self.series.device

    def to(self, device: torch.device, move: Callable[[Tensor], Tensor] | None = None) -> PriceWindows | Tensor:
        """The same windows on another device, on which torch's operations compute them.

        `move` copies a tensor to the device, by default with `Tensor.to`. Maps that are not stages are for the CPU, so
        windows with such a map become a tensor of all columns.
        """
        copied = move or (lambda tensor: tensor.to(device))
        if self.later:
            columns = torch.empty(self.shape, device=device)
            for start in range(0, len(self), ROW_CHUNK):
                columns[start : start + ROW_CHUNK] = torch.from_numpy(self[start : start + ROW_CHUNK]).to(device)
            return columns
        stored = self.stored
        return replace(
            self,
            series=copied(self.series),
            ends=copied(self.ends),
            divisors=copied(self.divisors),
            divisor_of=copied(self.divisor_of),
            stages=copied(self.stages),
            selected=None if self.selected is None else copied(self.selected),
            stored=None if stored is None else StoredRows(copied(stored.rows), copied(stored.values)),
        )
