"""LSTM, GRU and ALSTM compared with Qlib's modules. `bench/grid.py` compares the operators with torch's layers.

    python -m pytest bench/bench_recurrent.py -s -k compared   # training step and inference, interleaved
    python -m pytest bench/bench_recurrent.py -s -k share    # FLOPs per second as a share of the processor's peak
    python -m pytest bench/bench_recurrent.py -s -k memory   # peak of a training step

A step is forward, mean squared error, backward, value clipping and Adam; both sides start from the same weights and
have no dropout. Qlib's modules run on torch's layers. A multiply-add of the layers' matrix products counts as 2 FLOPs:
forward B T sum (F_l + H) gates H, training three times that without the gradient of x.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from compare import compare, cpu_seconds, memory_mb, reset_peak
from fma_peak import fma_peak
from network_calls import inference, training_step
from torch import Tensor, nn

import qfast.nn

GATES = {"LSTM": 4, "GRU": 3}


@dataclass(frozen=True)
class Shape:
    batch: int
    steps: int
    features: int = 20
    hidden: int = 64
    layers: int = 2

    def flops(self, kind: str, training: bool) -> float:
        of_x = self.features * GATES[kind] * self.hidden
        rest = (2 * self.layers - 1) * self.hidden * GATES[kind] * self.hidden
        return 2.0 * self.batch * self.steps * (2 * of_x + 3 * rest if training else of_x + rest)

    def windows(self) -> Tensor:
        rng = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, self.steps, self.features, generator=rng)


SHAPES = {"800x20": Shape(800, 20), "800x60": Shape(800, 60, 6), "5000x20": Shape(5000, 20)}
# lowest accepted ratio
GOALS = {
    ("LSTM", "inference"): {"800x20": 1.15, "800x60": 1.5, "5000x20": 1.6},
    ("LSTM", "training"): {"800x20": 1.8, "800x60": 2.2, "5000x20": 2.4},
    ("GRU", "inference"): {"800x20": 2.0, "800x60": 2.4},
    ("GRU", "training"): {"800x20": 1.8, "800x60": 2.0},
    ("ALSTM", "inference"): {"800x20": 2.0},
    ("ALSTM", "training"): {"800x20": 1.8},
}


def network(kind: str, shape: Shape, side: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_feat": shape.features, "hidden_size": shape.hidden, "num_layers": shape.layers, "dropout": 0.0}
    if side == "qfast":
        return getattr(qfast.nn, f"{kind}Model")(**sizes)
    name = f"qlib.contrib.model.pytorch_{kind.lower()}"
    module = pytest.importorskip(name, reason="pyqlib (extra qlib) is not installed")
    return getattr(module, f"{kind}Model")(**sizes)


def call_of(kind: str, what: str, shape: Shape, side: str, x: Tensor) -> Callable[[], object]:
    # Qlib's modules accept flat windows [B, F * T]
    arguments = x.transpose(1, 2).flatten(1) if side == "reference" else x
    net = network(kind, shape, side)
    return training_step(net, arguments, side == "qfast") if what == "training" else inference(net, arguments)


# ---------------------------------------------------------------- compared with Qlib
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("what", ["inference", "training"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "ALSTM"])
def test_compared_with_qlib(kind: str, what: str, name: str, threads: int) -> None:
    shape, x = SHAPES[name], SHAPES[name].windows()
    ours, theirs = (call_of(kind, what, shape, side, x) for side in ("qfast", "reference"))
    if what == "inference":
        torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-5)
    result = compare(ours, theirs, rounds=5 if name == "800x20" else 2, threads=threads)
    print(f"\n{kind} {what}, {name} {shape}, {threads} threads: {result}")
    goal = GOALS[kind, what].get(name)
    if threads == 1 and goal:
        assert result.ratio >= goal


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", GATES)
def test_share_of_the_peak(kind: str, name: str) -> None:
    """FLOPs per second of a step and of inference as a share of the FMA peak; alternating, best of 5."""
    shape, x = SHAPES[name], SHAPES[name].windows()
    a, b = (torch.randn(1024, 1024) for _ in range(2))
    rates = {
        "matrix product": (lambda: a @ b, 2.0 * 1024**3),
        "inference": (call_of(kind, "inference", shape, "qfast", x), shape.flops(kind, False)),
        "training": (call_of(kind, "training", shape, "qfast", x), shape.flops(kind, True)),
    }
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    best, peak = dict.fromkeys(rates, 0.0), 0.0
    for _ in range(5):
        for what, (call, flops) in rates.items():
            best[what] = max(best[what], flops / cpu_seconds(call, 5 if what == "matrix product" else 2))
        peak = max(peak, 1e9 * fma_peak(repeats=3))
    torch.set_num_threads(before)
    print(f"\n{kind} {name}: " + ", ".join(f"{what} {rate / 1e9:.1f} GFLOP/s" for what, rate in best.items()))
    shares = {what: rate / peak for what, rate in best.items()}
    print(f"  of {peak / 1e9:.1f} GFLOP/s: " + ", ".join(f"{what} {share:.0%}" for what, share in shares.items()))
    if kind == "LSTM":
        assert shares["inference"] >= 0.75
        assert shares["training"] >= 0.60


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
    code = f"import bench_recurrent; bench_recurrent.print_step_memory({side!r}, {kind!r}, {name!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "ALSTM"])
def test_memory_of_a_training_step(kind: str, name: str) -> None:
    pytest.importorskip("qlib", reason="pyqlib (extra qlib) is not installed")
    ours, theirs = (min(step_memory(side, kind, name) for _ in range(2)) for side in ("qfast", "reference"))
    print(f"\n{kind} {name}: qfast {ours:.0f} MB, Qlib {theirs:.0f} MB, {ours / theirs:.0%}")
    assert ours <= 0.6 * theirs
