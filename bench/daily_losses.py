"""Compare losses and metrics of whole days with the mean squared error over seeds, on a synthetic market.

    OMP_NUM_THREADS=1 python bench/daily_losses.py            # the table of docs/training.md, about 10 minutes
    python bench/daily_losses.py --seeds 2 --models lstm

Each seed draws a market with a planted signal (`qfast.data.synthetic.factors`) and initial weights. Every case trains
on the same data. The labels are ranked within each day as in Qlib's benchmark files. A row shows the mean and the
standard deviation over the seeds of the daily IC and rank IC of the segment test with the true labels, the paired
difference in rank IC from the first case, the mean best epoch, and CPU seconds per epoch.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd

from qfast.data import TSDatasetH, synthetic
from qfast.metrics import daily_ic
from qfast.models import ts

FEATURES, STEPS = 8, 8
NETWORK = {"d_feat": FEATURES, "hidden_size": 16, "num_layers": 1}
TRAINING = {"n_epochs": 30, "lr": 2e-3, "early_stop": 6, "progress": False}
CASES = {
    "mse, metric loss": {"loss": "mse"},
    "mse, metric rank_ic": {"loss": "mse", "metric": "rank_ic"},
    "mse, days": {"loss": "mse", "batch_by": "day"},
    "ic, days, metric rank_ic": {"loss": "ic", "batch_by": "day", "metric": "rank_ic"},
    "rank_ic, days, metric rank_ic": {"loss": "rank_ic", "batch_by": "day", "metric": "rank_ic"},
    "listnet, days, metric rank_ic": {"loss": "listnet", "batch_by": "day", "metric": "rank_ic"},
    "mse+ic, days, metric rank_ic": {"loss": "mse+ic", "batch_by": "day", "metric": "rank_ic"},
}
MODELS = {"lstm": ts.LSTM, "gats": ts.GATs}


def market(seed: int) -> tuple[TSDatasetH, pd.Series]:
    """A dataset with ranked labels, and the true labels."""
    frame = synthetic.factors(60, 420, FEATURES, ic=0.1, seed=seed, missing=0.0)
    true = frame[("label", "LABEL0")]
    ranked = true.groupby(level="datetime").rank(pct=True)
    frame[("label", "LABEL0")] = ((ranked - 0.5) * 3.46).astype(np.float32)
    days = frame.index.get_level_values("datetime").unique()
    bounds = {"train": (0, 249), "valid": (250, 319), "test": (320, 417)}
    segments = {name: (days[first], days[last]) for name, (first, last) in bounds.items()}
    return TSDatasetH(frame, segments, step_len=STEPS), true


def scores(kind: type, seed: int, case: dict[str, str]) -> tuple[float, float, float, int]:
    """IC, rank IC, seconds per epoch and best epoch of one training."""
    dataset, true = market(seed)
    arguments = {**case} if kind is ts.GATs else {**case, "batch_size": 240}
    if kind is ts.GATs:
        arguments.pop("batch_by", None)
    model = kind(**NETWORK, **TRAINING, seed=seed, **arguments)
    started = time.process_time()
    model.fit(dataset)
    seconds = (time.process_time() - started) / len(model.history_)
    prediction = model.predict(dataset, "test")
    ic, rank_ic = daily_ic(prediction, true.reindex(prediction.index))
    return float(ic.mean()), float(rank_ic.mean()), seconds, int(model.best_epoch_ or 0)


def main() -> None:
    """Train every case for every seed and print one table per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["lstm"])
    arguments = parser.parse_args()
    for name in arguments.models:
        first: np.ndarray | None = None
        print(f"{name}: {arguments.seeds} seeds")
        for case, options in CASES.items():
            table = np.array([scores(MODELS[name], seed, options) for seed in range(arguments.seeds)])
            first = table if first is None else first
            difference = table[:, 1] - first[:, 1]
            mean, deviation = table.mean(0), table.std(0, ddof=1)
            print(
                f"| `{case}` | {mean[0]:.4f} ± {deviation[0]:.4f} | {mean[1]:.4f} ± {deviation[1]:.4f} "
                f"| {difference.mean():+.4f} ± {difference.std(ddof=1):.4f} | {mean[3]:.0f} | {mean[2]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
