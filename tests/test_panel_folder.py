"""Panel folders: equality after a round trip, damage, interrupted writes, concurrent readers and writers."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfast.data import array_files, load_prices, panel_folder, synthetic
from qfast.data.dataset import TSDatasetH
from qfast.data.handlers import DataHandlerLP
from qfast.data.panel import Panel, shared_tensor
from qfast.errors import ConfigError, DataError, QfastError
from qfast.workflow.dataset import source_arguments


def make_panel(rows: int = 40, columns: int = 3, *, dtype: type = np.float32, tz: str | None = None) -> Panel:
    """A panel of two instruments with NaN and infinity, a label and some dropped rows."""
    dates = pd.date_range("2024-01-01", periods=rows // 2, tz=tz, unit="ns")
    index = pd.MultiIndex.from_product([["A", "B"], dates], names=["instrument", "datetime"])
    values = np.random.default_rng(3).normal(size=(len(index), columns + 1))
    values[1, 0], values[2, 0] = np.nan, np.inf
    names = [("feature", f"f{i}") for i in range(columns)] + [("label", "LABEL0")]
    frame = pd.DataFrame(values, index=index, columns=pd.MultiIndex.from_tuples(names))
    panel = Panel.from_frame(frame, dtype=dtype)
    return panel.keep(np.arange(panel.n_rows) % 7 != 0)


def assert_equal(actual: Panel, expected: Panel) -> None:
    """Asserts that two panels are equal to the bit."""
    assert actual.content_hash() == expected.content_hash()
    assert actual.datetimes.equals(expected.datetimes)
    assert actual.datetimes.tz == expected.datetimes.tz
    assert actual.datetimes.unit == expected.datetimes.unit
    assert actual.instruments.tolist() == expected.instruments.tolist()
    assert list(actual.blocks) == list(expected.blocks)
    for name, block in expected.blocks.items():
        assert actual.columns(name) == block.columns
        assert actual.values(name).dtype == block.values.dtype


# ---------------------------------------------------------------- round trips
@pytest.mark.parametrize("tz", [None, "UTC", "Asia/Shanghai", "America/New_York", "+05:30"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_round_trip_keeps_every_bit(tmp_path: Path, tz: str | None, dtype: type) -> None:
    panel = make_panel(tz=tz, dtype=dtype)
    panel.save(tmp_path / "panel")
    assert_equal(Panel.open(tmp_path / "panel"), panel)
    assert_equal(Panel.open(tmp_path / "panel", verify=False), panel)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 4),
    group=st.text(min_size=1, max_size=8),
    name=st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    chunk=st.sampled_from([1, 16, 64, 1 << 20]),
    transposed=st.booleans(),
)
def test_any_shape_name_and_memory_order(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    columns: int,
    group: str,
    name: str,
    chunk: int,
    transposed: bool,
) -> None:
    values = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    values = np.asfortranarray(values) if transposed else values
    base = make_panel(rows=20)
    keys = replace(
        base, date_codes=np.arange(rows, dtype=np.int32), instrument_codes=np.zeros(rows, np.int32), live=None
    )
    panel = replace(keys, instruments=np.array([name], dtype=object), blocks={})
    panel = panel.with_group(group, values, [f"{i} {name}" for i in range(columns)])
    folder = tmp_path_factory.mktemp("any") / "panel"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_files, "CHECKSUM_BYTES", chunk)
        panel.save(folder)
        assert_equal(Panel.open(folder), panel)


def test_the_values_are_mapped_and_read_only(tmp_path: Path) -> None:
    panel = make_panel()
    panel.save(tmp_path)
    values = Panel.open(tmp_path).values("feature")
    with pytest.raises(ValueError, match="read-only"):
        values[0, 0] = 1
    shared_tensor(values)[0, 0] = 1  # a stray write through a tensor stays in this process
    assert_equal(Panel.open(tmp_path), panel)


def test_a_mapped_panel_trains_as_one_in_memory(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    panel = Panel.from_frame(synthetic.factors(4, 30, 5))
    panel.save(tmp_path)
    windows = []
    for source in (panel, Panel.open(tmp_path)):
        dataset = TSDatasetH(5, handler=DataHandlerLP(source), segments={"train": (None, None)})
        sampler = dataset.prepare("train", col_set=["feature", "label"])
        windows.append(sampler[list(range(len(sampler)))])
    np.testing.assert_array_equal(*windows)
    assert not [w for w in recwarn if "not writable" in str(w.message)]


def test_a_panel_folder_is_a_source_of_prices_and_of_factors(tmp_path: Path) -> None:
    prices = load_prices(synthetic.prices(3, 70))
    prices.save(tmp_path / "prices")
    assert_equal(load_prices(tmp_path / "prices"), prices)
    Panel.from_frame(synthetic.factors(4, 30, 5)).save(tmp_path / "factors")
    kwargs = {"class": "DataHandlerLP", "kwargs": {}}
    source = source_arguments(kwargs, tmp_path / "factors")
    assert_equal(DataHandlerLP(**source).panel("infer"), Panel.open(tmp_path / "factors"))


# ---------------------------------------------------------------- damage and foreign folders
def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "longer", "missing"])
def test_every_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    make_panel().save(tmp_path / "good")
    files = files_of(tmp_path / "good")
    assert len(files) == 9
    for file in files:
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "good", copy)
        target = copy / file.relative_to(tmp_path / "good")
        data = bytearray(target.read_bytes())
        if damage == "flipped bit":
            data[len(data) // 2] ^= 4
        target.write_bytes({"truncated": data[:-1], "longer": data + b"0"}.get(damage, data))
        if damage == "missing":
            target.unlink()
        with pytest.raises(DataError, match=r"Remedy: .*[Ss]ave") as error:
            Panel.open(copy)
        assert target.name in str(error.value) or "incomplete" in str(error.value)
        shutil.rmtree(copy)


def test_without_verification_only_flipped_values_pass(tmp_path: Path) -> None:
    make_panel().save(tmp_path)
    file = next(tmp_path.rglob("block-0.values"))
    data = bytearray(file.read_bytes())
    data[8] ^= 1
    file.write_bytes(data)
    Panel.open(tmp_path, verify=False)
    with pytest.raises(DataError, match="rows 0 to 39 do not match their checksum"):
        Panel.open(tmp_path)


def change_header(folder: Path, **changes: object) -> None:
    header = json.loads((folder / "panel.json").read_text())
    header.update(changes)
    header["digest"] = panel_folder._digest_of(header)
    (folder / "panel.json").write_text(json.dumps(header))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "format version 1; this release reads the versions 2 and 3"),
        ({"byte_order": "big"}, "in 'big' byte order, and this machine needs 'little'"),
        ({"format": "other"}, "does not describe a panel of qfast"),
        ({"contents": "../elsewhere"}, "is damaged"),
        ({"contents": "contents-0"}, "is incomplete: 'contents-0' lacks files"),
    ],
)
def test_a_foreign_header_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    make_panel().save(tmp_path)
    change_header(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        Panel.open(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\x00\xff"])
def test_a_header_that_is_not_one_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "panel.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"panel\.json"):
        Panel.open(tmp_path)


def test_missing_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        Panel.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"is not a panel folder: it has no panel\.json"):
        Panel.open(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"contains other files, for example 'notes\.txt'"):
        make_panel().save(tmp_path)
    with pytest.raises(DataError, match="is a file"):
        make_panel().save(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    panel = make_panel()
    folder = tmp_path / "panel"
    with pytest.raises(DataError, match=r"instruments that are text or integers, got 1\.5"):
        replace(panel, instruments=np.array([1.5, 2.5], dtype=object)).save(folder)
    with pytest.raises(DataError, match="group 'feature' is int64"):
        panel.replace("feature", np.zeros((40, 3), dtype=np.int64)).save(folder)
    assert files_of(folder) == []
    assert [p for p in folder.iterdir() if p.is_dir()] == []


# ---------------------------------------------------------------- interrupted and concurrent writes
def test_the_disk_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panel = make_panel()
    panel.save(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 100))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"has 0\.00 GB left"):
        make_panel(80).save(tmp_path)
    assert_equal(Panel.open(tmp_path), panel)


@pytest.mark.parametrize("failing_call", range(9))
@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_keeps_the_previous_panel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int, fault: BaseException
) -> None:
    previous, new = make_panel(), make_panel(80)
    previous.save(tmp_path)
    calls = [0]
    sync = os.fsync

    def fsync(handle: int) -> None:
        calls[0] += 1
        if calls[0] == failing_call + 1:
            raise fault
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    error, message = (QfastError, "no space left") if isinstance(fault, OSError) else (KeyboardInterrupt, None)
    with pytest.raises(error, match=message):
        new.save(tmp_path)
    monkeypatch.undo()
    panel = Panel.open(tmp_path)
    assert_equal(panel, new if panel.n_rows == 80 else previous)
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 1  # the incomplete contents are removed


def test_a_killed_write_keeps_the_previous_panel_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    previous = make_panel()
    previous.save(tmp_path)
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from test_panel_folder import make_panel\n"
        "sync, left = os.fsync, [int(sys.argv[3])]\n"
        "def fsync(handle):\n"
        "    left[0] -= 1\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if left[0] == 0 else sync(handle)\n"
        "os.fsync = fsync\n"
        "make_panel(80).save(sys.argv[1])\n"
    )
    for step in (2, 6):
        command = [sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parent), str(step)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert_equal(Panel.open(tmp_path), previous)
    make_panel(60).save(tmp_path)
    assert_equal(Panel.open(tmp_path), make_panel(60))
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 1


def test_a_replaced_panel_stays_readable_where_it_is_open(tmp_path: Path) -> None:
    first, second = make_panel(), make_panel(80)
    first.save(tmp_path)
    mapped = Panel.open(tmp_path)
    second.save(tmp_path)
    assert_equal(mapped, first)
    assert_equal(Panel.open(tmp_path), second)


def test_a_panel_that_is_replaced_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_panel(), make_panel(80)
    first.save(tmp_path)
    read = panel_folder._read_header

    def read_then_replace(folder: Path) -> dict[str, object]:
        header = read(folder)
        monkeypatch.undo()
        second.save(tmp_path)
        return header

    monkeypatch.setattr(panel_folder, "_read_header", read_then_replace)
    assert_equal(Panel.open(tmp_path), second)


@pytest.mark.skipif(os.name != "posix", reason="this platform has no folder locks")
def test_two_writers_exclude_each_other(tmp_path: Path) -> None:
    panel = make_panel()
    panel.save(tmp_path)
    with panel_folder.locked(tmp_path, "panel"), pytest.raises(ConfigError, match=r"the panel in .* is still in prog"):
        panel.save(tmp_path)
    assert_equal(Panel.open(tmp_path), panel)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_saving_and_opening_use_little_memory(tmp_path: Path) -> None:
    panel = make_panel(200, 3)
    rows = 200_000  # 128 MB of float32 values, twice
    big = replace(
        panel,
        date_codes=np.zeros(rows, np.int32),
        instrument_codes=np.zeros(rows, np.int32),
        live=None,
        blocks={},
    ).with_group("feature", np.broadcast_to(np.float32(1), (rows, 160)), [str(i) for i in range(160)])

    def anonymous_mb() -> float:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Anonymous:"))

    before = anonymous_mb()
    big.save(tmp_path)
    mapped = Panel.open(tmp_path)
    assert mapped.values("feature").sum() == rows * 160
    assert anonymous_mb() - before < 40
