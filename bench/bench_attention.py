"""Attention over all stocks of a day, forward and backward, compared with Qlib's and with a dense softmax.

    python -m pytest bench/bench_attention.py -s -k ratio       # the ratios, interleaved (see compare.py)
    python -m pytest bench/bench_attention.py -s -k scaling     # exponents of time over N, across the cache sizes
    python -m pytest bench/bench_attention.py -s -k memory      # extra memory at a million rows
    python -m pytest bench/bench_attention.py -k sizes          # pytest-benchmark over days of any size

H = 64 throughout; a step is forward and backward with gradients of all inputs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import compare, cpu_seconds, memory_mb, reset_peak
from torch import Tensor
from torch.nn import functional

from qfast.ops import additive_attention, graph_attention

WIDTH = 64
SMALL = (300, 500, 800, 1_500, 3_000, 5_000)
CLIFF = (7_000, 10_000, 14_000)
LARGE = (20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000)


def step_of(call: Callable[..., Tensor], *sizes: tuple[int, ...]) -> Callable[[], None]:
    """Forward and backward of `call` on random leaves of these sizes."""
    rng = torch.Generator().manual_seed(0)
    leaves = [torch.randn(size, generator=rng).requires_grad_() for size in sizes]
    grad = torch.randn(call(*leaves).shape, generator=rng)

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        call(*leaves).backward(grad)

    return step


def our_step(n: int) -> Callable[[], None]:
    return step_of(additive_attention, (n,), (n,), (n, WIDTH))


def our_graph_step(n: int) -> Callable[[], None]:
    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return graph_attention(hidden, weight / WIDTH**0.5, bias)

    return step_of(call, (n, WIDTH), (2, WIDTH), (2,))


def reference_step(n: int) -> Callable[[], None]:
    """Qlib's attention and the product with the hidden states, as in its forward."""
    name = "qlib.contrib.model.pytorch_gats"
    network = pytest.importorskip(name, reason="pyqlib (extra qlib) is not installed").GATModel(hidden_size=WIDTH)
    step = step_of(lambda hidden: network.cal_attention(hidden, hidden).mm(hidden) + hidden, (n, WIDTH))

    def call() -> None:
        network.zero_grad()
        step()

    return call


def dense_step(n: int) -> Callable[[], None]:
    """The obvious torch code: scores as the sum of a column and a row, no tensor of size N x N x H."""

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.leaky_relu(query[:, None] + key, 0.01).softmax(-1) @ value

    return step_of(call, (n,), (n,), (n, WIDTH))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("n", "other", "goal"),
    [(300, reference_step, 300), (800, reference_step, 1500), (5000, dense_step, 100)],
    ids=["reference-300", "reference-800", "dense-5000"],
)
def test_ratio(n: int, other: Callable[[int], Callable[[], None]], goal: float, threads: int) -> None:
    many = 200_000 // n
    theirs = other(n)
    for name, step in (("additive_attention", our_step(n)), ("graph_attention", our_graph_step(n))):
        result = compare(step, theirs, rounds=3, calls=(many, 1), threads=threads)
        print(f"\n{name} N={n} H={WIDTH}, {threads} threads, against {other.__name__[:-5]}: {result}")
        assert threads > 1 or result.ratio >= goal


# ---------------------------------------------------------------- growth with N
def step_seconds(
    sizes: tuple[int, ...], maker: Callable[[int], Callable[[], None]] = our_step, repeats: int = 3
) -> dict[int, float]:
    """Least CPU seconds per step for each size. The sizes alternate, and each measurement covers about 0.05 s."""
    steps = {n: maker(n) for n in sizes}
    best = dict.fromkeys(sizes, float("inf"))
    for _ in range(repeats):
        for n, step in steps.items():
            calls = max(1, int(0.05 / max(cpu_seconds(step), 1e-6)))
            best[n] = min(best[n], *(cpu_seconds(step, calls) for _ in range(3)))
    return best


def exponent(seconds: dict[int, float]) -> float:
    """Slope of log time over log N."""
    return float(np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0])


def measure_scaling() -> dict[int, float]:
    torch.set_num_threads(1)
    return step_seconds(SMALL + CLIFF) | step_seconds(LARGE)


def test_scaling() -> None:
    seconds = measure_scaling()
    print()
    for n, took in seconds.items():
        print(f"N={n:>9,}: {took * 1e3:9.3f} ms, {took / n * 1e9:7.1f} ns a row")
    for name, sizes in (("300 .. 5,000", SMALL), ("5,000 .. 20,000", (5_000, *CLIFF, 20_000)), ("20,000 ..", LARGE)):
        print(f"exponent {name}: {exponent({n: seconds[n] for n in sizes}):.2f}")
    assert exponent({n: seconds[n] for n in SMALL}) <= 1.1
    assert exponent({n: seconds[n] for n in LARGE}) <= 1.15


# ---------------------------------------------------------------- memory
def print_extra_memory(n: int, threads: int) -> None:
    """Print the peak memory of one step beyond its inputs and the incoming gradient, in MB. Run in a new process."""
    torch.set_num_threads(threads)
    our_step(100)()
    query, key = torch.randn(2, n)
    value, grad = torch.randn(2, n, WIDTH)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    reset_peak()
    before = memory_mb("VmRSS")
    additive_attention(*leaves).backward(grad)
    print(memory_mb("VmHWM") - before)


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_of_a_million_rows(threads: int) -> None:
    code = f"import bench_attention; bench_attention.print_extra_memory(1_000_000, {threads})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    print(f"\nN=1,000,000 H={WIDTH}, {threads} threads: {float(done.stdout):.0f} MB beyond the inputs")
    assert float(done.stdout) < 2048


# ---------------------------------------------------------------- days of any size
@pytest.mark.parametrize("days", ["1 x 300", "1 x 5000", "250 x 300", "2500 x 40"])
@pytest.mark.parametrize("direction", ["forward", "step"])
def test_sizes(benchmark, days: str, direction: str) -> None:
    torch.set_num_threads(1)
    count, size = map(int, days.split(" x "))
    offsets, n = torch.arange(count + 1) * size, count * size
    if direction == "step":
        benchmark(step_of(lambda q, k, v: additive_attention(q, k, v, offsets), (n,), (n,), (n, WIDTH)))
    else:
        query, key = torch.randn(2, n)
        value = torch.randn(n, WIDTH)
        benchmark(lambda: additive_attention(query, key, value, offsets))
