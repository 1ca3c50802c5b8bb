"""Reads the rows of the next batch from a file while the current one is processed.

A shuffled batch reads windows at random places of a panel. If the panel is larger than memory, each page fault waits
for the disk, and the operating system reads many pages around it that no window needs. A request for exactly the rows
of the next batch avoids both.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from torch import Tensor

from qfast.data.storage import default_memory_limit, map_at

Part = TypeVar("Part")

__all__ = ["ReadAhead"]


class ReadAhead:
    """Requests rows of a table in a mapped file from the operating system, without waiting for them.

    Parameters
    ----------
    mapped : mmap.mmap
    begin : int
        Place of row 0 in the map, in bytes.
    row_bytes : int
        Distance of two rows in bytes.
    width : int
        Bytes of a row.
    """

    def __init__(self, mapped: mmap.mmap, begin: int, row_bytes: int, width: int) -> None:
        self.mapped, self.begin, self.row_bytes, self.width = mapped, begin, row_bytes, width

    @classmethod
    def of(cls, table: Tensor) -> ReadAhead | None:
        """None if the table [R, D] is not in a map, or if the map fits into half of the memory."""
        if table.device.type != "cpu" or not hasattr(mmap, "MADV_WILLNEED"):
            return None
        found = map_at(table.data_ptr())
        if found is None or len(found[0]) <= default_memory_limit():
            return None
        return cls(*found, table.stride(0) * table.element_size(), table.shape[1] * table.element_size())

    def one_ahead(self, parts: Iterable[Part], request: Callable[[Part], None]) -> Iterator[Part]:
        """Yield `parts`. Before each one is yielded, `request` is called with the next one.

        Meanwhile a page fault reads one page only. If memory is short, the system may ignore a request, and a fault
        would otherwise read many pages around its own.
        """
        self.mapped.madvise(mmap.MADV_RANDOM)
        try:
            waiting: list[Part] = []
            for part in parts:
                request(part)
                if waiting:
                    yield waiting.pop()
                waiting.append(part)
            yield from waiting
        finally:
            self.mapped.madvise(mmap.MADV_NORMAL)

    def request(self, first: np.ndarray, last: np.ndarray) -> None:
        """Request the rows `first` to `last` (both int64 [B]), B ranges."""
        low = (self.begin + np.maximum(first, 0) * self.row_bytes) // mmap.PAGESIZE
        high = (self.begin + last * self.row_bytes + self.width - 1) // mmap.PAGESIZE + 1
        order = np.argsort(low)
        low, high = low[order], np.maximum.accumulate(high[order])
        is_start = np.ones(len(low), dtype=bool)
        is_start[1:] = low[1:] > high[:-1]
        ends = np.append(high[:-1][is_start[1:]], high[-1:])
        for begin, end in zip(low[is_start].tolist(), ends.tolist(), strict=True):
            self.mapped.madvise(mmap.MADV_WILLNEED, begin * mmap.PAGESIZE, (end - begin) * mmap.PAGESIZE)
