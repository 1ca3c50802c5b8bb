"""Training steps of two source trees, each with its compiled library, compared pair by pair.

    python bench/paired.py BEFORE AFTER [--steps LSTM-800 GATs-300 ...] [--pairs 25] [--threads 1]

Two processes, one for each tree, answer in turn. A pair is the lowest CPU time (with several threads: wall time) of a
few steps on both sides, and the figure is the median ratio over all pairs, with its quartiles. Other work on the
machine slows both sides of a pair alike. A step is forward, loss, backward, clipping and Adam of a network with Qlib's
default sizes on windows of 20 steps and 20 features. Its name contains the model and the number of windows. The last
column is the number of page faults of a step.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, cast

STEP_LEN, FEATURES = 20, 20
DEFAULT = (
    "LSTM-800",
    "LSTM-5000",
    "GRU-800",
    "ALSTM-800",
    "GATs-300",
    "TCN-2000",
    "Transformer-512",
    "Localformer-512",
)


def training_step(name: str) -> Callable[[], None]:
    """One step of a network of the tree on sys.path."""
    import torch
    from bench_regression import MODELS  # imports the package qfast of the tree

    from qfast.training.optim import ClippedAdam

    model, _, windows = name.partition("-")
    torch.manual_seed(0)
    network = MODELS[model](d_feat=FEATURES)
    x, label = torch.randn(int(windows), STEP_LEN, FEATURES), torch.randn(int(windows))
    x = x.transpose(1, 2).contiguous() if model == "TCN" else x
    optimizer = ClippedAdam(network.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        (network(x).flatten() - label).square().mean().backward()
        optimizer.step()

    return step


def serve(tree: str, threads: int) -> None:
    """Time a step of a tree, once for each empty line on the standard input. The first line is the name of the step."""
    sys.path.insert(0, tree)
    import torch

    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    step = training_step(sys.stdin.readline().strip())
    step()
    begin = clock()
    step()
    repeats = min(12, max(2, int(0.4 / (clock() - begin))))
    for _ in sys.stdin:
        faults, best = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, float("inf")
        for _ in range(repeats):
            begin = clock()
            step()
            best = min(best, clock() - begin)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        print(best, faults / repeats, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", type=Path, nargs="+", metavar="TREE", help="folders that contain the package qfast")
    parser.add_argument("--steps", nargs="+", default=DEFAULT)
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(str(options.trees[0]), options.threads)
        return
    if len(options.trees) != 2:
        parser.error(f"expected two trees, got {len(options.trees)}")
    for tree in options.trees:
        if not list((tree / "qfast").glob("_C*")):
            parser.error(f"{tree} has no compiled library. Remedy: python setup.py build_ext --inplace in that folder.")
    print("| step | before, ms | after, ms | before / after: median | quartiles | page faults |")
    print("|---|---|---|---|---|---|", flush=True)
    for step in options.steps:
        command = [sys.executable, __file__, "--serve", "--threads", str(options.threads)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        sides = [subprocess.Popen([*command, str(tree.resolve())], **pipes) for tree in options.trees]
        for side in sides:
            ask(side, step)
        times: list[tuple[float, float]] = []
        faults = (0.0, 0.0)
        for number in range(options.pairs):
            order = (0, 1) if number % 2 else (1, 0)
            answers = {which: ask(sides[which], "") for which in order}
            times.append((answers[0][0], answers[1][0]))
            faults = (answers[0][1], answers[1][1])
        for side in sides:
            side.communicate()
        ratios = [before / after for before, after in times]
        low, middle, high = statistics.quantiles(ratios, n=4)
        before, after = (1e3 * min(column) for column in zip(*times, strict=True))
        print(
            f"| {step} | {before:.1f} | {after:.1f} | {middle:.2f} | {low:.2f} to {high:.2f} | "
            f"{faults[0]:,.0f}, {faults[1]:,.0f} |",
            flush=True,
        )


def ask(side: subprocess.Popen[str], line: str) -> tuple[float, float]:
    """Seconds and page faults of a step in one process. The first line is the name of the step."""
    stdin, stdout = cast(IO[str], side.stdin), cast(IO[str], side.stdout)
    stdin.write(line + "\n")
    stdin.flush()
    if line:
        return 0.0, 0.0
    seconds, faults = stdout.readline().split()
    return float(seconds), float(faults)


if __name__ == "__main__":
    main()
