"""Losses and scores of Alpha360 workflows with the features as a view of prices and as columns.

    python bench/alpha360_workflows.py FILE... --data PRICES [--instruments 60] [--set KEY=VALUE ...]

Runs every workflow file twice on part of the prices, for two epochs with small networks, and prints the losses of both
runs and the largest differences: of the losses, of the scores of the test segment, and of the scores of `predict` on
the run with the view.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from qfast import predict, run
from qfast.data import load_prices
from qfast.workflow.folder import read_frame

SEGMENTS = {
    "train": ["2014-01-01", "2016-12-31"],
    "valid": ["2017-01-01", "2017-06-30"],
    "test": ["2017-07-01", "2017-12-31"],
}
SMALL = {
    "hidden_size": 16,
    "d_model": 16,
    "nhead": 2,
    "n_chans": 16,
    "num_layers": 2,
    "n_epochs": 2,
    "batch_size": 800,
    "dropout": 0.1,
}
KNOWN = {
    "TCN": {"n_chans", "num_layers", "batch_size"},
    "GATs": {"hidden_size", "num_layers"},
    "TransformerModel": {"d_model", "nhead", "num_layers", "batch_size"},
    "LocalformerModel": {"d_model", "nhead", "num_layers", "batch_size"},
}


def settings(path: Path, windows: str, extra: Sequence[str]) -> list[str]:
    """Changes of a workflow file: a small network, two epochs, the dates of the prices and the form of the features."""
    found = re.search(r"^\s*model:\s*class: (\w+)", path.read_text(), re.MULTILINE)
    model = found[1] if found else ""
    names = KNOWN.get(model, {"hidden_size", "num_layers", "batch_size"}) | {"n_epochs", "dropout"}
    handler = "task.dataset.kwargs.handler.kwargs"
    out = [f"task.model.kwargs.{name}={SMALL[name]}" for name in sorted(names)]
    out += [f"{handler}.fit_start_time=2014-01-01", f"{handler}.fit_end_time=2016-12-31"]
    out += [f"{handler}.start_time=2013-01-01", f"{handler}.end_time=2017-12-31", f"{handler}.windows={windows}"]
    out += [f"task.dataset.kwargs.segments={SEGMENTS}", f"{handler}.instruments=all", f"{handler}.vwap=typical"]
    if model == "GATs":
        out.append("task.model.kwargs.model_path=null")
    return [*out, "task.record=[{class: SignalRecord, module_path: qlib.workflow.record_temp}]", *extra]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both forms of every workflow and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--instruments", type=int, default=60)
    parser.add_argument("--set", action="append", default=[], dest="extra")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    prices = load_prices(options.data).to_frame()
    names = sorted(prices.index.get_level_values("instrument").unique())[: options.instruments]
    prices = prices[prices.index.get_level_values("instrument").isin(names)]
    prices.columns = prices.columns.get_level_values(-1)
    print("| workflow | losses, view | losses, columns | difference of losses | of scores | predict |")
    print("|---|---|---|---|---|---|")
    for path in options.files:
        with tempfile.TemporaryDirectory() as folder:
            results = {}
            for windows in ("view", "columns"):
                changes = settings(path, windows, options.extra)
                results[windows] = run(path, prices, changes, output=Path(folder) / windows, seed=0)
            losses = {windows: np.array(result.model.history_["train_loss"]) for windows, result in results.items()}
            scores = {windows: read_frame(result.path, "pred").iloc[:, 0] for windows, result in results.items()}
            again = predict(Path(folder) / "view", prices, start=SEGMENTS["test"][0], end=SEGMENTS["test"][1])
            common = again.index.intersection(scores["view"].index)
            again_gap = np.abs(again[common].to_numpy() - scores["view"][common].to_numpy()).max()
            view, columns = (" ".join(f"{loss:.6f}" for loss in losses[windows]) for windows in ("view", "columns"))
            loss_gap = np.abs(losses["view"] - losses["columns"]).max()
            score_gap = np.abs(scores["view"].to_numpy() - scores["columns"].to_numpy()).max()
            print(f"| {path.stem} | {view} | {columns} | {loss_gap} | {score_gap} | {again_gap} |")


if __name__ == "__main__":
    main()
