"""Attention weights of one day, as a table of neighbours and as a heat map."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from qfast.drawing import save_figure
from qfast.errors import ConfigError, DataError, suggest, whole_number
from qfast.files import atomic_write

CHUNK_SCORES = 1 << 22  # scores computed at a time, 32 MiB
MAX_SHOWN = 40  # stocks and neighbours in a heat map
FORMATS = (".png", ".pdf", ".svg")

__all__ = ["neighbours", "plot_attention"]


def neighbours(
    query: Tensor, key: Tensor, names: Iterable[str], instruments: Iterable[str] | None = None, top: int = 10
) -> pd.DataFrame:
    """List the neighbours of stocks with the largest weights softmax_j(LeakyReLU(query_i + key_j)).

    LeakyReLU preserves order, so all stocks rank their neighbours by key and only the weights differ. The neighbours
    are therefore sorted once. The softmax is computed for a few stocks at a time, so no N x N matrix is built.

    Parameters
    ----------
    query, key : Tensor
        [N], from `GATModel.scores`.
    names : sequence of str
        The N instruments.
    instruments : sequence of str, optional
        Instruments whose neighbours are listed. Duplicates count once; None means all N.
    top : int
        Number of neighbours per instrument, at most N.

    Returns
    -------
    DataFrame
        One row per instrument and rank, instruments in the requested order: instrument, rank (1 is the largest weight),
        neighbour (possibly the stock itself), weight, and score, which is query_i + key_j.

    Raises
    ------
    ConfigError
        `top` is not an integer of at least 1.
    DataError
        An instrument is not in `names`.

    Examples
    --------
    >>> table = neighbours(torch.zeros(2), torch.tensor([0.0, 2.0]), ["A", "B"], ["A"], top=1)
    >>> table.round(4).to_dict("records")
    [{'instrument': 'A', 'rank': 1, 'neighbour': 'B', 'weight': 0.8808, 'score': 2.0}]
    """
    whole_number("top", top)
    stocks = [str(name) for name in names]
    requested = stocks if instruments is None else list(dict.fromkeys(str(name) for name in instruments))
    row_of = {name: row for row, name in enumerate(stocks)}
    unknown = [name for name in requested if name not in row_of]
    if unknown:
        raise DataError(
            f"instruments: {unknown[:5]} ({len(unknown)} in all) have no row on that day." + suggest(unknown[0], row_of)
        )
    query, key = query.detach().double().cpu(), key.detach().double().cpu()
    best = torch.argsort(key, descending=True, stable=True)[:top]
    rows = torch.tensor([row_of[name] for name in requested], dtype=torch.int64)
    weights = [
        functional.leaky_relu(query[part].unsqueeze(1) + key).softmax(1)[:, best]
        for part in rows.split(max(1, CHUNK_SCORES // max(1, len(key))))
    ]
    labels = np.array(stocks, dtype=object)
    return pd.DataFrame(
        {
            "instrument": np.repeat(labels[rows], len(best)),
            "rank": np.tile(np.arange(1, len(best) + 1), len(requested)),
            "neighbour": np.tile(labels[best], len(requested)),
            "weight": torch.cat(weights).flatten().numpy() if weights else np.empty(0),
            "score": (query[rows].unsqueeze(1) + key[best]).flatten().numpy(),
        }
    )


def plot_attention(table: pd.DataFrame, path: str | os.PathLike[str], title: str = "Attention") -> Path:
    """Draw a table of `neighbours` as a heat map of stocks by neighbours.

    At most 40 stocks are shown, equally spaced from the most to the least concentrated attention, with a note in the
    title; and the first 40 neighbours.

    Parameters
    ----------
    table : DataFrame
        Result of `neighbours`.
    path : path
        A .png, .pdf or .svg file, which appears complete or not at all.
    title : str

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ConfigError
        Another suffix.
    DataError
        An empty table.

    Examples
    --------
    >>> import tempfile
    >>> table = neighbours(torch.zeros(2), torch.tensor([0.0, 2.0]), ["A", "B"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plot_attention(table, Path(folder, "attention.svg")).name
    'attention.svg'
    """
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise ConfigError(f"path must end in one of {list(FORMATS)}, got {target.name!r}.")
    if table.empty:
        raise DataError(f"the attention table has {len(table)} rows: there is nothing to draw.")
    grid = table.pivot(index="instrument", columns="rank", values="weight")
    grid = grid.loc[grid.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    grid = grid.iloc[:, :MAX_SHOWN]
    total = len(grid)
    if total > MAX_SHOWN:
        grid = grid.iloc[np.linspace(0, total - 1, MAX_SHOWN).round().astype(int)]
        title = f"{title}, {MAX_SHOWN} of {total} stocks"
    columns = table.drop_duplicates("rank").set_index("rank")["neighbour"].reindex(grid.columns)
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(target, lambda file: _draw(grid, list(columns), title, file, target.suffix.lower()[1:]))
    return target


def _draw(grid: pd.DataFrame, columns: list[str], title: str, file: Path, kind: str) -> None:
    # matplotlib's object interface needs neither a display nor global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, width = grid.shape
    figure = Figure(figsize=(2.6 + 0.55 * width, 1.6 + 0.24 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    values = grid.to_numpy(dtype=float)
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0.0)
    for (row, column), value in np.ndenumerate(values):
        colour = "black" if value > values.max() / 2 else "white"
        axes.text(column, row, f"{value:.2g}", ha="center", va="center", color=colour, fontsize=6)
    axes.set_xticks(range(width), columns, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(rows), list(grid.index), fontsize=8)
    axes.set(xlabel="neighbour, largest weight first", ylabel="stock", title=title)
    figure.colorbar(image, ax=axes, label="weight")
    save_figure(figure, file, kind)
