"""Time and memory of attention over N stocks, measured, printed as a table and drawn.

    python bench/plot_attention_scaling.py attention_scaling.png [--largest 1000000]

Forward and backward, H = 64, one thread, process CPU time. Memory is the peak of a first step beyond its inputs, in a
new process. Qlib and the dense softmax stop where a step needs seconds; dotted lines extrapolate them with N squared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from bench_attention import CLIFF, LARGE, SMALL, WIDTH, dense_step, exponent, our_step, reference_step, step_seconds
from compare import memory_mb, reset_peak

SIDES: dict[str, tuple[Callable[[int], Callable[[], None]], tuple[int, ...]]] = {
    "qfast": (our_step, SMALL + CLIFF + LARGE),
    "dense softmax": (dense_step, SMALL),
    "reference": (reference_step, (300, 500, 800, 1_500)),
}
COLORS = {"qfast": "#1f77b4", "dense softmax": "#7f7f7f", "reference": "#d62728"}


def print_memory(side: str, n: int) -> None:
    """Print the peak of one step beyond the inputs and the incoming gradient; it includes the input gradients."""
    torch.set_num_threads(1)
    SIDES[side][0](50)()
    step = SIDES[side][0](n)
    before = memory_mb("VmRSS")
    reset_peak()
    step()
    print(memory_mb("VmHWM") - before)


def memory_of(side: str, n: int) -> float:
    code = f"import plot_attention_scaling as p; p.print_memory({side!r}, {n})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


def measure(largest: int) -> dict[str, dict[int, tuple[float, float]]]:
    """Seconds and megabytes of each side and N."""
    torch.set_num_threads(1)
    figures: dict[str, dict[int, tuple[float, float]]] = {}
    for side, (maker, sizes) in SIDES.items():
        small, large = (tuple(n for n in sizes if n <= largest and (n < LARGE[0]) == want) for want in (True, False))
        seconds = step_seconds(small, maker) | step_seconds(
            large, maker
        )  # separately: the inputs of all sizes of a call are alive at once
        figures[side] = {n: (took, memory_of(side, n)) for n, took in seconds.items()}
    return figures


def print_table(figures: dict[str, dict[int, tuple[float, float]]]) -> None:
    print("| N | " + " | ".join(f"{side}, ms | MB" for side in figures) + " |")
    print("| --- " * (1 + 2 * len(figures)) + "|")
    for n in figures["qfast"]:
        cells = [
            f"{1e3 * figures[side][n][0]:.3g} | {figures[side][n][1]:.3g}" if n in figures[side] else "- | -"
            for side in figures
        ]
        print(f"| {n:,} | " + " | ".join(cells) + " |")
    ours = {n: seconds for n, (seconds, _) in figures["qfast"].items()}
    for name, sizes in (("300 .. 5,000", SMALL), ("5,000 .. 20,000", (5_000, *CLIFF, 20_000)), ("20,000 ..", LARGE)):
        measured = {n: ours[n] for n in sizes if n in ours}
        if len(measured) > 1:
            print(f"exponent of qfast's time, {name}: {exponent(measured):.2f}")


def draw(figures: dict[str, dict[int, tuple[float, float]]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    largest = max(figures["qfast"])
    for side, points in figures.items():
        for axis, which, unit in ((axes[0], 0, 1e3), (axes[1], 1, 1.0)):
            values = [max(point[which] * unit, 0.1 * which) for point in points.values()]  # 0 MB: pages at hand
            axis.loglog(list(points), values, "o-", color=COLORS[side], label=side, markersize=4)
            if side != "qfast":
                last = max(points)
                dotted = [values[-1], values[-1] * (largest / last) ** 2]
                axis.loglog([last, largest], dotted, ":", color=COLORS[side])
    axes[0].set_ylabel("ms, forward and backward")
    axes[1].set_ylabel("MB beyond the inputs")
    for axis in axes:
        axis.set_xlabel("stocks of one day")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(f"Attention over all stocks of a day, H = {WIDTH}, float32, one thread; dotted: as N squared")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="file of the picture: .png, .svg or .pdf")
    parser.add_argument("--largest", type=int, default=LARGE[-1], help="largest N for qfast")
    arguments = parser.parse_args()
    mpl.use("Agg")
    figures = measure(arguments.largest)
    print_table(figures)
    draw(figures, arguments.path)


if __name__ == "__main__":
    main()
