"""Inputs that need more memory than there is, and arguments of the wrong structure: refused before any allocation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from qfast.data import load_prices, storage
from qfast.errors import DataError
from qfast.ops import gather_windows
from qfast.ops.temporal_conv import BlockWeights, temporal_conv_net
from qfast.ops.window_index import build_window_index


def test_a_table_with_large_gaps_states_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each instrument has a first and a last row only, and the calendar is long."""
    days = pd.date_range("2000-01-01", periods=2000)
    ends = [(days[i], f"S{i}") for i in range(100)] + [(days[-1 - i], f"S{i}") for i in range(100)]
    rows = [*ends, *((day, "FULL") for day in days)]
    frame = pd.DataFrame(rows, columns=["datetime", "instrument"]).assign(close=1.0)
    assert load_prices(frame).n_rows > 150_000
    monkeypatch.setattr(storage, "usable_memory", lambda: 1 << 20)
    with pytest.raises(
        DataError, match=r"of 101 instruments .* rows instead of 2,200; .* needs 0.0 GiB of memory, but"
    ):
        load_prices(frame)


def test_a_parquet_file_with_many_rows_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    file = tmp_path / "p.parquet"
    parquet.write_table(arrow.table({"datetime": np.zeros(10**6, np.int64), "close": np.zeros(10**6)}), file)
    monkeypatch.setattr(storage, "usable_memory", lambda: 1 << 20)
    monkeypatch.setattr(pd, "read_parquet", lambda *_: pytest.fail("the file is read"))
    with pytest.raises(DataError, match=r"p.parquet: a table of 1,000,000 rows and 2 columns needs 0.0 GiB of memory"):
        load_prices(file)


def block() -> BlockWeights:
    sizes = ((4, 2, 3), (4, 1, 1), (4,), (4, 4, 3), (4, 1, 1), (4,), (4, 2, 1), (4,))
    return BlockWeights(*(torch.ones(size) for size in sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("blocks", [None, 5, "abc", [None], [1], ["abcdef"], [(1, 2)], [(None,) * 9]], ids=repr)
def test_blocks_of_a_wrong_structure_are_refused(blocks: object, dtype: torch.dtype) -> None:
    with pytest.raises(DataError, match=r"temporal_conv_net: blocks"):
        temporal_conv_net(torch.ones(3, 2, 9, dtype=dtype), blocks)


@pytest.mark.parametrize("position", range(8))
@pytest.mark.parametrize("value", [1, "a", [1.0], np.zeros(4)], ids=["int", "text", "list", "array"])
def test_weights_that_are_not_tensors_are_refused(position: int, value: object) -> None:
    weights = list(block())
    weights[position] = value
    with pytest.raises(DataError, match=r"temporal_conv_net: blocks\[0\]"):
        temporal_conv_net(torch.ones(3, 2, 9), [BlockWeights(*weights)])


def test_operators_compile_with_symbolic_sizes() -> None:
    def gathered(panel: torch.Tensor, tables: tuple, last: torch.Tensor) -> torch.Tensor:
        return gather_windows(panel, tables, last, 3)

    def convolved(x: torch.Tensor, weights: BlockWeights) -> torch.Tensor:
        return temporal_conv_net(x, [weights])

    for function, arguments in (
        (gathered, lambda n: (torch.randn(2 * n, n), build_window_index([0] * 2 * n, range(2 * n)), torch.arange(n))),
        (convolved, lambda n: (torch.randn(n, 2, 9 + n), block())),
    ):
        compiled = torch.compile(function, dynamic=True, fullgraph=True, backend="aot_eager")
        for n in (3, 5):
            values = arguments(n)
            torch.testing.assert_close(compiled(*values), function(*values), equal_nan=True)
