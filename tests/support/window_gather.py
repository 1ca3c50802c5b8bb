"""Cases of the rolling-window gather.

A case names the shape in the project's axis letters (R panel rows, D columns, B windows, T steps) and
builds seeded inputs on any device, as slices of larger buffers, so strides are never trivial.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qfast.ops import WindowIndex, build_window_index, gather_windows, window_rows
from qfast.ops.window_gather import FILLS, LAYOUTS
from support.operator_case import F32, F64

__all__ = ["GATHER_CASES", "GatherCase", "market_codes"]


def market_codes(
    instruments: int, dates: int, *, holes: float = 0.15, dead: float = 0.1, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of a market with late listings, delistings, suspensions, and rows that a processor dropped."""
    rng = np.random.default_rng(seed)
    date, instrument = np.meshgrid(np.arange(dates), np.arange(instruments))
    first = rng.integers(0, max(dates // 3, 1), instruments)[:, None]
    last = rng.integers(dates - max(dates // 4, 1), dates, instruments)[:, None]
    exists = (date >= first) & (date <= last) & (rng.random(date.shape) >= holes)
    live = rng.random(int(exists.sum())) >= dead
    return instrument[exists].astype(np.int32), date[exists].astype(np.int32), live


@dataclass(frozen=True)
class GatherCase:
    """Arguments of one gather. `columns` None means all; `row_dtype` is the dtype of the row numbers."""

    name: str
    instruments: int = 6
    dates: int = 30
    columns_all: int = 5
    windows: int = 40
    steps: int = 8
    fill: str = "ffill+bfill"
    first_position: int = 0
    columns: tuple[int, int] | None = None
    layout: str = "BTD"
    row_dtype: torch.dtype = torch.int64
    holes: float = 0.15
    padding: int = 3  # columns of the buffer outside the panel

    def index(self, device: torch.device) -> WindowIndex:
        return build_window_index(*market_codes(self.instruments, self.dates, holes=self.holes)).to(device)

    def panel(self, device: torch.device, dtype: torch.dtype, rows: int) -> torch.Tensor:
        """[R, D] with a row stride beyond D, as panels have."""
        generator = torch.Generator().manual_seed(1)
        buffer = torch.randn(rows, self.columns_all + self.padding, generator=generator, dtype=dtype)
        return buffer.to(device)[:, self.padding // 2 : self.padding // 2 + self.columns_all]

    def last_row(self, device: torch.device, rows: int) -> torch.Tensor:
        """[B] rows in random order, with repeats and some -1."""
        generator = torch.Generator().manual_seed(2)
        last = torch.randint(-1, rows, (self.windows,), generator=generator)
        return last.to(device=device, dtype=self.row_dtype)

    def inputs(self, dtype: torch.dtype = F64) -> list[torch.Tensor]:
        """The panel. Row numbers and tables are integers and have no gradient."""
        cpu = torch.device("cpu")
        return [self.panel(cpu, F32, len(self.index(cpu).position)).to(dtype)]

    def reference(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Computes the row numbers and indexes the panel with them."""
        (panel,) = tensors
        index, last = self.index(panel.device), self.last_row(panel.device, len(panel))
        rows = window_rows(index, last, self.steps, fill=self.fill, first_position=self.first_position)
        begin, end = self.column_range
        values = panel[rows.clamp(min=0), begin:end].masked_fill((rows < 0)[..., None], torch.nan)
        return values.transpose(1, 2).contiguous() if self.transposed else values

    def operator(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        (panel,) = tensors
        index, last = self.index(panel.device), self.last_row(panel.device, len(panel))
        return gather_windows(panel, index, last, self.steps, **self.options())

    def options(self) -> dict:
        return {
            "fill": self.fill,
            "first_position": self.first_position,
            "columns": self.columns,
            "layout": self.layout,
        }

    @property
    def column_range(self) -> tuple[int, int]:
        return self.columns or (0, self.columns_all)

    @property
    def fill_code(self) -> int:
        return FILLS[self.fill]

    @property
    def transposed(self) -> bool:
        return LAYOUTS[self.layout]


GATHER_CASES = [
    *(GatherCase(f"fill-{fill}", fill=fill) for fill in FILLS),
    *(GatherCase(f"late-start-{fill}", fill=fill, first_position=11) for fill in FILLS),
    GatherCase("start-beyond-everything", first_position=999),
    GatherCase("start-negative", first_position=-5),
    GatherCase("transposed", layout="BDT"),
    GatherCase("transposed-columns", layout="BDT", columns=(1, 4), fill="none"),
    GatherCase("columns", columns=(1, 3)),
    GatherCase("one-column", columns=(4, 5)),
    GatherCase("no-columns", columns=(2, 2)),
    GatherCase("int32", row_dtype=torch.int32),
    GatherCase("one-step", steps=1),
    GatherCase("one-step-none", steps=1, fill="none", first_position=9),
    GatherCase("longer-than-history", steps=64),
    GatherCase("longer-than-history-ffill", steps=64, fill="ffill", layout="BDT"),
    GatherCase("empty-batch", windows=0),
    GatherCase("one-window", windows=1),
    GatherCase("one-instrument", instruments=1),
    GatherCase("mostly-holes", holes=0.8, dates=80),
    GatherCase("no-holes", holes=0.0, padding=0),
    # Row widths on both sides of every vector length (16, 32 and 64 bytes) and a long copy.
    *(
        GatherCase(f"width-{d}-padding-{p}", columns_all=d, padding=p)
        for d in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 33)
        for p in (0, 5)
    ),
    GatherCase("wide", columns_all=158, windows=64, steps=20, padding=1),
    GatherCase("wide-streamed", columns_all=160, windows=1800, steps=20, padding=0),  # 23 MB: larger than the caches
    GatherCase("wide-streamed-columns", columns_all=170, windows=1800, steps=20, columns=(3, 161)),
]
