"""Scores and losses of models with products of bfloat16 and of float32, over many seeds.

    python bench/bf16_seeds.py --data prices.parquet --output studies/bf16 [--stocks 40] [--seeds 20]
        [--models LSTM ...] [--section bench/results/29_bf16_seeds.json] [--picture docs/images/bf16_losses.svg]

bench/bf16_seeds.yaml is the workflow. A study of each model runs every seed in both precisions, one run at a time.
Finished runs of an earlier call are used again. The table compares the mean test IC of both precisions with the
standard error of float32's. The picture shows the losses of all runs.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import torch

import qfast

mpl.use("svg")
import matplotlib.pyplot as plt

WORKFLOW = Path(__file__).with_name("bf16_seeds.yaml")
PRECISIONS = {"float32": "#1d4ed8", "bf16": "#d97706"}  # colours of the losses
KEY = "task.model.kwargs.precision"
MODELS: dict[str, tuple[str, ...]] = {
    "LSTM": ("class=LSTM", "kwargs.hidden_size=32"),
    "GATs": ("class=GATs", "kwargs.hidden_size=32", "kwargs.base_model=LSTM"),
    "Transformer": ("class=TransformerModel", "kwargs.d_model=16"),
}


def first_stocks(prices: Path, stocks: int) -> pd.DataFrame:
    """The prices of the first instruments in alphabetical order."""
    frame = pd.read_parquet(prices)
    chosen = sorted(frame["instrument"].unique())[:stocks]
    return frame[frame["instrument"].isin(chosen)]


def study_of(model: str, data: pd.DataFrame, seeds: int, folder: Path) -> pd.DataFrame:
    """The table of a study, with the folder of each run."""
    sets = [f"task.model.{change}" for change in MODELS[model]]
    if (folder / "study.json").exists():
        result = qfast.study(resume=folder, data=data, jobs=1, quiet=True)
    else:
        grid = {KEY: list(PRECISIONS)}
        result = qfast.study(WORKFLOW, data, sets, output=folder, seeds=seeds, grid=grid, jobs=1, quiet=True)
    return result.table


def losses(folder: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Training and validation loss of all epochs of all runs: precision, seed, epoch, train, valid."""
    parts = []
    for run in table.itertuples():
        history = pd.read_csv(folder / "runs" / f"{int(run.run):03d}" / "history.csv")
        columns = {"epoch": history["epoch"] + 1, "train": history["train_loss"], "valid": -history["valid"]}
        parts.append(pd.DataFrame({"precision": run.precision, "seed": run.seed, **columns}))
    return pd.concat(parts)


def row_of(model: str, table: pd.DataFrame) -> list[str]:
    """A row of the table: means and standard errors of the test IC, and their difference."""
    scores = table.pivot(index="seed", columns="precision", values="test.ic")
    means, errors = scores.mean(), scores.std() / len(scores) ** 0.5
    difference = means["bf16"] - means["float32"]
    cells = [f"{means[name]:.5f} ± {errors[name]:.5f}" for name in PRECISIONS]
    return [model, str(len(scores)), *cells, f"{difference:+.5f}", f"{difference / errors['float32']:+.2f}"]


def draw(parts: dict[str, pd.DataFrame], target: Path) -> None:
    """The losses of all runs, and their means, by model."""
    figure, axes = plt.subplots(2, len(parts), figsize=(3.4 * len(parts), 5), layout="constrained", squeeze=False)
    figure.set_facecolor("white")
    for column, (model, table) in enumerate(parts.items()):
        for axis, loss in zip(axes[:, column], ("train", "valid"), strict=True):
            for precision, colour in PRECISIONS.items():
                runs = table[table["precision"] == precision].pivot(index="epoch", columns="seed", values=loss)
                axis.plot(runs.index, runs, color=colour, alpha=0.25, linewidth=0.7)
                style = {"linewidth": 3.5} if precision == "float32" else {"linewidth": 1.5, "linestyle": "--"}
                axis.plot(runs.index, runs.mean(axis=1), color=colour, label=precision, **style)
            axis.set_title(f"{model}: {'training' if loss == 'train' else 'validation'} loss", fontsize=10)
            axis.set_xticks(runs.index)
        axes[1, column].set_xlabel("epoch")
    axes[0, 0].legend(frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, facecolor="white")
    plt.close(figure)


def section(rows: list[list[str]], options: argparse.Namespace) -> dict[str, Any]:
    """The section of bench/RESULTS.md."""
    columns = ["model", "seeds", *(f"test IC, {name}" for name in PRECISIONS), "difference", "in standard errors"]
    text = (
        f"{date.today()}. Command: `python bench/bf16_seeds.py --data PRICES --output FOLDER`. "
        f"Mean test IC and its standard error over seeds, {options.stocks} stocks of the S&P 500, 2013 to 2018, small "
        "networks and four epochs (bench/bf16_seeds.yaml). The last column is the difference relative to the standard "
        "error of float32."
    )
    return {
        "title": "Scores with products of bfloat16",
        "level": 3,
        "machine": "one core of an Intel Xeon of the fourth generation (AMX), virtual machine with other work",
        "software": f"torch {torch.__version__}, Python {platform.python_version()}",
        "dates": [str(date.today())],
        "commands": [
            "python bench/bf16_seeds.py --data prices.parquet --output studies/bf16 --section "
            "bench/results/29_bf16_seeds.json --picture docs/images/bf16_losses.svg"
        ],
        "blocks": [{"text": text}, {"columns": columns, "rows": rows}],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the studies, print the table, and write the section and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stocks", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--section", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args(arguments)
    data = first_stocks(options.data, options.stocks)
    rows, curves = [], {}
    for model in options.models:
        folder = options.output / model
        table = study_of(model, data, options.seeds, folder)
        table = table.rename(columns={KEY: "precision"})
        rows.append(row_of(model, table))
        curves[model] = losses(folder, table)
        print(*rows[-1], sep=" | ", flush=True)
    if options.section is not None:
        text = json.dumps(section(rows, options), indent=1, ensure_ascii=False) + "\n"
        options.section.write_text(text, encoding="utf-8")
    if options.picture is not None:
        draw(curves, options.picture)


if __name__ == "__main__":
    main()
