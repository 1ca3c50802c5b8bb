"""Attention between all stocks of a day whose scores are sums: LeakyReLU(query_i + key_j), in N log N.

Reading order: the two public functions, the plain-torch twins that state the meaning (the dense softmax),
then schemas, fakes and gradients. The kernels are in csrc/additive_attention: additive_attention_kernels.h (behind
additive_attention.cpp) and additive_attention.cu; docs/attention.md derives what they compute.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from qfast.errors import ConfigError
from qfast.ops import transforms
from qfast.ops._common import (
    check_alike,
    check_floating,
    check_same,
    define,
    is_half,
    needs_grad,
    refuse_double_backward,
    require,
    require_saved,
    require_tensor,
)
from qfast.ops.additive_attention_twin import (
    attend,
    attention_backward_twin,
    attention_twin,
    empty_kept,
    graph_backward_twin,
    graph_twin,
)

__all__ = ["additive_attention", "graph_attention"]

_DENSE = "torch.func.grad within torch.func.grad, which computes with the dense softmax"


def additive_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor | None = None, negative_slope: float = 0.01
) -> Tensor:
    """out_i = sum over j of the same day of softmax_j(LeakyReLU(query_i + key_j)) value_j.

    Exact, in N log N time and N H memory: no N x N tensor, forward or backward.

    Parameters
    ----------
    query, key : Tensor [N] or [heads, N], float32 or float64
        Half precisions are computed in float32 and the result is rounded back.
    value : Tensor [N, H] or [heads, N, H], same dtype
    offsets : Tensor [D + 1], int64, optional
        Day d is rows offsets[d] to offsets[d + 1]: ascending from 0 to N, empty days allowed. Days never see
        each other. None: all rows are one day. Keep it on the CPU: on a GPU its check waits for the stream.
    negative_slope : float
        Of the LeakyReLU, from 0 (ReLU) to 1 (no bend).

    Returns
    -------
    Tensor [N, H] or [heads, N, H]
        The same bits every time on the same device, whatever the number of threads. Differentiable in query, key
        and value; at a score of exactly 0 the gradient takes `negative_slope`, as torch's LeakyReLU.

    Raises
    ------
    ValueError
        Wrong type, dtype, shape, device, offsets or negative_slope.
    NotImplementedError
        A gradient of a gradient by `backward`; torch.func.grad twice gives it.

    Notes
    -----
    NaN and infinity spread as in the dense softmax, within their day and head only: a NaN or +inf key makes all
    rows NaN, a query that is not finite its own row, a NaN value its column. A key of -inf masks its row (with
    negative_slope > 0, and another key that is finite).

    Under torch.func's transforms and in forward-mode levels this is the dense softmax, in N x N memory.

    Source
    ------
    The scores of graph attention (Velickovic et al. 2018). Sorted by key, the scores that are above 0 for a query
    are a suffix; on either side of the bend the exponential is a product, so two running sums serve all rows.

    Examples
    --------
    >>> value = torch.tensor([[1.0], [3.0]])
    >>> additive_attention(torch.zeros(2), torch.zeros(2), value).tolist()
    [[2.0], [2.0]]
    >>> additive_attention(torch.zeros(2), torch.zeros(2), value, torch.tensor([0, 1, 2])).tolist()
    [[1.0], [3.0]]
    """
    if is_half(value):
        return additive_attention(_wide(query), _wide(key), value.float(), offsets, negative_slope).to(value.dtype)
    slope = _slope("additive_attention", negative_slope)
    _check_attention(query, key, value)
    days, longest = _days("additive_attention", offsets, query.shape[-1], query)
    if transforms.active():
        return attend(query, key, value, days, slope)
    keep = needs_grad(query, key, value)
    if keep and not torch.compiler.is_compiling():
        return _Attention.apply(query, key, value, days, longest, slope)[0]
    tensors = _with_heads(query, key, value)
    return torch.ops.qfast.additive_attention(*tensors, days, longest, slope, keep)[0].reshape(value.shape)


def graph_attention(
    hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor | None = None, negative_slope: float = 0.01
) -> Tensor:
    """hidden + additive_attention(hidden @ weight[0] + bias[0], hidden @ weight[1] + bias[1], hidden).

    One operator from the hidden states of a day's stocks to what they are after attention: the scores are read
    off, attended with and added to in few passes over memory.

    Parameters
    ----------
    hidden : Tensor [N, H], float32 or float64
        Half precisions are computed in float32 and the result is rounded back.
    weight : Tensor [2, H]
        Row 0 gives the query scores, row 1 the key scores.
    bias : Tensor [2]
    offsets, negative_slope
        As in `additive_attention`.

    Returns
    -------
    Tensor [N, H]

    Raises
    ------
    ValueError, NotImplementedError
        As `additive_attention`.

    Source
    ------
    Graph attention as in pyqlib 0.9.7, qlib/contrib/model/pytorch_gats.py: there the scores are
    a . [W h_j + b, W h_i + b]; `weight` is W^T times either half of a, `bias` is b times either half.

    Examples
    --------
    >>> graph_attention(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1), torch.zeros(2)).tolist()
    [[3.0], [5.0]]
    """
    if is_half(hidden):
        return graph_attention(hidden.float(), _wide(weight), _wide(bias), offsets, negative_slope).to(hidden.dtype)
    slope = _slope("graph_attention", negative_slope)
    _check_graph(hidden, weight, bias)
    days, longest = _days("graph_attention", offsets, len(hidden), hidden)
    if transforms.active():
        query, key = (hidden @ weight.t() + bias).unbind(1)
        return hidden + attend(query, key, hidden, days, slope)
    keep = needs_grad(hidden, weight, bias)
    if keep and not torch.compiler.is_compiling():
        return _Graph.apply(hidden, weight, bias, days, longest, slope)[0]
    return torch.ops.qfast.graph_attention(hidden, weight, bias, days, longest, slope, keep)[0]


# ---------------------------------------------------------------- arguments
def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if is_half(tensor) else tensor


def _with_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """With an axis of one head, which the operator always has, where there is none."""
    return tensors if tensors[0].dim() == 2 else tuple(tensor.unsqueeze(0) for tensor in tensors)


def _slope(operator: str, negative_slope: object) -> float:
    # Outside [0, 1] the two sides of the bend would not be sums of terms that are at most 1.
    if not isinstance(negative_slope, Real) or not 0.0 <= float(negative_slope) <= 1.0:
        raise ConfigError(f"{operator}: negative_slope must lie in [0, 1], got {negative_slope!r}.")
    return float(negative_slope)


def _days(operator: str, offsets: Tensor | None, n: int, like: Tensor) -> tuple[Tensor | None, int]:
    """`offsets`, checked and on the device of `like`, and the rows of the longest day (or a bound of it)."""
    if offsets is None:
        return None, n
    require_tensor(operator, "offsets", offsets)
    fits = offsets.dim() == 1 and offsets.shape[0] >= 1 and offsets.dtype == torch.int64
    require(fits, operator, f"offsets: expected int64 [D + 1], got {offsets.dtype} {tuple(offsets.shape)}.")
    if torch.compiler.is_compiling() or transforms.active():
        return offsets.to(like.device), n
    bounds = offsets.cpu()
    sizes = bounds.diff()
    first, last, least = int(bounds[0]), int(bounds[-1]), int(sizes.min()) if len(sizes) else 0
    require(first == 0 and last == n, operator, f"offsets: must run from 0 to N = {n}, got {first} to {last}.")
    require(least >= 0, operator, f"offsets: must not fall, but a day has {least} rows.")
    return offsets.to(like.device, non_blocking=True), int(sizes.max()) if len(sizes) else 0


def _fits(tensor: object, like: object, shape: tuple[int, ...]) -> bool:
    """The usual case in one look: the messages below are not made up for it."""
    if not isinstance(tensor, Tensor) or not isinstance(like, Tensor):
        return False
    known = like.dtype is torch.float32 or like.dtype is torch.float64
    return known and tensor.dtype is like.dtype and tensor.device == like.device and tensor.shape == shape


def _check_attention(query: Tensor, key: Tensor, value: Tensor) -> None:
    if isinstance(query, Tensor) and query.dim() in (1, 2) and _fits(key, query, query.shape):
        width = value.shape[-1] if isinstance(value, Tensor) and value.dim() else 0
        if width > 0 and _fits(value, query, (*query.shape, width)):
            return
    name, like = "additive_attention", ("query", query)
    check_floating(name, "query", query)
    require(query.dim() in (1, 2), name, f"query: expected shape [N] or [heads, N], got {tuple(query.shape)}.")
    check_alike(name, "key", key, like, tuple(query.shape))
    require_tensor(name, "value", value)
    fits = value.dim() == query.dim() + 1 and value.shape[:-1] == query.shape and value.shape[-1] > 0
    expected = f"({', '.join(map(str, query.shape))}, H) with H > 0"
    require(fits, name, f"value: expected shape {expected}, got {tuple(value.shape)}.")
    check_alike(name, "value", value, like, tuple(value.shape))


def _check_graph(hidden: Tensor, weight: Tensor, bias: Tensor) -> None:
    width = hidden.shape[1] if isinstance(hidden, Tensor) and hidden.dim() == 2 else 0
    if width > 0 and _fits(weight, hidden, (2, width)) and _fits(bias, hidden, (2,)):
        return
    name, like = "graph_attention", ("hidden", hidden)
    check_floating(name, "hidden", hidden)
    require(width > 0, name, f"hidden: expected shape [N, H] with H > 0, got {tuple(hidden.shape)}.")
    check_alike(name, "weight", weight, like, (2, width))
    check_alike(name, "bias", bias, like, (2,))


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
    return value.new_empty(value.shape), *empty_kept(value, keep)


@torch.library.register_fake("qfast::additive_attention_backward")
def _(grad, query, key, value, offsets, longest, slope, out, share, share_weight, orders):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


@torch.library.register_fake("qfast::graph_attention")
def _(hidden, weight, bias, offsets, longest, slope, keep):  # type: ignore[no-untyped-def]
    scores = hidden.new_empty((2, hidden.shape[0]))
    return hidden.new_empty(hidden.shape), scores, *empty_kept(hidden.unsqueeze(0), keep)


@torch.library.register_fake("qfast::graph_attention_backward")
def _(grad, hidden, weight, offsets, longest, slope, out, scores, share, share_weight, orders):  # type: ignore[no-untyped-def]
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), weight.new_empty((2,))


# ---------------------------------------------------------------- gradients
# Each gradient is registered for the operator, where torch.compile finds it, and stands in a Function as well:
# eager calls through the registered one cost 80 us more, as much as the kernels take for 800 rows.
def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, offsets, longest, slope, keep = inputs
    require_saved("attention", keep)
    out, *kept = output
    ctx.save_for_backward(*tensors[: 3 if len(kept) == 3 else 2], offsets, out, *kept)  # the bias is not needed
    ctx.longest, ctx.slope = longest, slope
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _attention_gradients(ctx, grad, *_):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 7
    query, key, value, offsets, *kept = ctx.saved_tensors
    days = offsets, ctx.longest, ctx.slope
    return *torch.ops.qfast.additive_attention_backward(grad, query, key, value, *days, *kept), None, None, None, None


def _graph_gradients(ctx, grad, *_):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 7
    hidden, weight, offsets, *kept = ctx.saved_tensors
    days = offsets, ctx.longest, ctx.slope
    return *torch.ops.qfast.graph_attention_backward(grad, hidden, weight, *days, *kept), None, None, None, None


torch.library.register_autograd("qfast::additive_attention", _attention_gradients, setup_context=_save)
torch.library.register_autograd("qfast::graph_attention", _graph_gradients, setup_context=_save)
refuse_double_backward("additive_attention", remedy=_DENSE)
refuse_double_backward("graph_attention", remedy=_DENSE)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, days, longest, slope):  # type: ignore[no-untyped-def]
        with _kernel():
            tensors = _with_heads(query, key, value)
            out, *kept = torch.ops.qfast.additive_attention(*tensors, days, longest, slope, True)
        output = out.view(value.shape), *kept
        _save(ctx, (query, key, value, days, longest, slope, True), output)
        return output

    @staticmethod
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        if grad is None:
            return (None,) * 6
        query, key, value, offsets, out, *kept = ctx.saved_tensors
        days = offsets, ctx.longest, ctx.slope
        *tensors, grad, out = _with_heads(query, key, value, grad, out)
        with _kernel():
            grads = torch.ops.qfast.additive_attention_backward(grad, *tensors, *days, out, *kept)
        return *(g.view(t.shape) for g, t in zip(grads, (query, key, value), strict=True)), None, None, None


class _Graph(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, days, longest, slope):  # type: ignore[no-untyped-def]
        with _kernel():
            output = torch.ops.qfast.graph_attention(hidden, weight, bias, days, longest, slope, True)
        _save(ctx, (hidden, weight, bias, days, longest, slope, True), output)
        return output

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        with _kernel():
            return _graph_gradients(ctx, *grads)[:6]


def _kernel() -> AbstractContextManager[Any]:
    """Past the registered gradient to the kernel; but not where a gradient of this gradient is asked for."""
    return nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd()


# ---------------------------------------------------------------- self-test
def self_test(name: str, device: torch.device) -> None:
    """The kernels that serve `device` against the dense softmax, forward and backward, in float64.

    Parameters
    ----------
    name : "additive_attention" or "graph_attention"

    Raises
    ------
    ArithmeticError
        They differ.
    """
    rng = torch.Generator().manual_seed(0)
    n, width = 301, 19  # 19: whole vectors and a rest
    of_days = name == "additive_attention"
    sizes = [(1, n), (1, n), (1, n, width)] if of_days else [(n, width), (2, width), (2,)]
    inputs = [torch.randn(size, generator=rng, dtype=torch.float64).to(device) for size in sizes]
    days = torch.tensor([0, 1, 1, 8, 300, 301]).to(device), 292, 0.1
    results = getattr(torch.ops.qfast, name)(*inputs, *days, True)
    forward_twin: Any = attention_twin if of_days else graph_twin
    backward_twin: Any = attention_backward_twin if of_days else graph_backward_twin
    expected = forward_twin(*inputs, *days, True)
    check_same(name, results[:1], expected[:1])  # what is kept for the backward is each side's own affair
    grad = torch.randn(expected[0].shape, generator=rng, dtype=torch.float64).to(device)
    backward = (grad, *(inputs if of_days else inputs[:2]), *days)
    gradients = getattr(torch.ops.qfast, f"{name}_backward")(*backward, *results)
    check_same(name, gradients, backward_twin(*backward, *expected))
