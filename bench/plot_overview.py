"""The picture of the README: epochs and scores of Qlib's models and of qfast's.

    python bench/plot_overview.py    # writes docs/images/overview.svg; needs pyqlib

The left panel shows the ratios of `qfast bench`, from bench/results/bench_us_prices.json. For the right panel, the
script trains Qlib's LSTM and qfast's with the same seed and without dropout on a synthetic market (Alpha360, three
epochs, about two minutes) and compares their scores of the test segment.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from qlib.contrib.model.pytorch_lstm import LSTM as QlibLSTM

from qfast.data import Alpha360, DatasetH, synthetic
from qfast.metrics import daily_ic
from qfast.models import LSTM

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "bench_us_prices.json"
PICTURE = ROOT / "docs" / "images" / "overview.svg"
GREY, BLUE = "#7d8590", "#2f7de1"  # readable on light and on dark pages


def train_both() -> tuple[pd.Series, pd.Series, pd.Series]:
    """Scores of Qlib's LSTM, scores of qfast's LSTM, and labels, of the test segment."""
    handler = Alpha360(
        data=synthetic.prices(60, 500),
        fit_start_time="2015-01-01",
        fit_end_time="2016-02-29",
        infer_processors=[
            {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature", "clip_outlier": True}},
            {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
        ],
        learn_processors=["DropnaLabel", {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}}],
    )
    segments = {
        "train": ("2015-01-01", "2016-02-29"),
        "valid": ("2016-03-01", "2016-05-31"),
        "test": ("2016-06-01", None),
    }
    dataset = DatasetH(handler, segments)
    arguments = {"d_feat": 6, "hidden_size": 32, "num_layers": 2, "dropout": 0.0, "n_epochs": 3, "batch_size": 400}
    scores = []
    for kind in (QlibLSTM, LSTM):
        model = kind(**arguments, seed=0)
        model.fit(dataset)
        scores.append(model.predict(dataset).sort_index())
    labels = dataset.prepare("test", col_set="label", data_key="raw").iloc[:, 0]
    return scores[0], scores[1], labels


def plot_speed(axes: Axes) -> None:
    """Bars with the speed of an epoch compared with Qlib's."""
    result = json.loads(RESULT.read_text())
    models = sorted(result["models"], key=lambda model: model["ratio"])
    ratios = [model["ratio"] for model in models]
    axes.barh([model["name"] for model in models], ratios, color=BLUE, height=0.6)
    for row, ratio in enumerate(ratios):
        axes.text(ratio * 1.06, row, f"{ratio:.1f}x", va="center", color=GREY)
    axes.set_xscale("log")
    axes.set_xlim(1, 60)
    axes.set_xticks([1, 3, 10, 30], ["Qlib's\nspeed", "3x", "10x", "30x"])
    axes.minorticks_off()
    axes.set_title("Speed of an epoch on one CPU core", loc="left", color=GREY, fontsize=10)


def plot_scores(axes: Axes, qlib: pd.Series, ours: pd.Series, labels: pd.Series) -> None:
    """Cumulative daily rank IC of both models, with the largest difference of a score."""
    qlib_style, our_style = {"lw": 5, "color": GREY, "alpha": 0.5}, {"color": BLUE}
    for scores, name, style in ((qlib, "Qlib", qlib_style), (ours, "qfast", our_style)):
        axes.plot(daily_ic(scores, labels)[1].fillna(0).cumsum(), label=name, **style)
    axes.legend(frameon=False, labelcolor=GREY, loc="upper left")
    text = f"largest difference of a score:\n{float(np.abs(qlib - ours).max()):.0e}"
    axes.text(0.98, 0.05, text, transform=axes.transAxes, ha="right", color=GREY)
    axes.set_title("LSTM on a synthetic market: cumulative rank IC", loc="left", color=GREY, fontsize=10)
    axes.xaxis.set_major_formatter(mpl.dates.ConciseDateFormatter(axes.xaxis.get_major_locator()))


def main() -> None:
    """Train both models and draw the picture."""
    mpl.rcParams |= {"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "qfast", "font.size": 9}
    figure = Figure(figsize=(8.4, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_speed(left)
    plot_scores(right, *train_both())
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[:].set_color(GREY)
        axes.tick_params(colors=GREY)
        axes.patch.set_alpha(0)
    figure.patch.set_alpha(0)
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
