"""Memory that the CPU operators reuse: what is reused, when it is freed, and that results do not change."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfast import _backend
from qfast.device import release_memory
from qfast.errors import BackendError
from qfast.ops import attention_pool, encoder_layer, feed_forward, gru, lstm, window_conv

pytestmark = pytest.mark.skipif(_backend.native is None, reason="the CPU library is not loaded")

NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
SAVED_BYTES = 10 * 200 * 5 * 64 * 4  # of a step below: 10 steps of 200 rows, five numbers for each of 64 units


def native() -> Any:
    return _backend.native


def facts() -> dict[str, int]:
    return native().memory_cache_facts()


@pytest.fixture(autouse=True)
def empty_cache():
    release_memory()
    yield
    native().set_memory_cache_limit(-1)
    release_memory()


def forward(seed: int, rows: int = 200) -> tuple[Tensor, list[nn.Parameter]]:
    torch.manual_seed(seed)
    module = nn.LSTM(5, 64, batch_first=True)
    weights = [getattr(module, name) for name in NAMES]
    return lstm(torch.randn(rows, 10, 5), [weights])[0], weights


def gradients(seed: int) -> list[Tensor]:
    output, weights = forward(seed)
    return list(torch.autograd.grad(output.square().sum(), weights))


def test_repeated_steps_allocate_nothing() -> None:
    first = gradients(0)
    before = facts()
    for _ in range(3):
        for value, expected in zip(gradients(0), first, strict=True):
            assert torch.equal(value, expected)
    after = facts()
    assert after["allocated"] == before["allocated"]
    assert after["reused"] > before["reused"]
    assert after["used_bytes"] == before["used_bytes"]


def test_saved_values_are_used_until_torch_frees_the_graph() -> None:
    before = facts()["used_bytes"]
    output, weights = forward(0)
    if facts()["used_bytes"] == before:
        pytest.skip("torch allocates the saved tensors before version 2.11")
    assert facts()["used_bytes"] - before >= SAVED_BYTES
    expected = torch.autograd.grad(output.sum(), weights, retain_graph=True)
    other, _ = forward(1)  # must not reuse the memory of the first graph
    again = torch.autograd.grad(output.sum(), weights)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    del other
    assert facts()["used_bytes"] == before


def all_steps(seed: int, gradients_needed: bool = True) -> tuple[Tensor, Tensor]:
    """Inputs, and the results of all steps, of which each has 640 KB."""
    torch.manual_seed(seed)
    module = nn.GRU(64, 64, batch_first=True)
    x = torch.randn(128, 20, 64, requires_grad=gradients_needed)
    with torch.set_grad_enabled(gradients_needed):
        return x, gru(x, [[getattr(module, name) for name in NAMES]], all_steps=True)[0]


def pooled_gradient(steps: Tensor) -> Tensor:
    pooled = attention_pool(steps, torch.ones(8, 64) / 64, torch.zeros(8), torch.ones(8))
    return torch.autograd.grad(pooled.square().sum(), steps, retain_graph=True)[0]


def test_large_results_and_gradients_of_training_are_reused() -> None:
    """Without memory of their own, each would be new memory that the system clears page by page."""
    before = facts()["used_bytes"]
    x, steps = all_steps(0)
    if facts()["used_bytes"] == before:
        pytest.skip("torch allocates the saved tensors before version 2.11")
    grad_steps = pooled_gradient(steps)
    (grad_x,) = torch.autograd.grad(steps, x, grad_steps)
    values = [tensor.detach().clone() for tensor in (steps, grad_steps, grad_x)]
    used = facts()["used_bytes"]
    assert used - before >= 3 * x.nbytes
    other, other_steps = all_steps(1)  # must not write to memory that is in use
    torch.autograd.grad(other_steps, other, pooled_gradient(other_steps))
    assert all(torch.equal(a, b) for a, b in zip((steps, grad_steps, grad_x), values, strict=True))
    del other, other_steps
    allocated = facts()["allocated"]
    for seed in (2, 3):
        next_x, next_steps = all_steps(seed)
        torch.autograd.grad(next_steps, next_x, pooled_gradient(next_steps))
    assert facts()["allocated"] == allocated
    del next_x, next_steps, x, steps, grad_steps, grad_x
    assert facts()["used_bytes"] == before


def weight_gradients(op: str, seed: int) -> list[Tensor]:
    """The gradients of the parameters of a layer with 512 KB in a weight."""
    torch.manual_seed(seed)
    if op == "encoder_layer":
        layer: nn.Module = nn.TransformerEncoderLayer(128, 2, 1024, 0.0, batch_first=True)
        result = encoder_layer(torch.randn(3, 5, 128), list(layer.parameters()), heads=2)
    elif op == "feed_forward":
        layer = nn.Sequential(nn.Linear(128, 1024), nn.ReLU(), nn.Linear(1024, 128))
        result = feed_forward(torch.randn(20, 128), *layer.parameters())
    else:  # up to 64 steps have kernels of their own
        layer = nn.Conv1d(256, 512, 1)
        result = window_conv(torch.randn(1 if op == "few steps" else 9, 20, 256), *layer.parameters())
    return list(torch.autograd.grad(result.square().sum(), list(layer.parameters())))


@pytest.mark.parametrize("op", ["encoder_layer", "feed_forward", "window_conv", "few steps"])
def test_gradients_of_large_weights_reuse_memory(op: str) -> None:
    if torch.__version__ < (2, 11):
        pytest.skip("torch allocates the gradients before version 2.11")
    before = facts()["used_bytes"]
    grads = weight_gradients(op, 0)
    values = [grad.clone() for grad in grads]
    assert facts()["used_bytes"] - before >= max(grad.nbytes for grad in grads) == 1 << 19
    weight_gradients(op, 1)  # must not write to gradients that are in use
    assert all(map(torch.equal, grads, values))
    allocated = facts()["allocated"]
    weight_gradients(op, 2)
    assert facts()["allocated"] == allocated
    del grads
    assert facts()["used_bytes"] == before


def test_results_without_gradients_can_be_resized() -> None:
    _, steps = all_steps(0, gradients_needed=False)
    assert steps.resize_(256, 20, 64).shape[0] == 256


def test_release_frees_idle_memory_only() -> None:
    output, weights = forward(0)
    idle = facts()["idle_bytes"]
    assert idle > 0
    assert release_memory() == idle
    assert facts()["idle_bytes"] == release_memory() == 0
    torch.autograd.grad(output.sum(), weights)


def test_steps_that_need_more_than_the_spare_memory_allocate_nothing() -> None:
    """A step with 640 MB of activations. The cache holds as much as the step used, until it is released."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 1, 2048)
    weights, x = list(layer.parameters()), torch.randn(4000, 20, 8)

    def step() -> None:
        out, *saved = torch.ops.qfast.encoder_layer(x, weights, 1, 1e-5, 0.0, None, False, True, 0, True)
        torch.ops.qfast.encoder_layer_backward(out, x, weights, 1, 0.0, None, False, *saved, False)

    with torch.no_grad():
        step()
        before = facts()
        if before["idle_bytes"] < 600 << 20:
            pytest.skip("torch allocates the saved tensors before version 2.11")
        step()
        assert facts()["allocated"] == before["allocated"]
        release_memory()
    gradients(0)
    assert facts()["idle_bytes"] < 100 << 20


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_limit(limit: int) -> None:
    native().set_memory_cache_limit(limit)
    expected = gradients(3)
    assert facts()["idle_bytes"] <= limit
    native().set_memory_cache_limit(-1)
    assert all(torch.equal(a, b) for a, b in zip(gradients(3), expected, strict=True))
    native().set_memory_cache_limit(limit)  # applies to memory that is idle already
    assert facts()["idle_bytes"] <= limit


def test_smaller_batches_reuse_the_memory_of_larger_ones() -> None:
    forward(0, rows=200)
    before = facts()["allocated"]
    forward(0, rows=190)
    assert facts()["allocated"] == before


def test_threads() -> None:
    expected = [gradients(seed) for seed in range(4)]

    def matches(seed: int) -> bool:
        output, weights = graphs[seed]
        values = torch.autograd.grad(output.square().sum(), weights, retain_graph=True)
        return all(torch.equal(a, b) for a, b in zip(values, expected[seed], strict=True))

    graphs = [forward(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(matches, list(range(4)) * 5))


FORK = """
import os, torch
from torch import nn
from qfast.ops import lstm

torch.set_num_threads(1)
module = nn.LSTM(5, 64, batch_first=True)
layers = [[getattr(module, name) for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")]]
x = torch.randn(200, 10, 5)
with torch.no_grad():
    expected = lstm(x, layers)[0]
    child = os.fork()
    equal = torch.equal(lstm(x, layers)[0], expected)
    if child == 0:
        os._exit(0 if equal else 1)
    assert equal and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_process() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("value", "allowed"), [("0", True), ("64", True), ("-1", False), ("much", False)])
def test_environment_variable(value: str, allowed: bool) -> None:
    code = "from qfast import _backend; print(_backend.native.memory_cache_facts()['idle_bytes'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "QFAST_CACHE_MB": value}, capture_output=True, text=True
    )
    assert (done.returncode == 0) is allowed
    assert allowed or f"QFAST_CACHE_MB is {value!r}" in done.stderr


def test_a_library_of_older_sources_is_named() -> None:
    old = types.ModuleType("qfast._C")
    old.__file__ = "qfast/_C.so"
    with pytest.raises(BackendError, match=r"qfast/_C\.so was built from older sources .* Remedy: install qfast again"):
        _backend._limit_cache(old)
