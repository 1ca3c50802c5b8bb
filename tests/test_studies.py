"""Studies: runs equal to `qfast run`, the table and the summary, resuming, failures, and everything that is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qfast import cli, study
from qfast.errors import ConfigError
from qfast.studies import fork_server, tasks
from qfast.studies.combine import combined, run_scores
from qfast.studies.fork_server import ForkServer
from qfast.studies.local import ForkedProcess, LocalEngine
from qfast.studies.plots import curves_plot
from qfast.studies.results import markdown_summary, summarize
from qfast.workflow.folder import read_frame
from qfast.workflow.prepared import PreparedData, data_key
from qfast.workflow.run import run
from support.workflows import Interrupt, factors, write_case

KWARGS = "task.model.kwargs"
LR = f"{KWARGS}.lr"
SETS = [f"{KWARGS}.n_epochs=2"]
HERE = {"on": "inline", "quiet": True}


pytestmark = pytest.mark.usefixtures("undrawn_plots")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(workflow file, data file)."""
    return write_case(tmp_path_factory.mktemp("studies"))


@pytest.fixture(scope="module")
def done(case, tmp_path_factory):
    """A finished study of two seeds and two learning rates, which is not changed."""
    folder = tmp_path_factory.mktemp("done") / "study"
    return study(*case, SETS, output=folder, seeds=[3, 5], grid={LR: [1e-2, 1e-3]}, **HERE)


def table(folder) -> bytes:
    return (Path(folder) / "table.csv").read_bytes()


def same_run(one: Path, other: Path) -> None:
    """Two run folders have equal results, to the bit."""
    for name in ("best.safetensors", "metrics.json", "daily.csv", "config.yaml", "processors.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for stem in ("pred", "label"):
        pd.testing.assert_frame_equal(read_frame(one, stem), read_frame(other, stem), check_exact=True)


# ---------------------------------------------------------------- results
def test_runs_equal_those_of_qfast_run(case, done, tmp_path):
    assert done.failed == 0
    assert done.table["seed"].tolist() == [3, 5, 3, 5]
    assert done.table[LR].tolist() == [1e-2, 1e-2, 1e-3, 1e-3]
    for number, (rate, seed) in enumerate([(1e-2, 3), (1e-2, 5), (1e-3, 3), (1e-3, 5)]):
        alone = run(*case, [*SETS, f"{LR}={rate}"], output=tmp_path / str(number), seed=seed)
        same_run(done.path / "runs" / f"{number:03d}", alone.path)
        row = done.table.iloc[number]
        assert row["test.rank_ic"] == alone.metrics["test"]["Rank IC"]
        manifests = [
            json.loads((p / "manifest.json").read_text()) for p in (alone.path, done.path / f"runs/{number:03d}")
        ]
        assert manifests[0]["data"] == manifests[1]["data"]


def test_the_workflow_of_a_run_repeats_it(case, done, tmp_path):
    alone = run(done.path / "workflows" / "001.yaml", case[1], output=tmp_path / "r", seed=5)
    same_run(done.path / "runs" / "003", alone.path)


def test_summary_has_means_and_deviations(done):
    rows = done.table[done.table[LR] == 1e-2]
    summary = done.summary.loc["lr=0.01"]
    assert summary["IC"] == pytest.approx(rows["test.ic"].mean())
    assert summary["IC std"] == pytest.approx(rows["test.ic"].std(ddof=1))
    text = (done.path / "summary.md").read_text()
    assert text.startswith("| Model Name | Dataset | IC | ICIR | Rank IC | Rank ICIR | Annualized Return |")
    assert f"| lr=0.01 | DataHandlerLP | {rows['test.ic'].mean():.4f}±{rows['test.ic'].std():.2f} |" in text
    assert pd.read_csv(done.path / "summary.csv", index_col="name").loc["lr=0.01, ensemble", "runs"] == 1


def test_ensemble_is_the_mean_of_daily_ranks(done):
    members = [read_frame(done.path / "runs" / n, "pred") for n in ("000", "001")]
    ranks = [m[m["segment"] == "test"]["score"].groupby(level="datetime").rank(pct=True) for m in members]
    expected = (ranks[0] + ranks[1]) / 2
    scores = read_frame(done.path / "ensembles" / "000", "pred")
    actual = scores[scores["segment"] == "test"]["score"]
    pd.testing.assert_series_equal(actual, expected.reindex(actual.index), check_names=False, rtol=1e-6)
    metrics = json.loads((done.path / "ensembles" / "000" / "metrics.json").read_text())
    assert done.summary.loc["lr=0.01, ensemble", "Rank IC"] == pytest.approx(metrics["test"]["Rank IC"])


def test_zscores_ignore_constant_days(done):
    scores = run_scores(done.path / "runs" / "000")
    constant = {name: rows._replace(score=rows.score * 0) for name, rows in scores.items()}
    both = combined([scores, constant], "zscore")["test"].score
    days = scores["test"].score.astype(float).groupby(level="datetime")
    expected = (scores["test"].score - days.transform("mean")) / days.transform("std", ddof=0)
    np.testing.assert_allclose(both, expected.reindex(both.index), rtol=1e-6)


def test_markdown_has_the_format_of_qlib():
    rows = [{"test.ic": 0.04, "test.icir": 0.3, "1day.excess_return_with_cost.max_drawdown": -0.1}]
    text = markdown_summary(summarize({"LSTM": [*rows, {**rows[0], "test.ic": 0.06}]}), "Alpha158")
    assert text.splitlines()[2] == "| LSTM | Alpha158 | 0.0500±0.01 | 0.3000±0.00 | - | - | - | - | -0.1000±0.00 |"


# ---------------------------------------------------------------- shared data
def test_data_is_prepared_once_for_each_handler(case, tmp_path, monkeypatch):
    prepared = []
    write = PreparedData.write

    def counted(path, workflow, *arguments):
        prepared.append(data_key(workflow))
        return write(path, workflow, *arguments)

    monkeypatch.setattr(PreparedData, "write", counted)
    key = "task.dataset.kwargs.handler.kwargs.fit_end_time"
    grid = [f"{key}=2020-01-20,2020-02-05", f"{LR}=1e-2,1e-3"]
    result = study(*case, SETS, output=tmp_path / "s", grid=grid, **HERE)
    assert len(prepared) == len(set(prepared)) == 2
    alone = run(*case, [*SETS, f"{key}=2020-01-20", f"{LR}=1e-3"], output=tmp_path / "r", seed=0)
    same_run(result.path / "runs" / "001", alone.path)
    assert not (result.path / "prepared").exists()
    assert study(*case, SETS, resume=result.path, grid=grid, **HERE).table.equals(result.table)


def test_prepared_data_is_verified(case, tmp_path, monkeypatch):
    from qfast.errors import CheckpointError
    from qfast.workflow.config import load_config
    from qfast.workflow.validation import check_workflow

    workflow = check_workflow(load_config(case[0]).values)
    prepared = PreparedData.write(tmp_path / "p", workflow, str(case[1]))
    other = check_workflow(load_config(case[0], ["task.dataset.kwargs.handler.kwargs.fit_end_time=2020-01-20"]).values)
    with pytest.raises(ConfigError, match="belongs to a workflow with another handler"):
        prepared.dataset(other)
    panel = prepared.dataset(workflow).handler.panel("infer")
    panel.values("feature")[:] = 0  # reaches neither the file nor another map
    assert prepared.dataset(workflow).handler.panel("infer").values("feature").any()
    file = tmp_path / "p" / "handler.pickle"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="has changed since the data was prepared"):
        prepared.dataset(workflow)


def test_data_in_memory_must_be_passed_again(case, tmp_path):
    result = study(case[0], factors(), SETS, output=tmp_path / "s", **HERE)
    alone = run(case[0], factors(), SETS, output=tmp_path / "r", seed=0)
    same_run(result.path / "runs" / "000", alone.path)
    shutil.rmtree(result.path / "runs" / "000")
    with pytest.raises(ConfigError, match="was started with a DataFrame in memory, which is not stored"):
        study(resume=result.path, **HERE)
    assert study(resume=result.path, data=factors(), **HERE).table.equals(result.table)


# ---------------------------------------------------------------- resuming
def test_finished_runs_remain_and_lost_ones_are_made(done, tmp_path):
    folder = tmp_path / "s"
    shutil.copytree(done.path, folder)
    shutil.rmtree(folder / "runs" / "002")
    (folder / "runs" / "003" / "manifest.json").unlink()  # a run that was killed while its folder was created
    kept = (folder / "runs" / "000" / "manifest.json").stat().st_mtime_ns
    assert study(resume=folder, **HERE).table.equals(done.table)
    assert table(folder) == table(done.path)
    assert (folder / "runs" / "000" / "manifest.json").stat().st_mtime_ns == kept


def test_a_broken_run_continues_from_its_checkpoint(case, done, tmp_path, monkeypatch):
    folder = tmp_path / "s"

    def interrupted(*arguments, callbacks, **options):
        return run(*arguments, callbacks=[*callbacks, Interrupt(1)], **options)

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            study(*case, SETS, output=folder, seeds=[3, 5], grid={LR: [1e-2, 1e-3]}, **HERE)
    assert json.loads((folder / "study.json").read_text())["status"] == "interrupted"
    assert len(pd.read_csv(folder / "runs" / "000" / "history.csv")) == 1
    assert study(resume=folder, **HERE).table.equals(done.table)
    assert table(folder) == table(done.path)


def test_another_study_is_refused(case, done):
    with pytest.raises(ConfigError, match=r"is the folder of a different study: \['--seeds'\] differ .*\[3, 5\]"):
        study(*case, SETS, resume=done.path, seeds=[3, 6], grid={LR: [1e-2, 1e-3]}, **HERE)
    with pytest.raises(ConfigError, match=r"different study: \['task.model.kwargs.n_epochs'\] differ"):
        study(*case, [], resume=done.path, seeds=[3, 5], grid={LR: [1e-2, 1e-3]}, **HERE)
    with pytest.raises(ConfigError, match="contains the axes of the study, so --seeds must be omitted"):
        study(resume=done.path, seeds=[3, 5], **HERE)
    with pytest.raises(ConfigError, match=r"contains a study\. Remedy: --resume"):
        study(*case, SETS, output=done.path, **HERE)
    with pytest.raises(ConfigError, match="is not the folder of a study: it contains a run"):
        study(resume=done.path / "runs" / "000", **HERE)


# ---------------------------------------------------------------- bad input
def test_all_problems_are_reported_at_once(case, tmp_path):
    with pytest.raises(ConfigError) as caught:
        study(
            *case,
            output=tmp_path / "s",
            seeds="1,2,2",
            grid=["task.model.kwargs.hiden_size=4,8", "task.modle.kwargs.lr=1", f"{KWARGS}.metric=loss,lost", f"{LR}="],
            trials=3,
            expanding=True,
            jobs=0,
            on="locl",
        )
    text = str(caught.value)
    assert text.startswith("the study has 9 problems.")
    for part in (
        "--seeds: the seed 2 occurs 2 times",
        "LSTM has no argument 'hiden_size'",
        "Did you mean 'hidden_size'?",
        "--grid task.modle.kwargs.lr: the workflow does not contain this key. Did you mean 'task.model.kwargs.lr'?",
        "--grid task.model.kwargs.metric: metric must be",
        "--grid task.model.kwargs.lr: there are no values",
        "--trials: needs --search FILE",
        "--expanding: needs --rolling STEP",
        "--jobs: must be at least 1, got 0",
        "--on: expected local or ray[://ADDRESS], got 'locl'. Did you mean 'local'?",
    ):
        assert part in text, text
    assert not (tmp_path / "s").exists()


def test_problems_of_the_workflow_are_among_them(case):
    with pytest.raises(ConfigError, match=r"(?s)the study has 2 problems.*n_epoch.*the seed 1 occurs 2 times"):
        study(*case, [f"{KWARGS}.n_epoch=1"], seeds=[1, 1], **HERE)


# ---------------------------------------------------------------- failures
def test_a_failed_run_is_a_row_and_the_exit_status(case, tmp_path, capsys):
    words = ["study", str(case[0]), "--data", str(case[1]), "--set", SETS[0], "-q", "-o", str(tmp_path / "s")]
    assert cli.main([*words, "--grid", f"{LR}=1e-2,1e30", "--on", "inline"]) == 1
    rows = pd.read_csv(tmp_path / "s" / "table.csv")
    assert rows["status"].tolist() == ["finished", "failed"]
    assert "the training loss became inf" in rows["reason"][1]
    assert "run 001 failed: the training loss became inf" in capsys.readouterr().out


def test_out_of_memory_is_a_reason():
    assert tasks.reason_of(MemoryError()) == "out of memory (MemoryError)"
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    assert tasks.reason_of(error).startswith("out of memory (")


def test_a_dying_worker_is_tried_once_more(case, tmp_path, monkeypatch):
    """The worker is killed twice in the second epoch, so the run fails after one retry. The third attempt finishes.

    Model and handler are classes of the user.
    """
    killer = tmp_path / "killer.py"
    killer.write_text(KILLER)
    kills = tmp_path / "kills"
    kills.mkdir()
    monkeypatch.setenv("KILLS", str(kills))
    lstm = "class: LSTM\n    module_path: qlib.contrib.model.pytorch_lstm"
    config = tmp_path / "w.yaml"
    text = case[0].read_text().replace(lstm, "class: Killer\n    module_path: killer")
    config.write_text(text.replace("class: DataHandlerLP", "class: Mine\n        module_path: killer"))
    result = study(config, case[1], SETS, output=tmp_path / "s", seeds="3,", jobs=1, allow_code=killer, quiet=True)
    assert result.table["status"].tolist() == ["failed"]
    assert result.table["reason"][0].startswith("the process was killed by SIGKILL")
    assert len(list(kills.iterdir())) == 2
    resumed = study(resume=result.path, allow_code=killer, **HERE)
    alone = run(*case, SETS, output=tmp_path / "r", seed=3)
    assert len(pd.read_csv(resumed.path / "runs" / "000" / "history.csv")) == 2
    assert (resumed.path / "runs/000/pred.parquet").read_bytes() == (alone.path / "pred.parquet").read_bytes()


def test_workers_are_copies_of_a_server_or_new_processes(tmp_path):
    """A worker survives its server. Without a server, the next worker is a new process."""
    engine = LocalEngine(1, 1, tmp_path / "logs")
    task = tasks.RunTask(7, str(tmp_path / "r"), "no.yaml", 0, prepared={}, log=str(tmp_path / "logs" / "007.txt"))
    engine.submit(task)
    (outcome,) = engine.wait()
    assert (outcome.number, outcome.status, outcome.reason) == (7, "failed", "KeyError: 'path'")
    process = engine._workers[0]._process
    assert isinstance(process, ForkedProcess) == ForkServer.is_available()
    if engine._server is not None:
        os.kill(engine._server._process.pid, signal.SIGKILL)
    engine.submit(task)
    assert engine.wait()[0].status == "failed"
    assert engine._workers[0]._process is process
    os.kill(process.pid, signal.SIGKILL)
    engine._workers[0]._reader.join()
    engine.submit(task)
    assert isinstance(engine._workers[-1]._process, subprocess.Popen)
    assert engine.wait()[0].status == "failed"
    engine.close()


def test_a_process_with_threads_is_not_copied():
    stop = threading.Event()
    other = threading.Thread(target=stop.wait)
    other.start()
    try:
        assert not fork_server._can_fork()
    finally:
        stop.set()
        other.join()


KILLER = """
import os, signal
from pathlib import Path
from qfast import Callback
from qfast.data import DataHandlerLP
from qfast.models import LSTM

class Mine(DataHandlerLP):
    pass

class Kill(Callback):
    def on_batch_end(self, estimator):
        folder = Path(os.environ["KILLS"])
        kills = len(list(folder.iterdir()))
        if estimator.epoch_ == 1 and kills < 2:
            (folder / str(kills)).touch()
            os.kill(os.getpid(), signal.SIGKILL)

class Killer(LSTM):
    def fit(self, *arguments, callbacks=(), **options):
        return super().fit(*arguments, callbacks=[*callbacks, Kill()], **options)
"""


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["SIGKILL", "SIGINT"]
)
def test_a_killed_study_ends_with_the_same_table(case, done, tmp_path, number):
    """After SIGKILL the workers end by themselves. After Ctrl-C they record the interrupt."""
    folder = tmp_path / "s"
    words = ["study", str(case[0]), "--data", str(case[1]), "--set", SETS[0], "-q", "-o", str(folder), "--jobs", "1"]
    words += ["--seeds", "3,5", "--grid", f"{LR}=1e-2,1e-3"]
    process = subprocess.Popen([sys.executable, "-m", "qfast", *words], env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for_a_new_run(folder, process)
    process.send_signal(number)
    assert process.wait() == (130 if number == signal.SIGINT else -signal.SIGKILL)
    manifest = json.loads((folder / "study.json").read_text())
    status = manifest["status"]
    assert manifest["command"][:2] == ["qfast", "study"]
    assert status == ("interrupted" if number == signal.SIGINT else "running")
    assert cli.main(["study", "--resume", str(folder), "-q", "--on", "inline"]) == 0
    assert table(folder) == table(done.path)


def wait_for_a_new_run(folder: Path, process: subprocess.Popen) -> None:
    """Wait until the study has begun one more run."""

    def count() -> int:
        return len(list(folder.glob("runs/*/manifest.json")))

    before = count()
    while count() == before and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, "the study ended before it could be killed"


# ---------------------------------------------------------------- plots
def test_the_losses_of_single_epochs_are_visible_and_named_once(done, monkeypatch):
    drawn = []
    monkeypatch.setattr("qfast.workflow.plots.png", lambda figure: drawn.append(figure) or b"")
    runs = {"one": [done.path / "runs" / "000"], "other": [done.path / "runs" / "002"]}
    curves_plot(runs)
    curves_plot({"one": runs["one"]})
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["one", "other"]
    assert not drawn[1].legends
    assert all(line.get_marker() == "o" for panel in drawn[0].axes for line in panel.lines)
    curves_plot({})
    assert [panel.texts[0].get_text() for panel in drawn[2].axes] == ["no data"] * 2
