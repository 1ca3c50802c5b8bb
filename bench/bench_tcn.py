"""Training step, inference and memory of the TCN compared with Qlib, and its speed over shapes.

    python -m pytest bench/bench_tcn.py -s -k compared      # training step and inference, interleaved (see compare.py)
    python -m pytest bench/bench_tcn.py -s -k share       # FLOPs per second, compared with a large matrix product
    python -m pytest bench/bench_tcn.py -s -k memory      # peak of a training step
    python -m pytest bench/bench_tcn.py -s -k table       # kernel 2 to 9 x channels 16 to 256 x T 10 to 250
    python -m pytest bench/bench_tcn.py -s -k corners     # the corners of that table compared with Qlib
    python -m pytest bench/bench_tcn.py -s -k period      # windows of consecutive days of one stock

A step is forward (dropout 0.5), mean squared error, backward, value clipping and Adam; both sides start from the same
weights. A multiply-add that the last step can see counts as 2 FLOPs (`temporal_conv_net.plan`).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from compare import compare, cpu_seconds, memory_mb, reset_peak
from torch import Tensor, nn

from qfast.nn import TCNModel
from qfast.ops import temporal_conv_net
from qfast.ops.temporal_conv_plan import Plan


@dataclass(frozen=True)
class Setting:
    """Windows of T steps and F features, and a stack."""

    T: int
    kernel: int
    channels: int
    features: int
    batch: int
    layers: int = 5

    @property
    def plan(self) -> Plan:
        return temporal_conv_net.plan(self.T, self.kernel, self.layers)

    def flops(self, training: bool) -> float:
        """FLOPs of one call. Training adds the weight gradients, and the input gradients except for x."""
        forward, *_ = self.plan.multiply_adds(self.features, [self.channels] * self.layers)
        total = forward
        if training:
            first = self.plan.blocks[0]
            of_x = first.taps[0] * self.features * self.channels
            if self.features != self.channels:
                of_x += len(first.output) * self.features * self.channels
            total = 3 * forward - of_x
        return 2.0 * self.batch * total

    def network(self, of: type[nn.Module], dropout: float = 0.5) -> nn.Module:
        torch.manual_seed(0)
        return of(self.features, 1, [self.channels] * self.layers, self.kernel, dropout)

    def windows(self) -> Tensor:
        """[B, F, T], a transposed view of windows [B, T, F]."""
        rng = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, self.T, self.features, generator=rng).transpose(1, 2)


ALPHA158 = Setting(T=20, kernel=7, channels=32, features=20, batch=2000)
ALPHA360 = Setting(T=60, kernel=3, channels=128, features=6, batch=2000)
NAMED = {"alpha158": ALPHA158, "alpha360": ALPHA360}


def reference() -> type[nn.Module]:
    name = "qlib.contrib.model.pytorch_tcn"
    return pytest.importorskip(name, reason="pyqlib (extra qlib) is not installed").TCNModel


def training_step(network: nn.Module, x: Tensor, fused: bool) -> Callable[[], None]:
    """`fused` selects torch's fused Adam, which qfast uses; Qlib uses torch's default."""
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=fused)
    label = torch.randn(len(x), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        loss = (network(x) - label).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(network.parameters(), 3.0)
        optimizer.step()

    return step


def inference(network: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    network.eval()

    @torch.no_grad()
    def score() -> Tensor:
        return network(x)

    return score


def forward_and_backward(network: nn.Module, x: Tensor) -> None:
    network.zero_grad()
    network(x).sum().backward()


CALLS = {"training": training_step, "inference": inference}


# ---------------------------------------------------------------- compared with Qlib
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("name", NAMED)
def test_compared_with_qlib(name: str, what: str, threads: int) -> None:
    setting, x = NAMED[name], NAMED[name].windows()
    if what == "training":
        ours = training_step(setting.network(TCNModel), x, fused=True)
        theirs = training_step(setting.network(reference()), x, fused=False)
    else:
        ours, theirs = (inference(setting.network(of), x) for of in (TCNModel, reference()))
        torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-5)
    rounds = 3 if name == "alpha158" else 1
    result = compare(ours, theirs, rounds=rounds, calls=(3, 1), threads=threads)
    print(f"\n{what}, {name} {setting}, {threads} threads: {result}")
    if threads == 1:
        goal = {"alpha158": {"training": 12, "inference": 15}, "alpha360": {"training": 11, "inference": 14}}
        assert result.ratio >= goal[name][what]


@pytest.mark.parametrize("name", NAMED)
def test_share_of_the_matrix_product_rate(name: str) -> None:
    """FLOPs per second of a step and of inference over those of a 1,024 x 1,024 product; alternating, best of 5."""
    setting, x = NAMED[name], NAMED[name].windows()
    step, score = training_step(setting.network(TCNModel), x, True), inference(setting.network(TCNModel), x)
    a, b = (torch.randn(1024, 1024) for _ in range(2))
    rates = {
        "matrix product": (lambda: a @ b, 2 * 1024**3),
        "training": (step, setting.flops(True)),
        "inference": (score, setting.flops(False)),
    }
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    best = dict.fromkeys(rates, 0.0)
    for _ in range(5):
        for what, (call, flops) in rates.items():
            best[what] = max(best[what], flops / cpu_seconds(call, 5 if what == "matrix product" else 1))
    torch.set_num_threads(before)
    print(f"\n{name}: " + ", ".join(f"{what} {rate / 1e9:.1f} GFLOP/s" for what, rate in best.items()))
    shares = {what: best[what] / best["matrix product"] for what in CALLS}
    print(f"{name}: " + ", ".join(f"{what} {share:.0%}" for what, share in shares.items()))
    if name == "alpha360":
        assert min(shares.values()) >= 0.6


# ---------------------------------------------------------------- memory
def print_step_memory(side: str, name: str) -> None:
    """Print the peak of two training steps in MB, beyond the network, the optimiser and the batch."""
    torch.set_num_threads(1)
    setting = NAMED[name]
    network = setting.network(TCNModel if side == "qfast" else reference())
    x = setting.windows()
    training_step(network, x[:4], fused=side == "qfast")()
    step = training_step(network, x, fused=side == "qfast")
    before = memory_mb("VmRSS")
    reset_peak()
    step()
    step()
    print(memory_mb("VmHWM") - before)


def step_memory(side: str, name: str) -> float:
    code = f"import bench_tcn; bench_tcn.print_step_memory({side!r}, {name!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMED)
def test_memory_of_a_training_step(name: str) -> None:
    reference()
    ours, theirs = step_memory("qfast", name), step_memory("reference", name)
    print(f"\n{name}: ours {ours:.0f} MB, Qlib {theirs:.0f} MB, {theirs / ours:.1f}x")
    assert ours <= theirs / 5


# ---------------------------------------------------------------- shapes
KERNELS, WIDTHS, LENGTHS = (2, 3, 5, 7, 9), (16, 32, 64, 128, 256), (10, 20, 60, 120, 250)


def sized(T: int, kernel: int, channels: int) -> Setting:
    """A setting with 2,000 rows, or fewer if those exceed 3 GFLOPs forward."""
    one = Setting(T, kernel, channels, 20, 1)
    rows = max(24, min(2000, int(3e9 / one.flops(False))))
    return Setting(T, kernel, channels, 20, rows)


@pytest.mark.parametrize("kernel", KERNELS)
def test_table_over_shapes(kernel: int) -> None:
    """Share of a matrix product's rate, inference / forward and backward, least of three; five blocks, F = 20."""
    torch.set_num_threads(1)
    a, b = (torch.randn(1024, 1024) for _ in range(2))
    lowest = 1.0
    print(f"\nkernel {kernel}: share of a matrix product's rate, inference / forward and backward")
    print("     C " + "".join(f"{f'T={T}':>14}" for T in LENGTHS))
    for channels in WIDTHS:
        cells = []
        for T in LENGTHS:
            setting = sized(T, kernel, channels)
            x = setting.windows()
            score = inference(setting.network(TCNModel), x)
            network = setting.network(TCNModel)
            step = partial(forward_and_backward, network, x)
            score(), step()
            times = [[cpu_seconds(call) for call in (lambda: a @ b, score, step)] for _ in range(3)]
            product, *ours = (min(column) for column in zip(*times, strict=True))
            flops = (setting.flops(False), setting.flops(True))
            shares = [f / t / (2 * 1024**3 / product) for f, t in zip(flops, ours, strict=True)]
            lowest = min(lowest, *shares)
            cells.append(f"{shares[0]:.0%} / {shares[1]:.0%}")
        print(f"{channels:>6} " + "".join(f"{cell:>14}" for cell in cells), flush=True)
    assert lowest >= 0.3


@pytest.mark.parametrize("kernel", [2, 9])
def test_corners_compared_with_qlib(kernel: int) -> None:
    """The corners of the table: a training step with so few rows that Qlib needs about a second."""
    for channels in (16, 256):
        for T in (10, 250):
            one = Setting(T, kernel, channels, 20, 1)
            _, _, padded = one.plan.multiply_adds(20, [channels] * 5)
            setting = Setting(T, kernel, channels, 20, max(24, min(2000, int(12e9 / (6 * padded)))))
            x = setting.windows()
            ours = training_step(setting.network(TCNModel), x, fused=True)
            theirs = training_step(setting.network(reference()), x, fused=False)
            result = compare(ours, theirs, rounds=1, calls=(2, 1))
            print(f"\ntraining, {setting}: {result}")
            assert result.ratio >= 2


# ---------------------------------------------------------------- windows of consecutive days
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("threads", [1, 2])
def test_whole_period_of_consecutive_windows(name: str, threads: int) -> None:
    """2,500 days of one stock: views of the rows compared with copied windows."""
    setting = NAMED[name]
    rows = torch.randn(2500, setting.features, generator=torch.Generator().manual_seed(0))
    windows = rows.unfold(0, setting.T, 1)
    copied = windows.transpose(1, 2).contiguous().transpose(1, 2)
    network = setting.network(TCNModel)
    shared, each = inference(network, windows), inference(network, copied)
    torch.testing.assert_close(shared(), each(), rtol=1e-4, atol=1e-6)
    result = compare(shared, each, rounds=5, threads=threads)
    print(f"\n{len(windows)} consecutive windows, {name}, {threads} threads: {result}")
    if name == "alpha360" and threads == 1:
        assert result.ratio >= 2.5
