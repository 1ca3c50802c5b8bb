"""Reading the rows of the next batch from a mapped file ahead of time."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from qfast.data import DataHandlerLP, TSDatasetH, read_ahead
from qfast.data.panel import Panel
from qfast.data.read_ahead import ReadAhead
from qfast.data.storage import Storage, map_at
from support.fits import same_weights, small_model, weights
from support.frames import SEGMENTS, make_frame

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="no madvise")


class Advice:
    """Stands for a map and records the ranges of pages that are requested."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.modes: list[int] = []

    def madvise(self, option: int, start: int = 0, length: int = 0) -> None:
        if option == mmap.MADV_WILLNEED:
            assert start % mmap.PAGESIZE == 0
            self.ranges.append((start, start + length))
        else:
            self.modes.append(option)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("row_bytes", "width"), [(12, 12), (640, 632), (5000, 5000)])
def test_the_requested_pages_are_those_of_the_rows(seed, row_bytes, width):
    rng = np.random.default_rng(seed)
    advice, begin = Advice(), int(rng.integers(0, 9999))
    last = rng.integers(0, 5000, 200)
    first = last - rng.integers(0, 40, 200)  # below 0 at the start of the table
    ReadAhead(advice, begin, row_bytes, width).request(first, last)
    requested = set()
    for start, stop in advice.ranges:
        pages = set(range(start // mmap.PAGESIZE, stop // mmap.PAGESIZE))
        assert not requested & pages
        requested |= pages
    needed = set()
    for low, high in zip(np.maximum(first, 0), last, strict=True):
        needed |= set(
            range(
                (begin + low * row_bytes) // mmap.PAGESIZE, (begin + high * row_bytes + width - 1) // mmap.PAGESIZE + 1
            )
        )
    assert requested == needed


def test_each_part_is_requested_before_the_previous_one_is_processed():
    advice, events = Advice(), []
    reader = ReadAhead(advice, 0, 4, 4)
    for part in reader.one_ahead("abc", lambda part: events.append(f"request {part}")):
        events.append(f"process {part}")  # noqa: PERF401 - the order of events is the subject
    assert events == ["request a", "request b", "process a", "request c", "process b", "process c"]
    assert advice.modes == [mmap.MADV_RANDOM, mmap.MADV_NORMAL]


def test_an_interrupted_pass_restores_the_advice():
    advice = Advice()
    parts = ReadAhead(advice, 0, 4, 4).one_ahead("abc", lambda part: None)
    next(parts)
    parts.close()
    assert advice.modes == [mmap.MADV_RANDOM, mmap.MADV_NORMAL]


def test_the_map_of_an_array_is_known_as_long_as_it_exists(tmp_path):
    array = Storage(tmp_path).empty((1000, 1000))
    address = array.ctypes.data
    mapped, place = map_at(address + 4000)
    assert (len(mapped), place) == (4_000_000, 4000)
    del array, mapped
    assert map_at(address) is None
    assert map_at(np.zeros(10).ctypes.data) is None


def test_only_tables_larger_than_memory_are_read_ahead(tmp_path, monkeypatch):
    table = torch.from_numpy(Storage(tmp_path).empty((1000, 1000)))
    assert ReadAhead.of(table) is None
    monkeypatch.setattr(read_ahead, "default_memory_limit", lambda: 3_999_999)
    reader = ReadAhead.of(table[5:, 10:20])
    assert (reader.begin, reader.row_bytes, reader.width) == (5 * 4000 + 40, 4000, 40)
    assert ReadAhead.of(torch.zeros(1000, 1000)) is None


def test_training_and_scores_do_not_depend_on_it(tmp_path, monkeypatch):
    from qfast.models import ts

    Panel.from_frame(make_frame(70, 9, 3)).save(tmp_path / "panel")
    results = []
    for limit in (1 << 40, 0):
        monkeypatch.setattr(read_ahead, "default_memory_limit", lambda limit=limit: limit)
        panel = Panel.open(tmp_path / "panel")
        handler = DataHandlerLP.from_panels(
            {"infer": panel, "learn": panel}, {"shared": [], "infer": [], "learn": []}, start_time=None
        )
        dataset = TSDatasetH(handler, SEGMENTS, step_len=4)
        assert (dataset.windows("train", "learn")._reader is None) == (limit > 0)
        model = small_model(ts.LSTM, n_epochs=2).fit(dataset)
        results.append((weights(model), model.predict(dataset)))
    assert same_weights(results[0][0], results[1][0])
    assert results[0][1].equals(results[1][1])
