"""Draws memory and time over the size of the data, and speed over ranks, from files of measured results.

    python bench/plot_scale.py RESULTS.json... --output docs/images

Each line of a file is a JSON object. bench/alpha360_view.py --json writes lines of the kind "panel". A line of the kind
"ranks" has the keys model, ranks and seconds (of one step or epoch). Kinds without lines are not drawn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

COLORS = {"view": "#1f77b4", "columns": "#7f7f7f"}
PANELS = (
    ("handler_mb", "memory of the handler, MB"),
    ("peak_mb", "memory of handler and fit, MB"),
    ("fit_s", "fit of one epoch, CPU s"),
)


def read_lines(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The results of all files."""
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line.strip()]


def plot_panels(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """Memory and time of Alpha360 over the number of rows, as a view and as columns."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 3.2), layout="constrained")
    for axis, (key, label) in zip(axes, PANELS, strict=True):
        for form, color in COLORS.items():
            points = sorted((line["rows"], line[key]) for line in lines if line["form"] == form)
            axis.plot(*zip(*points, strict=True), "o-", color=color, label=form)
        axis.set_xlabel("rows (instruments x days)")
        axis.set_title(label, fontsize=10)
        axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    figure.savefig(file)
    plt.close(figure)


def plot_ranks(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """Speed over the number of ranks, relative to one rank."""
    figure, axis = plt.subplots(figsize=(4, 3.2), layout="constrained")
    for model in sorted({line["model"] for line in lines}):
        seconds = {line["ranks"]: line["seconds"] for line in lines if line["model"] == model}
        ranks = sorted(seconds)
        axis.plot(ranks, [seconds[ranks[0]] / seconds[n] * ranks[0] for n in ranks], "o-", label=model)
    axis.set_xlabel("ranks")
    axis.set_title("speed relative to one rank", fontsize=10)
    axis.legend(frameon=False)
    figure.savefig(file)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw every kind that the files contain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    options = parser.parse_args(arguments)
    lines = read_lines(options.files)
    options.output.mkdir(parents=True, exist_ok=True)
    for kind, draw in (("panel", plot_panels), ("ranks", plot_ranks)):
        chosen = [line for line in lines if line["kind"] == kind]
        if chosen:
            draw(chosen, options.output / f"scale_{kind}.svg")


if __name__ == "__main__":
    main()
