"""CPU time of an epoch without the second pass over the training segment, relative to an epoch with it.

    python bench/train_score.py [--models LSTM GRU ...] [--instruments 60] [--days 250] [--repeats 3]

Time-series models with Qlib's defaults on synthetic factors (T = 20, F = 20), four fifths of the days for training and
one for validation. One thread, process CPU time. The three choices of `train_score` alternate, and the table shows the
fastest of the repeats.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from qfast.data import TSDatasetH, synthetic
from qfast.models import ts

FEATURES, STEP_LEN = 20, 20
CHOICES = ("pass", "running", "never")
MODELS: dict[str, Any] = {
    "LSTM": ts.LSTM,
    "GRU": ts.GRU,
    "ALSTM": ts.ALSTM,
    "GATs": ts.GATs,
    "TCN": ts.TCN,
    "Transformer": ts.TransformerModel,
    "Localformer": ts.LocalformerModel,
}


def epoch_seconds(name: str, choice: str, dataset: TSDatasetH) -> float:
    """CPU seconds of a fit of one epoch."""
    size = {
        "TCN": {"n_chans": 32, "kernel_size": 7},
        "Transformer": {"num_layers": 2},
        "Localformer": {"num_layers": 2},
    }
    model = MODELS[name](
        d_feat=FEATURES, n_epochs=1, seed=0, train_score=choice, progress=False, device="cpu", **size.get(name, {})
    )
    start = time.process_time()
    model.fit(dataset)
    return time.process_time() - start


def main() -> None:
    """Print one line per model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--instruments", type=int, default=60)
    parser.add_argument("--days", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    frame = synthetic.factors(arguments.instruments, arguments.days, FEATURES, missing=0.0)
    days = frame.index.get_level_values(0).unique()
    split = int(0.8 * len(days))
    segments = {"train": (days[0], days[split - 1]), "valid": (days[split], days[-1])}
    dataset = TSDatasetH(frame, segments, step_len=STEP_LEN)
    print("CPU s of an epoch: " + "  ".join(f"{choice:>8}" for choice in CHOICES) + "   never / pass")
    for name in arguments.models:
        fastest = dict.fromkeys(CHOICES, float("inf"))
        for _ in range(arguments.repeats):
            for choice in CHOICES:
                fastest[choice] = min(fastest[choice], epoch_seconds(name, choice, dataset))
        times = "  ".join(f"{fastest[choice]:>8.2f}" for choice in CHOICES)
        print(f"{name:<18} {times}   {fastest['never'] / fastest['pass']:.2f}", flush=True)


if __name__ == "__main__":
    main()
