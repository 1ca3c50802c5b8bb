"""The index of rolling windows: three tables over the panel rows, built once for a dataset.

The native builder is csrc/window_index/window_index.cpp. Without it, the NumPy twin below is used.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from qfast import _backend
from qfast.errors import DataError
from qfast.ops._common import check_equal, explain_memory

__all__ = ["WindowIndex", "build_window_index", "self_test"]


class WindowIndex(NamedTuple):
    """Three int32 tables [R] over the panel rows that determine every rolling window.

    Attributes
    ----------
    position : Tensor
        Rank of the row's date among all dates with a live row, or -1 for a dead row.
    back : Tensor
        Distance to the previous live row of the same instrument, which is row r - back[r]. 0 if there is none.
    run : Tensor
        Number of rows directly before r that are live, belong to the same instrument and have consecutive positions. If
        run[r] >= T - 1, the window of row r is the rows r - T + 1, ..., r, which are copied at once.
    """

    position: Tensor
    back: Tensor
    run: Tensor

    def to(self, device: torch.device | str | int) -> WindowIndex:
        """Return the tables on `device`."""
        return WindowIndex(*(table.to(device) for table in self))


@explain_memory("build_window_index", "fewer rows")
def build_window_index(
    instrument_codes: ArrayLike, date_codes: ArrayLike, live: ArrayLike | None = None
) -> WindowIndex:
    """Build the index of rolling windows for a panel sorted by (instrument, date), in time linear in the rows.

    Parameters
    ----------
    instrument_codes, date_codes : integer array [R]
        Ranks from 0: date code d is the d-th date, not a timestamp. Strictly ascending by (instrument, date).
    live : bool array [R], optional
        False for dead rows, which belong to no window. A date is counted only if it has a live row. The default is that
        all rows are live.

    Returns
    -------
    WindowIndex
        int32 tables [R] on the CPU.

    Raises
    ------
    DataError
        The rows are not sorted, a key occurs twice, a code is negative or above 2**31 - 1, or the arrays differ in
        length.
    torch.OutOfMemoryError
        Insufficient memory, on any device. The message states the size.

    Source
    ------
    Replaces the index of Qlib's TSDataSampler (`build_index`), which loops over all cells in Python.

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
    mask = None if live is None else np.ascontiguousarray(np.asarray(live), dtype=bool)
    if mask is not None and mask.shape != dates.shape:
        raise DataError(f"live: expected shape {dates.shape}, got {mask.shape}.")
    build = _build_index_twin if _backend.native is None else _backend.native.window_index
    try:
        tables = build(instruments, dates, mask)
    except ValueError as error:
        raise DataError(str(error)) from None
    return WindowIndex(*(torch.from_numpy(table) for table in tables))


def _code_array(name: str, codes: ArrayLike) -> np.ndarray:
    """Return the codes as an int32 array."""
    array = np.asarray(codes)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise DataError(f"{name}: expected a 1-d integer array, got dtype {array.dtype}, shape {array.shape}.")
    limit = np.iinfo(np.int32)
    if array.size and array.dtype != np.int32:  # a conversion to int32 would wrap other codes
        for code in (array.max(), array.min()):
            if not limit.min <= code <= limit.max:
                raise DataError(f"{name}: codes must fit into int32, got {code}. Remedy: ranks, not timestamps.")
    return np.ascontiguousarray(array, dtype=np.int32)


def _build_index_twin(instruments: np.ndarray, dates: np.ndarray, live: np.ndarray | None) -> tuple[np.ndarray, ...]:
    n = len(dates)
    for name, codes in (("instrument_codes", instruments), ("date_codes", dates)):
        if n and codes.min() < 0:
            row = int(np.argmax(codes < 0))
            raise ValueError(f"{name}[{row}] is {codes[row]}: codes are not negative. Remedy: drop rows without a key.")
    key = instruments.astype(np.int64) << 32 | dates
    wrong = np.flatnonzero(key[1:] <= key[:-1])
    if wrong.size:
        row = int(wrong[0]) + 1
        problem = "repeats the key of" if key[row] == key[row - 1] else "sorts before"
        raise ValueError(
            f"row {row} (instrument code {instruments[row]}, date code {dates[row]}) {problem} row {row - 1} "
            f"(instrument code {instruments[row - 1]}, date code {dates[row - 1]}); rows must ascend by "
            "(instrument, date) without duplicates. Remedy: sort_index() and drop duplicates."
        )
    rows = np.arange(n) if live is None else np.flatnonzero(live)
    position, back, run = np.full(n, -1, np.int32), np.zeros(n, np.int32), np.zeros(n, np.int32)
    if not rows.size:
        return position, back, run
    ranks = np.unique(dates[rows], return_inverse=True)[1]
    same_instrument = instruments[rows[1:]] == instruments[rows[:-1]]
    position[rows] = ranks
    back[rows[1:]] = np.where(same_instrument, np.diff(rows), 0)
    starts_run = np.r_[True, ~(same_instrument & (np.diff(rows) == 1) & (np.diff(ranks) == 1))]
    order = np.arange(len(rows))
    run[rows] = order - np.maximum.accumulate(np.where(starts_run, order, 0))
    return position, back, run


def self_test(device: torch.device) -> None:
    """Compare the builder in use with the NumPy twin.

    Raises
    ------
    ArithmeticError
        The tables differ.
    """
    instruments = np.repeat(np.arange(5, dtype=np.int32), 8)
    dates = np.tile(np.array([0, 1, 2, 4, 5, 6, 9, 10], dtype=np.int32), 5)
    live = (np.arange(40) * 7) % 10 > 2
    expected = _build_index_twin(instruments, dates, live)
    index = build_window_index(instruments, dates, live)
    for name, result, table in zip(WindowIndex._fields, index, expected, strict=True):
        check_equal(f"build_window_index, {name}", result, torch.from_numpy(table))
