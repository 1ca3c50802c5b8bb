"""Looking at additive attention: who attends to whom on one day, as a table and as a picture."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from qfast.errors import ConfigError, DataError, suggest, whole_number
from qfast.files import atomic_write

SCORES_AT_ONCE = 1 << 22  # of stocks times neighbours: 32 MiB
MOST_SHOWN = 40  # stocks, and neighbours, of a picture
FORMATS = (".png", ".pdf", ".svg")

__all__ = ["neighbours", "plot_attention"]


def neighbours(
    query: Tensor, key: Tensor, names: Iterable[str], instruments: Iterable[str] | None = None, top: int = 10
) -> pd.DataFrame:
    """The neighbours with the largest weights softmax_j(LeakyReLU(query_i + key_j)) of some stocks of a day.

    A score is a sum, and LeakyReLU keeps its order: every stock ranks its neighbours by their key, and only the
    weights differ. So the ranking is found once, and the sums below the weights are taken over a few stocks at a
    time, never N x N.

    Parameters
    ----------
    query, key : Tensor [N]
    names : sequence of str
        The N instruments.
    instruments : sequence of str, optional
        Whose neighbours, each once; None: all N.
    top : int
        How many of each; at most N are there.

    Returns
    -------
    DataFrame
        instrument, rank (1 is the largest), neighbour (the stock itself may be among them), weight, and score, what
        the LeakyReLU is given. Instruments as asked for, ranks ascending.

    Raises
    ------
    ConfigError
        `top` is not a whole number above 0.
    DataError
        An instrument without a row; the nearest name is given.

    Examples
    --------
    >>> table = neighbours(torch.zeros(2), torch.tensor([0.0, 2.0]), ["A", "B"], ["A"], top=1)
    >>> table.round(4).to_dict("records")
    [{'instrument': 'A', 'rank': 1, 'neighbour': 'B', 'weight': 0.8808, 'score': 2.0}]
    """
    whole_number("top", top)
    known = [str(name) for name in names]
    asked = known if instruments is None else list(dict.fromkeys(str(name) for name in instruments))
    where = {name: row for row, name in enumerate(known)}
    unknown = [name for name in asked if name not in where]
    if unknown:
        raise DataError(
            f"instruments: {unknown[:5]} ({len(unknown)} in all) have no row on that day." + suggest(unknown[0], where)
        )
    query, key = query.detach().double().cpu(), key.detach().double().cpu()
    best = torch.argsort(key, descending=True, stable=True)[:top]
    chosen = torch.tensor([where[name] for name in asked], dtype=torch.int64)
    weights = [
        functional.leaky_relu(query[part].unsqueeze(1) + key).softmax(1)[:, best]
        for part in chosen.split(max(1, SCORES_AT_ONCE // max(1, len(key))))
    ]
    table = np.array(known, dtype=object)
    return pd.DataFrame(
        {
            "instrument": np.repeat(table[chosen], len(best)),
            "rank": np.tile(np.arange(1, len(best) + 1), len(asked)),
            "neighbour": np.tile(table[best], len(asked)),
            "weight": torch.cat(weights).flatten().numpy() if weights else np.empty(0),
            "score": (query[chosen].unsqueeze(1) + key[best]).flatten().numpy(),
        }
    )


def plot_attention(table: pd.DataFrame, path: str | os.PathLike[str], title: str = "Attention") -> Path:
    """Draw a table of `neighbours` as a heat map, stocks by neighbours, into a file.

    Parameters
    ----------
    table : DataFrame
    path : path
        .png, .pdf or .svg; appears whole or not at all.
    title : str

    Returns
    -------
    Path
        The file. Of more than 40 stocks, 40 from the most to the least concentrated are shown, and the title says so;
        of more than 40 neighbours the first 40.

    Raises
    ------
    ConfigError
        Another suffix.
    DataError
        An empty table.
    """
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise ConfigError(f"a picture is written as one of {list(FORMATS)}, got {target.name!r}.")
    if table.empty:
        raise DataError("the attention table is empty: there is nothing to draw.")
    grid = table.pivot(index="instrument", columns="rank", values="weight")
    grid = grid.loc[grid.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    grid = grid.iloc[:, :MOST_SHOWN]
    total = len(grid)
    if total > MOST_SHOWN:
        grid = grid.iloc[np.linspace(0, total - 1, MOST_SHOWN).round().astype(int)]
        title = f"{title}, {MOST_SHOWN} of {total} stocks"
    columns = table.drop_duplicates("rank").set_index("rank")["neighbour"].reindex(grid.columns)
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(target, lambda file: _draw(grid, list(columns), title, file, target.suffix.lower()[1:]))
    return target


def _draw(grid: pd.DataFrame, columns: list[str], title: str, file: Path, kind: str) -> None:
    # The object interface: no global state, no display, no interactive backend.
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
    figure.savefig(file, format=kind)
