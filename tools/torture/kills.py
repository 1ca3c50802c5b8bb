"""Killed runs, resumes, pre-training, studies, data-parallel runs and cache writes, whose results must not change."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist

import qfast.workflow.run  # noqa: F401 - children are forked, so the parent imports all they need
from qfast.cli import main
from qfast.data import load_prices, synthetic
from qfast.data.factor_cache import FactorCache
from qfast.files import is_temporary
from qfast.workflow import plots
from torture.inputs import workflow_inputs
from torture.protocol import Case, Fault, Part, choose, require
from torture.victims import PLACES, Moment, Victim, was_killed

SMALL = ["task.model.kwargs.n_epochs=2"]
SETS = {
    "lstm": SMALL,
    "tcn": [
        *SMALL,
        "task.model.class=TCN",
        "task.model.module_path=qlib.contrib.model.pytorch_tcn",
        "task.model.kwargs={d_feat: 3, n_chans: 4, kernel_size: 2, num_layers: 2, n_epochs: 2, metric: loss, GPU: 0}",
    ],
    "pretrain": [
        *SMALL,
        "task.model.class=GATs",
        "task.model.module_path=qlib.contrib.model.pytorch_gats",
        "task.model.kwargs.base_model=LSTM",
        "task.pretrain={n_epochs: 2, lr: 5e-3, batch_size: 64}",
    ],
    "parallel": ["task.model.kwargs.n_epochs=2", "task.model.kwargs.batch_size=128"],
}
JOBS = {"lstm": 4.0, "tcn": 1.5, "pretrain": 2.0, "cache": 3.0, "study": 0.4, "parallel": 2.5}
MOST_KILLS = {"study": 1, "parallel": 2}  # of jobs whose attempts are long; 4 otherwise
LARGEST = {  # (most renames and syncs, batches, bytes of a file, milliseconds) at which a job may be killed
    "lstm": (30, 26, 20_000, 1500),
    "tcn": (30, 26, 20_000, 1500),
    "pretrain": (45, 70, 20_000, 2500),
    "study": (12, 1, 4_000, 12_000),
    "parallel": (30, 14, 20_000, 2500),
    "cache": (4, 1, 30_000, 30),
}
SIGNALS = {"SIGKILL": 0.6, "SIGTERM": 0.2, "SIGINT": 0.2}
RESULTS = ("best.safetensors", "pred.parquet", "label.parquet", "metrics.json", "daily.csv")
STUDY_RESULTS = ("table.csv", "summary.csv", *(f"runs/{n:03d}/{name}" for n in range(2) for name in RESULTS))
SECONDS = 300.0  # of one process, on a busy machine
RANKS = 2
RANK_SECONDS = 45.0  # that a rank waits for another one, which may be dead


def draw(rng: random.Random, number: int) -> Case:
    """A job, and the moments at which its attempts are killed."""
    job = choose(rng, JOBS)
    count = rng.randint(1, MOST_KILLS.get(job, 4))
    return {"job": job, "moments": [_draw_moment(rng, job) for _ in range(count)], "rank": rng.randrange(RANKS)}


def _draw_moment(rng: random.Random, job: str) -> Moment:
    renames, batches, most_bytes, milliseconds = LARGEST[job]
    place = choose(rng, {name: weight for name, weight in PLACES.items() if not (name == "batch" and batches == 1)})
    if job == "parallel" and place == "bytes":  # the file through which the ranks meet would be cut too
        place = "replace"
    most = {"replace": renames, "fsync": renames, "batch": batches, "bytes": most_bytes, "time": milliseconds}[place]
    number = int(most ** rng.random()) if place == "bytes" else rng.randrange(most)
    name = "SIGKILL" if place == "bytes" or job == "cache" else choose(rng, SIGNALS)
    return {"signal": name, "at": place, "number": number, "after": rng.random() < 0.5}


def check(case: Case, folder: Path) -> Counter[str]:
    """Kill a job at its moments, complete it, and compare it with an uninterrupted one."""
    _prepare()
    if case["job"] == "cache":
        return _check_cache(case, folder)
    path, counts = folder / "run", Counter[str]()
    for number, moment in enumerate([*case["moments"], None]):
        statuses = _attempt(case, path, folder / f"log-{number}.txt", moment)
        killed = any(map(was_killed, statuses))
        if moment is not None and killed:
            counts.update(["kills", f"kills of {case['job']}", f"kills by {moment['signal']}"])
        elif not killed and any(statuses) and not (moment is not None and case["job"] == "parallel"):
            raise Fault(f"attempt {number} ended with {statuses}:\n{(folder / f'log-{number}.txt').read_text()}")
    names = STUDY_RESULTS if case["job"] == "study" else RESULTS
    _require_equal(path, _uninterrupted(case["job"]), names)
    return counts


@cache
def _prepare() -> None:
    """Plots are two thirds of the time of a tiny run."""
    plots.png = lambda figure: b"not drawn"
    torch.set_num_threads(1)


@cache
def _uninterrupted(job: str) -> Path:
    folder = workflow_inputs()[0]
    statuses = _attempt({"job": job, "rank": 0}, folder / job, folder / f"{job}.txt", None)
    require(not any(statuses), f"{job} fails without a kill:\n{(folder / f'{job}.txt').read_text()}")
    return folder / job


def _attempt(case: Case, path: Path, log: Path, moment: Moment | None) -> list[int]:
    """Start or resume a job, and return the exit statuses of its processes."""
    words = _words(case["job"], path)
    if case["job"] != "parallel":
        return [Victim(partial(main, words), log, moment).wait(SECONDS)]
    store = log.with_suffix(".store")
    ranks = [
        Victim(partial(_run_rank, rank, store, words), log, moment if rank == case["rank"] else None)
        for rank in range(RANKS)
    ]
    return [rank.wait(SECONDS) for rank in ranks]


def _words(job: str, path: Path) -> list[str]:
    """Arguments of the command line that starts the job, or resumes it if it has begun."""
    _, config, data = workflow_inputs()
    command = "study" if job == "study" else "run"
    if (path / ("study.json" if job == "study" else "manifest.json")).exists():
        return [command, "--resume", str(path), "-q"] + (["--jobs", "1"] if job == "study" else [])
    sets = [word for text in SETS.get(job, SMALL) for word in ("--set", text)]
    words = [command, str(config), "--data", str(data), "--output", str(path), "-q", *sets]
    return words + (["--seeds", "2", "--jobs", "1"] if job == "study" else ["--seed", "3"])


def _run_rank(rank: int, store: Path, words: Sequence[str]) -> int:
    limit = timedelta(seconds=RANK_SECONDS)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=RANKS, timeout=limit)
    return main(list(words))


def _require_equal(path: Path, expected: Path, names: Sequence[str]) -> None:
    different = [name for name in names if not _same_file(path / name, expected / name)]
    require(not different, f"differs from the uninterrupted job: {different}")
    remains = sorted(str(file.relative_to(path)) for file in path.rglob("*") if is_temporary(file.name))
    require(not remains, f"temporary files remain: {remains}")
    for file in path.rglob("manifest.json"):
        status = json.loads(file.read_text())["status"]
        require(status == "finished", f"{file} has the status {status!r}")


def _same_file(one: Path, other: Path) -> bool:
    if one.suffix == ".csv" and one.name == "table.csv":  # its times differ
        return pd.read_csv(one).filter(regex="^(?!.*seconds)").equals(pd.read_csv(other).filter(regex="^(?!.*seconds)"))
    return one.exists() and one.read_bytes() == other.read_bytes()


# ---------------------------------------------------------------- the factor cache
TEXTS = ["$close", "Ref($close, 1)"]


def _check_cache(case: Case, folder: Path) -> Counter[str]:
    """A killed write leaves no entry or a complete one, and the next write succeeds."""
    prices = load_prices(synthetic.prices(30, 60))
    entry, counts = FactorCache(folder / "cache"), Counter[str]()
    expected = np.arange(2 * prices.n_rows, dtype=np.float32).reshape(prices.n_rows, 2)
    fill: Callable[[np.ndarray], None] = lambda out: np.copyto(out, expected)  # noqa: E731

    def write() -> int:
        entry.write("key", TEXTS, prices, fill)
        return 0

    for number, moment in enumerate([*case["moments"], None]):
        log = folder / f"log-{number}.txt"
        status = Victim(write, log, moment).wait(SECONDS)
        require(status == 0 or was_killed(status), f"attempt {number} ended with {status}:\n{log.read_text()}")
        if was_killed(status):
            counts.update(["kills", "kills of cache", "kills by SIGKILL"])
        values = entry.read("key", TEXTS, prices.n_rows)
        require(values is None or np.array_equal(values, expected), "the cache returns values that were not written")
    require(values is not None, "the cache has no entry after an uninterrupted write")
    return counts


PART = Part(draw, check, unit="kills", seconds=2 * SECONDS, share=0.45)
__all__ = ["PART", "check", "draw"]
