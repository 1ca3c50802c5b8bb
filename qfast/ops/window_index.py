"""The index of rolling windows: three tables over the panel rows, built once for a dataset.

The native builder is csrc/window_index/window_index.cpp; the NumPy twin below serves where it is not loaded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qfast import _backend
from qfast.errors import DataError

__all__ = ["WindowIndex", "build_window_index", "self_test"]


class WindowIndex(NamedTuple):
    """Three int32 tables over the R panel rows from which every rolling window follows.

    position : rank of the row's date among the dates at which any live row exists; -1 for a dead row.
    back : distance to the previous live row of the same instrument (that row is r - back[r]); 0 = none.
    run : number of rows directly before r that are live, of the same instrument and on consecutive
        positions. Where run[r] >= T - 1 the window of r is the rows r - T + 1 .. r, one contiguous copy.
    """

    position: Tensor
    back: Tensor
    run: Tensor

    def to(self, device: Any) -> WindowIndex:
        """The same tables on `device`."""
        return WindowIndex(*(table.to(device) for table in self))


def build_window_index(instrument_codes: Any, date_codes: Any, live: Any = None) -> WindowIndex:
    """Index the rows of a panel sorted by (instrument, date), in time linear in the rows.

    Parameters
    ----------
    instrument_codes, date_codes : integer array [R]
        Codes, not timestamps: date code d is the d-th date. Strictly ascending by (instrument, date).
    live : bool array [R], optional
        Rows that exist. A dead row is in no window and its date counts only if another row lives on it.

    Returns
    -------
    WindowIndex
        int32 tables [R] on the CPU.

    Raises
    ------
    DataError
        Rows out of order, a duplicate key, a negative code, arrays of unequal length.

    Source
    ------
    Replaces the index of Qlib's TSDataSampler (`build_index`), which visits every cell in Python.

    Examples
    --------
    >>> index = build_window_index([0, 0, 0, 1], [0, 1, 3, 3])
    >>> index.position.tolist(), index.back.tolist(), index.run.tolist()
    ([0, 1, 2, 2], [0, 1, 1, 0], [0, 1, 2, 0])
    """
    instruments = _code_array("instrument_codes", instrument_codes)
    dates = _code_array("date_codes", date_codes)
    if len(instruments) != len(dates):
        raise DataError(f"instrument_codes has {len(instruments)} rows but date_codes has {len(dates)}.")
    alive = None if live is None else np.ascontiguousarray(np.asarray(live), dtype=bool)
    if alive is not None and alive.shape != dates.shape:
        raise DataError(f"live: expected shape {dates.shape}, got {alive.shape}.")
    build = _build_index_twin if _backend.native is None else _backend.native.window_index
    try:
        tables = build(instruments, dates, alive)
    except ValueError as error:
        raise DataError(str(error)) from None
    return WindowIndex(*(torch.from_numpy(table) for table in tables))


def _code_array(name: str, codes: Any) -> np.ndarray:
    array = np.asarray(codes)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise DataError(f"{name}: expected a 1-d integer array, got dtype {array.dtype}, shape {array.shape}.")
    limit = np.iinfo(np.int32).max
    if array.size and array.dtype != np.int32 and array.max() > limit:
        raise DataError(f"{name}: codes must fit int32, got {array.max()} (codes are ranks, not timestamps).")
    return np.ascontiguousarray(array, dtype=np.int32)


def _build_index_twin(instruments: np.ndarray, dates: np.ndarray, live: np.ndarray | None) -> tuple[np.ndarray, ...]:
    n = len(dates)
    for name, codes in (("instrument_codes", instruments), ("date_codes", dates)):
        if n and codes.min() < 0:
            row = int(np.argmax(codes < 0))
            raise ValueError(f"{name}[{row}] is {codes[row]}: codes are not negative.")
    key = instruments.astype(np.int64) << 32 | dates
    wrong = np.flatnonzero(key[1:] <= key[:-1])
    if wrong.size:
        row = int(wrong[0]) + 1
        what = "repeats the key of" if key[row] == key[row - 1] else "sorts before"
        raise ValueError(
            f"row {row} (instrument code {instruments[row]}, date code {dates[row]}) {what} row {row - 1} "
            f"(instrument code {instruments[row - 1]}, date code {dates[row - 1]}); rows must ascend by "
            "(instrument, date) without duplicates."
        )
    rows = np.arange(n) if live is None else np.flatnonzero(live)
    tables = [np.full(n, -1, np.int32), np.zeros(n, np.int32), np.zeros(n, np.int32)]
    if not rows.size:
        return tuple(tables)
    position = np.unique(dates[rows], return_inverse=True)[1]
    linked = instruments[rows[1:]] == instruments[rows[:-1]]
    tables[0][rows] = position
    tables[1][rows[1:]] = np.where(linked, np.diff(rows), 0)
    breaks = np.r_[True, ~(linked & (np.diff(rows) == 1) & (np.diff(position) == 1))]
    order = np.arange(len(rows))
    tables[2][rows] = order - np.maximum.accumulate(np.where(breaks, order, 0))
    return tuple(tables)


def self_test(device: torch.device) -> None:
    """Compare the builder in use with the NumPy twin; AssertionError if they differ."""
    instruments = np.repeat(np.arange(5, dtype=np.int32), 8)
    dates = np.tile(np.array([0, 1, 2, 4, 5, 6, 9, 10], dtype=np.int32), 5)
    live = (np.arange(40) * 7) % 10 > 2
    expected = _build_index_twin(instruments, dates, live)
    for name, found, table in zip(
        WindowIndex._fields, build_window_index(instruments, dates, live).to(device), expected, strict=True
    ):
        assert np.array_equal(found.cpu().numpy(), table), f"table {name}"
