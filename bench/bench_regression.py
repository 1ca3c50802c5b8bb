"""Did a change make something slower? Every model and operator at a usual shape, by pytest-benchmark.

    python -m pytest bench/bench_regression.py --benchmark-save=before       # on the old commit
    python -m pytest bench/bench_regression.py --benchmark-compare --benchmark-compare-fail=min:15%

CPU time of the process on one thread, lowest of the rounds. Compare minima, and only runs on the same machine. This
file times qfast alone; the other benchmarks compare it with Qlib. Models have their defaults, dropout included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qfast.nn
from qfast import ops
from qfast.training.optim import ClippedAdam

STEPS, FEATURES, STOCKS, WIDTH = 20, 20, 800, 64
MODELS = {
    "LSTM": qfast.nn.LSTMModel,
    "GRU": qfast.nn.GRUModel,
    "ALSTM": qfast.nn.ALSTMModel,
    "GATs": qfast.nn.GATModel,
    "TCN": lambda d_feat: qfast.nn.TCNModel(d_feat, 1, [32] * 5, 7, 0.5),
    "Transformer": qfast.nn.Transformer,
    "Localformer": qfast.nn.Localformer,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def measure(benchmark: Any, group: str, call: Callable[[], Any], iterations: int = 1) -> None:
    benchmark.group = group
    benchmark.pedantic(call, rounds=5, iterations=iterations, warmup_rounds=2)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("what", ["training", "inference"])
@pytest.mark.parametrize("name", MODELS)
def test_model(benchmark: Any, name: str, what: str) -> None:
    """One step, clipping and Adam included, or the scores of 800 windows of 20 steps and 20 features."""
    network: nn.Module = MODELS[name](d_feat=FEATURES)
    windows, label = torch.randn(STOCKS, STEPS, FEATURES), torch.randn(STOCKS)
    if name == "TCN":
        windows = windows.transpose(1, 2).contiguous()
    optimizer = ClippedAdam(network.parameters(), lr=1e-3)

    def train() -> None:
        optimizer.zero_grad()
        (network(windows).flatten() - label).square().mean().backward()
        optimizer.step()

    def score() -> None:
        with torch.no_grad():
            network(windows)

    network.train(what == "training")
    measure(benchmark, what, train if what == "training" else score)


def gather() -> Callable[[], Any]:
    panel, index = torch.randn(200_000, FEATURES), torch.randint(0, 199_000, (5000, 1)) + torch.arange(STEPS)
    return lambda: ops.gather_windows(panel, index)


def attention(stocks: int, gradients: bool) -> Callable[[], Any]:
    arguments = [torch.randn(*shape, requires_grad=gradients) for shape in ((stocks,), (stocks,), (stocks, WIDTH))]
    if gradients:
        return lambda: ops.additive_attention(*arguments).sum().backward()
    return lambda: ops.additive_attention(*arguments)


def window_index() -> Callable[[], Any]:
    instruments, days = np.repeat(np.arange(300), 2500), np.tile(np.arange(2500), 300)
    return lambda: ops.build_window_index(instruments, days)


def tanh() -> Callable[[], Any]:
    x = torch.randn(1_000_000)
    return lambda: ops.tanh(x)


OPERATORS: dict[str, Callable[[], Callable[[], Any]]] = {
    "gather 5,000 windows": gather,
    "attention of 800, forward": partial(attention, STOCKS, False),
    "attention of 800, both ways": partial(attention, STOCKS, True),
    "attention of 50,000, both ways": partial(attention, 50_000, True),
    "window index of 750,000 rows": window_index,
    "tanh of 1,000,000": tanh,
}


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("name", OPERATORS)
def test_operator(benchmark: Any, name: str) -> None:
    measure(benchmark, "operators", OPERATORS[name](), 20)
