"""Serial share of a training step, what more threads could give at best, and what two threads give.

    python bench/serial_share.py [--steps LSTM-800 GATs-300 ...] [--repeats 40]

CPU time of one thread, the fastest of the repeats. The operators divide their work among threads. Everything else of a
step counts as serial: Python, the loss, the attention of a single day, and torch's own operations, of which only large
ones use threads. The bounds are Amdahl's law with these shares. They also respect that a backward pass consists of at
most 16 parts, and of fewer for few windows. They assume that memory and clock rate keep up, and that all work of an
operator is divided, packing of weights included.

The last column is measured: the wall time of a step on one thread divided by the wall time on two. Both alternate. The
column contains the median and the quartiles of all pairs. A single pair may exceed the bound, because the clock rate of
the machine may change within it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from unittest import mock

import torch
from paired import training_step

import qfast.ops  # noqa: F401 - defines the operators

STEPS = ("LSTM-800", "LSTM-5000", "GRU-800", "ALSTM-800", "GATs-300", "TCN-2000", "Transformer-512", "Localformer-512")
OPERATORS = (
    "lstm",
    "gru",
    "linear_tanh",
    "attention_pool",
    "temporal_conv_net",
    "encoder_layer",
    "window_conv",
    "feed_forward",
)
THREADS = (2, 16, 64)
PARTS, TILE_ROWS = 16, 48  # of a backward pass; see csrc/cpu_workers.h and csrc/recurrent/recurrent_pack.h


def step_times(step: Callable[[], None], repeats: int) -> tuple[float, dict[str, float]]:
    """Seconds of the fastest step, and of the operators in it."""
    spent: dict[str, float] = {}

    def timed(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            start = time.process_time()
            result = call(*args, **kwargs)
            spent[name] = spent.get(name, 0.0) + time.process_time() - start
            return result

        return run

    fastest: tuple[float, dict[str, float]] = (float("inf"), {})
    with ExitStack() as patches:
        for operator in OPERATORS:
            for name in (operator, f"{operator}_backward"):
                call = getattr(torch.ops.qfast, name)
                patches.enter_context(mock.patch.object(torch.ops.qfast, name, timed(name, call)))
        for _ in range(3 + repeats):  # the first steps allocate memory
            spent.clear()
            start = time.process_time()
            step()
            fastest = min(fastest, (time.process_time() - start, dict(spent)), key=lambda times: times[0])
    return fastest


def speedup(total: float, spent: dict[str, float], windows: int, threads: int) -> float:
    """Upper bound of the speedup with this number of threads."""
    tiles = -(-windows // TILE_ROWS)
    parts = min(PARTS, tiles + tiles % 2) if tiles > 1 else 1
    divided = sum(
        seconds / (min(threads, parts) if name.endswith("_backward") else threads) for name, seconds in spent.items()
    )
    return total / (total - sum(spent.values()) + divided)


def measured_speedup(step: Callable[[], None], repeats: int) -> list[float]:
    """Wall time of a step on one thread divided by the time on two: the quartiles of alternating pairs."""
    ratios = []
    for _ in range(repeats):
        one_and_two = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            step()
            times = []
            for _ in range(3):
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
            one_and_two.append(min(times))
        ratios.append(one_and_two[0] / one_and_two[1])
    torch.set_num_threads(1)
    return statistics.quantiles(ratios, n=4)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", default=STEPS)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    titles = [f"{threads} threads" for threads in THREADS]
    print("| " + " | ".join(["step", "ms", "serial, ms", "serial share", *titles, "2 threads, measured"]) + " |")
    print("|" + "---|" * (5 + len(THREADS)), flush=True)
    for name in options.steps:
        step = training_step(name)
        total, spent = step_times(step, options.repeats)
        serial = total - sum(spent.values())
        bounds = [f"{speedup(total, spent, int(name.partition('-')[2]), threads):.2f}" for threads in THREADS]
        low, median, high = measured_speedup(step, options.repeats)
        measured = f"{median:.2f} ({low:.2f} to {high:.2f})"
        cells = [name, f"{total * 1e3:.1f}", f"{serial * 1e3:.2f}", f"{serial / total:.1%}", *bounds, measured]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
