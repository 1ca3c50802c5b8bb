"""Scoring a whole period with the time-series LSTM, GRU and ALSTM, data loading included, compared with Qlib.

    python bench/bench_period.py [--model LSTM GRU ALSTM] [--instruments 100] [--days 600]    # the ratios
    python bench/bench_period.py --alone --instruments 1000 --days 1030                       # qfast on 10^6 windows
    python -m pytest bench/bench_period.py                                                     # pytest-benchmark

`predict` of both sides on the same samples and weights, alternately in one process; one thread, process CPU time,
Qlib without loader workers (their CPU time would not be counted). 20 features, windows of 20 steps, batches of
800, hidden size 64, 2 layers. One run has no missing rows; one has 2% of them missing at
random, where few windows are consecutive rows.
"""

from __future__ import annotations

import argparse
import time
from importlib import import_module
from typing import Any

import pytest
import torch
from bench_epoch import BATCH, FEATURES, STEP_LEN, Prepared, alpha158_shaped, seconds

from qfast.data import TSDatasetH
from qfast.models import ts

REPEATS = 3
NETWORK = {"LSTM": "LSTM_model", "GRU": "GRU_model", "ALSTM": "ALSTM_model"}


def ours_of(model: str) -> Any:
    estimator = getattr(ts, model)(d_feat=FEATURES, batch_size=BATCH, seed=0, device="cpu")
    estimator.fitted = True  # random weights need as long as trained ones
    return estimator


def reference_of(model: str, weights: dict[str, Any]) -> Any:
    kind = getattr(import_module(f"qlib.contrib.model.pytorch_{model.lower()}_ts"), model)
    estimator = kind(d_feat=FEATURES, batch_size=BATCH, seed=0, n_jobs=0, GPU=-1)
    getattr(estimator, NETWORK[model]).load_state_dict(weights)
    estimator.fitted = True
    return estimator


def frame_of(n_instruments: int, n_days: int, missing: bool) -> Any:
    frame = alpha158_shaped(n_instruments, n_days)
    if missing:
        return frame
    full = frame.unstack().stack(future_stack=True)
    return full.fillna(0.0).astype("f4")


def pair(model: str, n_instruments: int, n_days: int, missing: bool) -> tuple[Any, Any, int]:
    """`predict` of both sides, checked to agree, and the number of windows."""
    frame = frame_of(n_instruments, n_days, missing)
    segments = {"test": (frame.index.levels[0][STEP_LEN - 1], None)}
    theirs, ours = Prepared(frame, segments), TSDatasetH(handler=frame, segments=segments, step_len=STEP_LEN)
    our_model = ours_of(model)
    reference = reference_of(model, our_model.network.state_dict())
    result, expected = our_model.predict(ours), reference.predict(theirs)
    assert abs(result.reindex(expected.index) - expected).max() < 1e-4
    return lambda: our_model.predict(ours), lambda: reference.predict(theirs), len(result)


@pytest.mark.parametrize("side", ["qfast", "reference"])
@pytest.mark.parametrize("model", ["LSTM", "ALSTM"])
def test_whole_period(benchmark: Any, model: str, side: str) -> None:
    """One thread; groups put the two sides next to each other."""
    pytest.importorskip("qlib", reason="pyqlib (extra qlib) is not installed")
    torch.set_num_threads(1)
    ours, reference, _ = pair(model, 20, 250, missing=False)
    benchmark.group = model
    benchmark.pedantic(ours if side == "qfast" else reference, rounds=REPEATS)


def alone(model: str, n_instruments: int, n_days: int) -> None:
    frame = frame_of(n_instruments, n_days, missing=False)
    segments = {"test": (frame.index.levels[0][STEP_LEN - 1], None)}
    dataset, estimator = TSDatasetH(handler=frame, segments=segments, step_len=STEP_LEN), ours_of(model)
    times = [seconds(lambda: estimator.predict(dataset), time.process_time) for _ in range(2)]
    windows = len(estimator.predict(dataset))
    print(f"{model}: {windows} windows in {min(times):.1f} s of CPU, {windows / min(times):.0f} a second", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=list(NETWORK), choices=list(NETWORK))
    parser.add_argument("--instruments", type=int, default=100)
    parser.add_argument("--days", type=int, default=600)
    parser.add_argument("--alone", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for model in arguments.model:
        if arguments.alone:
            alone(model, arguments.instruments, arguments.days)
            continue
        for missing in (False, True):
            ours, reference, windows = pair(model, arguments.instruments, arguments.days, missing)
            pairs = [(seconds(reference, time.process_time), seconds(ours, time.process_time)) for _ in range(REPEATS)]
            ratio, rows = min(a / b for a, b in pairs), "2% of rows missing" if missing else "no missing rows"
            best = min(b for _, b in pairs)
            print(
                f"{model}, {windows} windows, {rows}: Qlib {min(a for a, _ in pairs):.2f} s, qfast {best:.2f} s "
                f"({windows / best:.0f} windows a second), lowest of {REPEATS} ratios {ratio:.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
