"""Attention over the stocks of a day: values and gradients compared with the dense softmax in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfast.ops import additive_attention, graph_attention
from support import operator_case
from support.attention import (
    ATTENTION_CASES,
    NATIVE,
    OF_TERMS,
    ROUNDING,
    SLOW_CASES,
    VIEWS,
    AttentionCase,
    Exact,
    attention_inputs,
    chain_graph,
    check_accuracy,
    dense,
    dense_graph,
    errors,
    exact_attention,
    exact_graph,
    expected,
    graph_inputs,
    offsets_of,
    results,
    same_bits,
    sorted_oracle,
)
from support.operator_case import F32


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.param)


def assert_dense(
    inputs: list[Tensor], offsets: Tensor | None, slope: float = 0.01, limit: float = 1e-13, graph: bool = False
) -> None:
    """Result and gradients against the dense softmax in float64."""
    *tensors, grad = inputs
    if graph:
        hidden, weight, bias = (t.double() for t in tensors)
        scores = weight @ hidden.t() + bias[:, None]
        exact = exact_graph(hidden, weight, grad, scores, offsets, slope)
    else:
        exact = exact_attention(*inputs, offsets, slope)
    call = graph_attention if graph else additive_attention
    assert not exact.misses(results(lambda *t: call(*t, offsets, slope), tensors, grad), limit)


@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0])
def test_the_oracles_are_the_definition(slope: float) -> None:
    """Compares the oracles of the tests below with torch's gradients of the softmax."""
    offsets = offsets_of([3, 0, 300])
    *tensors, grad = attention_inputs(303, 4)
    plain = results(lambda *t: dense(*t, offsets, slope), tensors, grad)
    assert not exact_attention(*tensors, grad, offsets, slope).misses(plain, 1e-14)
    day = [t[3:] for t in (*tensors, grad)]
    assert not Exact([t[3:] for t in plain], [t[3:] for t in plain[:1]] * 4).misses(sorted_oracle(*day, slope), 1e-12)
    hidden, weight, bias, grad = graph_inputs(303, 4)
    plain = results(lambda *t: dense_graph(*t, offsets, slope), (hidden, weight, bias), grad)
    exact = exact_graph(hidden, weight, grad, weight @ hidden.t() + bias[:, None], offsets, slope)
    assert not exact.misses(plain, 1e-14)


# ---------------------------------------------------------------- accuracy of float32


def check_case(case: AttentionCase) -> None:
    tensors, grad = case.inputs(F32), case.grad(F32)
    result = operator_case.results(case.operator, tensors, grad=grad)
    check_accuracy(result, *expected(case), OF_TERMS)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_float32_is_no_worse_than_the_dense_softmax(case: AttentionCase, isa: str) -> None:
    check_case(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES, ids=lambda case: case.name)
def test_float32_is_no_worse_than_the_dense_softmax_at_5000(case: AttentionCase, isa: str) -> None:
    check_case(case)


@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("n", [1, 2, 7, 300, 1500])
def test_graph_attention_in_float32(n: int, scale: float, isa: str) -> None:
    """Scores are equal up to rounding.

    The rest is no less accurate than the dense softmax of the same float32 scores.
    """
    offsets = offsets_of([n] * max(1, 400 // n))
    hidden, weight, bias, grad = graph_inputs(int(offsets[-1]), 64, torch.float32)
    weight = weight * scale
    scores = torch.ops.qfast.graph_attention(hidden, weight, bias, offsets, n, 0.01, False)[1]
    wide = weight.double() @ hidden.double().t() + bias.double()[:, None]
    terms = weight.abs().double() @ hidden.abs().double().t()
    assert not Exact([wide], [terms]).misses([scores], ROUNDING)
    of_dense = results(lambda *t: dense(*t, offsets), (*scores, hidden), grad)
    exact = exact_graph(hidden, weight, grad, scores, offsets)
    result = results(lambda *t: graph_attention(*t, offsets), (hidden, weight, bias), grad)
    check_accuracy(result, exact, errors(chain_graph(of_dense, hidden, weight, grad), exact.values), [ROUNDING] * 4)


# ---------------------------------------------------------------- shapes
@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 128, 256, 512])
def test_any_width(width: int, dtype: torch.dtype, isa: str) -> None:
    offsets = offsets_of([1, 0, 200, 29])
    limit = 1e-6 if dtype == torch.float32 else 1e-13
    assert_dense(attention_inputs(230, width, dtype), offsets, limit=limit)
    assert_dense(graph_inputs(230, width, dtype), offsets, limit=limit, graph=True)


@pytest.mark.parametrize("n", [1, 2, 3, 31, 32, 33, 127, 128, 129, 255, 256, 257, 640, 2049])
def test_any_length_of_a_day(n: int, isa: str) -> None:
    assert_dense(attention_inputs(n, 5), None)
    assert_dense(attention_inputs(n + 3, 5), offsets_of([2, n, 1]), slope=0.3)
    assert_dense(graph_inputs(n, 5), None, graph=True)


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.3, 1.0])
def test_heads(slope: float, dtype: torch.dtype, isa: str) -> None:
    offsets = offsets_of([40, 0, 1, 150])
    inputs = attention_inputs(191, 9, dtype, heads=3)
    assert_dense(inputs, offsets, slope, 1e-6 if dtype == torch.float32 else 1e-13)
    *tensors, grad = inputs
    together = results(lambda *t: additive_attention(*t, offsets, slope), tensors, grad)
    for head in range(3):
        alone = results(lambda *t: additive_attention(*t, offsets, slope), [t[head] for t in tensors], grad[head])
        assert all(same_bits(a[head], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 0], [1], [0, 1, 0, 1]], ids=str)
@pytest.mark.parametrize("heads", [None, 0, 2])
def test_hardly_any_rows(sizes: list[int], heads: int | None, dtype: torch.dtype) -> None:
    n = sum(sizes)
    query, key, value, grad = attention_inputs(n, 4, dtype, heads=heads)
    result = results(lambda *t: additive_attention(*t, offsets_of(sizes)), (query, key, value), grad)
    torch.testing.assert_close(result[0], value)
    torch.testing.assert_close(result[3], grad)
    for of_score in result[1:3]:
        torch.testing.assert_close(of_score, torch.zeros_like(of_score), atol=1e-6, rtol=0)
    hidden, weight, bias, grad = graph_inputs(n, 4, dtype)
    result = results(lambda *t: graph_attention(*t, offsets_of(sizes)), (hidden, weight, bias), grad)
    torch.testing.assert_close(result[:2], [2 * hidden, 2 * grad])


@pytest.mark.parametrize("view", VIEWS)
def test_strides_do_not_matter(view: str, dtype: torch.dtype, isa: str) -> None:
    offsets = offsets_of([3, 140, 0, 1])
    for make, call in ((attention_inputs, additive_attention), (graph_inputs, graph_attention)):
        *tensors, grad = make(144, 17, dtype)
        plain = results(lambda *t, call=call: call(*t, offsets), tensors, grad)
        viewed = [VIEWS[view](t) for t in (*tensors, grad)]
        assert all(torch.equal(a, b) for a, b in zip(viewed, (*tensors, grad), strict=True))
        result = results(lambda *t, call=call: call(*t, offsets), viewed[:-1], viewed[-1])
        assert all(same_bits(a, b) for a, b in zip(result, plain, strict=True))


def test_expanded_inputs_and_gradients(isa: str) -> None:
    """Zero strides: one value for every row, one key for all, and the expanded gradient of `sum`."""
    query, key, value, _ = attention_inputs(130, 6)
    query, key, value = (t.detach().requires_grad_() for t in (query, key[:1], value[:1]))
    additive_attention(query, key.expand(130), value.expand(130, 6)).sum().backward()
    torch.testing.assert_close(value.grad, torch.full((1, 6), 130.0, dtype=torch.float64))
    for score in (query, key):  # all values are equal, so the result does not depend on the scores
        assert float(score.grad.abs().max()) < 1e-12


def test_graph_attention_is_its_three_parts(isa: str) -> None:
    """Several days, with gradients of all tensors and of one tensor alone."""
    offsets = offsets_of([300, 1, 0, 77])
    hidden, weight, bias, grad = graph_inputs(378, 33)
    whole = results(lambda *t: graph_attention(*t, offsets), (hidden, weight, bias), grad)

    def parts(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        query, key = (hidden @ weight.t() + bias).unbind(1)
        return hidden + additive_attention(query, key, hidden, offsets)

    torch.testing.assert_close(whole, results(parts, (hidden, weight, bias), grad), rtol=1e-9, atol=1e-11)
    for wanted in range(3):
        tensors = [t.detach().requires_grad_(i == wanted) for i, t in enumerate((hidden, weight, bias))]
        graph_attention(*tensors, offsets).backward(grad)
        assert [t.grad is not None for t in tensors] == [i == wanted for i in range(3)]
        assert torch.equal(tensors[wanted].grad, whole[1 + wanted])
    with torch.no_grad():
        assert torch.equal(graph_attention(hidden, weight, bias, offsets), whole[0])


def test_gradients_of_the_tensors_that_require_one(isa: str) -> None:
    *tensors, grad = attention_inputs(150, 5, torch.float32)
    whole = results(additive_attention, tensors, grad)
    for wanted in range(3):
        leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        additive_attention(*leaves).backward(grad)
        assert [t.grad is not None for t in leaves] == [i == wanted for i in range(3)]
        assert torch.equal(leaves[wanted].grad, whole[1 + wanted])
    assert torch.equal(additive_attention(*tensors), whole[0])  # nothing is saved, the same result


# ---------------------------------------------------------------- any days
uneven = st.lists(st.one_of(st.sampled_from([0, 1]), st.integers(2, 40), st.just(300)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=40)
@given(
    sizes=uneven,
    width=st.integers(1, 40),
    heads=st.sampled_from([None, 1, 3]),
    slope=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    scale=st.sampled_from([0.0, 0.1, 3.0]),
    seed=st.integers(0, 99),
)
def test_any_days_equal_the_dense_softmax(sizes, width, heads, slope, scale, seed):
    offsets = offsets_of(sizes)
    query, key, value, grad = attention_inputs(sum(sizes), width, seed=seed, heads=heads)
    tensors = query * scale, key * scale, value
    result = results(lambda *t: additive_attention(*t, offsets, slope), tensors, grad)
    wanted = results(lambda *t: dense(*t, offsets, slope), tensors, grad)
    for a, b in zip(result, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=25)
@given(sizes=uneven, width=st.integers(1, 40), slope=st.sampled_from([0.0, 0.01, 0.3, 1.0]), seed=st.integers(0, 99))
def test_many_days_are_each_day_alone_bit_for_bit(sizes, width, slope, seed):
    offsets = offsets_of(sizes)
    # the first `of_rows` arguments have the axis of rows
    for make, call, of_rows in ((attention_inputs, additive_attention, 3), (graph_inputs, graph_attention, 1)):
        *tensors, grad = make(sum(sizes), width, torch.float32, seed=seed)
        together = results(lambda *t, call=call: call(*t, offsets, slope), tensors, grad)[: of_rows + 1]
        for begin, end in offsets.unfold(0, 2, 1).tolist():
            day = [t[begin:end] for t in tensors[:of_rows]] + tensors[of_rows:]
            alone = results(lambda *t, call=call: call(*t, negative_slope=slope), day, grad[begin:end])
            assert all(same_bits(a[begin:end], b) for a, b in zip(together, alone, strict=False))


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 400), width=st.integers(1, 20), slope=st.sampled_from([0.0, 0.01, 1.0]), seed=st.integers(0, 99)
)
def test_the_order_of_a_days_rows_does_not_matter(n, width, slope, seed):
    *tensors, grad = attention_inputs(n, width, seed=seed)
    plain = results(lambda *t: additive_attention(*t, negative_slope=slope), tensors, grad)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    moved = results(lambda *t: additive_attention(*t, negative_slope=slope), [t[order] for t in tensors], grad[order])
    for a, b in zip(moved, plain, strict=True):
        torch.testing.assert_close(a, b[order], rtol=1e-9, atol=1e-11)


def test_thousands_of_days(isa: str) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.geometric(0.12, 4000) - 1
    sizes[[17, 2900]] = 700, 0
    assert (sizes == 0).sum() > 100
    offsets = offsets_of(sizes)
    assert_dense(attention_inputs(int(offsets[-1]), 8, torch.float32), offsets, limit=1e-6)


# ---------------------------------------------------------------- threads, repeats, long days
def on_threads(threads: int, call: Callable[[], list[Tensor]]) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("graph", [False, True], ids=["additive", "graph"])
@pytest.mark.parametrize("sizes", [[3000], [1, 700, 0, 40, 900, 3]], ids=["one-day", "days"])
def test_the_same_bits_for_any_number_of_threads(sizes: list[int], graph: bool, isa: str) -> None:
    make, call = (graph_inputs, graph_attention) if graph else (attention_inputs, additive_attention)
    *tensors, grad = make(sum(sizes), 64, torch.float32)
    offsets = offsets_of(sizes)

    def once() -> list[Tensor]:
        return results(lambda *t: call(*t, offsets), tensors, grad)

    first = on_threads(1, once)
    for threads in (1, 2, 3, 2):
        assert all(same_bits(a, b) for a, b in zip(on_threads(threads, once), first, strict=True)), threads


def test_a_long_day_on_any_threads(isa: str) -> None:
    """50,000 rows. Block sums keep float32 near the exact result; a single running sum drifts to 1e-5."""
    *tensors, grad = attention_inputs(50_000 if NATIVE else 3000, 8, torch.float32)
    first = on_threads(1, lambda: results(additive_attention, tensors, grad))
    exact = sorted_oracle(*tensors, grad)
    for i, (error, wanted) in enumerate(zip(errors(first, exact), exact, strict=True)):
        assert error <= 1e-6 * float(wanted.norm()), (i, error / float(wanted.norm()))
    for threads in (2, 3):
        again = on_threads(threads, lambda: results(additive_attention, tensors, grad))
        assert all(same_bits(a, b) for a, b in zip(again, first, strict=True)), threads


MILLION = """
import sys; sys.path.insert(0, {tests!r})
import torch
from support.attention import errors, results, sorted_oracle
from compare import memory_mb, reset_peak
from qfast.ops import additive_attention
torch.set_num_threads({threads})
rng = torch.Generator().manual_seed(0)
n = 1_000_000
query, key = torch.randn(2, n, generator=rng)
value, grad = torch.randn(2, n, 64, generator=rng)
additive_attention(query[:9].requires_grad_(), key[:9], value[:9]).sum().backward()
reset_peak()
before = memory_mb("VmRSS")
result = results(additive_attention, (query.detach(), key, value), grad)
print("extra", memory_mb("VmHWM") - before)
exact = sorted_oracle(query, key, value, grad)
print("errors", *(e / float(x.norm()) for e, x in zip(errors(result, exact), exact)))
chosen = torch.randint(0, n, (50,), generator=rng)
for row in chosen.tolist():
    weights = torch.nn.functional.leaky_relu(query[row].double() + key.double(), 0.01).softmax(0)
    out = sum(weights[i : i + 100_000] @ value[i : i + 100_000].double() for i in range(0, n, 100_000))
    torch.testing.assert_close(result[0][row].double(), out, rtol=1e-5, atol=1e-7)
"""


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE, reason="the dense softmax of a million rows needs terabytes")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak memory from Linux's /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_million_rows_in_one_day(threads: int) -> None:
    """Needs less than 2 GB beyond the inputs (512 MB, and as much for the incoming gradient); accurate to 2e-6."""
    tests = Path(__file__).parent
    code = f"import sys; sys.path.insert(0, {str(tests.parent / 'bench')!r})" + MILLION
    code = code.format(tests=str(tests), threads=threads)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    extra, *relative = [float(x) for line in done.stdout.splitlines() for x in line.split()[1:]]
    assert extra < 2048
    assert max(relative) < 2e-6, relative
