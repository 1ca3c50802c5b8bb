"""Transformer and Localformer compared with Qlib's modules. `bench/grid.py` compares the encoder layer with torch's.

    python -m pytest bench/bench_transformer.py -s -k compared   # training step and inference, interleaved
    python -m pytest bench/bench_transformer.py -s -k share    # FLOPs per second as a share of the processor's peak
    python -m pytest bench/bench_transformer.py -s -k memory   # peak of a training step
    python -m pytest bench/bench_transformer.py -k regression --benchmark-only

A step is forward, mean squared error, backward, value clipping and Adam with weight decay; both sides start from the
same weights and have no dropout. d_model 64, 2 heads, 2 layers, feed-forward blocks 2048 wide. A multiply-add of
the matrix products that qfast computes counts as 2 FLOPs. In the Transformer's last layer those are the keys and values
of all steps and the rest of the last step.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import compare, cpu_seconds, memory_mb, reset_peak
from fma_peak import fma_peak
from network_calls import inference, training_step
from torch import Tensor, nn

import qfast.nn

WIDTH, HEADS, LAYERS, HIDDEN = 64, 2, 2, 2048
MODULES = {"Transformer": "pytorch_transformer", "Localformer": "pytorch_localformer"}


@dataclass(frozen=True)
class Shape:
    batch: int
    steps: int
    features: int

    def windows(self) -> Tensor:
        return torch.randn(self.batch, self.steps, self.features, generator=torch.Generator().manual_seed(0))

    def flops(self, kind: str) -> float:
        """FLOPs of a forward pass."""
        D, T = WIDTH, self.steps
        pairs = 4.0 * D * D * T  # keys and values
        step = 4.0 * D * D + 4.0 * D * T + 4.0 * D * HIDDEN  # query, result, attention, feed-forward of one step
        layer = pairs + step * T
        if kind == "Transformer":
            return self.batch * ((LAYERS - 1) * layer + pairs + step)
        conv_and_gru = 6.0 * D * D * T + 12.0 * D * D * T
        return self.batch * LAYERS * (layer + conv_and_gru)


SHAPES = {"2048x20": Shape(2048, 20, 20), "2048x60": Shape(2048, 60, 6)}
# lowest accepted ratio
GOALS = {
    ("Transformer", "inference"): 5.0,
    ("Transformer", "training"): 4.1,
    ("Localformer", "inference"): 2.6,
    ("Localformer", "training"): 2.2,
}


def network(kind: str, shape: Shape, side: str) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_feat": shape.features, "d_model": WIDTH, "nhead": HEADS, "num_layers": LAYERS}
    if side == "qfast":
        return getattr(qfast.nn, kind)(**sizes, dropout=0.0)
    pytest.importorskip("qlib", reason="pyqlib (extra qlib) is not installed")
    return import_module(f"qlib.contrib.model.{MODULES[kind]}").Transformer(**sizes, dropout=0.0)


def call_of(kind: str, what: str, shape: Shape, side: str, x: Tensor) -> Callable[[], object]:
    # Qlib's modules accept flat windows [B, F * T]
    arguments = x.transpose(1, 2).flatten(1) if side == "reference" else x
    net = network(kind, shape, side)
    if what == "inference":
        return inference(net, arguments)
    return training_step(net, arguments, side == "qfast", weight_decay=1e-3)


# ---------------------------------------------------------------- compared with Qlib
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("what", ["inference", "training"])
@pytest.mark.parametrize("kind", MODULES)
def test_compared_with_qlib(kind: str, what: str, name: str, threads: int) -> None:
    shape, x = SHAPES[name], SHAPES[name].windows()
    ours, theirs = (call_of(kind, what, shape, side, x) for side in ("qfast", "reference"))
    if what == "inference":
        torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)
    result = compare(ours, theirs, rounds=2 if name == "2048x20" else 1, threads=threads)
    print(f"\n{kind} {what}, {name} {shape}, {threads} threads: {result} ({result.ratio:.2f})")
    if threads == 1:
        assert result.ratio >= GOALS[kind, what]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", MODULES)
def test_share_of_the_peak(kind: str, name: str) -> None:
    """FLOPs per second of inference as a share of the FMA peak; alternating, best of 5."""
    shape, x = SHAPES[name], SHAPES[name].windows()
    score = call_of(kind, "inference", shape, "qfast", x)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    best = peak = 0.0
    for _ in range(5):
        best = max(best, shape.flops(kind) / cpu_seconds(score))
        peak = max(peak, 1e9 * fma_peak(repeats=3))
    torch.set_num_threads(before)
    print(f"\n{kind} {name}: inference {best / 1e9:.1f} of {peak / 1e9:.1f} GFLOP/s, {best / peak:.0%}")
    assert best >= 0.8 * peak


# ---------------------------------------------------------------- memory
def print_step_memory(side: str, kind: str, name: str) -> None:
    """Print the peak of two training steps in MB, beyond what was resident: activations, gradients, optimiser."""
    torch.set_num_threads(1)
    shape = SHAPES[name]
    call_of(kind, "training", shape, side, shape.windows()[:4])()
    step = call_of(kind, "training", shape, side, shape.windows())
    before = memory_mb("VmRSS")
    reset_peak()
    step()
    step()
    print(memory_mb("VmHWM") - before)


def step_memory(side: str, kind: str, name: str) -> float:
    code = f"import bench_transformer; bench_transformer.print_step_memory({side!r}, {kind!r}, {name!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", MODULES)
def test_memory_of_a_training_step(kind: str) -> None:
    pytest.importorskip("qlib", reason="pyqlib (extra qlib) is not installed")
    ours, theirs = (step_memory(side, kind, "2048x20") for side in ("qfast", "reference"))
    print(f"\n{kind} 2048x20: qfast {ours:.0f} MB, Qlib {theirs:.0f} MB, {ours / theirs:.0%}")
    assert ours <= 0.6 * theirs  # with the hidden activations, which are kept if there is memory


# ---------------------------------------------------------------- pytest-benchmark
@pytest.mark.parametrize("side", ["qfast", "reference"])
@pytest.mark.parametrize("what", ["inference", "training"])
@pytest.mark.parametrize("kind", MODULES)
def test_regression(benchmark: Any, kind: str, what: str, side: str) -> None:
    """One thread, 256 windows of 20 steps; groups put the two sides next to each other."""
    torch.set_num_threads(1)
    shape = Shape(256, 20, 20)
    benchmark.group = f"{kind} {what}"
    benchmark.pedantic(call_of(kind, what, shape, side, shape.windows()), rounds=3, warmup_rounds=1)
