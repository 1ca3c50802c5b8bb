"""Attention between all stocks of a day with scores LeakyReLU(query_i + key_j), in N log N time.

additive_attention_twin.py states in plain torch what the operators compute: the dense softmax. docs/attention.md
derives the fast algorithm. The kernels are in csrc/additive_attention: additive_attention_kernels.h, called by
additive_attention.cpp, and additive_attention.cu.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from qfast.errors import ConfigError, DataError
from qfast.ops import transforms
from qfast.ops._common import (
    check_alike,
    check_floating,
    check_same,
    define,
    explain_memory,
    is_half,
    needs_grad,
    refuse_double_backward,
    require,
    require_saved,
    require_tensor,
    skip_autograd,
)
from qfast.ops.additive_attention_twin import (
    attend,
    attention_backward_twin,
    attention_twin,
    empty_saved,
    graph_backward_twin,
    graph_twin,
)

__all__ = ["additive_attention", "graph_attention"]

_DENSE = "torch.func.grad within torch.func.grad, which computes with the dense softmax"


@explain_memory("additive_attention")
def additive_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor | None = None, negative_slope: float = 0.01
) -> Tensor:
    """Compute out_i = sum over j of the same day of softmax_j(LeakyReLU(query_i + key_j)) value_j.

    The result is exact up to rounding. It needs N log N time and N H memory, forward and backward, because no N x N
    tensor is built.

    Parameters
    ----------
    query, key : Tensor [N] or [heads, N], float32 or float64
        float16 and bfloat16 are computed in float32; the result is rounded once. Under autocast, some arguments may be
        in half precision and others in float32.
    value : Tensor [N, H] or [heads, N, H], same dtype
        H is at least 1. The result has its dtype.
    offsets : Tensor [D + 1], int64, optional
        Day d is the rows offsets[d] to offsets[d + 1]. Ascending from 0 to N; days may be empty. Rows attend to rows of
        the same day only. If None, all rows are one day. Keep it on the CPU: checking it on a GPU synchronizes the
        stream. A CUDA graph captures a call only if it is in pinned memory (`offsets.pin_memory()`), and each replay
        copies it again, so keep it as long as the graph.
    negative_slope : float
        Slope of the LeakyReLU for negative scores, from 0 (ReLU) to 1 (linear).

    Returns
    -------
    Tensor [N, H] or [heads, N, H]
        The bits on one kind of device do not depend on the number of threads. Differentiable in query, key and value.
        At a score of 0 the gradient uses `negative_slope`, as torch's LeakyReLU does.

    Raises
    ------
    DataError
        Wrong type, dtype, shape or device, or wrong offsets.
    ConfigError
        negative_slope is not in [0, 1].
    NotImplementedError
        Double backward. Use torch.func.grad twice.
    torch.OutOfMemoryError
        Insufficient memory, on any device. The message states the size.

    Notes
    -----
    NaN and infinity propagate as in the dense softmax, within their day and head. A key of NaN or +inf makes all rows
    NaN. A query that is not finite makes its own row NaN, and a value of NaN its column. A key of -inf masks its row if
    negative_slope > 0 and another key is finite.

    torch.func transforms and forward mode compute the dense softmax, in N x N memory.

    Source
    ------
    The scores of graph attention (Velickovic et al. 2018). With sorted keys, the scores above 0 of a query belong to a
    suffix of the keys. On either side of 0 the exponential of a score is a product of a factor of i and a factor of j,
    so two running sums serve all rows.

    Examples
    --------
    >>> value = torch.tensor([[1.0], [3.0]])
    >>> additive_attention(torch.zeros(2), torch.zeros(2), value).tolist()
    [[2.0], [2.0]]
    >>> additive_attention(torch.zeros(2), torch.zeros(2), value, torch.tensor([0, 1, 2])).tolist()
    [[1.0], [3.0]]
    """
    if _has_halves(query, key, value):
        wide = additive_attention(_widen(query), _widen(key), _widen(value), offsets, negative_slope)
        return wide.to(value.dtype)
    slope = _checked_slope("additive_attention", negative_slope)
    _check_attention(query, key, value)
    days, longest = _checked_days("additive_attention", offsets, query.shape[-1], query)
    if transforms.active():
        return attend(query, key, value, days, slope)
    keep = needs_grad(query, key, value)
    if keep and not torch.compiler.is_compiling():
        return _Attention.apply(query, key, value, days, longest, slope)[0]
    tensors = _with_heads(query, key, value)
    with skip_autograd():
        return torch.ops.qfast.additive_attention(*tensors, days, longest, slope, keep)[0].reshape(value.shape)


@explain_memory("graph_attention")
def graph_attention(
    hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor | None = None, negative_slope: float = 0.01
) -> Tensor:
    """Compute hidden + additive_attention(hidden @ weight[0] + bias[0], hidden @ weight[1] + bias[1], hidden).

    One operator computes the scores, the attention and the residual connection, with few passes over memory.

    Parameters
    ----------
    hidden : Tensor [N, H], float32 or float64
        H is at least 1. float16 and bfloat16, also of `weight` and `bias` only, are computed in float32; the result is
        rounded once to the dtype of `hidden`.
    weight : Tensor [2, H]
        Row 0 computes the queries, row 1 the keys.
    bias : Tensor [2]
    offsets, negative_slope
        As in `additive_attention`.

    Returns
    -------
    Tensor [N, H]
        Differentiable in hidden, weight and bias.

    Raises
    ------
    DataError, ConfigError, NotImplementedError
        As in `additive_attention`.

    Notes
    -----
    As in `additive_attention`.

    Source
    ------
    Graph attention as in pyqlib 0.9.7, qlib/contrib/model/pytorch_gats.py. The scores there are
    a . [W h_j + b, W h_i + b], so `weight` is W^T times each half of a, and `bias` is b times each half.

    Examples
    --------
    >>> graph_attention(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1), torch.zeros(2)).tolist()
    [[3.0], [5.0]]
    """
    if _has_halves(hidden, weight, bias):
        wide = graph_attention(_widen(hidden), _widen(weight), _widen(bias), offsets, negative_slope)
        return wide.to(hidden.dtype)
    slope = _checked_slope("graph_attention", negative_slope)
    _check_graph(hidden, weight, bias)
    days, longest = _checked_days("graph_attention", offsets, len(hidden), hidden)
    if transforms.active():
        query, key = (hidden @ weight.t() + bias).unbind(1)
        return hidden + attend(query, key, hidden, days, slope)
    keep = needs_grad(hidden, weight, bias)
    if keep and not torch.compiler.is_compiling():
        return _Graph.apply(hidden, weight, bias, days, longest, slope)[0]
    with skip_autograd():
        return torch.ops.qfast.graph_attention(hidden, weight, bias, days, longest, slope, keep)[0]


def _has_halves(*tensors: object) -> bool:
    """Whether some tensors are in half precision and all others are float32."""
    others = [tensor for tensor in tensors if not is_half(tensor)]
    return len(others) < len(tensors) and all(isinstance(t, Tensor) and t.dtype == torch.float32 for t in others)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if is_half(tensor) else tensor


def _with_heads(*tensors: Tensor) -> Sequence[Tensor]:
    """Add an axis of one head, which the operator requires, unless the first tensor [heads, N] has one."""
    return tensors if tensors[0].dim() == 2 else [tensor.unsqueeze(0) for tensor in tensors]


# ---------------------------------------------------------------- argument checks
def _checked_slope(operator: str, negative_slope: object) -> float:
    # Outside [0, 1] the algorithm would add exponentials above 1, which can overflow.
    if not isinstance(negative_slope, Real) or not 0.0 <= float(negative_slope) <= 1.0:
        raise ConfigError(f"{operator}: negative_slope must be a number in [0, 1], got {negative_slope!r}.")
    return float(negative_slope)


def _checked_days(operator: str, offsets: Tensor | None, n: int, like: Tensor) -> tuple[Tensor | None, int]:
    """Check `offsets`. Return them on the device of `like`, and an upper bound of the rows of a day."""
    if offsets is None:
        return None, n
    require_tensor(operator, "offsets", offsets)
    fits = offsets.dim() == 1 and offsets.shape[0] >= 1 and offsets.dtype == torch.int64
    require(fits, operator, f"offsets: expected int64 [D + 1], got {offsets.dtype} {tuple(offsets.shape)}.")
    if torch.compiler.is_compiling() or transforms.active():  # the values are not known
        return offsets.to(like.device), n
    bounds = offsets.cpu()
    sizes = bounds.diff()
    first, last, smallest = int(bounds[0]), int(bounds[-1]), int(sizes.min()) if len(sizes) else 0
    require(first == 0 and last == n, operator, f"offsets: must run from 0 to N = {n}, got {first} to {last}.")
    require(smallest >= 0, operator, f"offsets: must not decrease, but a day has {smallest} rows.")
    return offsets.to(like.device, non_blocking=True), int(sizes.max()) if len(sizes) else 0


def _check_attention(query: Tensor, key: Tensor, value: Tensor) -> None:
    op, like = "additive_attention", ("query", query)
    check_floating(op, "query", query)
    if query.dim() not in (1, 2):
        raise DataError(f"{op}: query: expected shape [N] or [heads, N], got {tuple(query.shape)}.")
    check_alike(op, "key", key, like, query.shape)
    require_tensor(op, "value", value)
    if value.dim() != query.dim() + 1 or value.shape[:-1] != query.shape or value.shape[-1] == 0:
        expected = f"({', '.join(map(str, query.shape))}, H) with H > 0"
        raise DataError(f"{op}: value: expected shape {expected}, got {tuple(value.shape)}.")
    check_alike(op, "value", value, like, value.shape)


def _check_graph(hidden: Tensor, weight: Tensor, bias: Tensor) -> None:
    op, like = "graph_attention", ("hidden", hidden)
    check_floating(op, "hidden", hidden)
    if hidden.dim() != 2 or hidden.shape[1] == 0:
        raise DataError(f"{op}: hidden: expected shape [N, H] with H > 0, got {tuple(hidden.shape)}.")
    check_alike(op, "weight", weight, like, (2, hidden.shape[1]))
    check_alike(op, "bias", bias, like, (2,))


# ---------------------------------------------------------------- schemas and fakes
_DAYS = "Tensor? offsets, int longest, float negative_slope"
_SAVED = "Tensor share, Tensor share_weight, Tensor orders"
define(
    "additive_attention",
    f"(Tensor query, Tensor key, Tensor value, {_DAYS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    attention_twin,
)
define(
    "additive_attention_backward",
    f"(Tensor grad, Tensor query, Tensor key, Tensor value, {_DAYS}, Tensor out, {_SAVED}) -> (Tensor, Tensor, Tensor)",
    attention_backward_twin,
)
define(
    "graph_attention",
    f"(Tensor hidden, Tensor weight, Tensor bias, {_DAYS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    graph_twin,
)
define(
    "graph_attention_backward",
    f"(Tensor grad, Tensor hidden, Tensor weight, {_DAYS}, Tensor out, Tensor scores, {_SAVED}) "
    "-> (Tensor, Tensor, Tensor)",
    graph_backward_twin,
)


@torch.library.register_fake("qfast::additive_attention")
def _(query, key, value, offsets, longest, slope, keep):  # type: ignore[no-untyped-def]
    return value.new_empty(value.shape), *empty_saved(value, keep)


@torch.library.register_fake("qfast::additive_attention_backward")
def _(grad, query, key, value, offsets, longest, slope, out, share, share_weight, orders):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


@torch.library.register_fake("qfast::graph_attention")
def _(hidden, weight, bias, offsets, longest, slope, keep):  # type: ignore[no-untyped-def]
    scores = hidden.new_empty((2, hidden.shape[0]))
    return hidden.new_empty(hidden.shape), scores, *empty_saved(hidden.unsqueeze(0), keep)


@torch.library.register_fake("qfast::graph_attention_backward")
def _(grad, hidden, weight, offsets, longest, slope, out, scores, share, share_weight, orders):  # type: ignore[no-untyped-def]
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), weight.new_empty((2,))


# ---------------------------------------------------------------- gradients
def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, offsets, longest, slope, keep = inputs
    out, *saved = output
    of_graph = len(saved) == 4  # scores, share, share_weight and orders; additive_attention has no scores
    require_saved("graph_attention" if of_graph else "additive_attention", keep)
    if of_graph:
        tensors = tensors[:2]  # the gradients do not depend on the bias
    ctx.save_for_backward(*tensors, offsets, out, *saved)
    ctx.longest, ctx.slope = longest, slope
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)


@explain_memory("additive_attention")
def _attention_gradients(ctx, grad, *_):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 7
    query, key, value, offsets, *saved = ctx.saved_tensors
    days = offsets, ctx.longest, ctx.slope
    return *torch.ops.qfast.additive_attention_backward(grad, query, key, value, *days, *saved), None, None, None, None


@explain_memory("graph_attention")
def _graph_gradients(ctx, grad, *_):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 7
    hidden, weight, offsets, *saved = ctx.saved_tensors
    days = offsets, ctx.longest, ctx.slope
    return *torch.ops.qfast.graph_attention_backward(grad, hidden, weight, *days, *saved), None, None, None, None


torch.library.register_autograd("qfast::additive_attention", _attention_gradients, setup_context=_save)
torch.library.register_autograd("qfast::graph_attention", _graph_gradients, setup_context=_save)
refuse_double_backward("additive_attention", remedy=_DENSE)
refuse_double_backward("graph_attention", remedy=_DENSE)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, days, longest, slope):  # type: ignore[no-untyped-def]
        with skip_autograd():
            tensors = _with_heads(query, key, value)
            out, *saved = torch.ops.qfast.additive_attention(*tensors, days, longest, slope, True)
        output = out.view(value.shape), *saved
        _save(ctx, (query, key, value, days, longest, slope, True), output)
        return output

    @staticmethod
    @explain_memory("additive_attention")
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        if grad is None:
            return (None,) * 6
        query, key, value, offsets, out, *saved = ctx.saved_tensors
        days = offsets, ctx.longest, ctx.slope
        *tensors, grad, out = _with_heads(query, key, value, grad, out)
        with skip_autograd():
            grads = torch.ops.qfast.additive_attention_backward(grad, *tensors, *days, out, *saved)
        return *(g.view(t.shape) for g, t in zip(grads, (query, key, value), strict=True)), None, None, None


class _Graph(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, days, longest, slope):  # type: ignore[no-untyped-def]
        with skip_autograd():
            output = torch.ops.qfast.graph_attention(hidden, weight, bias, days, longest, slope, True)
        _save(ctx, (hidden, weight, bias, days, longest, slope, True), output)
        return output

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        with skip_autograd():
            return _graph_gradients(ctx, *grads)[:6]


# ---------------------------------------------------------------- self-test
def self_test(name: str, device: torch.device) -> None:
    """Compare operator `name` on `device` with the dense softmax, forward and backward, in float64.

    Parameters
    ----------
    name : "additive_attention" or "graph_attention"
    device : torch.device

    Raises
    ------
    ArithmeticError
        The results differ.
    """
    rng = torch.Generator().manual_seed(0)
    n, width = 301, 19  # 19 is not a multiple of a vector's lanes
    is_additive = name == "additive_attention"
    sizes = [(1, n), (1, n), (1, n, width)] if is_additive else [(n, width), (2, width), (2,)]
    inputs = [torch.randn(size, generator=rng, dtype=torch.float64).to(device) for size in sizes]
    days = torch.tensor([0, 1, 1, 8, 300, 301]).to(device), 292, 0.1
    results = getattr(torch.ops.qfast, name)(*inputs, *days, True)
    forward_twin: Any = attention_twin if is_additive else graph_twin
    backward_twin: Any = attention_backward_twin if is_additive else graph_backward_twin
    expected = forward_twin(*inputs, *days, True)
    check_same(name, results[:1], expected[:1])  # kernel and twin may save different tensors
    grad = torch.randn(expected[0].shape, generator=rng, dtype=torch.float64).to(device)
    backward = (grad, *(inputs if is_additive else inputs[:2]), *days)
    gradients = getattr(torch.ops.qfast, f"{name}_backward")(*backward, *results)
    check_same(name, gradients, backward_twin(*backward, *expected))
