"""A workflow over several ranks: one run folder, equal results, and restarts by torchrun."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qfast import Callback, run
from qfast.errors import ConfigError, RankError
from qfast.workflow.demo import DEMO, demo_prices
from qfast.workflow.prepared import PreparedData
from qfast.workflow.torchrun import _share_cores, data_of_machine
from support.ranks import prepare_forks, run_ranks

SETS = [
    "task.model.kwargs.n_epochs=3",
    "task.model.kwargs.hidden_size=4",
    "task.model.kwargs.batch_size=1500",
    "task.model.kwargs.progress=false",
]
STEPS = 3  # per epoch


@pytest.fixture(scope="module")
def prices(tmp_path_factory):
    path = tmp_path_factory.mktemp("prices") / "prices.parquet"
    demo_prices(12, 560).to_parquet(path)
    return path


def run_demo(rank: int, prices: Path, output: Path, sets=(), seed: int | None = 3) -> tuple[dict, list[str], dict]:
    result = run(DEMO, data=prices, output=output, seed=seed, sets=[*SETS, *sets])
    files = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    return result.metrics, files, result.portfolio


@pytest.fixture(scope="module")
def one_rank(prices, tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "run"
    return output, run_demo(0, prices, output)


@pytest.fixture(scope="module")
def two_ranks(prices, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    results = run_ranks(2, run_demo, folder, prices, folder / "run")
    assert all(isinstance(result, tuple) for result in results), results
    return folder / "run", results


def test_a_run_over_two_ranks_writes_the_same_folder(one_rank, two_ranks):
    (one, (metrics, files, portfolio)), (two, results) = one_rank, two_ranks
    assert results[0][1] == files
    for their_metrics, _, their_portfolio in results:
        for segment, values in metrics.items():
            np.testing.assert_allclose(
                list(their_metrics[segment].values()), list(values.values()), rtol=1e-3, atol=1e-4
            )
        assert their_portfolio.keys() == portfolio.keys()
    ours, theirs = (pd.read_csv(folder / "history.csv")[["train_loss", "train", "valid"]] for folder in (one, two))
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-6)
    ours, theirs = (pd.read_parquet(folder / "pred.parquet") for folder in (one, two))
    np.testing.assert_allclose(theirs["score"], ours["score"], rtol=0, atol=1e-5)


def refused_run(rank: int, prices: Path, output: Path) -> str:
    try:
        run(DEMO, data=prices, output=output, sets=[*SETS, f"task.model.kwargs.lr={0.01 * (rank + 1)}"])
    except (ConfigError, RankError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_ranks_with_different_workflows_are_refused(prices, tmp_path):
    first, second = run_ranks(2, refused_run, tmp_path, prices, tmp_path / "run")
    message = "rank 1 and rank 0 differ in the workflow at task.model.kwargs.lr: '0.02' and '0.01'."
    assert second.startswith(f"ConfigError: {message}")
    assert first.startswith(f"RankError: rank 1 failed: {message}")
    assert '"status": "failed"' in (tmp_path / "run" / "manifest.json").read_text()


class DieInMidEpoch(Callback):
    """Kills rank 1 in the second epoch of the first attempt."""

    steps = 0

    def on_batch_end(self, estimator):
        self.steps += 1
        is_first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if is_first_attempt and os.environ["RANK"] == "1" and self.steps == STEPS + 1:
            os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(prices: Path, directory: Path) -> str:
    torch.set_num_threads(1)
    os.chdir(directory)  # without an output, the folder has a new name at each attempt
    return str(run(DEMO, data=prices, seed=3, sets=SETS, callbacks=[DieInMidEpoch()]).path.resolve())


def test_a_rank_killed_in_mid_epoch_continues_after_the_restart(prices, two_ranks, tmp_path):
    prepare_forks()
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, start_method="forkserver", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", run_id="restart", monitor_interval=0.1,
    )  # fmt: skip
    folders = elastic_launch(config, run_and_die)(prices, tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    assert set(folders.values()) == {str(folder.resolve())}
    ours, theirs = (safetensors.torch.load_file(path / "best.safetensors") for path in (folder, two_ranks[0]))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert '"resumed"' in (folder / "manifest.json").read_text()
    assert not list(folder.glob(".data-*"))


class FirstRank:
    """Stands in for `Ranks` on rank 0 and records what it publishes."""

    rank = 0

    def publish(self, name, value):
        self.published = name, value


def test_a_handler_that_cannot_be_pickled_is_prepared_by_every_rank(monkeypatch, tmp_path):
    def fail(*arguments):
        raise TypeError("cannot pickle '_io.TextIOWrapper' object")

    monkeypatch.setattr(PreparedData, "write", fail)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    ranks, job = FirstRank(), SimpleNamespace(workflow=None, data=None, read_options=None)
    with contextlib.ExitStack() as stack:
        assert data_of_machine(ranks, job, tmp_path, stack) is None
    assert ranks.published == ("data/0", None)
    assert data_of_machine(None, job, tmp_path, stack) is None  # one process


def test_cores_are_divided_among_the_processes_unless_threads_are_set(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for setting in ("1", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
        _share_cores()
    assert threads == [4]
