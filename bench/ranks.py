"""Speed of one fit over several processes (ranks), each with one thread.

    python bench/ranks.py [--ranks 1 2] [--models LSTM Transformer GATs] [--instruments 200] [--days 300] [--batch 800]

Trains time-series models of Qlib's default size on synthetic factors (T = 20, F = 20). It prints, for each number of
ranks, milliseconds of the fastest and of the median training step after the first epoch, CPU milliseconds of the median
step (of the busiest rank), the speeds relative to the first number of ranks, and the share of the panel's rows that
a rank reads. Runs alternate, and the table shows the lower of the repeats. The last column is the load average of
the machine. If other processes use the cores, the median says little, because a step waits for its slowest rank.

A line "apart" shows the limit of the machine: as many processes, each with its part of every batch, that exchange
nothing. Cores that share memory, caches or power do not reach their number times the speed of one. The difference
between "apart" and "rank(s)" is the cost of the exchange.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from qfast.data import TSDatasetH, synthetic
from qfast.data.windows import WindowSet
from qfast.models import ts
from qfast.training import estimator
from qfast.training.callbacks import Callback
from qfast.training.distributed import SharedWindows, Sharing

STEP_LEN, FEATURES, EPOCHS = 20, 20, 3


class StepTimes(Callback):
    """Wall and CPU milliseconds of every step after the first epoch."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []
        self.last: tuple[float, float] | None = None

    def on_epoch_start(self, model: Any) -> None:
        self.last = None

    def on_batch_end(self, model: Any) -> None:
        now = time.perf_counter(), time.process_time()
        if self.last is not None and model.epoch_ > 0:
            self.times.append((1e3 * (now[0] - self.last[0]), 1e3 * (now[1] - self.last[1])))
        self.last = now


def model_of(name: str, batch: int) -> Any:
    """A model of Qlib's size without dropout."""
    common = {"d_feat": FEATURES, "dropout": 0.0, "n_epochs": EPOCHS, "seed": 0, "progress": False, "device": "cpu"}
    sizes = {"LSTM": {"hidden_size": 64, "num_layers": 2}, "GATs": {"hidden_size": 64, "num_layers": 2}}
    sizes["Transformer"] = {"d_model": 64, "nhead": 2, "num_layers": 2}
    kind = {"LSTM": ts.LSTM, "GATs": ts.GATs, "Transformer": ts.TransformerModel}[name]
    return kind(**common, **sizes[name], **({} if name == "GATs" else {"batch_size": batch}))


def fit(rank: int, size: int, store: str | None, arguments: argparse.Namespace, name: str, queue: Any) -> None:
    """Train in one process and report the times of a step. Without a store, the processes do not know each other."""
    torch.set_num_threads(1)
    parts = 1 if store else size
    if store and size > 1:
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    frame = synthetic.factors(arguments.instruments // parts, arguments.days, FEATURES, missing=0.0)
    dataset = TSDatasetH(frame, {"train": (None, None)}, step_len=STEP_LEN)
    times = StepTimes()
    estimator.Sharing = RowShares  # type: ignore[misc]
    model_of(name, arguments.batch // parts).fit(dataset, callbacks=[times])
    walls, cpus = (sorted(column) for column in zip(*times.times, strict=True))
    middle = len(walls) // 2
    queue.put((walls[0], walls[middle], cpus[middle], max(RowShares.shares, default=1.0 / parts)))
    if dist.is_initialized():
        dist.destroy_process_group()


class RowShares(Sharing):
    """Records the share of the panel's rows that this rank reads."""

    shares: ClassVar[list[float]] = []

    def __call__(self, windows: WindowSet) -> SharedWindows:
        shared = super().__call__(windows)
        self.shares.append(shared.own.features.shape[0] / windows.features.shape[0])
        return shared


def measure(size: int, name: str, arguments: argparse.Namespace, *, is_apart: bool = False) -> list[float]:
    """Fastest and median wall time and median CPU time of a step, and share of the rows: the largest of the ranks."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = None if is_apart else str(Path(folder, "store"))
        jobs = [context.Process(target=fit, args=(r, size, store, arguments, name, queue)) for r in range(size)]
        for job in jobs:
            job.start()
        results = [queue.get(timeout=600) for _ in jobs]
        for job in jobs:
            job.join()
    return [max(column) for column in zip(*results, strict=True)]


def main() -> None:
    """Print one line per model and number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", default=["LSTM", "Transformer", "GATs"])
    parser.add_argument("--instruments", type=int, default=200)
    parser.add_argument("--days", type=int, default=300)
    parser.add_argument("--batch", type=int, default=800)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    cases = [(size, is_apart) for size in arguments.ranks for is_apart in (False, True) if size > 1 or not is_apart]
    print("ms of a step:             fastest   median  CPU median  speed: fastest  median   CPU  rows  load")
    for name in arguments.models:
        best: dict[tuple[int, bool], list[float]] = {}
        loads: dict[tuple[int, bool], float] = {}
        for _ in range(arguments.repeats):
            for case in cases:
                result = measure(case[0], name, arguments, is_apart=case[1])
                best[case] = [min(pair) for pair in zip(best.get(case, result), result, strict=True)]
                loads[case] = os.getloadavg()[0]
        first = best[cases[0]]
        for (size, is_apart), (*times, share) in best.items():
            fastest, median, cpu = times
            speeds = [one / time for one, time in zip(first, times, strict=False)]
            print(
                f"{name:<12} {size} {'apart' if is_apart else 'rank(s)':<8}   {fastest:>7.1f}  {median:>7.1f}"
                f"  {cpu:>10.1f}  {speeds[0]:>14.2f}  {speeds[1]:>6.2f}  {speeds[2]:>4.2f}  {share:>4.0%}"
                f"  {loads[size, is_apart]:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
