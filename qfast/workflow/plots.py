"""The plots of a run, as PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qfast.drawing import legend_text, save_figure
from qfast.training.daily_losses import DAILY_METRICS
from qfast.workflow.results import SegmentResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "add_legend",
    "cumulative_plot",
    "figure_axes",
    "loss_plot",
    "png",
    "portfolio_plot",
    "quantile_plot",
]


COLOURS = {"train": "#8a94a6", "valid": "#d97706", "test": "#1d4ed8"}
OTHER_COLOURS = ("#047857", "#9d174d", "#6d28d9")
QUANTILES = 5
# Space around and between the axes, in inches. matplotlib's layout engines measure every label instead, which takes
# about as long as drawing.
MARGINS = {"left": 0.8, "right": 0.3, "bottom": 0.62, "top": 0.36}
GAP = 0.62


def loss_plot(
    history: pd.DataFrame, best_epoch: int | None, title: str = "Loss by epoch", *, is_loss: bool = True
) -> bytes:
    """Plot the loss, or the score, of train and valid by epoch, and mark the best epoch.

    Parameters
    ----------
    history : DataFrame
        One row per epoch, with the columns "train" and "valid", or one of them. As in Qlib, they contain minus the
        loss, averaged over batches, or the mean daily IC or rank IC.
    best_epoch : int or None
    title : str
    is_loss : bool
        False if the columns contain scores of another metric, which are plotted as they are.

    Returns
    -------
    bytes
        A PNG image.
    """
    figure, axes = figure_axes()
    columns = set(history)
    metric = next((text for name, text in DAILY_METRICS.items() if {f"train_{name}", f"valid_{name}"} & columns), None)
    is_loss = is_loss and metric is None
    for name in ("train", "valid"):
        if name in history:
            values = history[name].to_numpy(dtype=float) * (-1 if is_loss else 1)
            axes.plot(
                history.index,
                values,
                color=COLOURS[name],
                label=name,
                marker="o",
                markersize=3,
                linewidth=1.8,
            )
    if best_epoch is not None:
        axes.axvline(best_epoch, color="#111827", linewidth=1, linestyle=":", label=f"best epoch ({best_epoch})")
    score = "score (higher is better)" if metric is None else f"mean daily {metric}"
    axes.set(xlabel="epoch", ylabel="loss" if is_loss else score, title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    add_legend(axes)
    return png(figure)


def cumulative_plot(segments: Sequence[SegmentResult]) -> bytes:
    """Plot the cumulative sums of daily IC and rank IC, one panel for each segment, as PNG bytes.

    Each segment begins at zero and has its own axes, because a test segment is often much shorter than the training
    segment. A constant slope indicates a stable signal.
    """
    figure, axes = figure_axes(columns=max(len(segments), 1))
    if not segments:
        add_legend(axes)
    for position, (panel, segment) in enumerate(zip(np.atleast_1d(axes), segments, strict=False)):
        colour = _colour(segment.name, position)
        for daily, name, style in ((segment.ic, "IC", "-"), (segment.rank_ic, "rank IC", "--")):
            daily = daily.dropna()
            if len(daily):
                panel.plot(daily.index, daily.cumsum(), style, color=colour, label=name, linewidth=1.8)
        panel.axhline(0, color="#9ca3af", linewidth=0.8)
        panel.set(title=f"Cumulative IC: {segment.name}")
        panel.tick_params(axis="x", rotation=30)
        add_legend(panel)
    return png(figure)


def quantile_plot(segments: Sequence[SegmentResult]) -> bytes:
    """Plot the mean label of each day's instruments in five equal groups from lowest to highest score, as PNG bytes."""
    shown = [s for s in segments if s.name != "train"] or list(segments)
    figure, axes = figure_axes()
    width = 0.8 / max(len(shown), 1)
    for position, segment in enumerate(shown):
        means = _quantile_means(segment)
        where = np.arange(QUANTILES) + (position - (len(shown) - 1) / 2) * width
        axes.bar(where, means, width * 0.92, color=_colour(segment.name, position), label=legend_text(segment.name))
    axes.axhline(0, color="#6b7280", linewidth=0.8)
    axes.set_xticks(range(QUANTILES), ["lowest", "2", "3", "4", "highest"])
    axes.set(xlabel="score group of the day", ylabel="mean label", title="Mean label by score group")
    add_legend(axes)
    return png(figure)


def portfolio_plot(report: pd.DataFrame) -> bytes:
    """Plot the cumulative returns of the portfolio and the benchmark, and the excess return, as PNG bytes."""
    figure, axes = figure_axes(columns=2)
    returns = {
        "portfolio": report["return"] - report["cost"],
        "without costs": report["return"],
        "benchmark": report["bench"],
    }
    colours = ("#1d4ed8", "#93c5fd", "#8a94a6")
    for (name, series), colour in zip(returns.items(), colours, strict=True):
        axes[0].plot(report.index, series.cumsum(), color=colour, label=name, linewidth=1.8)
    excess = (returns["portfolio"] - report["bench"]).cumsum()
    axes[1].plot(report.index, excess, color="#1d4ed8", label="excess return, with costs", linewidth=1.8)
    axes[1].fill_between(report.index, excess - excess.cummax(), 0, color="#d97706", alpha=0.35, label="drawdown")
    for panel, title in zip(axes, ("Cumulative return", "Excess return over the benchmark"), strict=True):
        panel.axhline(0, color="#9ca3af", linewidth=0.8)
        panel.set(title=title)
        panel.tick_params(axis="x", rotation=30)
        add_legend(panel)
    return png(figure)


def _quantile_means(segment: SegmentResult) -> list[float]:
    frame = pd.DataFrame({"score": segment.score, "label": segment.label}).dropna()
    if frame.empty:
        return [math.nan] * QUANTILES
    rank = frame.groupby(level="datetime")["score"].rank(pct=True, method="first")
    group = np.ceil(rank.to_numpy() * QUANTILES).clip(1, QUANTILES)
    daily = frame["label"].groupby([frame.index.get_level_values("datetime"), group]).mean()
    means = daily.groupby(level=1).mean()
    return [float(means.get(q, math.nan)) for q in range(1, QUANTILES + 1)]


def figure_axes(columns: int = 1, *, fitted: bool = False) -> tuple[Figure, Any]:
    """A figure of one row of axes in the style of the reports.

    Parameters
    ----------
    columns : int
    fitted : bool
        Fit the margins to the labels, for labels of unknown length. By default the margins are `MARGINS`.
    """
    # The object interface has no global state and needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (max(6.4, 4.6 * columns) if columns < 3 else 3.6 * columns, 3.4)
    figure = Figure(figsize=size, dpi=110, layout="constrained" if fitted else None)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, gridspec_kw=None if fitted else _fixed_margins(size, columns))
    for panel in np.atleast_1d(axes):
        panel.grid(True, color="#e5e7eb", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color("#9ca3af")
        panel.tick_params(colors="#374151", labelsize=9)
    return figure, axes


def _fixed_margins(size: tuple[float, float], columns: int) -> dict[str, float]:
    """`MARGINS` and `GAP` as fractions of a figure of this size, for `Figure.subplots`."""
    width, height = size
    panel = (width - MARGINS["left"] - MARGINS["right"] - GAP * (columns - 1)) / columns
    return {
        "left": MARGINS["left"] / width,
        "right": 1 - MARGINS["right"] / width,
        "bottom": MARGINS["bottom"] / height,
        "top": 1 - MARGINS["top"] / height,
        "wspace": GAP / panel,
    }


def add_legend(axes: Axes) -> None:
    """Add a legend, or the text "no data" to empty axes."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes, color="#6b7280")


def _colour(name: str, position: int) -> str:
    return COLOURS.get(name, OTHER_COLOURS[position % len(OTHER_COLOURS)])


def png(figure: Figure) -> bytes:
    """Draw a figure of `figure_axes`."""
    for axes in figure.axes:
        _fix_positions(axes)
    out = io.BytesIO()
    save_figure(figure, out, "png")
    return out.getvalue()


def _fix_positions(axes: Axes) -> None:
    """Place titles and empty labels at once. To place them, matplotlib measures the labels of all ticks twice."""
    if axes.xaxis.get_ticks_position() == "bottom":  # no ticks above the axes, which a title must not overlap
        axes.set_title(axes.get_title(), y=1.0)
    for axis in (axes.xaxis, axes.yaxis):
        if not axis.get_label_text():
            axis.set_label_coords(0, 0)
