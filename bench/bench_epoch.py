"""One epoch (training pass and both evaluations) of the time-series LSTM and GRU, compared with Qlib.

    python bench/bench_epoch.py [--model LSTM|GRU] [--instruments 60] [--days 600]    # the ratios
    python bench/bench_epoch.py --instruments 300 --days 2150 --workers 16 --device cuda    # on a GPU, by wall clock
    python -m pytest bench/bench_epoch.py                                             # pytest-benchmark, small panel

Both sides alternate in one process. First figure: one thread, process CPU time, Qlib without loader
workers (their CPU time would not be counted). Second: all threads, wall clock, Qlib with the best of
several worker counts. Data: 20 features, windows of 20 steps, batches of 800.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from qfast.data import TSDatasetH
from qfast.models import ts

FEATURES, STEP_LEN, BATCH, REPEATS = 20, 20, 800, 3


def alpha158_shaped(n_instruments: int, n_days: int, features: int = FEATURES) -> pd.DataFrame:
    """Random (datetime, instrument) frame of features and a label, 2% of the rows missing."""
    rng = np.random.default_rng(0)
    dates = pd.bdate_range("2010-01-01", periods=n_days)
    names = [f"S{i:04d}" for i in range(n_instruments)]
    index = pd.MultiIndex.from_product([dates, names], names=["datetime", "instrument"])
    index = index[rng.random(len(index)) > 0.02]
    columns = pd.MultiIndex.from_tuples([("feature", f"F{j}") for j in range(features)] + [("label", "LABEL0")])
    return pd.DataFrame(rng.standard_normal((len(index), features + 1)).astype("f4"), index=index, columns=columns)


class Prepared:
    """A dataset with prebuilt samplers, so `fit` measures the epoch alone."""

    def __init__(self, frame: pd.DataFrame, segments: dict[str, Any]) -> None:
        from qlib.data.dataset import TSDataSampler

        self.samplers = {n: TSDataSampler(frame.copy(), *b, STEP_LEN) for n, b in segments.items()}

    def prepare(self, segment: str, **_: Any) -> Any:
        return self.samplers[segment]


def reference_epoch(model: str, dataset: Prepared, n_jobs: int) -> None:
    from importlib import import_module

    kind = getattr(import_module(f"qlib.contrib.model.pytorch_{model.lower()}_ts"), model)
    estimator = kind(d_feat=FEATURES, n_epochs=1, batch_size=BATCH, seed=0, n_jobs=n_jobs)
    with tempfile.NamedTemporaryFile() as file:
        estimator.fit(dataset, {}, save_path=file.name)


def our_epoch(model: str, dataset: TSDatasetH, device: str = "cpu") -> None:
    options = {"device": device, "cuda_graphs": device != "cpu"}
    getattr(ts, model)(d_feat=FEATURES, n_epochs=1, batch_size=BATCH, seed=0, **options).fit(dataset)


def seconds(call: Any, clock: Any) -> float:
    start = clock()
    call()
    return clock() - start


@cache
def datasets(n_instruments: int, n_days: int) -> tuple[Prepared, TSDatasetH]:
    """The same samples for both sides, a fifth of the days for validation."""
    frame = alpha158_shaped(n_instruments, n_days)
    dates = frame.index.levels[0]
    cut = dates[int(len(dates) * 0.8)]
    segments = {"train": (None, cut), "valid": (cut + pd.Timedelta(days=1), None)}
    return Prepared(frame, segments), TSDatasetH(handler=frame, segments=segments, step_len=STEP_LEN)


@pytest.mark.parametrize("side", ["qfast", "reference"])
@pytest.mark.parametrize("model", ["LSTM", "GRU"])
def test_one_epoch(benchmark: Any, model: str, side: str) -> None:
    """One thread; groups put the two sides next to each other."""
    pytest.importorskip("qlib", reason="pyqlib (extra qlib) is not installed")
    theirs, ours = datasets(20, 250)
    benchmark.group = model
    torch.set_num_threads(1)
    call = (lambda: our_epoch(model, ours)) if side == "qfast" else (lambda: reference_epoch(model, theirs, 0))
    benchmark.pedantic(call, rounds=REPEATS, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="LSTM", choices=["LSTM", "GRU"])
    parser.add_argument("--instruments", type=int, default=60)
    parser.add_argument("--days", type=int, default=600)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu", help="device of qfast; Qlib uses a GPU if there is one")
    arguments = parser.parse_args()
    theirs, ours = datasets(arguments.instruments, arguments.days)
    print(
        f"{arguments.model}: {len(theirs.samplers['train'])} training and {len(theirs.samplers['valid'])} valid windows"
    )

    if not torch.cuda.is_available():  # Qlib would use the GPU, and CPU time would not count it
        torch.set_num_threads(1)
        pairs = [
            (
                seconds(lambda: reference_epoch(arguments.model, theirs, 0), time.process_time),
                seconds(lambda: our_epoch(arguments.model, ours), time.process_time),
            )
            for _ in range(REPEATS)
        ]
        ratios = [round(a / b, 2) for a, b in pairs]
        print("1 thread, CPU seconds (Qlib, qfast):", [(round(a, 2), round(b, 2)) for a, b in pairs])
        print(f"  ratios {ratios}, lower of {REPEATS}: {min(ratios):.2f}x")

    torch.set_num_threads(os.cpu_count() or 1)
    for workers in arguments.workers:
        pairs = [
            (
                seconds(lambda n=workers: reference_epoch(arguments.model, theirs, n), time.perf_counter),
                seconds(lambda: our_epoch(arguments.model, ours, arguments.device), time.perf_counter),
            )
            for _ in range(REPEATS)
        ]
        print(
            f"{torch.get_num_threads()} threads, wall seconds, reference n_jobs={workers}:",
            [(round(a, 2), round(b, 2)) for a, b in pairs],
            f"lower of {REPEATS}: {min(a / b for a, b in pairs):.2f}x",
        )


if __name__ == "__main__":
    main()
