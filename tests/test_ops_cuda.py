"""All CUDA operators on another stream, on another GPU, and partly in a CUDA graph.

The calls are those of `tools/gpu_kernels.py`, which compute-sanitizer checks.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from qfast import ops
from qfast.ops import OPERATORS
from support.devices import DEVICE, needs_gpu, needs_kernels
from support.tensors import fix_dropout_seed

pytestmark = needs_kernels
GPU = "cuda"


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if "cuda" in operator.devices])
def test_an_operator_tests_itself(name):
    OPERATORS[name].self_test(torch.device(DEVICE))


def kernels():
    file = Path(__file__).parents[1] / "tools" / "gpu_kernels.py"
    spec = importlib.util.spec_from_file_location("gpu_kernels", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def same_masks(monkeypatch):
    fix_dropout_seed(monkeypatch)


@pytest.fixture(scope="module")
def calls():
    torch.manual_seed(0)
    return list(kernels().operators()), kernels().forward_and_backward


def results(calls, device, dtype=torch.float32):
    """All results and gradients on a device."""
    cases, forward_and_backward = calls
    out = []
    for call, tensors in cases:
        result = forward_and_backward(call, tensors, torch.device(device), dtype)
        out.append([part.nan_to_num(nan=7.0) for part in result])  # a gather's missing rows are NaN
    return out


def require_same(result, expected):
    for number, (some, others) in enumerate(zip(result, expected, strict=True)):
        for one, other in zip(some, others, strict=True):
            assert torch.equal(one.cpu(), other.cpu()), number


@needs_gpu
def test_float64_equals_the_cpu(calls):
    for number, pair in enumerate(
        zip(results(calls, GPU, torch.float64), results(calls, "cpu", torch.float64), strict=True)
    ):
        for one, other in zip(*pair, strict=True):
            error = float((one.cpu() - other).norm() / other.norm().clamp_min(1e-300))
            assert error < 1e-11, (number, error)


@needs_gpu
def test_another_stream_has_the_same_bits(calls):
    expected = results(calls, GPU)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    busy = torch.randn(4096, 4096, device=GPU)
    for _ in range(20):  # an operator on the default stream would wait for this, or read too early
        busy = busy @ busy / 4096
    with torch.cuda.stream(stream):
        result = results(calls, GPU)
    stream.synchronize()
    require_same(result, expected)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_gpu_has_the_same_bits(calls):
    with torch.cuda.device(0):  # operators run on the device of their tensors, not on the current device
        require_same(results(calls, "cuda:1"), results(calls, "cuda:0"))


@needs_gpu
def test_a_gather_is_captured():
    panel = torch.randn(500, 20, device=GPU)
    rows = torch.randint(0, 500, (64, 20), device=GPU)
    grad = torch.randn(64, 20, 20, device=GPU)

    def once():
        x = panel.detach().requires_grad_()
        result = ops.gather_windows(x, rows)
        return result, *torch.autograd.grad(result, x, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = once()
    rows.copy_(torch.randint(0, 500, (64, 20)))
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(captured, once(), strict=True):
        assert torch.equal(one, other)
