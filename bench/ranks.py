"""Speed of one fit over several processes (ranks), each with one thread.

    python bench/ranks.py [--ranks 1 2] [--models LSTM Transformer GATs] [--instruments 200] [--days 300] [--batch 800]

Trains time-series models of Qlib's default size on synthetic factors (T = 20, F = 20). It prints, for each number of
ranks, milliseconds of wall time and of CPU time (of the busiest rank) per training step, the speed relative to the
first number of ranks, and the share of the panel's rows that a rank reads. The lower of the epochs after the first
counts. Runs alternate. The load average is that of the machine during the measurement. Wall times mean little if it is
higher than the number of ranks, because a step waits for its slowest rank.
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
    """Wall and CPU milliseconds of a step, by epoch."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []
        self.steps = 0

    def on_epoch_start(self, model: Any) -> None:
        self.steps, self.begin = 0, (time.perf_counter(), time.process_time())

    def on_batch_end(self, model: Any) -> None:
        self.steps += 1
        now = time.perf_counter(), time.process_time()
        self.last = tuple(1e3 * (end - start) / self.steps for end, start in zip(now, self.begin, strict=True))

    def on_epoch_end(self, model: Any) -> None:
        self.times.append(self.last)


def model_of(name: str, batch: int) -> Any:
    """A model of Qlib's size without dropout."""
    common = {"d_feat": FEATURES, "dropout": 0.0, "n_epochs": EPOCHS, "seed": 0, "progress": False, "device": "cpu"}
    sizes = {"LSTM": {"hidden_size": 64, "num_layers": 2}, "GATs": {"hidden_size": 64, "num_layers": 2}}
    sizes["Transformer"] = {"d_model": 64, "nhead": 2, "num_layers": 2}
    kind = {"LSTM": ts.LSTM, "GATs": ts.GATs, "Transformer": ts.TransformerModel}[name]
    return kind(**common, **sizes[name], **({} if name == "GATs" else {"batch_size": batch}))


def fit(rank: int, size: int, store: str, arguments: argparse.Namespace, name: str, queue: Any) -> None:
    """Train in one process of the group and report the times of a step."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    frame = synthetic.factors(arguments.instruments, arguments.days, FEATURES, missing=0.0)
    dataset = TSDatasetH(frame, {"train": (None, None)}, step_len=STEP_LEN)
    times = StepTimes()
    estimator.Sharing = RowShares  # type: ignore[misc]
    model_of(name, arguments.batch).fit(dataset, callbacks=[times])
    wall, cpu = (min(column) for column in zip(*times.times[1:], strict=True))
    queue.put((wall, cpu, max(RowShares.shares, default=1.0)))
    if size > 1:
        dist.destroy_process_group()


class RowShares(Sharing):
    """Records the share of the panel's rows that this rank reads."""

    shares: ClassVar[list[float]] = []

    def __call__(self, windows: WindowSet) -> SharedWindows:
        shared = super().__call__(windows)
        self.shares.append(shared.own.features.shape[0] / windows.features.shape[0])
        return shared


def measure(size: int, name: str, arguments: argparse.Namespace) -> list[float]:
    """Wall and CPU milliseconds of a step, and the share of the rows, each the largest of the ranks."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
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
    print("model        ranks  wall ms/step  CPU ms/step  speed (wall)  speed (CPU)  rows  load")
    for name in arguments.models:
        best: dict[int, list[float]] = {}
        loads: dict[int, float] = {}
        for _ in range(arguments.repeats):
            for size in arguments.ranks:
                result = measure(size, name, arguments)
                best[size] = [min(pair) for pair in zip(best.get(size, result), result, strict=True)]
                loads[size] = os.getloadavg()[0]
        first = best[arguments.ranks[0]]
        for size, (wall, cpu, share) in best.items():
            print(
                f"{name:<12} {size:>5}  {wall:>12.1f}  {cpu:>11.1f}  {first[0] / wall:>12.2f}  {first[1] / cpu:>11.2f}"
                f"  {share:>4.0%}  {loads[size]:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
