"""Runs that fail or collide, and new data that is too short: errors, logs and remaining files."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from qfast import cli
from qfast import files as files_module
from qfast.errors import ConfigError, DataError
from qfast.files import atomic_write, locked, sweep
from qfast.workflow import run as run_module
from qfast.workflow.demo import DEMO, demo_prices
from qfast.workflow.folder import RunFolder, check_table_target, read_frame
from qfast.workflow.predict import predict
from qfast.workflow.run import run
from support.workflows import factors, write_case

ONE_EPOCH = ["task.model.kwargs.n_epochs=1"]
LEFTOVER = ".history.csv.0123456789abcdef.tmp"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(workflow file, data file, finished run), made once and not changed."""
    base = tmp_path_factory.mktemp("ends")
    config, data = write_case(base)
    run(config, data, output=base / "run", seed=3)
    return config, data, base / "run"


def manifest(path):
    return json.loads((path / "manifest.json").read_text())


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


# ---------------------------------------------------------------- interrupts
def test_an_interrupt_while_data_loads_can_be_resumed(case, tmp_path, monkeypatch, caplog):
    path = tmp_path / "r"
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "qfast"):
        patch.setattr(run_module, "build_dataset", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(case[0], case[1], output=path, seed=3)
    assert manifest(path)["status"] == "interrupted"
    assert f"resume with: qfast run --resume {path}" in caplog.text
    assert cli.main(["info", str(path)]) == 0
    assert cli.main(["run", "--resume", str(path), "-q"]) == 0
    pd.testing.assert_frame_equal(read_frame(path, "pred"), read_frame(case[2], "pred"))


def test_a_frame_in_memory_must_be_passed_again(case, tmp_path, monkeypatch, caplog):
    path = tmp_path / "r"
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "qfast"):
        patch.setattr(run_module, "raw_labels", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(case[0], factors(), ONE_EPOCH, output=path)
    assert "--resume" not in caplog.text
    assert "and the same data (a DataFrame in memory)" in caplog.text
    with pytest.raises(ConfigError, match=r"was started with a DataFrame in memory, which is not stored. Remedy: pass"):
        run(resume=path)
    assert run(resume=path, data=factors()).report.exists()


def test_a_folder_without_a_config_is_not_a_run(tmp_path):
    folder = RunFolder.create(tmp_path / "r", "x")
    assert "--resume" not in folder.resume_hint()
    with pytest.raises(
        ConfigError, match=r"has no config.yaml: it ended before config.yaml was written, .* start a new run"
    ):
        run(resume=folder.path)


def test_an_interrupt_before_the_manifest_leaves_no_folder(case, tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(case[0], case[1], output=tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["write_report", "finish"])
def test_an_interrupt_at_the_very_end_is_recorded(case, tmp_path, monkeypatch, where):
    path = tmp_path / "r"
    real_report, real_finish = run_module.write_report, RunFolder.finish

    def report_then_interrupt(*args):
        real_report(*args)
        raise KeyboardInterrupt

    def finish(self, status, error=None):
        if status == "finished":
            raise KeyboardInterrupt
        real_finish(self, status, error)

    with monkeypatch.context() as patch:
        if where == "finish":
            patch.setattr(RunFolder, "finish", finish)
        else:
            patch.setattr(run_module, "write_report", report_then_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(case[0], case[1], ONE_EPOCH, output=path)
    assert (path / "report.html").exists()
    assert manifest(path)["status"] == "interrupted"
    run(resume=path)
    assert manifest(path)["status"] == "finished"


# ---------------------------------------------------------------- two processes, one folder
needs_locks = pytest.mark.skipif(files_module.fcntl is None, reason="this platform has no flock")


@needs_locks
def test_a_running_run_cannot_be_resumed(case, tmp_path):
    path = tmp_path / "run"
    command = [sys.executable, "-m", "qfast.cli", "run", str(case[0]), "--data", str(case[1]), "-o", str(path), "-q"]
    process = subprocess.Popen(
        [*command, "--set", "task.model.kwargs.n_epochs=100000", "--set", "task.model.kwargs.early_stop=100000"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 60
        while not (path / "last.safetensors").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        with pytest.raises(ConfigError, match=r"the run in '.*run' is still in progress: another process writes to it"):
            run(resume=path)
        assert process.poll() is None
        assert manifest(path)["status"] == "running"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    (path / LEFTOVER).write_text("half")  # a kill leaves the lock file, and perhaps a file it was writing
    done = len(pd.read_csv(path / "history.csv"))
    run(resume=path, sets=[f"task.model.kwargs.n_epochs={done + 1}"])
    assert manifest(path)["status"] == "finished"
    assert not [f.name for f in path.iterdir() if f.name.startswith(".")]


@needs_locks
def test_locks_end_with_their_block_and_leave_no_file(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            with pytest.raises(ConfigError, match=r"is still in progress"), locked(tmp_path):
                pass
            assert [f.name for f in tmp_path.iterdir()] == [".lock"]
        assert list(tmp_path.iterdir()) == []


@needs_locks
def test_a_removed_lock_file_locks_nothing(tmp_path, monkeypatch):
    real = files_module.fcntl.flock
    seen = []

    def flock(handle, operation):
        if not seen:
            (tmp_path / ".lock").unlink()
        seen.append(os.fstat(handle).st_ino)
        real(handle, operation)

    monkeypatch.setattr(files_module.fcntl, "flock", flock)
    with locked(tmp_path):
        assert len(seen) == 2
        assert (tmp_path / ".lock").stat().st_ino == seen[1]


def test_a_platform_without_locks_runs_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "fcntl", None)
    with locked(tmp_path), locked(tmp_path):
        assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- temporary files
def test_sweep_removes_only_qfasts_temporary_files(tmp_path):
    (tmp_path / "plots").mkdir()
    of_safetensors = ".tmp4k4dCc"
    ours = [tmp_path / LEFTOVER, tmp_path / of_safetensors, tmp_path / "plots" / ".loss.png.00000000deadbeef.tmp"]
    names = (".mine.tmp", "a.0123456789abcdef.tmp", ".a.0123.tmp", ".reserve", ".tmp", ".tmp4k4dCcX", "a.tmp4k4dCc")
    others = [tmp_path / name for name in names]
    for file in [*ours, *others]:
        file.write_text("x")
    assert sorted(sweep(tmp_path)) == sorted(ours)
    assert sorted(f for f in tmp_path.iterdir() if f.is_file()) == sorted(others)


def test_sweep_removes_the_files_of_a_killed_atomic_write(tmp_path):
    seen = []

    def write(file):
        file.write_text("half")
        shutil.copy(file, tmp_path / "kept")
        seen.append(file.name)

    atomic_write(tmp_path / "a.csv", write)
    os.rename(tmp_path / "kept", tmp_path / seen[0])
    assert [f.name for f in sweep(tmp_path)] == seen
    assert [f.name for f in tmp_path.iterdir()] == ["a.csv"]


def test_an_interrupt_at_any_call_of_atomic_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                atomic_write(tmp_path / "a", lambda file: file.write_text("x"))
        assert list(tmp_path.iterdir()) == []


def test_written_files_have_the_mode_that_the_umask_gives(tmp_path):
    atomic_write(tmp_path / "a", lambda file: file.write_text("x"))
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


# ---------------------------------------------------------------- arguments, checked before any work
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_reported(case, tmp_path, capsys, seed):
    command = ["run", str(case[0]), "--data", str(case[1]), "-o", str(tmp_path / "r")]
    assert cli.main([*command, "--seed", str(seed)]) == 2
    assert f"must be from 0 to 4294967295, got {seed}" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
    with pytest.raises(ConfigError, match=r"task.model.kwargs.seed\) must be from 0 to 4294967295, got -5"):
        run(case[0], case[1], ["task.model.kwargs.seed=-5"], output=tmp_path / "r")


def test_the_greatest_seed_is_accepted(case, tmp_path):
    assert run(case[0], case[1], ONE_EPOCH, output=tmp_path / "r", seed=2**32 - 1).report.exists()


def test_predict_checks_its_target_before_it_scores(case, tmp_path, monkeypatch, capsys):
    from qfast.workflow import predict as predict_module

    command = ["predict", str(case[2]), "--data", str(case[1]), "--out"]
    new = tmp_path / "new" / "deep" / "x.csv"
    assert cli.main([*command, str(new)]) == 0
    assert len(pd.read_csv(new)) == 840
    monkeypatch.setattr(predict_module, "predict", lambda *a, **k: pytest.fail("scored before the target was checked"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.csv").mkdir()
    for out, message in (
        (tmp_path / "x.xlsx", "must be .parquet or .csv, got 'x.xlsx'"),
        (tmp_path / "file" / "x.csv", "file' cannot be created"),
        (tmp_path / "folder.csv", "folder.csv' is a folder"),
    ):
        assert cli.main([*command, str(out)]) == 2
        assert message in capsys.readouterr().err


def test_a_target_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"is not writable. Remedy: pass another one"):
        check_table_target(tmp_path / "x.csv")


# ---------------------------------------------------------------- history
@pytest.fixture(scope="module")
def price_case(tmp_path_factory):
    """(prices, finished run) of the demo's workflow, cut short."""
    prices = demo_prices(n_instruments=25, n_days=560)
    path = tmp_path_factory.mktemp("prices") / "run"
    run(DEMO, prices, [*ONE_EPOCH, "task.model.kwargs.hidden_size=4"], output=path, seed=1)
    return prices, path


def last_days(prices, n):
    dates = prices.index.get_level_values("datetime")
    return prices[dates >= dates.unique().sort_values()[-n]]


@pytest.mark.parametrize("n_days", [1, 30, 59])
def test_scoring_without_any_whole_history_is_refused(price_case, n_days):
    prices, path = price_case
    with pytest.raises(DataError, match=rf"need 60 days, but no row .* has more than {n_days}. Remedy"):
        predict(path, last_days(prices, n_days))


def test_dates_without_enough_history_are_reported(price_case, caplog, tmp_path, capsys):
    prices, path = price_case
    recent = last_days(prices, 62)
    dates = recent.index.get_level_values("datetime").unique().sort_values()
    with caplog.at_level(logging.WARNING, "qfast"):
        scores = predict(path, recent)
    expected = f"the data begins too late for 59 of the 62 scored dates ({dates[0]:%Y-%m-%d} to {dates[58]:%Y-%m-%d}; "
    assert expected in caplog.text
    assert "the features need 60 days" in caplog.text
    assert scores.attrs["notes"][0].startswith(expected)
    recent.reset_index().to_csv(tmp_path / "recent.csv", index=False)
    command = ["predict", str(path), "--data", str(tmp_path / "recent.csv"), "--out", str(tmp_path / "s.parquet"), "-q"]
    assert cli.main(command) == 0
    assert f"warning: {expected}" in capsys.readouterr().out
    assert cli.main([*command, "--start", f"{dates[-1]:%Y-%m-%d}"]) == 0
    assert "begins too late" not in "".join(capsys.readouterr())


def test_history_before_the_start_counts_and_new_listings_are_accepted(price_case, caplog):
    prices, path = price_case
    dates = prices.index.get_level_values("datetime").unique().sort_values()
    cut = prices.drop(index=[key for key in prices.index if key[0] < dates[-5] and key[1] == prices.index[0][1]])
    with caplog.at_level(logging.WARNING, "qfast"):
        predict(path, prices, start=dates[-20])
        scores = predict(path, cut, start=dates[-5])  # one instrument listed five days ago
        predict(path, last_days(prices, 60), start=dates[-1])
    assert "begins too late" not in caplog.text
    assert scores.attrs["notes"] == []


def test_empty_rows_before_the_first_price_do_not_count_as_history(price_case):
    prices, path = price_case
    recent = last_days(prices, 80).copy()
    dates = recent.index.get_level_values("datetime")
    recent.loc[dates < dates.unique().sort_values()[-10]] = np.nan
    with pytest.raises(DataError, match=r"has more than 10"):
        predict(path, recent)


def test_rolling_windows_need_history_and_flat_samples_do_not(case, tmp_path, caplog):
    sets = [
        *ONE_EPOCH,
        "task.model.kwargs.d_feat=6",
        "task.model.module_path=qlib.contrib.model.pytorch_lstm_ts",
        "task.dataset.class=TSDatasetH",
        "task.dataset.kwargs.step_len=5",
    ]
    result = run(case[0], case[1], sets, output=tmp_path / "ts", seed=1)
    assert json.loads((tmp_path / "ts" / "model.json").read_text())["short_history"] == pytest.approx(4 / 36)
    frame = factors().drop(columns="label")
    with pytest.raises(DataError, match=r"one score need 5 days, but no row .* has more than 4"):
        predict(result.path, frame.loc["2020-03-07":])
    with caplog.at_level(logging.WARNING, "qfast"):
        predict(result.path, frame.loc["2020-03-06":], start="2020-03-10")
        assert "too late" not in caplog.text
        predict(result.path, frame.loc["2020-03-06":], start="2020-03-08")
    assert "the data begins too late for 2 of the 3 scored dates (2020-03-08 to 2020-03-09; 24 rows)" in caplog.text
    assert len(predict(case[2], frame.loc["2020-03-10":])) == 12
