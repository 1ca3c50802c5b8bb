"""Precisions of the feed-forward block on a GPU, alone and in an encoder layer, compared with float64.

A hidden value that is rounded to the other side of its ReLU loses its gradient. Where gradients are compared, the
biases keep hidden values away from zero.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qfast.ops import encoder_layer, feed_forward
from qfast.precision import NAMES, using_precision
from support.devices import DEVICE, long_on_host, needs_gpu, needs_kernels
from support.encoder import BlockCase, LayerCase
from support.operator_case import F32, relative_error

pytestmark = needs_kernels
OPS = torch.ops.qfast
FAST = NAMES[1:]
LIMITS = {"tf32": 2e-3, "bf16": 2e-2}  # of the relative norm

# All forms: results in one or two 64s of columns, several tiles, several blocks per tile, remainders.
BLOCKS = [
    (BlockCase((1,), 1, 1, 1), 0.0),
    (BlockCase((3,), 7, 33, 5), 0.3),
    (BlockCase((70,), 64, 100, 64), 0.3),
    (BlockCase((131,), 10, 64, 70), 0.2),
    (BlockCase((300,), 16, 300, 8), 0.0),
    (BlockCase((65,), 128, 70, 128), 0.3),
    (BlockCase((40,), 33, 257, 65), 0.0),
    pytest.param(BlockCase((5000,), 64, 2048, 64), 0.1, marks=long_on_host),
    (BlockCase((13,), 130, 40, 200), 0.4),  # too wide for these forms
]


def seed_for(dropout: float) -> Tensor | None:
    return torch.tensor([12345], device=DEVICE) if dropout else None


def away_from_zero(case: BlockCase) -> list[Tensor]:
    """x, parameters and a gradient in float64, of float32 values; half of the hidden values are well below zero."""
    x, w1, b1, w2, b2 = (part.double().to(DEVICE) for part in case.inputs(F32))
    largest = (x @ w1.t()).abs().max() if len(x) else x.new_ones(())
    b1 = torch.where(torch.arange(len(b1), device=DEVICE) % 3 == 1, -1.0, 1.0) * (1.5 * largest + b1.abs())
    grad = torch.randn(len(x), case.out, generator=torch.Generator().manual_seed(9)).double().to(DEVICE)
    return [part.float().double() for part in (x, w1, b1, w2, 0.1 * b2, grad)]


def forward_and_backward(tensors: list[Tensor], dropout: float, name: str = "ieee") -> list[Tensor]:
    *inputs, grad = tensors
    seed, number = seed_for(dropout), NAMES.index(name)
    out = OPS.feed_forward(*inputs, dropout, seed, number)
    return [out, *OPS.feed_forward_backward(grad, *inputs[:4], dropout, seed, True, number)]


def errors(result: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [relative_error(ours.cpu(), true.cpu()) for ours, true in zip(result, exact, strict=True)]


@pytest.mark.parametrize(("case", "dropout"), BLOCKS, ids=str)
def test_errors_of_the_block(case: BlockCase, dropout: float) -> None:
    exact = away_from_zero(case)
    narrow = [part.float() for part in exact]
    true, plain = forward_and_backward(exact, dropout), forward_and_backward(narrow, dropout)
    for ours, theirs in zip(
        errors(forward_and_backward(narrow, dropout, "3xtf32"), true), errors(plain, true), strict=True
    ):
        assert ours <= max(2 * theirs, 5e-7)
    for name, limit in LIMITS.items():
        assert max(errors(forward_and_backward(narrow, dropout, name), true)) <= limit, name


@needs_gpu  # for host code the networks pass no precision
@pytest.mark.parametrize("last", [False, True])
def test_errors_of_a_layer(last: bool) -> None:
    case = LayerCase(50, 9, 64, 2, 300, last)
    x, *weights = (part.to(DEVICE) for part in case.inputs(F32))
    true = encoder_layer(x.double(), [part.double() for part in weights], heads=2, last_step=last)

    def error(name: str) -> float:
        with using_precision(name):
            return relative_error(encoder_layer(x, weights, heads=2, last_step=last).cpu(), true.cpu())

    assert error("3xtf32") <= max(2 * error("ieee"), 5e-7)
    for name, limit in LIMITS.items():
        assert 1e-6 < error(name) <= limit, name  # float32 is computed differently


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dropout", [1e-9, 0.4, 1.0])
def test_dropout_drops_the_same_hidden_values(name: str, dropout: float) -> None:
    rows, hidden = 300, 70
    x, w1, _, _, _ = (part.to(DEVICE) for part in BlockCase((rows,), 20, hidden, 3).inputs(F32))
    inputs = x, w1, torch.full((hidden,), 99.0, device=DEVICE), torch.eye(hidden, device=DEVICE), x.new_zeros(hidden)
    ours, theirs = (OPS.feed_forward(*inputs, dropout, seed_for(dropout), NAMES.index(n)) != 0 for n in (name, "ieee"))
    assert torch.equal(ours, theirs)


@long_on_host
@pytest.mark.parametrize("name", FAST)
def test_the_same_bits_come_again(name: str) -> None:
    for case in (BlockCase((9000,), 64, 512, 64), BlockCase((70,), 20, 2048, 100)):
        tensors = [part.float() for part in away_from_zero(case)]
        first = forward_and_backward(tensors, 0.2, name)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(forward_and_backward(tensors, 0.2, name), first, strict=True))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_stay_in_their_row(name: str, value: float) -> None:
    tensors = [part.float() for part in away_from_zero(BlockCase((150,), 20, 70, 33))]
    clean = forward_and_backward(tensors, 0.2, name)
    tensors[0][37, 3] = value
    result = forward_and_backward(tensors, 0.2, name)
    others = [i for i in range(150) if i != 37]
    for number in (0, 1):  # the result, the gradient of x
        assert torch.equal(result[number][others], clean[number][others])
    assert not result[0][37].isfinite().any()
    if value != value:
        assert result[0][37].isnan().all()


@pytest.mark.parametrize("name", FAST)
def test_rows_do_not_depend_on_their_tile(name: str) -> None:
    x, *weights, _ = (part.float() for part in away_from_zero(BlockCase((300,), 20, 90, 33)))
    number = NAMES.index(name)
    whole = OPS.feed_forward(x, *weights, 0.0, None, number)
    for first, last in ((0, 1), (0, 129), (64, 300), (77, 109)):
        assert torch.equal(OPS.feed_forward(x[first:last], *weights, 0.0, None, number), whole[first:last])


@needs_gpu  # for host code the networks pass no precision
def test_the_backward_has_the_precision_of_its_forward() -> None:
    x, *weights, grad = (part.float() for part in away_from_zero(BlockCase((150,), 20, 70, 33)))
    leaves = [part.requires_grad_() for part in (x, *weights)]
    with using_precision("bf16"):
        out = feed_forward(*leaves)
    with using_precision("ieee"):
        result = torch.autograd.grad(out, leaves, grad)
    expected = forward_and_backward([part.detach() for part in (*leaves, grad)], 0.0, "bf16")
    assert all(torch.equal(a, b) for a, b in zip((out.detach(), *result), expected, strict=True))


@needs_gpu
@pytest.mark.parametrize("name", FAST)
def test_a_cuda_graph_captures_it(name: str) -> None:
    tensors = [part.float() for part in away_from_zero(BlockCase((150,), 20, 70, 33))]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_and_backward(tensors, 0.0, name)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward_and_backward(tensors, 0.0, name)
    tensors[0].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(result, forward_and_backward(tensors, 0.0, name), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # cuBLAS uses other workspaces during capture


def test_float64_has_no_choice_and_other_numbers_are_refused() -> None:
    tensors = away_from_zero(BlockCase((37,), 20, 70, 9))
    assert all(
        torch.equal(a, b)
        for a, b in zip(forward_and_backward(tensors, 0.0, "bf16"), forward_and_backward(tensors, 0.0), strict=True)
    )
    for number in (-1, 4):
        with pytest.raises(ValueError, match=r"feed_forward: precision: expected 0 \(ieee\)"):
            OPS.feed_forward(*tensors[:5], 0.0, None, number)
