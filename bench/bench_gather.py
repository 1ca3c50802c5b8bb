"""Rolling-window gather and index building, compared with Qlib's sampler and DataLoader.

    python -m pytest bench/bench_gather.py -s -k ratio          # the ratios, interleaved (see compare.py)
    python -m pytest bench/bench_gather.py -k shapes            # pytest-benchmark over the shape range
    python -m pytest bench/bench_gather.py -s -k bandwidth      # share of this machine's copy bandwidth

Batches are random windows of a panel larger than the caches, as a shuffled training epoch reads them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from compare import compare, copy_bandwidth, cpu_seconds

from qfast.ops import WindowIndex, build_window_index, gather_windows

BATCH, STEPS = 800, 20  # Qlib's defaults for the Alpha158 models


def codes(instruments: int, days: int) -> tuple[np.ndarray, np.ndarray]:
    """A full market; 3 % of the rows suspended."""
    instrument = np.repeat(np.arange(instruments, dtype=np.int32), days)
    date = np.tile(np.arange(days, dtype=np.int32), instruments)
    traded = np.random.default_rng(0).random(len(date)) >= 0.03
    return instrument[traded], date[traded]


@cache
def market(columns: int, instruments: int, days: int = 2500) -> tuple[torch.Tensor, WindowIndex]:
    index = build_window_index(*codes(instruments, days))
    return torch.randn(len(index.position), columns, generator=torch.Generator().manual_seed(0)), index


def batches(rows: int, size: int, count: int = 16) -> Iterator[torch.Tensor]:
    """Shuffled sample rows, `size` at a time, for ever."""
    generator = torch.Generator().manual_seed(1)
    return itertools.cycle([torch.randint(0, rows, (size,), generator=generator) for _ in range(count)])


def frame(panel: torch.Tensor, instruments: int, days: int = 2500) -> pd.DataFrame:
    instrument, date = codes(instruments, days)
    dates = pd.date_range("2010-01-01", periods=days, freq="B")
    names = np.array([f"S{i:05d}" for i in range(instruments)])
    keys = pd.MultiIndex.from_arrays([dates[date], names[instrument]], names=["datetime", "instrument"])
    return pd.DataFrame(panel.numpy().copy(), index=keys).sort_index()


def reference_batches(panel: torch.Tensor, instruments: int) -> Callable[[], object]:
    """Each call returns a batch of Qlib's sampler behind a shuffling DataLoader without workers."""
    dataset = pytest.importorskip("qlib.data.dataset", reason="pyqlib (extra qlib) is not installed")
    sampler = dataset.TSDataSampler(frame(panel, instruments), None, None, STEPS, fillna_type="ffill+bfill")
    loader = torch.utils.data.DataLoader(sampler, batch_size=BATCH, shuffle=True, drop_last=True)
    stream = iter(loader)
    return lambda: next(stream)


@pytest.mark.parametrize(("columns", "instruments", "goal"), [(21, 400, 80), (159, 100, 20)], ids=["D21", "D159"])
def test_ratio_of_a_batch(columns: int, instruments: int, goal: float) -> None:
    panel, index = market(columns, instruments)
    stream = batches(len(panel), BATCH)
    result = compare(
        lambda: gather_windows(panel, index, next(stream), STEPS),
        reference_batches(panel, instruments),
        calls=(20, 1),
    )
    print(f"\ngather B={BATCH} T={STEPS} D={columns}: {result}; {BATCH / result.ours / 1e6:.2f} M windows/s")
    assert result.ratio >= goal


def test_ratio_of_the_index() -> None:
    dataset = pytest.importorskip("qlib.data.dataset", reason="pyqlib (extra qlib) is not installed")
    instruments, days = 300, 2500
    instrument, date = codes(instruments, days)
    data = frame(torch.zeros(len(date), 1), instruments)
    by_instrument = data.swaplevel().sort_index()
    sampler = dataset.TSDataSampler

    def reference() -> None:
        sampler.idx_map2arr(sampler.build_index(by_instrument)[1])

    def whole_constructor() -> None:
        sampler(data.copy(), None, None, STEPS)

    for name, call in (("index part", reference), ("whole constructor", whole_constructor)):
        result = compare(lambda: build_window_index(instrument, date), call, rounds=2, calls=(10, 1))
        print(f"\nindex, {instruments} instruments x {days} days, against the {name}: {result}")
        assert result.ratio >= 20


@pytest.mark.parametrize(
    ("columns", "batch", "steps"), [(160, 800, 20), (159, 800, 20), (158, 800, 60), (360, 800, 20), (360, 400, 60)]
)
def test_bandwidth_of_wide_windows(columns: int, batch: int, steps: int) -> None:
    """Full-width windows of a panel without holes against a cold copy of as many bytes."""
    rows = 240_000 if columns < 300 else 120_000
    panel = torch.from_numpy(
        np.empty((rows, columns), np.float32)
    ).normal_()  # as Panel allocates: NumPy asks for huge pages
    index = build_window_index(np.repeat(np.arange(rows // 2000), 2000), np.tile(np.arange(2000), rows // 2000))
    generator = torch.Generator().manual_seed(2)
    inside = torch.arange(rows).reshape(-1, 2000)[:, steps:].flatten()
    stream = itertools.cycle([inside[torch.randint(0, len(inside), (batch,), generator=generator)] for _ in range(16)])
    torch.set_num_threads(1)
    size = batch * steps * columns * 4
    shares = []
    for _ in range(3):
        copied = copy_bandwidth(size >> 20)
        ours = min(cpu_seconds(lambda: gather_windows(panel, index, next(stream), steps), 8) for _ in range(5))
        shares.append((size / ours / 1e9 / copied, size / ours / 1e9, copied))
    share, gathered, copied = min(shares)
    print(f"\nB={batch} T={steps} D={columns}: {gathered:.1f} of {copied:.1f} GB/s copied = {share:.0%}")
    assert share >= 2 / 3


SHAPES = [
    (columns, steps, batch) for columns in (6, 21, 159, 360) for steps in (20, 60) for batch in (1, 64, 800, 8192)
]


@pytest.mark.parametrize(("columns", "steps", "batch"), SHAPES, ids=lambda v: str(v))
@pytest.mark.parametrize("layout", ["BTD", "BDT"])
def test_shapes(benchmark, columns: int, steps: int, batch: int, layout: str) -> None:
    panel, index = market(columns, 100)
    stream = batches(len(panel), batch)
    torch.set_num_threads(1)
    benchmark.extra_info["windows"] = batch
    benchmark.extra_info["bytes"] = batch * steps * columns * 4
    benchmark(lambda: gather_windows(panel, index, next(stream), steps, layout=layout))


def test_shapes_backward(benchmark) -> None:
    panel, index = market(64, 100)
    panel = panel.detach().requires_grad_()
    stream = batches(len(panel), BATCH)
    torch.set_num_threads(1)
    benchmark(lambda: gather_windows(panel, index, next(stream), STEPS).sum().backward())
