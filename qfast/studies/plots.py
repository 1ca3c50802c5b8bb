"""The plots of a study, as PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qfast.drawing import legend_text
from qfast.studies.combine import Scores
from qfast.studies.results import short_names
from qfast.workflow import plots
from qfast.workflow.folder import HISTORY

__all__ = ["curves_plot", "heat_map", "monthly_plot", "parallel_plot", "rolling_plot"]

COLOURS = ("#1d4ed8", "#d97706", "#047857", "#9d174d", "#6d28d9", "#0e7490", "#b45309", "#4d7c0f")
MOST_LABELS = 8  # lines with a legend entry
LEGEND_COLUMNS = 2
DIVERGING, SEQUENTIAL = "RdBu", "viridis"


def curves_plot(runs: Mapping[str, Sequence[Path]]) -> bytes:
    """Plot the loss of the training and of the validation segment by epoch, one line for each run.

    Parameters
    ----------
    runs : mapping
        Name of a point -> folders of its runs, which have one colour.

    Returns
    -------
    bytes
        A PNG image.
    """
    figure, axes = plots.figure_axes(columns=2, fitted=True)
    has_legend = 1 < len(runs) <= MOST_LABELS
    lines: dict[str, Any] = {}
    for position, (name, folders) in enumerate(runs.items()):
        colour = COLOURS[position % len(COLOURS)]
        for folder in folders:
            history = pd.read_csv(folder / HISTORY)
            for panel, segment in zip(axes, ("train", "valid"), strict=True):
                if segment in history:
                    style = {"color": colour, "linewidth": 1.2, "alpha": 0.75, "marker": "o", "markersize": 2.5}
                    (lines[legend_text(name)],) = panel.plot(-history[segment], **style)
    for panel, segment in zip(axes, ("train", "valid"), strict=True):
        panel.set(xlabel="epoch", ylabel="loss", title=f"Loss of all runs: {segment}")
        panel.xaxis.get_major_locator().set_params(integer=True)
        if not panel.lines:
            plots.add_legend(panel)
    if has_legend:
        rows = -(-len(lines) // LEGEND_COLUMNS)
        figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + 0.22 * rows)
        figure.legend(
            lines.values(), lines, loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False, fontsize=9
        )
    return plots.png(figure)


def heat_map(table: pd.DataFrame, keys: Sequence[str], metric: str) -> bytes:
    """Plot the mean of a metric for each pair of values of two keys.

    Parameters
    ----------
    table : DataFrame
        Rows of finished runs.
    keys : sequence of str
        Two columns.
    metric : str
        A column.
    """
    values = table.assign(**{key: table[key].map(str) for key in keys})
    grid = values.pivot_table(index=keys[0], columns=keys[1], values=metric, sort=False)
    names = short_names(keys)
    figure, axes = plots.figure_axes(fitted=True)
    axes.grid(False)
    image = axes.imshow(grid.to_numpy(), cmap=SEQUENTIAL, aspect="auto")
    axes.set_xticks(range(len(grid.columns)), grid.columns)
    axes.set_yticks(range(len(grid.index)), grid.index)
    middle = np.nanmean(grid.to_numpy())
    for (row, column), value in np.ndenumerate(grid.to_numpy()):
        colour = "white" if value < middle else "black"
        axes.text(column, row, f"{value:.4f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set(xlabel=names[keys[1]], ylabel=names[keys[0]], title=f"Mean {metric} over seeds")
    figure.colorbar(image, ax=axes)
    return plots.png(figure)


def parallel_plot(table: pd.DataFrame, keys: Sequence[str], metric: str) -> bytes:
    """Plot each run as a line through its values and its metric, coloured by the metric.

    Parameters
    ----------
    table : DataFrame
        Rows of finished runs.
    keys : sequence of str
    metric : str
    """
    names = short_names(keys)
    columns = [*keys, metric]
    places = {column: _places(table[column]) for column in columns}
    figure, axes = plots.figure_axes(fitted=True)
    figure.set_size_inches(min(10.5, max(6.4, 1.9 * len(columns))), 4.2)
    axes.grid(False)
    colours = _colours(table[metric].to_numpy(dtype=float))
    for row in range(len(table)):
        heights = [places[column][0][row] for column in columns]
        axes.plot(range(len(columns)), heights, color=colours[row], linewidth=1.4, alpha=0.8)
    for position, column in enumerate(columns):
        axes.axvline(position, color="#9ca3af", linewidth=0.8)
        for height, text in places[column][1]:
            axes.annotate(text, (position, height), xytext=(4, 2), textcoords="offset points", fontsize=8)
    axes.set_xticks(range(len(columns)), [names.get(column, column) for column in columns])
    axes.set_yticks([])
    axes.set(title=f"Values and {metric} of each run", xlim=(-0.3, len(columns) - 0.4))
    return plots.png(figure)


def monthly_plot(scores: Mapping[str, Scores]) -> bytes:
    """Plot the mean daily IC of each month of the test segment.

    Parameters
    ----------
    scores : mapping
        Name -> scores over all windows.
    """
    figure, axes = plots.figure_axes(fitted=True)
    figure.set_size_inches(9.2, 3.4)
    shown = dict(list(scores.items())[:MOST_LABELS])
    width = 0.8 / max(len(shown), 1)
    months: pd.PeriodIndex | None = None
    for position, (name, results) in enumerate(shown.items()):
        monthly = monthly_ic(results)
        months = monthly.index if months is None else months  # type: ignore[assignment]
        where = np.arange(len(monthly)) + (position - (len(shown) - 1) / 2) * width
        axes.bar(where, monthly["ic"], width * 0.92, color=COLOURS[position], label=legend_text(name))
    if months is not None:
        step = max(1, len(months) // 12)
        axes.set_xticks(range(0, len(months), step), [str(month) for month in months[::step]], rotation=30)
    axes.axhline(0, color="#6b7280", linewidth=0.8)
    axes.set(ylabel="mean daily IC", title="IC by month")
    plots.add_legend(axes)
    return plots.png(figure)


def monthly_ic(results: Scores) -> pd.DataFrame:
    """Means of the daily IC and rank IC of the test segment by month."""
    daily = pd.DataFrame({"ic": results["test"].ic, "rank_ic": results["test"].rank_ic})
    days = pd.DatetimeIndex(daily.index)
    return daily.groupby((days.tz_localize(None) if days.tz is not None else days).to_period("M")).mean()


def rolling_plot(scores: Mapping[str, Scores]) -> bytes:
    """Plot the cumulative IC of the test segments of all windows.

    Parameters
    ----------
    scores : mapping
        Name -> scores over all windows.
    """
    figure, axes = plots.figure_axes(fitted=True)
    figure.set_size_inches(9.2, 3.4)
    for position, (name, results) in enumerate(list(scores.items())[:MOST_LABELS]):
        daily = results["test"].ic.dropna()
        axes.plot(daily.index, daily.cumsum(), color=COLOURS[position], label=legend_text(name), linewidth=1.8)
    axes.axhline(0, color="#9ca3af", linewidth=0.8)
    axes.set(title="Cumulative IC over all windows")
    axes.tick_params(axis="x", rotation=30)
    plots.add_legend(axes)
    return plots.png(figure)


def _places(column: pd.Series) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Height of each value from 0 to 1, and the labels of an axis: all values of a category, or the ends of a range."""
    numbers = pd.to_numeric(column, errors="coerce")
    if numbers.notna().all() and not pd.api.types.is_bool_dtype(column):
        low, high = float(numbers.min()), float(numbers.max())
        log = low > 0 and high / low > 50
        scaled = np.log(numbers.to_numpy(float)) if log else numbers.to_numpy(float)
        spread = scaled.max() - scaled.min()
        heights = (scaled - scaled.min()) / spread if spread > 0 else np.full(len(scaled), 0.5)
        ends = [(0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")] if spread > 0 else [(0.5, f"{low:.4g}")]
        return heights, ends
    texts = column.map(lambda value: str(value) or "''")
    names = list(dict.fromkeys(texts))
    place = {name: (number / (len(names) - 1) if len(names) > 1 else 0.5) for number, name in enumerate(names)}
    return texts.map(place).to_numpy(float), [(height, name) for name, height in place.items()]


def _colours(values: np.ndarray) -> Any:
    from matplotlib import colormaps

    spread = np.nanmax(values) - np.nanmin(values)
    scaled = (values - np.nanmin(values)) / spread if spread > 0 else np.full(len(values), 0.5)
    return colormaps[SEQUENTIAL](scaled * 0.9)
