"""The panel: the table of all (instrument, datetime) rows, float32, sorted by instrument and then by time.

This order makes the window of an instrument a contiguous block of rows. Each row has two int32 codes as its key. Only
`from_frame`, `to_frame` and `index` use pandas frames and indexes.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import DTypeLike

from qfast.data.date_formats import parse_dates
from qfast.dates import DateLike, is_date_only
from qfast.errors import DataError, some, suggest

if TYPE_CHECKING:
    from qfast.data.price_windows import PriceWindows

Table: TypeAlias = "np.ndarray | PriceWindows"
"""The values of a block: in memory, or computed when they are read. Both support `table[rows]` and `table.shape`."""

ROW_CHUNK = 1 << 16  # rows copied at a time, which limits temporary memory

__all__ = ["Block", "Panel", "Table", "WindowBlock", "shared_tensor"]


@dataclass(frozen=True)
class Block:
    """The columns of one group.

    Attributes
    ----------
    values : ndarray
        float32 [R, C]; float64 if `Panel.from_frame` was called with that dtype.
    columns : tuple of str
        C names.
    """

    values: np.ndarray
    columns: tuple[str, ...]

    @property
    def table(self) -> Table:
        """The values, without computing those of a `WindowBlock`."""
        return self.values


class WindowBlock(Block):
    """A block whose values are computed from prices when they are read.

    `table` reads some rows or columns. `values` computes all of them, at every access.
    """

    def __init__(self, table: PriceWindows, columns: tuple[str, ...]) -> None:
        object.__setattr__(self, "_table", table)
        object.__setattr__(self, "columns", columns)

    @property
    def values(self) -> np.ndarray:
        """All values, float32 [R, C], in a new array."""
        return self.table[:]

    @property
    def table(self) -> PriceWindows:
        """The windows of prices."""
        return self._table  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        """The shape; the values are not computed."""
        return f"WindowBlock({self.table.shape})"


@dataclass(frozen=True, eq=False)
class Panel:
    """A table with rows sorted by (instrument, datetime) and columns in named groups.

    Attributes
    ----------
    datetimes : pandas.DatetimeIndex
        Sorted unique timestamps of any frequency, with or without a time zone.
    instruments : numpy.ndarray
        Sorted unique instrument names (object).
    date_codes, instrument_codes : numpy.ndarray
        int32 [R]: position of each row's key in `datetimes` and `instruments`.
    blocks : Mapping[str, Block]
        Column groups, for example "feature", "label" or "price". Panels may share blocks, so blocks are never changed
        in place.
    live : numpy.ndarray or None
        bool [R]: False for rows that a processor dropped. None: all rows are live. Dropping rows changes only this mask
        and copies no block.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=3), ["A", "B"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"close": np.arange(6.0)}, index=index), group="price")
    >>> panel.values("price")[:, 0].tolist()
    [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]
    """

    datetimes: pd.DatetimeIndex
    instruments: np.ndarray
    date_codes: np.ndarray
    instrument_codes: np.ndarray
    blocks: Mapping[str, Block]
    live: np.ndarray | None = None

    # ---------------------------------------------------------------- construction
    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame | pd.Series,
        *,
        group: str = "feature",
        dtype: DTypeLike = np.float32,
    ) -> Panel:
        """Copy a pandas frame into a panel.

        Parameters
        ----------
        frame : DataFrame or Series
            Indexed by datetime and instrument, with the levels in either order and the rows in any order. Two-level
            columns are (group, name).
        group : str
            Group of single-level columns.
        dtype : numpy dtype
            float32 (default) or float64.

        Returns
        -------
        Panel
            R rows, all live.

        Raises
        ------
        DataError
            The index does not have these two levels, a key is missing or occurs twice, a column is not numeric, or a
            column name occurs twice.

        Examples
        --------
        >>> index = pd.MultiIndex.from_product([["A"], pd.date_range("2024-01-01", periods=2)],
        ...                                    names=["instrument", "datetime"])
        >>> Panel.from_frame(pd.DataFrame({"x": [1.0, 2.0]}, index=index)).columns("feature")
        ('x',)
        """
        if isinstance(frame, pd.Series):
            frame = frame.to_frame(name=frame.name if frame.name is not None else group)
        datetimes, date_codes, instruments, instrument_codes = _key_codes(frame.index)
        order = _sort_order(datetimes, date_codes, instruments, instrument_codes)
        if order is not None:
            date_codes, instrument_codes = date_codes[order], instrument_codes[order]
        blocks = {
            name: Block(_copy_columns(frame, positions, order, dtype), columns)
            for name, positions, columns in _column_groups(frame.columns, group)
        }
        return cls(datetimes, instruments, date_codes, instrument_codes, blocks)

    # ---------------------------------------------------------------- files
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the panel to a folder that `open` maps.

        The write is atomic: the folder contains the previous panel, if any, until the new one is complete, also if the
        process is killed or the disk is full. Memory does not grow with the size of the panel.

        Parameters
        ----------
        path : path
            A new or empty folder, or a folder with a panel, which is replaced. Processes that have opened the previous
            panel keep it.

        Raises
        ------
        DataError
            The folder contains other files, the disk has too little space, a group is neither float32 nor float64, or
            an instrument is neither text nor an integer.
        ConfigError
            Another process is saving a panel to this folder.

        Examples
        --------
        >>> import tempfile
        >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=2), ["A"]],
        ...                                    names=["datetime", "instrument"])
        >>> panel = Panel.from_frame(pd.DataFrame({"x": [1.0, 2.0]}, index=index))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     panel.save(folder)
        ...     Panel.open(folder).values("feature").tolist()
        [[1.0], [2.0]]
        """
        from qfast.data.panel_folder import save_panel

        save_panel(self, path)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Panel:
        """Map a panel that `save` has written.

        The values are read-only memory maps: all processes of a machine share one copy, and a panel may be larger than
        memory. The mask of live rows, one byte per row, is read into memory.

        Parameters
        ----------
        path : path
            The folder.
        verify : bool
            Compare the values with their checksums, which reads all of them once. False checks only the sizes of the
            files, the keys and the names.

        Returns
        -------
        Panel

        Raises
        ------
        DataError
            The folder is missing, incomplete or damaged, contains no panel, or was written in another format version or
            byte order. The message names the file.

        Examples
        --------
        See `save`.
        """
        from qfast.data.panel_folder import open_panel

        return open_panel(path, verify=verify)

    def create(
        self, path: str | os.PathLike[str], columns: Mapping[str, Sequence[str]]
    ) -> AbstractContextManager[dict[str, np.ndarray]]:
        """Write a panel with the rows of this one and new values, which may exceed memory.

        The values are computed inside the `with` statement, in any order and in pieces of any size, for example
        instrument by instrument. Afterwards the folder contains the new panel. If an error occurs, or the process is
        killed, it still contains the previous one, as with `save`.

        Parameters
        ----------
        path : path
            As in `save`.
        columns : mapping of group to names
            The column groups of the new panel.

        Returns
        -------
        context manager
            It returns a dict from group to float32 [R, C], arrays over the new files. Write every value once, and do
            not use the arrays after the `with` statement.

        Raises
        ------
        DataError, ConfigError
            As `save`. The space on the disk is reserved before the first value is written.

        Examples
        --------
        >>> import tempfile
        >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=2), ["A", "B"]],
        ...                                    names=["datetime", "instrument"])
        >>> keys = Panel.from_frame(pd.DataFrame(index=index))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with keys.create(folder, {"feature": ["x"]}) as values:
        ...         for code in range(2):
        ...             values["feature"][keys.instrument_codes == code] = code
        ...     Panel.open(folder).values("feature").tolist()
        [[0.0], [0.0], [1.0], [1.0]]
        """
        from qfast.data.panel_folder import create_panel

        return create_panel(self, path, columns)

    # ---------------------------------------------------------------- shape and access
    @property
    def n_rows(self) -> int:
        """R: number of rows, including dropped ones."""
        return len(self.date_codes)

    @property
    def n_live(self) -> int:
        """Number of live rows."""
        return self.n_rows if self.live is None else int(np.count_nonzero(self.live))

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks and key codes."""
        values = sum(b.table.nbytes for b in self.blocks.values())
        return values + self.date_codes.nbytes + self.instrument_codes.nbytes

    def block(self, group: str) -> Block:
        """The block of a group. Raises a DataError if the panel lacks the group."""
        try:
            return self.blocks[group]
        except KeyError:
            raise DataError(
                f"the panel has no column group {group!r}; it has {sorted(self.blocks)}." + suggest(group, self.blocks)
            ) from None

    def values(self, group: str) -> np.ndarray:
        """Values [R, C] of a group. They are shared and must not be changed."""
        return self.block(group).values

    def table(self, group: str) -> Table:
        """Values [R, C] of a group; windows of prices are not computed before they are read."""
        return self.block(group).table

    def columns(self, group: str) -> tuple[str, ...]:
        """C column names of a group."""
        return self.block(group).columns

    def column(self, name: str, group: str | None = None) -> np.ndarray:
        """One column [R] of `group`, or of the first group that has it. Raises a DataError if none has it."""
        groups = [group] if group is not None else list(self.blocks)
        for g in groups:
            if name in self.block(g).columns:
                return self.table(g)[:, self.columns(g).index(name)]
        columns = [c for g in groups for c in self.blocks[g].columns]
        raise DataError(f"the panel has no column {name!r}; it has [{some(columns)}]." + suggest(name, columns))

    def live_rows(self) -> np.ndarray:
        """int64 row numbers of the live rows, ascending."""
        return np.arange(self.n_rows) if self.live is None else np.flatnonzero(self.live)

    def live_dates(self) -> np.ndarray:
        """bool [D]: True for the datetimes of at least one live row."""
        present = np.zeros(len(self.datetimes), dtype=bool)
        for start in range(0, self.n_rows, ROW_CHUNK):
            codes = self.date_codes[start : start + ROW_CHUNK]
            present[codes if self.live is None else codes[self.live[start : start + ROW_CHUNK]]] = True
        return present

    def index(self, rows: np.ndarray | None = None) -> pd.MultiIndex:
        """(datetime, instrument) keys of `rows` in their order. Default: all live rows."""
        rows = self.live_rows() if rows is None else rows
        return pd.MultiIndex(
            levels=[self.datetimes, pd.Index(self.instruments)],  # type: ignore[list-item]
            codes=[self.date_codes[rows], self.instrument_codes[rows]],
            names=["datetime", "instrument"],
            verify_integrity=False,
        )

    def date_code_range(self, start: DateLike | None = None, end: DateLike | None = None) -> tuple[int, int]:
        """Half-open range of date codes with start <= datetime <= end. None is unbounded.

        An `end` without a time of day ("2020-12-31", datetime.date) includes that whole day.
        """
        low = 0 if start is None else int(self.datetimes.searchsorted(self.timestamp(start, "start"), "left"))
        if end is None:
            return low, len(self.datetimes)
        stamp = self.timestamp(end, "end")
        if is_date_only(end):
            stamp = stamp + pd.Timedelta(days=1)
            return low, max(low, int(self.datetimes.searchsorted(stamp, "left")))
        return low, max(low, int(self.datetimes.searchsorted(stamp, "right")))

    def rows_between(self, start: DateLike | None = None, end: DateLike | None = None) -> np.ndarray:
        """Live rows with start <= datetime <= end, int64, ascending."""
        low, high = self.date_code_range(start, end)
        inside = (self.date_codes >= low) & (self.date_codes < high)
        if self.live is not None:
            inside &= self.live
        return np.flatnonzero(inside)

    def by_date(self, rows: np.ndarray) -> np.ndarray:
        """`rows` sorted by (datetime, instrument), the order of Qlib's frames."""
        return rows[np.argsort(self.date_codes[rows], kind="stable")]

    # ---------------------------------------------------------------- derived panels
    def replace(self, group: str, values: np.ndarray, columns: Sequence[str] | None = None) -> Panel:
        """A panel with new `values` [R, C] and optionally new `columns` of a group. Other blocks are shared."""
        names = self.block(group).columns if columns is None else tuple(columns)
        if values.shape != (self.n_rows, len(names)):
            raise DataError(
                f"values of group {group!r} must have shape {(self.n_rows, len(names))}, got {values.shape}."
            )
        return replace(self, blocks={**self.blocks, group: Block(values, names)})

    def with_block(self, group: str, block: Block) -> Panel:
        """A panel with another block [R, C] for a group. Other blocks are shared."""
        return replace(self, blocks={**self.blocks, group: block})

    def with_group(self, group: str, values: np.ndarray, columns: Sequence[str]) -> Panel:
        """A panel with an additional column group `group` of `values` [R, C]."""
        return replace(self, blocks={**self.blocks, group: Block(values, ())}).replace(group, values, columns)

    def only(self, groups: Iterable[str]) -> Panel:
        """A panel with only these groups, whose blocks are shared."""
        return replace(self, blocks={g: self.block(g) for g in groups})

    def keep(self, mask: np.ndarray) -> Panel:
        """A panel in which the live rows r with mask[r] (bool [R]) remain live. Blocks are shared."""
        live = mask if self.live is None else (self.live & mask)
        return replace(self, live=live)

    def to_frame(
        self,
        groups: str | Sequence[str] | None = None,
        rows: np.ndarray | None = None,
    ) -> pd.DataFrame:
        """Copy rows and column groups into a frame.

        Parameters
        ----------
        groups : str or sequence of str, optional
            One name: a frame with single-level columns. A list, or None for all groups: two-level columns.
        rows : int64 [M], optional
            Default: all live rows, sorted by (datetime, instrument).

        Returns
        -------
        DataFrame
            Indexed (datetime, instrument).
        """
        rows = self.by_date(self.live_rows()) if rows is None else rows
        names = list(self.blocks) if groups is None else ([groups] if isinstance(groups, str) else list(groups))
        values = np.concatenate([self.table(g)[rows] for g in names], axis=1)
        if isinstance(groups, str):
            columns = pd.Index(self.columns(groups))
        else:
            columns = pd.MultiIndex.from_tuples([(g, c) for g in names for c in self.columns(g)])
        return pd.DataFrame(values, index=self.index(rows), columns=columns, copy=False)

    def content_hash(self) -> str:
        """Hexadecimal digest of keys, column names and values. Equal panels have equal digests."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(self.datetimes.as_unit("ns").asi8.tobytes())
        digest.update("\x1f".join(map(str, self.instruments)).encode())
        for codes in (self.date_codes, self.instrument_codes, self.live):
            if codes is not None:
                digest.update(np.ascontiguousarray(codes).data)
        for name in sorted(self.blocks):
            digest.update("\x1f".join((name, *self.blocks[name].columns)).encode())
            values = self.blocks[name].table
            for start in range(0, len(values), ROW_CHUNK):
                digest.update(np.ascontiguousarray(values[start : start + ROW_CHUNK]).data)
        return digest.hexdigest()

    def timestamp(self, value: DateLike, name: str) -> pd.Timestamp:
        """`value` as a timestamp in the panel's time zone.

        Parameters
        ----------
        value : date-like
        name : str
            The argument's name, for the message.

        Raises
        ------
        DataError
            The value is not a date or time.
        """
        try:
            stamp = pd.Timestamp(value)
        except (ValueError, TypeError) as error:
            raise DataError(f"{name} is {value!r}, which is not a date or time: {error}") from None
        zone = self.datetimes.tz
        if zone is not None:
            return stamp.tz_localize(zone) if stamp.tz is None else stamp.tz_convert(zone)
        return stamp if stamp.tz is None else stamp.tz_localize(None)


def shared_tensor(values: np.ndarray) -> torch.Tensor:
    """A tensor that shares the memory of `values`, which may be read-only. It must not be changed in place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)


# ---------------------------------------------------------------- helpers of from_frame
def _key_codes(index: pd.Index) -> tuple[pd.DatetimeIndex, np.ndarray, np.ndarray, np.ndarray]:
    """Sorted unique datetimes and instruments of the index, and each row's int32 codes."""
    if not isinstance(index, pd.MultiIndex) or index.nlevels != 2:
        raise DataError(
            "the index of the frame must have the two levels (datetime, instrument), got "
            f"{type(index).__name__} with level names {list(index.names)}. Remedy: "
            "frame.set_index(['datetime', 'instrument'])."
        )
    names = list(index.names)
    date_level = names.index("datetime") if "datetime" in names else None
    if date_level is None and "instrument" in names:
        date_level = 1 - names.index("instrument")
    if date_level is None:
        date_level = 0 if _looks_like_dates(index.levels[0]) or not _looks_like_dates(index.levels[1]) else 1
    dates, date_codes = _sorted_level(index, date_level, "datetime")
    instruments, instrument_codes = _sorted_level(index, 1 - date_level, "instrument")
    stamps = _to_datetimes(dates)
    if not stamps.is_monotonic_increasing or not stamps.is_unique:
        # Dates as text may sort differently from time ("12/1/2019" < "2/1/2020") and have several spellings.
        unique = stamps.unique().sort_values()
        date_codes = unique.get_indexer(stamps).astype(np.int32)[date_codes]
        stamps = unique
    return stamps, date_codes, np.asarray(instruments, dtype=object), instrument_codes


def _looks_like_dates(level: pd.Index) -> bool:
    return isinstance(level, pd.DatetimeIndex) or (len(level) > 0 and isinstance(level[0], dt.date))


def _sorted_level(index: pd.MultiIndex, level: int, what: str) -> tuple[pd.Index, np.ndarray]:
    codes = np.asarray(index.codes[level])
    if len(codes) and codes.min() < 0:
        row = int(np.argmax(codes < 0))
        raise DataError(f"row {row} of the frame has no {what} (missing value in the index).")
    used = np.zeros(len(index.levels[level]), dtype=bool)
    used[codes] = True
    values = index.levels[level][used]
    renumber = np.cumsum(used) - 1
    try:
        order = np.argsort(np.asarray(values), kind="stable")
    except TypeError:
        kinds = sorted({type(v).__name__ for v in values})
        raise DataError(f"index level {what!r} mixes types that cannot be sorted: {kinds}.") from None
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return values[order], rank[renumber[codes]] if len(codes) else codes.astype(np.int32)


def _to_datetimes(values: pd.Index) -> pd.DatetimeIndex:
    if isinstance(values, pd.DatetimeIndex):
        return values.rename(None)
    if len(values) and not isinstance(values[0], (str, dt.date)):
        raise DataError(
            f"index level 'datetime' must contain dates, got {type(values[0]).__name__} ({values[0]!r}). Remedy: "
            "convert it with pandas.to_datetime first (pass the format for numbers such as 20240131)."
        )
    try:
        return parse_dates(pd.Series(values, name="datetime"), "the frame").rename(None)
    except DataError as error:
        raise DataError(
            f"index level 'datetime' cannot be parsed as dates: {error} In Python, convert the index with "
            "pandas.to_datetime(..., format=...)."
        ) from None


def _sort_order(
    datetimes: pd.DatetimeIndex, date_codes: np.ndarray, instruments: np.ndarray, instrument_codes: np.ndarray
) -> np.ndarray | None:
    """Order that sorts the rows by (instrument, datetime); None if they are sorted. Duplicate keys are an error."""
    key = instrument_codes.astype(np.int64) * max(len(datetimes), 1) + date_codes
    steps = np.diff(key)
    if steps.size == 0 or steps.min() > 0:
        return None
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    if same.size:
        first, second = sorted((int(order[same[0]]), int(order[same[0] + 1])))
        raise DataError(
            f"duplicate key: rows {first} and {second} are both (datetime {datetimes[date_codes[first]]}, instrument "
            f"{instruments[instrument_codes[first]]!r}); {same.size} duplicate rows in all. Remedy: "
            "frame[~frame.index.duplicated(keep='last')]."
        )
    return order


def _column_groups(columns: pd.Index, group: str) -> list[tuple[str, list[int], tuple[str, ...]]]:
    """(group, column positions, names) in order of first appearance."""
    if columns.nlevels > 2:
        raise DataError(f"columns must have one level (name) or two (group, name), got {columns.nlevels} levels.")
    pairs = [(str(c[0]), str(c[1])) if columns.nlevels == 2 else (group, str(c)) for c in columns]
    seen: set[tuple[str, str]] = set()
    positions_of: dict[str, list[int]] = {}
    for position, pair in enumerate(pairs):
        if pair in seen:
            raise DataError(f"column {pair[1]!r} occurs twice in group {pair[0]!r}. Remedy: rename or drop one.")
        seen.add(pair)
        positions_of.setdefault(pair[0], []).append(position)
    return [(name, positions, tuple(pairs[p][1] for p in positions)) for name, positions in positions_of.items()]


def _copy_columns(frame: pd.DataFrame, positions: list[int], order: np.ndarray | None, dtype: DTypeLike) -> np.ndarray:
    """C-ordered copy [R, C] of some columns, with the rows in the order `order`."""
    part = frame.iloc[:, positions]
    for name, kind in zip(part.columns, part.dtypes, strict=True):
        if not pd.api.types.is_numeric_dtype(kind) or pd.api.types.is_complex_dtype(kind):
            raise DataError(f"column {name!r} has dtype {kind}, which is not numeric. Remedy: drop or convert it.")
    out = np.empty((len(part), len(positions)), dtype=dtype)
    if len({str(kind) for kind in part.dtypes}) == 1 and isinstance(part.dtypes.iloc[0], np.dtype):
        source = part.to_numpy(copy=False)
        for start in range(0, len(part), ROW_CHUNK):
            stop = min(start + ROW_CHUNK, len(part))
            out[start:stop] = source[start:stop] if order is None else source[order[start:stop]]
        return out
    for j in range(len(positions)):
        column = part.iloc[:, j].to_numpy(dtype=dtype, na_value=np.nan)
        out[:, j] = column if order is None else column[order]
    return out
