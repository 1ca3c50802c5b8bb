"""What look-ahead is worth: test IC of time-series GATs in Qlib's batches and on true days.

    python bench/look_ahead.py PROVIDER_URI [--epochs 3] [--seeds 0 1]

PROVIDER_URI is a Qlib data folder with daily prices from 2013-02-08 to 2018-02-07. Data, factors and dataset are
Qlib's (the twenty columns of its Alpha158 workflows, windows of 20 days). All models start from scratch with the
same seed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from qfast.benchmarks.cases import COLUMNS
from qfast.metrics import daily_ic, ic_summary
from qfast.models import ts

SEGMENTS = {
    "train": ("2013-02-08", "2016-06-30"),
    "valid": ("2016-07-01", "2016-12-31"),
    "test": ("2017-01-01", "2018-02-07"),
}


def make_dataset(provider_uri: str) -> tuple[Any, pd.Series]:
    """Qlib's dataset and the raw label."""
    import qlib
    from qlib.contrib.data.handler import Alpha158
    from qlib.data.dataset import TSDatasetH

    qlib.init(provider_uri=provider_uri, region="us", logging_level=40)
    begin, end = SEGMENTS["train"]
    feature = {"fields_group": "feature"}
    handler = Alpha158(
        instruments="all",
        start_time=begin,
        end_time=SEGMENTS["test"][1],
        fit_start_time=begin,
        fit_end_time=end,
        infer_processors=[
            {"class": "FilterCol", "kwargs": {**feature, "col_list": COLUMNS}},
            {"class": "RobustZScoreNorm", "kwargs": {**feature, "clip_outlier": True}},
            {"class": "Fillna", "kwargs": feature},
        ],
        learn_processors=["DropnaLabel", {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}}],
        label=["Ref($close, -2) / Ref($close, -1) - 1"],
    )
    return TSDatasetH(handler=handler, segments=SEGMENTS, step_len=20), handler.fetch(
        slice(*SEGMENTS["test"]), col_set="label", data_key="raw"
    ).iloc[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("provider_uri")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset, label = make_dataset(arguments.provider_uri)
    from qlib.contrib.model.pytorch_gats_ts import GATs as Reference

    for seed in arguments.seeds:
        shared = {
            "d_feat": 20,
            "n_epochs": arguments.epochs,
            "lr": 1e-3,
            "metric": "loss",
            "base_model": "LSTM",
            "seed": seed,
        }
        for name, make in {
            "reference": lambda shared=shared: Reference(**shared, n_jobs=0),
            "qfast, compat": lambda shared=shared: ts.GATs(**shared, compat="qlib", progress=False),
            "qfast, true days": lambda shared=shared: ts.GATs(**shared, progress=False),
        }.items():
            model = make()
            with tempfile.TemporaryDirectory() as folder:
                model.fit(dataset, evals_result={}, save_path=str(Path(folder, "best.pt")))
            result = ic_summary(*daily_ic(model.predict(dataset).sort_index(), label))
            print(f"seed {seed}, {name}: " + ", ".join(f"{k} {v:.4f}" for k, v in result.items()), flush=True)


if __name__ == "__main__":
    main()
