"""Adam on a GPU: compared with float64 and torch's fused Adam; many tensors, odd addresses, streams and graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_value_

from qfast.ops import clipped_adam_
from qfast.ops.adam import self_test
from qfast.training.optim import ClippedAdam
from support.devices import DEVICE, needs_gpu, needs_kernels
from support.tensors import randn

pytestmark = needs_kernels
GPU = "cuda"
SHAPES = [(64,), (1,), (7,), (0,), (33, 17), (3, 5, 2), (), (100_003,)]


def parameters(shapes=SHAPES, dtype=torch.float32, device=GPU):
    rng = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=rng, dtype=torch.float64).to(device, dtype)) for shape in shapes]


def give_gradients(params, step):
    rng = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=rng, dtype=torch.float64) * 2).to(p.device, p.dtype)


def run(optimizer, params, steps):
    for step in range(steps):
        give_gradients(params, step)
        if not isinstance(optimizer, ClippedAdam):
            clip_grad_value_(params, 3.0)
        optimizer.step()


def test_the_kernel_equals_plain_torch():
    self_test(torch.device(DEVICE))


# ---------------------------------------------------------------- the operator
BETAS = (0.9, 0.999)


def adam_in_float64(p, g, m, v, step, weight_decay, betas=BETAS, lr=1e-2):
    """The definition, with the settings of `by_operator`."""
    p, g, m, v = (part.cpu().double() for part in (p, g, m, v))
    g = g + weight_decay * p
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
    return p - lr / (1 - betas[0] ** step) * m / (v.sqrt() / (1 - betas[1] ** step) ** 0.5 + 1e-8), m, v


def by_operator(p, g, m, v, step, weight_decay, betas=BETAS, lr=1e-2):
    """Parameters and both averages after step number `step`, on the CPU."""
    p, g, m, v = (part.clone().to(DEVICE) for part in (p, g, m, v))
    count = torch.tensor(float(step - 1), device=DEVICE)
    settings = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "weight_decay": weight_decay}
    clipped_adam_([p], [g], [m], [v], [count], **settings)
    assert float(count) == step
    return p.cpu(), m.cpu(), v.cpu()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.99, 0.0), (0.5, 0.99999)])
@pytest.mark.parametrize("step", [1, 2, 3, 10, 100, 1000, 100_000, 10_000_000])
def test_the_bias_correction_is_exact(step, betas):
    """The averages begin at 0, so the update is the correction and nothing cancels."""
    gradient = randn(1000, dtype=torch.float32)
    inputs = torch.zeros(1000), gradient, torch.zeros(1000), torch.zeros(1000), step, 0.0, betas
    for ours, exact in zip(by_operator(*inputs), adam_in_float64(*inputs), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_float32_follows_float64(weight_decay):
    ours = exact = [randn(10_000, dtype=torch.float32), torch.zeros(10_000), torch.zeros(10_000)]
    for step in range(1, 21):
        gradient = randn(10_000, seed=step, dtype=torch.float32) * 2
        gradient.clamp_(-3, 3)
        ours = by_operator(ours[0], gradient, *ours[1:], step, weight_decay)
        exact = adam_in_float64(exact[0], gradient, *exact[1:], step, weight_decay)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=3e-6, atol=1e-7)


# ---------------------------------------------------------------- the optimizer


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_follows_torch_fused(dtype, weight_decay):
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    settings = {"lr": 1e-2, "weight_decay": weight_decay}
    mine, other = ClippedAdam(ours, **settings), torch.optim.Adam(theirs, fused=True, **settings)
    run(mine, ours, 20), run(other, theirs, 20)
    precision = 1e-6 if dtype == torch.float32 else 1e-15
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=3 * precision, atol=10 * precision * settings["lr"])
        assert torch.equal(a.grad, b.grad)
        step = mine.state[a]["step"]
        assert step.is_cuda
        assert float(step) == 20


@needs_gpu
def test_float64_follows_the_cpu():
    ours, theirs = parameters(dtype=torch.float64), parameters(dtype=torch.float64, device="cpu")
    run(ClippedAdam(ours, lr=1e-2), ours, 10), run(ClippedAdam(theirs, lr=1e-2), theirs, 10)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-14)


@needs_gpu
@pytest.mark.parametrize("count", [75, 76, 77, 200])
def test_any_number_of_tensors(count):
    shapes = [(1 + 37 * i % 4001,) for i in range(count)]
    ours, theirs = parameters(shapes), parameters(shapes)
    mine = ClippedAdam(ours, lr=1e-2)
    run(mine, ours, 3), run(torch.optim.Adam(theirs, lr=1e-2, fused=True), theirs, 3)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=1e-7)
    assert {float(mine.state[p]["step"]) for p in ours} == {3.0}
    assert all(int(ticket) == 0 for ticket in mine._tickets.values())


@needs_gpu
def test_any_strides_and_addresses():
    buffer = torch.randn(5000, device=GPU)
    odd = [buffer[1:1002], buffer[1500:2500].view(20, 50).t(), buffer[3000:4000:2], buffer[4001:4004]]
    ours, theirs = [nn.Parameter(part) for part in odd], [nn.Parameter(part.clone()) for part in odd]
    run(ClippedAdam(ours, lr=1e-2), ours, 3), run(torch.optim.Adam(theirs, lr=1e-2, foreach=False), theirs, 3)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@needs_gpu
def test_clipping_leaves_nan():
    p = [nn.Parameter(torch.ones(5, device=GPU))]
    p[0].grad = torch.tensor([9.0, float("-inf"), float("nan"), 0.5, float("inf")], device=GPU)
    ClippedAdam(p, lr=0.1).step()
    assert p[0].grad.nan_to_num(7.0).tolist() == [3.0, -3.0, 7.0, 0.5, 3.0]
    assert p[0].isnan().tolist() == [False, False, True, False, False]


@needs_gpu
def test_a_graph_makes_a_step_each_replay():
    captured, eager = parameters(), parameters()
    mine, other = ClippedAdam(captured, lr=1e-2), ClippedAdam(eager, lr=1e-2)
    give_gradients(captured, 0), give_gradients(eager, 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        mine.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mine.step()
    for _ in range(4):
        graph.replay()
    for _ in range(5):
        other.step()
    torch.cuda.synchronize()
    for a, b in zip(captured, eager, strict=True):
        assert torch.equal(a, b)
        assert float(mine.state[a]["step"]) == 5


@needs_gpu
def test_two_optimisers_on_two_streams():
    networks = [parameters([(500_000,)] * 3) for _ in range(2)]
    optimizers = [ClippedAdam(params, lr=1e-2) for params in networks]
    for params in networks:
        give_gradients(params, 0)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in networks]
    for _ in range(50):
        for stream, optimizer in zip(streams, optimizers, strict=True):
            with torch.cuda.stream(stream):
                optimizer.step()
    torch.cuda.synchronize()
    for a, b in zip(*networks, strict=True):
        assert torch.equal(a, b)
    assert all(
        float(optimizer.state[params[0]]["step"]) == 50 for optimizer, params in zip(optimizers, networks, strict=True)
    )


@needs_gpu
def test_states_of_a_cpu_and_copies():
    """A step count that torch stores on the CPU is moved to the parameter's device."""
    theirs, ours = parameters(device="cpu"), parameters()
    other = torch.optim.Adam(theirs, lr=1e-2)
    run(other, theirs, 2)
    mine = ClippedAdam(ours, lr=1e-2)
    mine.load_state_dict(copy.deepcopy(other.state_dict()))
    assert all(state["step"].is_cuda for state in mine.state.values())
    pair = copy.deepcopy((ours, mine))
    run(mine, ours, 2), run(pair[1], pair[0], 2)
    for a, b in zip(ours, pair[0], strict=True):
        assert torch.equal(a, b)
