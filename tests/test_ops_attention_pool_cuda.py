"""Attention over time on a GPU: the CUDA kernels compared with the definition in float64."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfast.ops import attention_pool
from support.devices import DEVICE, assert_no_synchronization, needs_gpu, needs_kernels

pytestmark = needs_kernels
F32, F64 = torch.float32, torch.float64
OPS = torch.ops.qfast
MODULE = importlib.import_module("qfast.ops.attention_pool")  # the package exports the function under that name


class Case(NamedTuple):
    batch: int
    steps: int
    hidden: int
    width: int
    dropout: float = 0.0
    layout: str = "plain"


CASES = [
    Case(0, 3, 4, 2),
    Case(1, 1, 1, 1),
    Case(2, 3, 1, 0),
    Case(5, 7, 7, 3, 0.3),
    Case(33, 20, 64, 32, 0.2),
    Case(9, 31, 33, 16, 0.0, "steps first"),
    Case(9, 32, 32, 33, 0.5, "features first"),
    Case(4, 65, 70, 35, 0.0, "part of a larger tensor"),
    Case(3, 300, 64, 32),
    Case(7, 20, 512, 256, 0.3),
    Case(259, 5, 19, 9),
]
LAYOUTS = ["plain", "steps first", "features first", "part of a larger tensor"]


def draw(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=F64).float().double()


def inputs(case: Case, dtype: torch.dtype, device: str, seed: int = 12345678901) -> tuple[list[Tensor], Tensor]:
    """h, weight, bias, score and a gradient of the result; float64 inputs hold float32 numbers."""
    rng = torch.Generator().manual_seed(case.batch + 7 * case.steps + case.hidden)
    batch, steps, hidden, width = case[:4]
    h = {
        "plain": lambda: draw(rng, batch, steps, hidden).to(device, dtype),
        "steps first": lambda: draw(rng, steps, batch, hidden).to(device, dtype).transpose(0, 1),
        "features first": lambda: draw(rng, batch, hidden, steps).to(device, dtype).transpose(1, 2),
        "part of a larger tensor": lambda: draw(rng, batch, steps + 2, hidden + 1).to(device, dtype)[:, 1:-1, 1:],
    }[case.layout]()
    weight = draw(rng, width, hidden) / hidden**0.5
    others = [part.to(device, dtype) for part in (weight, draw(rng, width), draw(rng, width))]
    return [h, *others], draw(rng, batch, hidden).to(device, dtype)


def seed_for(case: Case, device: str, seed: int = 12345678901) -> Tensor | None:
    return torch.tensor([seed], device=device) if case.dropout else None


def forward_and_backward(tensors: list[Tensor], grad: Tensor, dropout: float, seed: Tensor | None) -> list[Tensor]:
    """Result, attention and the four gradients, by the raw operators."""
    pooled, attention = OPS.attention_pool(*tensors, dropout, seed)
    return [
        pooled,
        attention,
        *OPS.attention_pool_backward(grad, *tensors, dropout, seed, attention, pooled),
    ]


def by_definition(case: Case, dtype: torch.dtype, seed: int = 12345678901) -> list[Tensor]:
    """The definition in plain torch on the CPU, with gradients by autograd."""
    tensors, grad = inputs(case, dtype, "cpu")
    leaves = [part.requires_grad_() for part in tensors]
    pooled, attention = MODULE._pool(*leaves, case.dropout, seed_for(case, "cpu", seed))
    return [pooled.detach(), attention.detach(), *torch.autograd.grad(pooled, leaves, grad)]


def on_gpu(case: Case, dtype: torch.dtype, seed: int = 12345678901) -> list[Tensor]:
    return forward_and_backward(*inputs(case, dtype, DEVICE), case.dropout, seed_for(case, DEVICE, seed))


def relative(result: Tensor, exact: Tensor) -> float:
    assert result.shape == exact.shape
    error, size = float((result.cpu().double() - exact).norm()), float(exact.norm())
    return error / size if size > 1e-12 else error


def test_self_test() -> None:
    MODULE.self_test(torch.device(DEVICE))


def test_the_cuda_kernels_are_registered() -> None:
    for name in ("attention_pool", "attention_pool_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qfast::{name}", DEVICE.upper())


# ---------------------------------------------------------------- accuracy
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64(case: Case) -> None:
    result, exact = on_gpu(case, F64), by_definition(case, F64)
    assert [error for error in map(relative, result, exact) if not error <= 1e-12] == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_compared_with_plain_torch(case: Case) -> None:
    """The error is at most five times that of plain torch in float32 on the CPU, or a few roundings."""
    result, plain, exact = on_gpu(case, F32), by_definition(case, F32), by_definition(case, F64)
    for number, (ours, theirs, true) in enumerate(zip(result, plain, exact, strict=True)):
        error = relative(ours, true)
        assert error <= max(5 * relative(theirs, true), 2e-6), (number, error)
    assert relative(result[0], exact[0]) <= 1e-5


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        Case,
        st.integers(0, 40),
        st.integers(1, 70),
        st.integers(1, 70),
        st.integers(0, 40),
        st.sampled_from([0.0, 0.3, 1.0]),
        st.sampled_from(LAYOUTS),
    )
)
def test_any_shape_in_any_layout(case: Case) -> None:
    for ours, true in zip(on_gpu(case, F64), by_definition(case, F64), strict=True):
        torch.testing.assert_close(ours.cpu(), true, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_a_bit(layout: str) -> None:
    (h, *others), grad = inputs(Case(20, 9, 33, 16, 0.0, layout), F32, DEVICE)
    moved = forward_and_backward([h, *others], grad, 0.0, None)
    easy = forward_and_backward([h.contiguous(), *others], grad, 0.0, None)
    assert all(torch.equal(a, b) for a, b in zip(moved, easy, strict=True))


def test_with_one_step_scores_have_no_gradient() -> None:
    """A single step gets all the attention.

    Zero gradients are exactly 0, because Adam turns rounding noise into full steps.
    """
    (h, *others), grad = inputs(Case(50, 1, 33, 16), F32, DEVICE)
    pooled, attention, grad_h, *of_weights = forward_and_backward([h, *others], grad, 0.0, None)
    assert torch.equal(pooled, h[:, 0])
    assert attention.eq(1).all()
    assert torch.equal(grad_h[:, 0], grad)
    assert not any(part.any() for part in of_weights)


# ---------------------------------------------------------------- dropout
@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345])
@pytest.mark.parametrize("dropout", [1e-9, 0.5, 1.0])
def test_the_mask_is_that_of_the_definition(seed: int, dropout: float) -> None:
    case = Case(27, 6, 20, 40, dropout)
    for ours, true in zip(on_gpu(case, F64, seed), by_definition(case, F64, seed), strict=True):
        torch.testing.assert_close(ours.cpu(), true, rtol=1e-11, atol=1e-12)


def test_manual_seed_makes_it_repeat() -> None:
    tensors, _ = inputs(Case(40, 9, 32, 16), F32, DEVICE)

    def once(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return attention_pool(*tensors, dropout=0.3, training=True)

    assert torch.equal(once(5), once(5))
    assert not torch.equal(once(5), once(6))


# ---------------------------------------------------------------- gradients, schemas, non-finite values
def test_gradients_by_finite_differences() -> None:
    tensors, _ = inputs(Case(3, 5, 4, 2), F64, DEVICE)
    assert torch.autograd.gradcheck(attention_pool, [part.requires_grad_() for part in tensors])


@pytest.mark.parametrize("case", [Case(0, 3, 4, 2), Case(3, 5, 4, 2), Case(3, 5, 4, 2, 0.4)], ids=str)
def test_opcheck(case: Case) -> None:
    tensors, grad = inputs(case, F64, DEVICE)
    rest = case.dropout, seed_for(case, DEVICE)
    torch.library.opcheck(OPS.attention_pool, (*(part.clone().requires_grad_() for part in tensors), *rest))
    pooled, attention = OPS.attention_pool(*tensors, *rest)
    torch.library.opcheck(OPS.attention_pool_backward, (grad, *tensors, *rest, attention, pooled))


def test_autocast_casts_nothing_inside() -> None:
    tensors, grad = inputs(Case(20, 9, 33, 16), F32, DEVICE)
    plain = forward_and_backward(tensors, grad, 0.0, None)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        result = forward_and_backward(tensors, grad, 0.0, None)
    assert all(torch.equal(a, b) for a, b in zip(result, plain, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_stay_in_their_window(value: float) -> None:
    tensors, grad = inputs(Case(30, 9, 33, 16), F64, DEVICE)
    clean = forward_and_backward(tensors, grad, 0.0, None)
    tensors[0][13, 2, 4] = value
    result = forward_and_backward(tensors, grad, 0.0, None)
    others = [i for i in range(30) if i != 13]
    for number in (0, 1, 2):
        assert torch.equal(result[number][others], clean[number][others])
    exact = MODULE._pool(*[part.cpu() for part in tensors], 0.0, None)
    for ours, true in zip(result, exact, strict=False):
        torch.testing.assert_close(ours.cpu(), true, rtol=1e-11, atol=1e-12, equal_nan=True)


# ---------------------------------------------------------------- repeats, graphs, size
def test_the_same_bits_come_again() -> None:
    tensors, grad = inputs(Case(1500, 20, 64, 32), F32, DEVICE)
    seed = torch.tensor([3], device=DEVICE)
    first = forward_and_backward(tensors, grad, 0.2, seed)
    for _ in range(5):
        assert all(
            torch.equal(a, b) for a, b in zip(forward_and_backward(tensors, grad, 0.2, seed), first, strict=True)
        )


@needs_gpu
def test_no_synchronization_with_the_host() -> None:
    tensors, grad = inputs(Case(70, 9, 33, 16), F32, DEVICE)
    seed = torch.tensor([3], device=DEVICE)
    assert_no_synchronization(lambda: forward_and_backward(tensors, grad, 0.2, seed))


@needs_gpu
def test_a_cuda_graph_captures_both_operators() -> None:
    """The graph is replayed on new values, including a new seed, in the same memory."""
    tensors, grad = inputs(Case(70, 9, 33, 16), F32, DEVICE)
    seed = torch.tensor([3], device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_and_backward(tensors, grad, 0.2, seed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward_and_backward(tensors, grad, 0.2, seed)
    for number in (3, 4):
        seed.fill_(number)
        tensors[0].mul_(0.5)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(result, forward_and_backward(tensors, grad, 0.2, seed), strict=True):
            torch.testing.assert_close(a, b)  # cuBLAS uses other workspaces during capture


@needs_gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 64 << 30:
        pytest.skip("needs 64 GB on the GPU")
    (h, *others), _ = inputs(Case(1, 1, 64, 32), F32, DEVICE)
    h = torch.randn(1_150_000, 30, 64, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    assert h.numel() > 2**31
    whole = OPS.attention_pool(h, *others, 0.0, None)
    few = OPS.attention_pool(h[-5:], *others, 0.0, None)
    for a, b in zip(whole, few, strict=True):
        torch.testing.assert_close(a[-5:], b)


# ---------------------------------------------------------------- refusals
def test_refusals_of_the_kernels() -> None:
    (h, weight, bias, score), grad = inputs(Case(3, 5, 4, 2), F32, DEVICE)
    with pytest.raises(ValueError, match="seed: expected one int64 on the device of h"):
        OPS.attention_pool(h, weight, bias, score, 0.5, None)
    with pytest.raises(ValueError, match=r"dropout: expected 0 to 1, got 1\.5"):
        OPS.attention_pool(h, weight, bias, score, 1.5, None)
    with pytest.raises(ValueError, match=r"weight: expected \[A, 4\], got \(2, 3\)"):
        OPS.attention_pool(h, weight[:, 1:], bias, score, 0.0, None)
    with pytest.raises(ValueError, match="h: expected at least one step"):
        OPS.attention_pool(h[:, :0], weight, bias, score, 0.0, None)
    pooled, attention = OPS.attention_pool(h, weight, bias, score, 0.0, None)
    with pytest.raises(ValueError, match=r"attention: expected shape \(3, 5\) and the dtype of h, \w+, got \(3, 4\)"):
        OPS.attention_pool_backward(grad, h, weight, bias, score, 0.0, None, attention[:, 1:], pooled)


@needs_gpu
def test_tensors_of_another_device_are_refused() -> None:
    (h, weight, bias, score), _ = inputs(Case(3, 5, 4, 2), F32, DEVICE)
    with pytest.raises(ValueError, match="expected the device of h"):
        OPS.attention_pool(h, weight.cpu(), bias, score, 0.0, None)
    with pytest.raises(ValueError, match="seed: expected the device of h"):
        OPS.attention_pool(h, weight, bias, score, 0.5, torch.tensor([3]))
