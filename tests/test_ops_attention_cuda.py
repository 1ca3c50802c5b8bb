"""Attention over the stocks of a day on a GPU: the CUDA kernels compared with the dense softmax in float64.

There are three implementations (additive_attention_launch.cuh): pair by pair for few short days, one block
per day, and launches over all days for long days. Most tests run for each of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfast.ops import additive_attention, graph_attention
from qfast.ops.additive_attention import self_test
from support.attention import (
    ATTENTION_CASES,
    DAY_SIZES,
    INFINITE_TERMS,
    INPUT_NAMES,
    OF_TERMS,
    SIDES,
    SPOILED,
    SPOILED_DAY,
    VIEWS,
    AttentionCase,
    attention_inputs,
    chain_graph,
    check_accuracy,
    day_inputs,
    dense,
    dense_graph,
    errors,
    exact_attention,
    exact_graph,
    expected,
    graph_inputs,
    offsets_of,
    results,
    sorted_oracle,
)
from support.devices import DEVICE, assert_no_synchronization, needs_gpu, needs_kernels
from support.operator_case import F32
from support.tensors import randn

pytestmark = needs_kernels
LONG = 2500  # too many rows per day for one block
OPS = torch.ops.qfast


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.param)


WAY = "QFAST_CUDA_ATTENTION"


@pytest.fixture(params=["auto", "block"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The implementation to test. Few short days are computed pair by pair unless one block per day is requested."""
    monkeypatch.setenv(WAY, request.param)


@pytest.fixture(params=["short-days", "short-days-in-blocks", "a-long-day"])
def extra_days(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Days that are added to those of a test."""
    monkeypatch.setenv(WAY, "block" if request.param == "short-days-in-blocks" else "auto")
    return [LONG] if request.param == "a-long-day" else []


def on_gpu(call: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Result and gradients of `call`, computed on the GPU and copied to the CPU."""
    return [t.cpu() for t in results(call, [t.to(DEVICE) for t in tensors], grad.to(DEVICE))]


def check(inputs: list[Tensor], offsets: Tensor | None, slope: float = 0.01, limit: float = 1e-13) -> None:
    *tensors, grad = inputs
    result = on_gpu(lambda *t: additive_attention(*t, offsets, slope), tensors, grad)
    assert not exact_attention(*inputs, offsets, slope).misses(result, limit)


def check_graph(inputs: list[Tensor], offsets: Tensor | None, slope: float = 0.01, limit: float = 1e-13) -> None:
    *tensors, grad = inputs
    hidden, weight, bias = (t.double() for t in tensors)
    exact = exact_graph(hidden, weight, grad, weight @ hidden.t() + bias[:, None], offsets, slope)
    assert not exact.misses(on_gpu(lambda *t: graph_attention(*t, offsets, slope), tensors, grad), limit)


@pytest.mark.parametrize("name", ["additive_attention", "graph_attention"])
@pytest.mark.usefixtures("way")
def test_self_test(name: str) -> None:
    self_test(name, torch.device(DEVICE))


def test_the_cuda_kernels_are_registered() -> None:
    for name in ("additive_attention", "graph_attention"):
        for operator in (name, f"{name}_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qfast::{operator}", DEVICE.upper())


# ---------------------------------------------------------------- accuracy
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("way")
def test_float32_is_no_worse_than_the_dense_softmax(case: AttentionCase) -> None:
    tensors, grad = case.inputs(F32), case.grad(F32)
    result = on_gpu(lambda *t: additive_attention(*t, case.offsets, case.slope), tensors, grad)
    check_accuracy(result, *expected(case), OF_TERMS)


@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("n", [1, 7, 300, LONG])
@pytest.mark.usefixtures("way")
def test_graph_attention_in_float32(n: int, scale: float) -> None:
    """No less accurate than the dense softmax of the same float32 scores."""
    offsets = offsets_of([n] * max(1, 400 // n))
    hidden, weight, bias, grad = graph_inputs(int(offsets[-1]), 64, torch.float32)
    weight = weight * scale
    given_scores = [t.to(DEVICE) for t in (hidden, weight, bias)]
    scores = OPS.graph_attention(*given_scores, offsets.to(DEVICE), n, 0.01, False)[1].cpu()
    of_dense = results(lambda *t: dense(*t, offsets), (*scores, hidden), grad)
    exact = exact_graph(hidden, weight, grad, scores, offsets)
    result = on_gpu(lambda *t: graph_attention(*t, offsets), [hidden, weight, bias], grad)
    check_accuracy(result, exact, errors(chain_graph(of_dense, hidden, weight, grad), exact.values), [2e-7] * 4)


# ---------------------------------------------------------------- where the gradient of the scores is 0
def noise_inputs(side: str, n: int, common: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """All scores on one side of the bend, and values with a common part."""
    query, key = randn(n, seed=1) + SIDES[side], randn(n, seed=2)
    value, grad = randn(n, 64, seed=3) + common, randn(n, 64, seed=4) + 0.5
    return [t.to(dtype) for t in (query, key, value, grad)]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("sizes", [[37], [300], [2000], [64, 1, 500]], ids=str)
@pytest.mark.parametrize("common", [0.0, 10.0, 100.0])
def test_keys_are_not_pushed_together(
    side: str, sizes: list[int], common: float, dtype: torch.dtype, extra_days: list[int]
) -> None:
    sizes = [*sizes, *extra_days]
    *tensors, grad = noise_inputs(side, sum(sizes), common, dtype)
    _, of_query, of_key, _ = on_gpu(lambda *t: additive_attention(*t, offsets_of(sizes)), tensors, grad)
    for result in of_key.double().split(sizes):
        # the sum of n numbers rounded to float32; in float64 the sum itself is rounded
        bound = 1e-7 if dtype == torch.float32 else 1e-12
        assert abs(float(result.sum())) <= bound * float(result.abs().sum()) + 1e-12
    if side == "above":
        assert not of_query.any()  # every score has the slope 1, so a row's common part does not matter at all


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("n", [300, LONG])
@pytest.mark.usefixtures("way")
def test_a_bias_without_effect_gets_no_gradient(side: str, n: int) -> None:
    hidden = randn(n, 64, seed=1, dtype=torch.float32) * 0.1 + 0.5
    weight, grad = randn(2, 64, seed=2, dtype=torch.float32) * 0.1, randn(n, 64, seed=3, dtype=torch.float32)
    tensors = [hidden, weight, torch.tensor([SIDES[side] * 2, 0.0])]
    *_, result = on_gpu(graph_attention, tensors, grad)
    *_, noise = results(dense_graph, tensors, grad)
    assert float(result.norm()) <= float(noise.norm()) / 10


@pytest.mark.parametrize("common", [1.0, 30.0, 100.0])
@pytest.mark.parametrize("n", [400, LONG])
@pytest.mark.usefixtures("way")
def test_a_common_part_of_the_values_costs_less_than_in_the_dense_softmax(common: float, n: int) -> None:
    tensors = [randn(n, seed=1), randn(n, seed=2), randn(n, 64, seed=3) + common]
    tensors, grad = [t.float() for t in tensors], randn(n, 64, seed=4, dtype=torch.float32)
    exact = results(dense, [t.double() for t in tensors], grad.double())
    result, theirs = on_gpu(additive_attention, tensors, grad), results(dense, tensors, grad)
    for ours, plain, true in zip(result[1:3], theirs[1:3], exact[1:3], strict=True):
        assert (ours - true).norm() <= (plain - true).norm()


# ---------------------------------------------------------------- shapes
@pytest.mark.parametrize("width", [1, 2, 3, 8, 17, 31, 32, 33, 64, 65, 130, 512])
def test_any_width(width: int, dtype: torch.dtype, extra_days: list[int]) -> None:
    sizes = [1, 0, 200, 29, *extra_days]
    limit = 1e-6 if dtype == torch.float32 else 1e-13
    check(attention_inputs(sum(sizes), width, dtype), offsets_of(sizes), limit=limit)
    check_graph(graph_inputs(sum(sizes), width, dtype), offsets_of(sizes), limit=limit)


@pytest.mark.parametrize("n", [1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1023, 1025, 2047, 2048, 2049, 9000])
@pytest.mark.usefixtures("way")
def test_any_length_of_a_day(n: int) -> None:
    check(attention_inputs(n, 5), None)
    check(attention_inputs(n + 3, 5), offsets_of([2, n, 1]), slope=0.3)
    check_graph(graph_inputs(n, 5), None)


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.3, 1.0])
def test_heads(slope: float, dtype: torch.dtype, extra_days: list[int]) -> None:
    sizes = [40, 0, 1, 150, *extra_days]
    limit = 1e-6 if dtype == torch.float32 else 1e-13
    check(attention_inputs(sum(sizes), 9, dtype, heads=3), offsets_of(sizes), slope, limit)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 0], [1], [0, 1, 0, 1]], ids=str)
@pytest.mark.parametrize("heads", [None, 0, 2])
@pytest.mark.usefixtures("way")
def test_hardly_any_rows(sizes: list[int], heads: int | None, dtype: torch.dtype) -> None:
    n = sum(sizes)
    *tensors, grad = attention_inputs(n, 4, dtype, heads=heads)
    result = on_gpu(lambda *t: additive_attention(*t, offsets_of(sizes)), tensors, grad)
    torch.testing.assert_close(result[0], tensors[2])
    torch.testing.assert_close(result[3], grad)
    hidden, weight, bias, grad = graph_inputs(n, 4, dtype)
    result = on_gpu(lambda *t: graph_attention(*t, offsets_of(sizes)), [hidden, weight, bias], grad)
    torch.testing.assert_close(result[:2], [2 * hidden, 2 * grad])
    assert [t.shape for t in result[2:]] == [(2, 4), (2,)]


@pytest.mark.parametrize("view", VIEWS)
def test_strides_do_not_matter(view: str, dtype: torch.dtype, extra_days: list[int]) -> None:
    sizes = [3, 140, 0, 1, *extra_days]
    offsets = offsets_of(sizes)
    for make, call in ((attention_inputs, additive_attention), (graph_inputs, graph_attention)):
        tensors = [t.to(DEVICE) for t in make(sum(sizes), 17, dtype)]
        plain = results(lambda *t, call=call: call(*t, offsets), tensors[:-1], tensors[-1])
        viewed = [VIEWS[view](t) for t in tensors]
        result = results(lambda *t, call=call: call(*t, offsets), viewed[:-1], viewed[-1])
        assert all(torch.equal(a, b) for a, b in zip(result, plain, strict=True))


def test_a_long_day_has_the_same_bits_alone_and_among_many(dtype: torch.dtype) -> None:
    """Alone, thread blocks carry its sums of 40,000 rows; with 1,100 other days, warps do."""
    long, others = 40_000, 1_100
    tensors = [t.to(DEVICE) for t in attention_inputs(long + others, 1, dtype)]
    among = results(lambda *t: additive_attention(*t, offsets_of([long, *[1] * others])), tensors[:-1], tensors[-1])
    first = [t[:long].contiguous() for t in tensors]
    alone = results(lambda *t: additive_attention(*t, offsets_of([long])), first[:-1], first[-1])
    for a, b in zip(among, alone, strict=True):
        assert torch.equal(a[:long], b)


uneven = st.lists(st.one_of(st.sampled_from([0, 1]), st.integers(2, 40), st.just(300)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(
    sizes=uneven,
    long=st.booleans(),
    width=st.integers(1, 70),
    heads=st.sampled_from([None, 1, 3]),
    slope=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    scale=st.sampled_from([0.0, 0.1, 3.0]),
    seed=st.integers(0, 99),
    asked=st.sampled_from(["auto", "dense", "block", "passes"]),
)
def test_any_days_equal_the_dense_softmax(sizes, long, width, heads, slope, scale, seed, asked):
    sizes = [*sizes, LONG] if long else sizes
    query, key, value, grad = attention_inputs(sum(sizes), width, seed=seed, heads=heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WAY, asked)
        check([query * scale, key * scale, value, grad], offsets_of(sizes), slope)


@pytest.mark.parametrize(
    ("days", "width", "asked", "pairs"),
    [
        ([1024], 64, "auto", True),
        ([1025], 64, "auto", False),
        ([800] * 10, 64, "auto", True),
        ([800] * 11, 64, "auto", False),
        ([300], 257, "auto", False),
        ([300], 64, "block", False),
        ([300], 64, "passes", False),
        ([1500], 64, "dense", True),
        ([LONG], 8, "dense", False),
    ],
)
def test_which_calls_go_pair_by_pair(
    days: list[int], width: int, asked: str, pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the pair-by-pair implementation saves no orders."""
    monkeypatch.setenv(WAY, asked)
    query, key, value, _ = attention_inputs(sum(days), width, torch.float32, heads=1)
    given_days = offsets_of(days).to(DEVICE), max(days), 0.01
    orders = OPS.additive_attention(query.to(DEVICE), key.to(DEVICE), value.to(DEVICE), *given_days, True)[3]
    assert bool(orders.any()) == (not pairs)


def test_an_unknown_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WAY, "fast")
    with pytest.raises(ValueError, match="QFAST_CUDA_ATTENTION is 'fast', allowed: auto, dense, block, passes"):
        check(attention_inputs(3, 2), None)


def test_thousands_of_uneven_days(extra_days: list[int]) -> None:
    sizes = [*(np.random.default_rng(0).geometric(0.02, 3000) - 1).tolist(), *extra_days]
    assert sizes.count(0) > 30
    offsets = offsets_of(sizes)
    check(attention_inputs(sum(sizes), 8, torch.float32), offsets, limit=1e-6)


def test_thousands_of_days_of_one_row() -> None:
    n = 70_000  # more days than the second axis of a grid allows
    *tensors, grad = attention_inputs(n, 3, torch.float32)
    result = on_gpu(lambda *t: additive_attention(*t, offsets_of([1] * n)), tensors, grad)
    torch.testing.assert_close(result[0], tensors[2])
    torch.testing.assert_close(result[3], grad)


# ---------------------------------------------------------------- gradients, schemas, non-finite values
@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0])
@pytest.mark.usefixtures("way")
def test_gradients_by_finite_differences(slope: float) -> None:
    offsets = offsets_of([1, 0, 5, 3])
    query, key = randn(2, 2, 9, seed=3).to(DEVICE)
    tensors = [t.requires_grad_() for t in (query, key, randn(2, 9, 3, seed=4).to(DEVICE))]
    assert torch.autograd.gradcheck(lambda *t: additive_attention(*t, offsets, slope), tensors)
    hidden, weight, bias = (randn(*shape, seed=i).to(DEVICE) for i, shape in enumerate([(9, 3), (2, 3), (2,)]))
    tensors = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: graph_attention(*t, offsets, slope), tensors)


@pytest.mark.parametrize("sizes", [None, [], [2, 1, 6]], ids=str)
@pytest.mark.usefixtures("way")
def test_opcheck(sizes: list[int] | None) -> None:
    n = 9 if sizes is None else sum(sizes)
    days = None if sizes is None else offsets_of(sizes).to(DEVICE), n, 0.01
    query, key = randn(2, 2, n).to(DEVICE)
    attention = query, key, randn(2, n, 3).to(DEVICE)
    graph = randn(n, 3).to(DEVICE), randn(2, 3).to(DEVICE), randn(2).to(DEVICE)
    for name, tensors, again in (("additive_attention", attention, 3), ("graph_attention", graph, 2)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        torch.library.opcheck(getattr(OPS, name), (*leaves, *days, True))
        torch.library.opcheck(getattr(OPS, name), (*tensors, *days, False))
        saved = getattr(OPS, name)(*tensors, *days, True)
        grad = randn(*saved[0].shape).to(DEVICE)
        torch.library.opcheck(getattr(OPS, f"{name}_backward"), (grad, *tensors[:again], *days, *saved))


@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("what", SPOILED)
def test_non_finite_values_spread_as_in_the_dense_softmax(what: str, slope: float, extra_days: list[int]) -> None:
    """Forward and backward, element by element. The bits of other days and other heads do not change."""
    sizes = [*DAY_SIZES, *extra_days]
    inputs, clean = day_inputs(), day_inputs()
    SPOILED[what](inputs)
    more = dict(zip((*INPUT_NAMES, "grad"), attention_inputs(sum(extra_days), 5), strict=True))
    spoiled, plain = ([torch.cat([of[n], more[n]]) for n in (*INPUT_NAMES, "grad")] for of in (inputs, clean))
    heads = [torch.stack([a, b]) for a, b in zip(spoiled, plain, strict=True)]
    untouched = [torch.stack([b, b]) for b in plain]

    def ours(*tensors: Tensor) -> Tensor:
        return additive_attention(*tensors, offsets_of(sizes), slope)

    result, before = (on_gpu(ours, of[:-1], of[-1]) for of in (heads, untouched))
    day = [t[SPOILED_DAY] for t in spoiled]
    wanted = results(lambda *t: dense(*t, None, slope), day[:-1], day[-1])
    there = [t[0, SPOILED_DAY] for t in result]
    if what in INFINITE_TERMS:
        torch.testing.assert_close(there[0], wanted[0], rtol=1e-9, atol=1e-11, equal_nan=True)
        there, wanted = ([torch.where(t.isfinite(), t, torch.nan) for t in of] for of in (there, wanted))
    torch.testing.assert_close(there, wanted, rtol=1e-9, atol=1e-11, equal_nan=True)
    for a, b in zip(result, before, strict=True):
        assert torch.equal(a[1], b[1])
        assert torch.equal(a[0, : SPOILED_DAY.start], b[0, : SPOILED_DAY.start])
        assert torch.equal(a[0, SPOILED_DAY.stop :], b[0, SPOILED_DAY.stop :])


# ---------------------------------------------------------------- repeats, streams, graphs
def direct_inputs(sizes: list[int], width: int = 64) -> tuple[list[Tensor], list[Tensor], Tensor, tuple]:
    """Inputs of either raw operator, a gradient, and the days, all on the GPU."""
    n = sum(sizes)
    query, key = randn(2, 1, n, dtype=torch.float32).to(DEVICE)
    hidden, weight, bias, grad = (t.to(DEVICE) for t in graph_inputs(n, width, torch.float32))
    days = offsets_of(sizes).to(DEVICE), max(sizes), 0.01
    return [query, key, hidden[None].clone()], [hidden, weight, bias], grad, days


def forward_and_backward(attention: list[Tensor], graph: list[Tensor], grad: Tensor, days: tuple) -> list[Tensor]:
    """All results of the four operators."""
    saved = OPS.additive_attention(*attention, *days, True)
    result = [*saved, *OPS.additive_attention_backward(grad[None], *attention, *days, *saved)]
    saved = OPS.graph_attention(*graph, *days, True)
    return [*result, *saved, *OPS.graph_attention_backward(grad, *graph[:2], *days, *saved)]


@needs_gpu
def test_the_same_bits_come_again(extra_days: list[int]) -> None:
    inputs = direct_inputs([1, 700, 0, 40, 900, 3, *extra_days])
    first = forward_and_backward(*inputs)
    side = torch.cuda.Stream()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(forward_and_backward(*inputs), first, strict=True))
        with torch.cuda.stream(side):
            side.wait_stream(torch.cuda.default_stream())
            again = forward_and_backward(*inputs)
        side.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@needs_gpu
def test_no_synchronization_with_the_host(extra_days: list[int]) -> None:
    inputs = direct_inputs([300, 0, 7, *extra_days])
    assert_no_synchronization(lambda: forward_and_backward(*inputs))


@needs_gpu
def test_a_cuda_graph_captures_all_four_operators(extra_days: list[int]) -> None:
    """The graph is replayed on new values, including new offsets, in the same memory."""
    sizes, other = [300, 0, 7, *extra_days], [5, 290, 12, *extra_days]
    inputs, changed = direct_inputs(sizes), direct_inputs(other)
    longest = max(*sizes, *other)
    inputs, changed = ((*of[:3], (of[3][0], longest, 0.01)) for of in (inputs, changed))
    changed = ([t * 0.7 for t in changed[0]], [t * 0.9 for t in changed[1]], changed[2] * 1.1, changed[3])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_and_backward(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward_and_backward(*inputs)
    for given_now in (inputs, changed):
        wanted = forward_and_backward(*given_now)
        static = [*inputs[0], *inputs[1], inputs[2], inputs[3][0]]
        fresh = [*given_now[0], *given_now[1], given_now[2], given_now[3][0]]
        for a, b in zip(static, [t.clone() for t in fresh], strict=True):
            a.copy_(b)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))


@needs_gpu
def test_a_training_step_is_captured() -> None:
    tensors = [t.to(DEVICE).requires_grad_() for t in graph_inputs(500, 64, torch.float32)[:3]]

    def step() -> list[Tensor]:
        return [*torch.autograd.grad(graph_attention(*tensors).square().sum(), tensors)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        wanted = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))


@needs_gpu
def test_days_in_pinned_memory_are_captured() -> None:
    """torch refuses to capture a copy from other host memory. A replay reads the memory again."""
    hidden, weight, bias = (t.to(DEVICE) for t in graph_inputs(500, 64, torch.float32)[:3])
    offsets = torch.tensor([0, 300, 500]).pin_memory()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph_attention(hidden, weight, bias, offsets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = graph_attention(hidden, weight, bias, offsets)
    for boundary in (300, 200):  # the longest day, on which the algorithm depends, stays the same
        offsets[1] = boundary
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result, graph_attention(hidden, weight, bias, torch.tensor([0, boundary, 500])))


# ---------------------------------------------------------------- size
@needs_gpu
def test_a_million_rows_in_one_day() -> None:
    """Needs at most 2 GB beyond the inputs. Block sums keep float32 near the exact result."""
    *tensors, grad = attention_inputs(1_000_000, 64, torch.float32)
    leaves = [t.to(DEVICE).requires_grad_() for t in tensors]
    on_device = grad.to(DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = additive_attention(*leaves)
    out.backward(on_device)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 2 << 30, f"{extra / 2**20:.0f} MB"
    result = [t.cpu() for t in (out.detach(), *(leaf.grad for leaf in leaves))]
    exact = sorted_oracle(*tensors, grad)
    for i, (error, wanted) in enumerate(zip(errors(result, exact), exact, strict=True)):
        assert error <= 1e-6 * float(wanted.norm()), (i, error / float(wanted.norm()))


@needs_gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_numbers() -> None:
    """The last columns of a matrix with more than 2^31 elements, compared with the same columns alone."""
    n, width = 4_300_000, 512
    if torch.cuda.get_device_properties(0).total_memory < 64 << 30:
        pytest.skip("needs 64 GB on the GPU")
    rng = torch.Generator(DEVICE).manual_seed(0)
    query, key = torch.randn(2, 1, n, generator=rng, device=DEVICE)
    value, grad = (torch.randn(1, n, width, generator=rng, device=DEVICE) for _ in range(2))
    days = None, n, 0.01
    saved = OPS.additive_attention(query, key, value, *days, True)
    result = OPS.additive_attention_backward(grad, query, key, value, *days, *saved)
    last, of_last = (t[..., -4:].contiguous() for t in (value, grad))
    few = OPS.additive_attention(query, key, last, *days, True)
    alone = OPS.additive_attention_backward(of_last, query, key, last, *days, *few)
    torch.testing.assert_close(saved[0][..., -4:], few[0])
    torch.testing.assert_close(result[2][..., -4:], alone[2])
    assert all(torch.isfinite(t).all() for t in result[:2])


# ---------------------------------------------------------------- refusals
@needs_gpu
def test_refusals_of_the_kernels() -> None:
    attention, graph, grad, (offsets, longest, slope) = direct_inputs([5, 4], 3)
    with pytest.raises(ValueError, match="offsets: expected the device of value"):
        OPS.additive_attention(*attention, offsets.cpu(), longest, slope, False)
    with pytest.raises(ValueError, match="longest: expected the rows of the longest day, 1 to 9, got 10"):
        OPS.additive_attention(*attention, offsets, 10, slope, False)
    with pytest.raises(ValueError, match="negative_slope: expected 0 to 1, got 2"):
        OPS.additive_attention(*attention, offsets, longest, 2.0, False)
    with pytest.raises(ValueError, match=r"query: expected shape \(1, 9\), got \(1, 8\)"):
        OPS.additive_attention(attention[0][:, :8], *attention[1:], offsets, longest, slope, False)
    with pytest.raises(ValueError, match=r"weight: expected shape \(2, 3\), got \(3, 2\)"):
        OPS.graph_attention(graph[0], graph[1].t(), graph[2], offsets, longest, slope, False)
    saved = OPS.graph_attention(*graph, offsets, longest, slope, False)
    with pytest.raises(ValueError, match=r"share: expected shape \(1, 9, 3\), got \(1, 0, 3\)"):
        OPS.graph_attention_backward(grad, *graph[:2], offsets, longest, slope, *saved)


@needs_gpu
def test_unchecked_offsets_touch_no_other_memory() -> None:
    attention, graph, grad, _ = direct_inputs([9], 3)
    for wrong in ([0, 10], [0, 7, 3, 9], [-1, 9], [0, 8], [9, 0]):
        forward_and_backward(attention, graph, grad, (torch.tensor(wrong, device=DEVICE), 9, 0.01))
    long = direct_inputs([LONG], 3)
    result = forward_and_backward(*long[:3], (torch.tensor([0, 2 * LONG, LONG], device=DEVICE), LONG, 0.01))
    assert torch.isnan(result[0]).all()
    torch.cuda.synchronize()
