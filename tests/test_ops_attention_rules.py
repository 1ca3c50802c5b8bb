"""Attention over the stocks of a day: non-finite values, gradients, torch's transforms, error messages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qfast.ops import additive_attention, graph_attention
from support.attention import (
    DAY_SIZES,
    INF,
    INFINITE_TERMS,
    INPUT_NAMES,
    NAN,
    NATIVE,
    SPOILED,
    SPOILED_DAY,
    day_inputs,
    dense,
    dense_graph,
    offsets_of,
    results,
    same_bits,
)
from support.tensors import randn


@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("what", SPOILED)
def test_non_finite_values_spread_as_in_the_dense_softmax(what: str, slope: float, isa: str) -> None:
    """Forward and backward, element by element. The bits of other days do not change."""
    offsets = offsets_of(DAY_SIZES)
    clean, inputs = day_inputs(), day_inputs()
    SPOILED[what](inputs)
    result, wanted, untouched = (
        results(lambda *t, call=call: call(*t, offsets, slope), [of[n] for n in INPUT_NAMES], of["grad"])
        for call, of in ((additive_attention, inputs), (dense, inputs), (additive_attention, clean))
    )
    if what in INFINITE_TERMS:
        torch.testing.assert_close(result[0], wanted[0], rtol=1e-9, atol=1e-11, equal_nan=True)
        result, wanted = ([torch.where(t.isfinite(), t, NAN) for t in of] for of in (result, wanted))
    for a, b, c in zip(result, wanted, untouched, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, equal_nan=True)
        for other in (slice(0, SPOILED_DAY.start), slice(SPOILED_DAY.stop, None)):
            assert same_bits(a[other], c[other])


def test_the_docstring_on_non_finite_values(isa: str) -> None:
    offsets = offsets_of(DAY_SIZES)

    def attend(what: str, slope: float = 0.01) -> Tensor:
        inputs = day_inputs()
        SPOILED[what](inputs)
        return additive_attention(inputs["query"], inputs["key"], inputs["value"], offsets, slope)[SPOILED_DAY]

    for what in ("key nan", "key inf"):
        assert torch.isnan(attend(what)).all()
    for what in ("query nan", "query inf", "query -inf"):
        rows = torch.isnan(attend(what)).all(1)
        assert rows.nonzero().flatten().tolist() == [7]
        assert torch.isnan(attend(what)).sum() == 5
    columns = torch.isnan(attend("value nan"))
    assert columns.all(0).tolist() == [False, False, True, False, False]
    assert columns.sum() == 150
    inputs = day_inputs()
    saved = torch.arange(150) != 7
    without = additive_attention(*(inputs[n][SPOILED_DAY][saved] for n in INPUT_NAMES))
    torch.testing.assert_close(attend("key -inf")[saved], without)


def test_non_finite_values_stay_in_their_head(isa: str) -> None:
    clean, inputs = day_inputs(heads=3), day_inputs(heads=3)
    inputs["key"][1, 50] = NAN
    result, wanted = (
        results(lambda *t: additive_attention(*t, offsets_of(DAY_SIZES)), [of[n] for n in INPUT_NAMES], of["grad"])
        for of in (inputs, clean)
    )
    for a, b in zip(result, wanted, strict=True):
        assert same_bits(a[[0, 2]], b[[0, 2]])
        assert torch.isnan(a[1, SPOILED_DAY]).any()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_hidden_state_that_is_not_finite(value: float, isa: str) -> None:
    """Its row scores every stock of the day. Only that day changes, and it equals the dense softmax."""
    offsets = offsets_of(DAY_SIZES)
    hidden, weight, bias, grad = randn(244, 5), randn(2, 5, seed=1), randn(2, seed=2), randn(244, 5, seed=3)
    clean = graph_attention(hidden, weight, bias, offsets)
    hidden[SPOILED_DAY][7, 2] = value
    result, wanted = (
        results(lambda *t, call=call: call(*t, offsets), (hidden, weight, bias), grad)
        for call in (graph_attention, dense_graph)
    )
    torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-11, equal_nan=True)
    assert torch.isnan(result[0][SPOILED_DAY]).any()
    for other in (slice(0, SPOILED_DAY.start), slice(SPOILED_DAY.stop, None)):
        assert same_bits(result[0][other], clean[other])


# ---------------------------------------------------------------- gradients, schemas
def small_inputs(heads: int = 2) -> list[Tensor]:
    query, key = randn(2, heads, 9, seed=3)
    return [t.requires_grad_() for t in (query, key, randn(heads, 9, 3, seed=4))]


def graph_small() -> list[Tensor]:
    return [t.requires_grad_() for t in (randn(9, 3), randn(2, 3, seed=1), randn(2, seed=2))]


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("sizes", [[9], [1, 0, 5, 3]], ids=str)
def test_gradients_by_finite_differences(sizes: list[int], slope: float, isa: str) -> None:
    offsets = offsets_of(sizes)
    assert torch.autograd.gradcheck(lambda *t: additive_attention(*t, offsets, slope), small_inputs())
    assert torch.autograd.gradcheck(lambda *t: graph_attention(*t, offsets, slope), graph_small())


def test_a_score_of_zero_has_the_lower_slope(isa: str) -> None:
    """Two keys are exactly at the bend, where the one-sided derivatives differ.

    torch's LeakyReLU has the lower slope there.
    """
    query, key, value = torch.zeros(3), torch.tensor([0.0, 0.0, 1.0]), torch.tensor([[1.0], [2.0], [5.0]])
    result, wanted = (results(call, (query, key, value), torch.ones(3, 1)) for call in (additive_attention, dense))
    torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("sizes", [None, [], [0, 9, 0], [2, 1, 6]], ids=str)
def test_opcheck(sizes: list[int] | None, keep: bool) -> None:
    n = 9 if sizes is None else sum(sizes)
    days = None if sizes is None else offsets_of(sizes), n, 0.01
    ops = torch.ops.qfast
    attention = [t.detach()[:, :n].requires_grad_(keep) for t in small_inputs()]
    graph = [graph_small()[0].detach()[:n].requires_grad_(keep), *(t.requires_grad_(keep) for t in graph_small()[1:])]
    torch.library.opcheck(ops.additive_attention, (*attention, *days, keep))
    torch.library.opcheck(ops.graph_attention, (*graph, *days, keep))
    if keep:
        plain, hidden = [t.detach() for t in attention], [t.detach() for t in graph]
        saved = ops.additive_attention(*plain, *days, True)
        torch.library.opcheck(ops.additive_attention_backward, (randn(*saved[0].shape), *plain, *days, *saved))
        saved = ops.graph_attention(*hidden, *days, True)
        torch.library.opcheck(ops.graph_attention_backward, (randn(*saved[0].shape), *hidden[:2], *days, *saved))


def test_double_backward_is_refused_by_name() -> None:
    for call, tensors in ((additive_attention, small_inputs()), (graph_attention, graph_small())):
        (grad,) = torch.autograd.grad(call(*tensors).square().sum(), tensors[0], create_graph=True)
        with pytest.raises(NotImplementedError, match=r"attention: double backward .*torch\.func\.grad"):
            grad.sum().backward()


def test_saved_tensors_have_no_gradient_and_need_keep() -> None:
    saved = torch.ops.qfast.additive_attention(*small_inputs(), None, 9, 0.01, True)
    assert [t.requires_grad for t in saved] == [True, False, False, False]
    saved = torch.ops.qfast.graph_attention(*graph_small(), None, 9, 0.01, True)
    assert [t.requires_grad for t in saved] == [True, False, False, False, False]
    with pytest.raises(ValueError, match="keep: must be True if a gradient is needed"):
        torch.ops.qfast.additive_attention(*small_inputs(), None, 9, 0.01, False)
    with pytest.raises(ValueError, match="keep: must be True if a gradient is needed"):
        torch.ops.qfast.graph_attention(*graph_small(), None, 9, 0.01, False)
    none = torch.ops.qfast.additive_attention(*(t.detach() for t in small_inputs()), None, 9, 0.01, False)
    assert [t.numel() for t in none[1:]] == [0, 0, 0]


# ---------------------------------------------------------------- torch's transforms, compile, autocast, meta
BOTH = {"additive": (additive_attention, dense, small_inputs), "graph": (graph_attention, dense_graph, graph_small)}


@pytest.mark.parametrize("which", BOTH)
def test_transforms_and_forward_mode(which: str) -> None:
    call, definition, make = BOTH[which]
    offsets = offsets_of([5, 0, 4])
    tensors = tuple(t.detach() for t in make())
    along = tuple(randn(*t.shape, seed=8) for t in tensors)

    def ours(*t: Tensor) -> Tensor:
        return call(*t, offsets)

    def theirs(*t: Tensor) -> Tensor:
        return definition(*t, offsets)

    close = {"rtol": 1e-12, "atol": 1e-12}
    expected = torch.func.jvp(theirs, tensors, along)
    assert expected[1].norm() > 0.1
    torch.testing.assert_close(torch.func.jvp(ours, tensors, along), expected, **close)
    with torch.autograd.forward_ad.dual_level():  # nothing requires a gradient: torch would drop the tangent silently
        duals = map(torch.autograd.forward_ad.make_dual, tensors, along)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(ours(*duals))[1], expected[1], **close)

    def slopes(f: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        return torch.func.grad(lambda *t: f(*t).square().sum(), argnums=(0, 1, 2))

    torch.testing.assert_close(slopes(ours)(*tensors), slopes(theirs)(*tensors), **close)
    twice = [
        torch.func.grad(lambda *t, f=f: sum(g.square().sum() for g in slopes(f)(*t)))(*tensors) for f in (ours, theirs)
    ]
    torch.testing.assert_close(*twice, **close)
    each = torch.vmap(ours)(*(torch.stack([t, 2 * t]) for t in tensors))
    torch.testing.assert_close(each, torch.stack([theirs(*tensors), theirs(*(2 * t for t in tensors))]), **close)


@pytest.mark.parametrize("which", BOTH)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(which: str, dynamic: bool) -> None:
    call, definition, make = BOTH[which]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for sizes in ([5, 0, 4], [2, 7]):
        tensors = [t.detach() for t in make()]
        shape = tensors[2].shape if which == "additive" else tensors[0].shape
        days = offsets_of(sizes)
        result, wanted = (
            results(lambda *t, f=f, days=days: f(*t, days, 0.3), tensors, randn(*shape, seed=5))
            for f in (compiled, definition)
        )
        torch.testing.assert_close(result, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(compiled(*tensors), definition(*tensors))
    torch.compiler.reset()


@pytest.mark.parametrize("which", BOTH)
def test_autocast_leaves_float32_alone(which: str) -> None:
    call, _, make = BOTH[which]
    tensors = [t.detach().float() for t in make()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = call(*tensors)
    assert result.dtype == torch.float32
    # the twin's matrix products are torch's, which autocast computes in bfloat16
    torch.testing.assert_close(result, call(*tensors), rtol=0, atol=0 if NATIVE else 2e-2)


@pytest.mark.parametrize("which", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixtures_of_half_precision_and_float32(which: str, dtype: torch.dtype) -> None:
    """Under autocast nn.Linear returns half precision and the LSTM operator float32, and both may be arguments."""
    call, _, make = BOTH[which]
    wide = [t.detach().to(dtype).float() for t in make()]
    values = 2 if which == "additive" else 0  # the argument whose dtype the result has
    for narrow in ((0,), (1,), (2,), (0, 1), (1, 2)):
        mixed = [t.to(dtype).requires_grad_() if i in narrow else t for i, t in enumerate(wide)]
        result = call(*mixed)
        assert result.dtype == mixed[values].dtype
        assert torch.equal(result, call(*wide).to(result.dtype))
        result.float().sum().backward()
        assert all(mixed[i].grad.dtype == dtype for i in narrow)


@pytest.mark.parametrize("which", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_computed_in_float32(which: str, dtype: torch.dtype) -> None:
    call, _, make = BOTH[which]
    narrow = [t.detach().to(dtype).requires_grad_() for t in make()]
    wide = [t.detach().float().requires_grad_() for t in narrow]
    result, expected = call(*narrow), call(*wide)
    result.float().sum().backward()
    expected.to(dtype).float().sum().backward()
    assert torch.equal(result, expected.to(dtype))
    for ours, theirs in zip(narrow, wide, strict=True):
        assert torch.equal(ours.grad, theirs.grad.to(dtype))


@pytest.mark.parametrize("which", BOTH)
def test_meta_tensors_have_shapes(which: str) -> None:
    call, _, make = BOTH[which]
    tensors = [t.detach().to("meta").requires_grad_() for t in make()]
    out = call(*tensors, offsets_of([5, 4]))
    expected = tensors[2].shape if which == "additive" else tensors[0].shape
    assert (out.device.type, out.shape) == ("meta", expected)
    out.sum().backward()
    assert [t.grad.shape for t in tensors] == [t.shape for t in tensors]


# ---------------------------------------------------------------- refusals
def test_refusals_of_additive_attention() -> None:
    query, key, value = (t.detach()[0] for t in small_inputs())
    for slope in (-0.1, 1.5, NAN):
        with pytest.raises(
            ValueError, match=rf"additive_attention: negative_slope must be a number in \[0, 1\], got {slope}"
        ):
            additive_attention(query, key, value, negative_slope=slope)
    with pytest.raises(ValueError, match=r"query: expected shape \[N\] or \[heads, N\], got \(1, 1, 9\)"):
        additive_attention(query[None, None], key, value)
    with pytest.raises(ValueError, match=r"query: expected dtype float32 or float64, got torch\.float16"):
        additive_attention(query.half(), key, value)
    with pytest.raises(ValueError, match="query: expected a tensor, got list"):
        additive_attention([1.0], key, value)
    with pytest.raises(
        ValueError, match=r"key: expected dtype and device of query \(torch.float64 on cpu\), .* Remedy"
    ):
        additive_attention(query, key.float(), value)
    with pytest.raises(ValueError, match=r"value: expected dtype and device of query .* got torch.float64 on meta"):
        additive_attention(query, key, value.to("meta"))
    with pytest.raises(ValueError, match=r"key: expected shape \(9,\), got \(8,\)"):
        additive_attention(query, key[:8], value)
    for bad in (value[:8], value[:, :0], value[None], query):
        with pytest.raises(ValueError, match=r"value: expected shape \(9, H\) with H > 0, got \("):
            additive_attention(query, key, bad)
    with pytest.raises(ValueError, match=r"value: expected shape \(2, 9, H\) with H > 0, got \(9, 3\)"):
        additive_attention(query.expand(2, 9), key.expand(2, 9), value)


def test_refusals_of_graph_attention() -> None:
    hidden, weight, bias = (t.detach() for t in graph_small())
    with pytest.raises(ValueError, match=r"graph_attention: negative_slope must be a number in \[0, 1\], got 2"):
        graph_attention(hidden, weight, bias, negative_slope=2)
    with pytest.raises(ValueError, match=r"hidden: expected dtype float32 or float64, got torch\.int64"):
        graph_attention(hidden.long(), weight, bias)
    for bad in (hidden[0], hidden[None], hidden[:, :0]):
        with pytest.raises(ValueError, match=r"hidden: expected shape \[N, H\] with H > 0, got \("):
            graph_attention(bad, weight, bias)
    with pytest.raises(ValueError, match=r"weight: expected shape \(2, 3\), got \(3, 2\)"):
        graph_attention(hidden, weight.t(), bias)
    with pytest.raises(ValueError, match=r"bias: expected shape \(2,\), got \(2, 1\)"):
        graph_attention(hidden, weight, bias[:, None])
    with pytest.raises(ValueError, match=r"weight: expected dtype and device of hidden .* Remedy: hidden.to\(weight\)"):
        graph_attention(hidden, weight.float(), bias)


@pytest.mark.parametrize("which", BOTH)
def test_refusals_of_offsets(which: str) -> None:
    call, _, make = BOTH[which]
    tensors = [t.detach() for t in make()]
    for offsets, message in (
        ([0, 9], "offsets: expected a tensor, got list"),
        (torch.tensor([0, 9], dtype=torch.int32), r"offsets: expected int64 \[D \+ 1\], got torch.int32 \(2,\)"),
        (torch.tensor([[0, 9]]), r"offsets: expected int64 \[D \+ 1\], got torch.int64 \(1, 2\)"),
        (torch.tensor([], dtype=torch.int64), r"offsets: expected int64 \[D \+ 1\], got torch.int64 \(0,\)"),
        (torch.tensor([0, 8]), "offsets: must run from 0 to N = 9, got 0 to 8"),
        (torch.tensor([1, 9]), "offsets: must run from 0 to N = 9, got 1 to 9"),
        (torch.tensor([0]), "offsets: must run from 0 to N = 9, got 0 to 0"),
        (torch.tensor([0, 6, 4, 9]), "offsets: must not decrease, but a day has -2 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*tensors, offsets)


@pytest.mark.skipif(not NATIVE, reason="the checks of the kernels themselves")
def test_the_kernels_reject_offsets_beyond_the_rows() -> None:
    """After torch.compile no Python code checks the values of `offsets`."""
    tensors = [t.detach() for t in small_inputs()]
    for bad in ([0, 10], [0, 7, 3, 9], [-1, 9], [0, 8]):
        with pytest.raises(ValueError, match=r"offsets: must (run from|not decrease)"):
            torch.ops.qfast.additive_attention(*tensors, torch.tensor(bad), 9, 0.01, False)


@pytest.mark.skipif(not NATIVE, reason="plain torch does not use the orders")
@pytest.mark.parametrize("bad", [4, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("side", [0, 1])
def test_the_kernels_reject_orders_beyond_the_rows(side: int, bad: int) -> None:
    """The saved orders are indices. A changed one read and wrote outside the arrays."""
    operators, days = torch.ops.qfast, torch.tensor([0, 4, 9])
    query, key, value = (t.detach() for t in small_inputs())
    out, share, weight, orders = operators.additive_attention(query, key, value, days, 5, 0.01, True)
    orders[side, -1, 2] = bad
    message = r"backward: orders: expected rows 0 to 3 in day 0, got"
    with pytest.raises(ValueError, match=message):
        operators.additive_attention_backward(value, query, key, value, days, 5, 0.01, out, share, weight, orders)
    hidden, weights, bias = (t.detach() for t in graph_small())
    out, scores, share, weight, orders = operators.graph_attention(hidden, weights, bias, days, 5, 0.01, True)
    orders[side, -1, 2] = bad
    with pytest.raises(ValueError, match=message):
        operators.graph_attention_backward(hidden, hidden, weights, days, 5, 0.01, out, scores, share, weight, orders)
