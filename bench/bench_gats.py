"""A training step, memory and evaluation of GATs, compared with Qlib.

    python -m pytest bench/bench_gats.py -s -k step          # training steps, interleaved (see compare.py)
    python -m pytest bench/bench_gats.py -s -k evaluation    # 250 days x 300 stocks
    python -m pytest bench/bench_gats.py -s -k memory        # a day of 5,000 stocks

A step is forward, mean squared error, backward, value clipping and Adam, on one day; both sides start from the
same weights. qfast runs twice: with its recurrent kernel, and with torch's LSTM.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from compare import compare, memory_mb, reset_peak
from torch import Tensor, nn

from qfast.models import GATs
from qfast.nn import GATModel

STEPS, FEATURES = 20, 20  # the sizes of the Alpha158 models, unless a case changes them


def reference_network(features: int, base: str) -> nn.Module:
    name = "qlib.contrib.model.pytorch_gats"
    module = pytest.importorskip(name, reason="pyqlib (extra qlib) is not installed")
    torch.manual_seed(0)
    return module.GATModel(d_feat=features, base_model=base)


def our_network(features: int, base: str, own_kernel: bool = True) -> GATModel:
    torch.manual_seed(0)
    network = GATModel(d_feat=features, base_model=base)
    if not own_kernel:  # qfast calls torch's layer if the layer has hooks
        network.rnn.register_forward_hook(lambda *_: None)
    return network


def training_step(network: nn.Module, x: Tensor, fused: bool) -> Callable[[], None]:
    """`fused` selects torch's fused Adam, which qfast uses; Qlib uses torch's default."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=fused)
    label = torch.randn(len(x), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        loss = (network(x) - label).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(network.parameters(), 3.0)
        optimizer.step()

    return step


def flat_day(n: int, steps: int, features: int) -> Tensor:
    return torch.randn(n, features * steps, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("base", ["LSTM", "GRU"])
@pytest.mark.parametrize(("steps", "features"), [(20, 20), (60, 6)], ids=["T20-F20", "T60-F6"])
@pytest.mark.parametrize("n", [300, 800])
def test_training_step(n: int, steps: int, features: int, base: str, threads: int) -> None:
    x = flat_day(n, steps, features)
    theirs = training_step(reference_network(features, base), x, fused=False)
    for own_kernel in (True, False):
        ours = training_step(our_network(features, base, own_kernel), x, fused=True)
        result = compare(ours, theirs, rounds=3, calls=(2, 1), threads=threads)
        kernel = "qfast's" if own_kernel else "torch's"
        print(f"\nstep N={n} T={steps} F={features}, {kernel} {base}, {threads} threads: {result}")
        if threads == 1 and base == "LSTM" and steps == 20:
            assert result.ratio >= {(300, True): 2.8, (300, False): 1.4, (800, True): 8, (800, False): 5}[n, own_kernel]


# ---------------------------------------------------------------- evaluation
def flat_frame(days: int, stocks: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Features and label in the form that Qlib's evaluation accepts."""
    dates = pd.bdate_range("2020-01-01", periods=days)
    index = pd.MultiIndex.from_product([dates, [f"S{i:04d}" for i in range(stocks)]], names=["datetime", "instrument"])
    values = np.random.default_rng(0).standard_normal((len(index), FEATURES * STEPS), dtype=np.float32)
    return pd.DataFrame(values, index=index), pd.DataFrame(values[:, 0].copy(), index=index)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("days", "stocks", "least"), [(250, 300, 4), (50, 800, 8)], ids=["250x300", "50x800"])
def test_evaluation(days: int, stocks: int, least: float, threads: int) -> None:
    """Qlib's `test_epoch` against qfast's network, called with as many days at once as the estimator does."""
    module = pytest.importorskip("qlib.contrib.model.pytorch_gats", reason="pyqlib (extra qlib) is not installed")
    features, label = flat_frame(days, stocks)
    theirs = module.GATs(d_feat=FEATURES, base_model="LSTM", GPU=-1, seed=0)
    network, labels = our_network(FEATURES, "LSTM"), torch.from_numpy(label.to_numpy().ravel())
    network.load_state_dict(theirs.GAT_model.state_dict())
    at_once = GATs.rows_per_call // stocks

    @torch.no_grad()
    def ours() -> float:
        windows = torch.from_numpy(features.to_numpy()).split(at_once * stocks)
        parts = [network(part, torch.arange(0, len(part) + 1, stocks)) for part in windows]
        return (torch.cat(parts) - labels).square().view(days, stocks).mean(1).mean().item()

    assert abs(ours() / theirs.test_epoch(features, label)[0] - 1) < 1e-5  # the same loss
    result = compare(ours, lambda: theirs.test_epoch(features, label), rounds=1, threads=threads)
    print(f"\nevaluation of {days} days x {stocks} stocks, {threads} threads: {result}")
    assert threads > 1 or result.ratio >= least


# ---------------------------------------------------------------- memory
def print_step_memory(side: str, n: int) -> None:
    """Print the peak of two training steps in MB, beyond the network, the optimiser and the day's data."""
    torch.set_num_threads(1)
    network = reference_network(FEATURES, "LSTM") if side == "reference" else our_network(FEATURES, "LSTM")
    training_step(network, flat_day(4, STEPS, FEATURES), fused=side == "qfast")()
    step = training_step(network, flat_day(n, STEPS, FEATURES), fused=side == "qfast")
    before = memory_mb("VmRSS")
    reset_peak()
    step()
    step()
    print(memory_mb("VmHWM") - before)


def step_memory(side: str, n: int) -> float:
    code = f"import bench_gats; bench_gats.print_step_memory({side!r}, {n})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


def test_memory_of_a_day_of_5000() -> None:
    """Qlib is measured at 1,000 and 1,500 stocks. The part that grows with N squared is extrapolated to 5,000."""
    pytest.importorskip("qlib", reason="pyqlib (extra qlib) is not installed")
    ours, small, middle = step_memory("qfast", 5000), step_memory("reference", 1000), step_memory("reference", 1500)
    square = (middle - small) / (1500**2 - 1000**2)
    extrapolated = middle + square * (5000**2 - 1500**2)
    print(
        f"\ntraining step, 5,000 stocks: ours {ours:.0f} MB; Qlib {small:.0f} MB at 1,000 and {middle:.0f} MB at "
        f"1,500 stocks, {square * 2**20:.0f} bytes a pair: {extrapolated * 2**20 / 1e9:.1f} GB at 5,000"
    )
    assert ours < 1024
