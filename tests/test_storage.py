"""Data that may exceed memory: temporary files, panels written in pieces, and equal results."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from qfast import machine
from qfast.data import (
    Alpha360,
    DataHandlerLP,
    DatasetH,
    FactorHandler,
    TSDatasetH,
    load_prices,
    sampler,
    storage,
    synthetic,
)
from qfast.data import dataset as qfast_dataset
from qfast.data.panel import Panel
from qfast.data.processors import columns as processor_columns
from qfast.data.storage import Storage, byte_count, default_memory_limit
from qfast.errors import ConfigError, DataError
from qfast.models import LSTM

FIT = {"fit_start_time": "2015-01-10", "fit_end_time": "2015-03-01"}
FEATURES = (["$close / Ref($close, 3)", "Std($close, 7)", "$vwap / $close", "Log($volume)"], ["A", "B", "C", "D"])


def step(name: str, group: object = "feature", **kwargs: object) -> dict[str, Any]:
    return {"class": name, "kwargs": {"fields_group": group, **kwargs}}


PIPELINES: dict[str, dict[str, Any]] = {
    "fitted": {"infer_processors": [step("RobustZScoreNorm"), step("Fillna")]},
    "cross-sectional": {
        "infer_processors": [step("CSZScoreNorm"), step("CSZFillna"), step("CSRankNorm", ("feature", "C"))],
        "learn_processors": ["DropnaLabel", step("CSRankNorm", "label"), step("CSZScoreNorm")],
    },
    "robust": {"infer_processors": [step("DropnaProcessor"), step("CSZScoreNorm", method="robust")]},
    "infinite": {"infer_processors": ["ProcessInf", step("MinMaxNorm"), "TanhProcess"]},
    "columns": {"infer_processors": [step("ZScoreNorm"), {"class": "DropCol", "kwargs": {"col_list": ["B"]}}]},
    "independent": {
        "shared_processors": [step("CSZFillna")],
        "infer_processors": [step("ZScoreNorm", ("feature", "D"))],
        "learn_processors": [step("CSZScoreNorm")],
        "process_type": "independent",
    },
    "raw dropped": {"infer_processors": [step("RobustZScoreNorm")], "drop_raw": True},
}


@pytest.fixture(scope="module")
def prices() -> pd.DataFrame:
    frame = synthetic.prices(7, 60, seed=2)
    frame.iloc[100:103] = np.nan
    frame.iloc[150, 4] = 0.0
    return frame


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of any size are in files, and a block has few days."""
    monkeypatch.setattr(storage, "SMALLEST_FILE", 1)
    monkeypatch.setattr(processor_columns, "DAY_BLOCK_BYTES", 3_000)


def is_mapped(values: Any) -> bool:
    while isinstance(values, np.ndarray):
        values = values.base
    return isinstance(values, (mmap.mmap, memoryview))


def assert_equal_handlers(actual: DataHandlerLP, expected: DataHandlerLP) -> None:
    for key in ("infer", "learn") if actual.drop_raw else ("raw", "infer", "learn"):
        assert actual.panel(key).content_hash() == expected.panel(key).content_hash()
    for ours, theirs in zip(actual.get_all_processors(), expected.get_all_processors(), strict=True):
        states = [{name: array.tobytes() for name, array in step.state().items()} for step in (ours, theirs)]
        assert states[0] == states[1]


# ---------------------------------------------------------------- handlers
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_factors_in_files_are_equal(prices, pipeline, small_files, tmp_path):
    kwargs = {"data": prices, "vwap": "typical", **FIT, **PIPELINES[pipeline]}
    handler = FactorHandler(FEATURES, memory_limit=0, scratch=tmp_path, **kwargs)
    assert is_mapped(handler.panel("infer").values("feature"))
    assert list(tmp_path.iterdir()) == []  # the files have no names
    assert_equal_handlers(handler, FactorHandler(FEATURES, **kwargs))


@pytest.mark.parametrize("windows", ["auto", "columns"])
def test_alpha360_in_files_is_equal(prices, windows, small_files):
    kwargs = {"data": prices, "infer_processors": [step("CSZScoreNorm"), step("Fillna")], "windows": windows}
    handler = Alpha360("all", memory_limit="1 kB", **kwargs)
    assert is_mapped(handler.panel("infer").values("feature"))
    assert_equal_handlers(handler, Alpha360("all", **kwargs))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_given_columns_in_files_are_equal(prices, pipeline, small_files, tmp_path):
    given = FactorHandler(FEATURES, data=prices, vwap="typical", learn_processors=[]).panel("raw")
    given.save(tmp_path)
    kwargs = {"start_time": "2015-01-12", **FIT, **PIPELINES[pipeline]}
    handler = DataHandlerLP(Panel.open(tmp_path), memory_limit=0, **kwargs)
    assert is_mapped(handler.panel("infer").values("feature"))
    assert_equal_handlers(handler, DataHandlerLP(given, **kwargs))


def test_blocks_of_days_are_equal_in_memory_too(prices, monkeypatch):
    kwargs = {"data": prices, **PIPELINES["cross-sectional"]}
    expected = FactorHandler(FEATURES, **kwargs)
    monkeypatch.setattr(processor_columns, "MANY_ROWS", 10)
    monkeypatch.setattr(processor_columns, "DAY_BLOCK_BYTES", 3_000)
    assert_equal_handlers(FactorHandler(FEATURES, **kwargs), expected)


def test_training_from_files_is_equal(prices, small_files):
    stages = PIPELINES["fitted"]
    losses, scores = [], []
    for limit in (0, "100 GB"):
        handler = FactorHandler(FEATURES, data=prices, vwap="typical", memory_limit=limit, **FIT, **stages)
        segments = {"train": (None, "2015-02-20"), "valid": ("2015-02-21", "2015-03-10"), "test": ("2015-03-01", None)}
        model = LSTM(d_feat=4, hidden_size=4, num_layers=1, n_epochs=2, batch_size=50, seed=0, GPU=-1, progress=False)
        dataset = DatasetH(handler, segments)
        model.fit(dataset)
        losses.append(model.history_.filter(regex="^(?!.*seconds)"))
        scores.append(model.predict(dataset))
    pd.testing.assert_series_equal(*scores, check_exact=True)
    pd.testing.assert_frame_equal(*losses, check_exact=True)


def test_the_limit_decides(monkeypatch):
    monkeypatch.setattr(storage, "SMALLEST_FILE", 1)
    prices = synthetic.prices(4, 30)
    kwargs = {"data": prices, "learn_processors": [], "infer_processors": [step("Fillna")]}
    rows = len(prices)
    for limit, in_files in ((2 * rows * 4 * 4, False), (2 * rows * 4 * 4 - 1, True)):
        handler = FactorHandler(FEATURES, memory_limit=limit, **kwargs)
        assert is_mapped(handler.panel("infer").values("feature")) == in_files
    monkeypatch.setattr(storage, "default_memory_limit", lambda: 10)
    assert is_mapped(FactorHandler(FEATURES, **kwargs).panel("infer").values("feature"))


@pytest.mark.parametrize(
    ("groups", "limited", "name"),
    [
        ("0::/\n", "", "memory.max"),  # in a container
        ("0::/user.slice/run-1.scope\n", "user.slice/run-1.scope", "memory.max"),
        ("0::/user.slice/run-1.scope\n", "user.slice", "memory.max"),  # the limit of a group above
        ("0::/host/only/on/the/host\n", "", "memory.max"),
        ("9:cpu:/\n4:memory:/job_7\n0::/\n", "memory/job_7", "memory.limit_in_bytes"),
        ("4:memory:/docker/a0\n", "memory", "memory.limit_in_bytes"),
    ],
)
def test_the_default_limit_is_that_of_the_control_group(monkeypatch, tmp_path, groups, limited, name):
    whole = default_memory_limit()
    (tmp_path / "own").write_text(groups)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "groups")
    assert default_memory_limit() >= whole
    folder = tmp_path / "groups" / limited
    folder.mkdir(parents=True)
    (folder / name).write_text("max\n")
    assert default_memory_limit() >= whole
    (folder / name).write_text("1000000\n")
    assert default_memory_limit() == 500_000 < whole


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "VAR_TMP", tmp_path)
    monkeypatch.delenv("TMPDIR", raising=False)
    assert storage.default_scratch() == tmp_path
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    assert storage.default_scratch() != tmp_path


@pytest.mark.parametrize("value", ["lots", "-1", -5, "3 parsecs", True, [], float("nan"), "inf", ""])
def test_wrong_limits_are_refused(value):
    with pytest.raises(ConfigError, match="memory_limit must be a number of bytes"):
        byte_count("memory_limit", value)


def test_units():
    assert [byte_count("x", v) for v in ("2kB", "1 MiB", "0.5 gb", 12, "7")] == [2000, 1 << 20, 500_000_000, 12, 7]


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_clear_error(prices, small_files, monkeypatch, tmp_path, fault):
    def full(*_: object) -> None:
        raise OSError(fault, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"temporary file of .* no space left on the disk. Remedy: free some space"):
        FactorHandler(FEATURES, data=prices, memory_limit=0, scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_folder_that_is_a_file(prices, small_files, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="temporary file"):
        FactorHandler(FEATURES, data=prices, memory_limit=0, scratch=tmp_path / "file")


def test_without_fallocate_space_is_reserved_by_writing(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(storage, "ZEROS", 1000)
    monkeypatch.setattr(storage, "SMALLEST_FILE", 1)
    values = Storage(tmp_path).empty((123, 7))
    values[:] = 3
    assert is_mapped(values)
    assert values.sum() == 3 * 123 * 7


MEMORY_TEST = """
import resource, sys
import numpy as np, pandas as pd
from qfast.data import DataHandlerLP
from qfast.data.panel import Panel
from qfast.data.processors import columns

columns.DAY_BLOCK_BYTES, columns.ROW_CHUNK = 4 << 20, 4096

def entry(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

panel = Panel.open(sys.argv[1])
stages = [{"class": name, "kwargs": {"fields_group": "feature"}} for name in ("ZScoreNorm", "CSZScoreNorm", "Fillna")]
limit = entry("VmData") + (60 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    handler = DataHandlerLP(panel, infer_processors=stages, fit_start_time="2000-01-01", fit_end_time="2100-01-01",
                            memory_limit=sys.argv[2], scratch=sys.argv[1] + "-scratch")
    print(handler.panel("infer").n_live)
except MemoryError:
    print("MemoryError")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_columns_larger_than_memory(tmp_path):
    """80 MB of columns and as much again of results, with 60 MB of memory for both."""
    n_dates, n_stocks = 250, 400
    index = pd.MultiIndex.from_product(
        [[f"S{i:04d}" for i in range(n_stocks)], pd.bdate_range("2020-01-01", periods=n_dates)],
        names=["instrument", "datetime"],
    )
    keys = Panel.from_frame(pd.DataFrame(index=index))
    rng = np.random.default_rng(0)
    with keys.create(tmp_path / "panel", {"feature": [f"f{i}" for i in range(200)]}) as values:
        for start in range(0, len(index), 50_000):
            values["feature"][start : start + 50_000] = rng.standard_normal((50_000, 200), dtype=np.float32)

    def outcome(limit: str) -> str:
        command = [sys.executable, "-c", MEMORY_TEST, str(tmp_path / "panel"), limit]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    assert outcome("50 MB") == str(n_dates * n_stocks)
    assert outcome("100 GB") == "MemoryError"


# ---------------------------------------------------------------- Panel.create
COLUMNS = {"feature": ["x", "y"], "label": ["z"]}


def keys_and_values(n: int = 30) -> tuple[Panel, np.ndarray]:
    keys = load_prices(synthetic.prices(3, n))
    return keys, np.random.default_rng(n).standard_normal((keys.n_rows, 3), dtype=np.float32)


def create(path: Path, keys: Panel, values: np.ndarray) -> None:
    with keys.create(path, COLUMNS) as arrays:
        for code in range(len(keys.instruments)):
            rows = keys.instrument_codes == code
            arrays["feature"][rows] = values[rows, :2]
            arrays["label"][rows] = values[rows, 2:]


def test_a_panel_written_in_pieces_equals_a_saved_one(tmp_path):
    keys, values = keys_and_values()
    create(tmp_path / "created", keys, values)
    panel = keys.only(()).with_group("feature", values[:, :2], ["x", "y"]).with_group("label", values[:, 2:], ["z"])
    assert Panel.open(tmp_path / "created").content_hash() == panel.content_hash()
    panel.save(tmp_path / "saved")
    contents = [
        {file.name: file.read_bytes() for file in (tmp_path / name).glob("contents-*/*")}
        for name in ("created", "saved")
    ]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("fault", [RuntimeError("mine"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_interrupted_creation_keeps_the_previous_panel(tmp_path, fault):
    keys, values = keys_and_values()
    create(tmp_path, keys, values)
    before = Panel.open(tmp_path).content_hash()
    later = keys_and_values(20)[0]
    expected = DataError if isinstance(fault, OSError) else type(fault)

    def interrupted() -> None:
        with later.create(tmp_path, COLUMNS) as arrays:
            arrays["feature"][:5] = 1
            raise fault

    with pytest.raises(expected, match="no space left" if isinstance(fault, OSError) else None):
        interrupted()
    assert Panel.open(tmp_path).content_hash() == before
    assert len(list(tmp_path.glob("contents-*"))) == 1


def test_a_disk_without_space_is_an_error_before_anything_is_computed(tmp_path, monkeypatch):
    keys, values = keys_and_values()
    create(tmp_path, keys, values)
    before = Panel.open(tmp_path).content_hash()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match="no space left on the disk for the panel"), keys.create(tmp_path, COLUMNS):
        pytest.fail("the body must not run")
    assert Panel.open(tmp_path).content_hash() == before


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_killed_creation_keeps_the_previous_panel(tmp_path):
    keys, values = keys_and_values()
    create(tmp_path, keys, values)
    before = Panel.open(tmp_path).content_hash()
    program = (
        "import os, signal, sys\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from test_storage import COLUMNS, keys_and_values\n"
        "with keys_and_values(20)[0].create(sys.argv[1], COLUMNS) as arrays:\n"
        "    arrays['feature'][:] = 1\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert Panel.open(tmp_path).content_hash() == before
    create(tmp_path, keys, values)
    assert len(list(tmp_path.glob("contents-*"))) == 1


# ---------------------------------------------------------------- training on a large panel
def test_large_panels_have_the_same_windows_in_less_memory(monkeypatch):
    frame = synthetic.factors(6, 40, 3, missing=0.0, seed=4)

    def windows() -> list[Any]:
        handler = DataHandlerLP(frame, learn_processors=["DropnaLabel"])
        dates = handler.panel("infer").datetimes
        dataset = TSDatasetH(handler, {"train": (None, dates[20]), "test": (dates[30], None)}, step_len=7)
        sets = [dataset.windows(*part) for part in (("train", "learn"), ("test", "infer"), ("train", "learn"))]
        results = [[w.rows.tolist(), w.history().tolist(), w.first_position, *map(list, w.index)] for w in sets]
        return [len(dataset._index_of), results]

    tables, expected = windows()
    monkeypatch.setattr(qfast_dataset, "MANY_ROWS", 10)
    monkeypatch.setattr(sampler, "HISTORY_ROWS", 1)
    assert windows() == [1, expected]
    assert tables == 2


def test_training_does_not_import_the_compiler(tmp_path):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from qfast.data import DatasetH, synthetic\n"
        "from qfast.models import LSTM\n"
        "dataset = DatasetH(synthetic.factors(4, 30, 2, missing=0.0), {'train': (None, None)})\n"
        "folder = Path(sys.argv[1])\n"
        "model = LSTM(d_feat=2, hidden_size=4, num_layers=1, n_epochs=1, seed=0, progress=False)\n"
        "model.fit(dataset, checkpoint_dir=folder)\n"
        "LSTM(d_feat=2, hidden_size=4, num_layers=1, seed=0).load_checkpoint(folder / 'last.safetensors')\n"
        "model.train_optimizer.load_state_dict(model.train_optimizer.state_dict())\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
