"""The operators compared with torch's layers over a grid of shapes: no cell may be more than 5% slower.

    python bench/grid.py                        # the whole grid; some 15 minutes
    python bench/grid.py beyond                 # shapes outside the grid, where torch's layers may be faster
    python bench/grid.py encoder --gflop 1      # one part, calls of at most 1 GFLOP
    python bench/grid.py --rows "D=256 M=2048"  # rows whose name contains this text
    python bench/grid.py --output cells.json    # adds the ratios to this file, so the grid may be measured in pieces

A cell is the ratio of two CPU times on one thread: torch's layer divided by the operator. Both sides alternate in one
process; a side's time is its lowest of two rounds if the ratio is above 1.25, and else of five. A cell below the limit
is measured once more, with 15 rounds, and the better ratio counts. The exit status is 1 if a cell remains below the
limit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from compare import cpu_seconds
from torch import Tensor, nn

from qfast.files import atomic_write
from qfast.ops import encoder_layer, gru, lstm, window_conv

ROUNDS = 5
CLEAR = 1.25  # a ratio that two rounds suffice for
ROUND_SECONDS = 0.02  # a round repeats short calls for about this long

Side = Callable[[], Tensor]


@dataclass(frozen=True)
class Cell:
    """One shape: `sides` builds a module that owns the weights, the operator's call and torch's."""

    row: str
    column: str
    flops: float  # of a forward pass
    sides: Callable[[], tuple[nn.Module, Side, Side]]


def encoder(width: int, hidden: int, steps: int, batch: int) -> Cell:
    def sides() -> tuple[nn.Module, Side, Side]:
        layer = nn.TransformerEncoderLayer(width, 2, hidden, 0.0, batch_first=False)
        weights, x = list(layer.parameters()), torch.randn(batch, steps, width, requires_grad=True)
        turned = x.detach().transpose(0, 1).contiguous().requires_grad_()
        return layer, lambda: encoder_layer(x, weights, heads=2), lambda: layer(turned)

    flops = 2.0 * batch * steps * width * (4 * width + 2 * hidden + 2 * steps)
    return Cell(f"D={width} M={hidden} T={steps}", f"{batch}", flops, sides)


def recurrent(kind: str, hidden: int, steps: int, batch: int) -> Cell:
    def sides() -> tuple[nn.Module, Side, Side]:
        module = getattr(nn, kind)(20, hidden, 2, batch_first=True)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        layers = [[getattr(module, f"{name}_l{layer}") for name in names] for layer in range(2)]
        operator, x = {"LSTM": lstm, "GRU": gru}[kind], torch.randn(batch, steps, 20)
        return module, lambda: operator(x, layers)[0], lambda: module(x)[0][:, -1]

    gates = 4 if kind == "LSTM" else 3
    flops = 2.0 * batch * steps * gates * hidden * (20 + 3 * hidden)
    return Cell(f"{kind} H={hidden} T={steps}", f"{batch}", flops, sides)


def convolution(width: int, steps: int, batch: int) -> Cell:
    def sides() -> tuple[nn.Module, Side, Side]:
        conv = nn.Conv1d(width, width, 3, 1, 1)
        assert conv.bias is not None
        x, bias = torch.randn(batch, steps, width, requires_grad=True), conv.bias
        return conv, lambda: window_conv(x, conv.weight, bias), lambda: conv(x.transpose(1, 2)).transpose(1, 2)

    return Cell(f"conv D={width} T={steps}", f"{batch}", 6.0 * batch * steps * width * width, sides)


STEPS = (10, 20, 60, 250)
WINDOWS = (1, 16, 64, 300, 2048)
ROWS = (1, 16, 64, 256, 800, 2000, 8192)


def beyond_cells() -> Iterator[Cell]:
    """Shapes outside the grid: wider layers and single steps."""
    yield from itertools.starmap(encoder, itertools.product((512,), (2048,), (1, 10, 60), (1, 16, 64)))
    for kind in ("LSTM", "GRU"):
        yield from itertools.starmap(recurrent, itertools.product((kind,), (64, 256, 512), (1,), (1, 16, 64, 256)))
        yield from itertools.starmap(recurrent, itertools.product((kind,), (512,), (10, 60), (1, 16, 64)))
    yield from itertools.starmap(convolution, itertools.product((512,), (10, 60), (1, 16, 64)))


PARTS: dict[str, Callable[[], Iterator[Cell]]] = {
    "encoder": lambda: itertools.starmap(
        encoder, itertools.product((8, 32, 64, 128, 256), (256, 2048), STEPS, WINDOWS)
    ),
    "recurrent": lambda: itertools.starmap(
        recurrent, itertools.product(("LSTM", "GRU"), (32, 64, 128, 256), STEPS, ROWS)
    ),
    "convolution": lambda: itertools.starmap(convolution, itertools.product((8, 32, 64, 128, 256), STEPS, WINDOWS)),
    "beyond": beyond_cells,
}
GRID = ("encoder", "recurrent", "convolution")


def ratio(cell: Cell, what: str, least: float) -> float:
    """CPU time of torch's layer divided by the CPU time of the operator."""
    torch.manual_seed(0)
    module, ours, theirs = cell.sides()

    def train(side: Side) -> None:
        module.zero_grad()
        side().square().mean().backward()

    def infer(side: Side) -> None:
        with torch.no_grad():
            side()

    run = train if what == "training" else infer
    calls = [lambda side=side: run(side) for side in (ours, theirs)]  # type: ignore[misc]
    for call in calls:
        call()
    count = max(1, int(ROUND_SECONDS / max(cpu_seconds(calls[1]), 1e-6)))
    best = 0.0
    for rounds in (2, ROUNDS, 3 * ROUNDS):
        pairs = [[cpu_seconds(call, count) for call in calls] for _ in range(rounds)]
        best = max(best, min(pair[1] for pair in pairs) / min(pair[0] for pair in pairs))
        if best >= (CLEAR if rounds == 2 else least):
            break
    return best


def measure_part(part: str, what: str, options: argparse.Namespace) -> dict[str, float]:
    """Print the table of a part, a line per row of cells, and return the ratio of each cell by its name."""
    ratios = {}
    lowest, highest = (float(limit) * 1e9 for limit in (options.from_gflop, options.gflop))
    for row, group in itertools.groupby(PARTS[part](), key=lambda cell: cell.row):
        if options.rows not in row:
            continue
        line = f"{what:<9} {row:<22}"
        for cell in group:
            if not lowest <= cell.flops * (3 if what == "training" else 1) <= highest:
                continue
            value = ratio(cell, what, options.least)
            line += f" {cell.column:>5}: {value:5.2f}{'*' if value < options.least else ' '}"
            ratios[f"{part} {what} {cell.row} B={cell.column}"] = value
        print(line, flush=True)
    return ratios


def add_to_file(path: Path, ratios: dict[str, float]) -> None:
    """Write the ratios to a JSON file. Cells that the file contains already are replaced, others are kept."""
    cells = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    cells |= {name: round(value, 3) for name, value in ratios.items()}
    atomic_write(path, lambda file: file.write_text(json.dumps(cells, indent=0) + "\n", encoding="utf-8"))


def main() -> int:
    """Print all tables, then the cells below the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"parts: {', '.join(PARTS)} (default: the first three)")
    parser.add_argument("--what", choices=["inference", "training"], help="default: both")
    parser.add_argument("--rows", default="", metavar="TEXT", help="rows of the tables whose name contains TEXT")
    parser.add_argument("--gflop", type=float, default=4.0, help="skip longer calls (default 4)")
    parser.add_argument("--from-gflop", type=float, default=0.0, help="skip shorter calls (default 0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="add the ratios to this JSON file")
    parser.add_argument("--least", type=float, default=0.95, help="lowest accepted ratio (default 0.95)")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts {sorted(unknown)}, allowed: {', '.join(PARTS)}")
    torch.set_num_threads(1)
    ratios: dict[str, float] = {}
    for part in options.parts or GRID:
        for what in [options.what] if options.what else ["inference", "training"]:
            measured = measure_part(part, what, options)
            ratios |= measured
            if options.output:
                add_to_file(options.output, measured)
    slow = [f"{name}: {value:.2f}" for name, value in ratios.items() if value < options.least]
    print(f"{len(slow)} cells below {options.least}", *slow, sep="\n  ")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
