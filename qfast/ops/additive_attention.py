"""Attention between all stocks of a day whose scores are sums: LeakyReLU(query_i + key_j), in N log N.

Reading order: the two public functions, the plain-torch twins that state the meaning (the dense softmax),
then schemas, fakes and gradients. The kernels are in csrc/additive_attention: additive_attention_kernels.h (behind
additive_attention.cpp) and additive_attention.cu; docs/attention.md derives what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qfast.errors import ConfigError, DataError
from qfast.ops import transforms

__all__ = ["additive_attention", "graph_attention"]


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
    if _is_half(value):
        return additive_attention(_wide(query), _wide(key), value.float(), offsets, negative_slope).to(value.dtype)
    slope = _slope("additive_attention", negative_slope)
    _check_attention(query, key, value)
    days, longest = _days("additive_attention", offsets, query.shape[-1], query)
    if transforms.active():
        return _attend(query, key, value, days, slope)
    keep = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if keep and not torch.compiler.is_compiling():
        return _Attention.apply(query, key, value, days, longest, slope)[0]
    return _with_heads(query, key, value, days, longest, slope, keep)[0].reshape(value.shape)


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
    if _is_half(hidden):
        return graph_attention(hidden.float(), _wide(weight), _wide(bias), offsets, negative_slope).to(hidden.dtype)
    slope = _slope("graph_attention", negative_slope)
    _check_graph(hidden, weight, bias)
    days, longest = _days("graph_attention", offsets, len(hidden), hidden)
    if transforms.active():
        query, key = (hidden @ weight.t() + bias).unbind(1)
        return hidden + _attend(query, key, hidden, days, slope)
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad or bias.requires_grad)
    if keep and not torch.compiler.is_compiling():
        return _Graph.apply(hidden, weight, bias, days, longest, slope)[0]
    out: Tensor = torch.ops.qfast.graph_attention(hidden, weight, bias, days, longest, slope, keep)[0]
    return out


def _with_heads(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """The operator, which always has the axis of heads."""
    if query.dim() == 1:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    return torch.ops.qfast.additive_attention(query, key, value, *others)


# ---------------------------------------------------------------- arguments
def _require(condition: bool, operator: str, message: str) -> None:
    if not condition:
        raise DataError(f"{operator}: {message}")


def _is_half(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype in (torch.float16, torch.bfloat16)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if _is_half(tensor) else tensor


def _slope(operator: str, negative_slope: Any) -> float:
    # Outside [0, 1] the two sides of the bend would not be sums of terms that are at most 1.
    if not isinstance(negative_slope, Real) or not 0.0 <= float(negative_slope) <= 1.0:
        raise ConfigError(f"{operator}: negative_slope must lie in [0, 1], got {negative_slope!r}.")
    return float(negative_slope)


def _days(operator: str, offsets: Tensor | None, n: int, like: Tensor) -> tuple[Tensor | None, int]:
    """`offsets`, checked and on the device of `like`, and the rows of the longest day (or a bound of it)."""
    if offsets is None:
        return None, n
    _require(isinstance(offsets, Tensor), operator, f"offsets: expected a tensor, got {type(offsets).__name__}.")
    fits = offsets.dim() == 1 and offsets.shape[0] >= 1 and offsets.dtype == torch.int64
    _require(fits, operator, f"offsets: expected int64 [D + 1], got {offsets.dtype} {tuple(offsets.shape)}.")
    if torch.compiler.is_compiling() or transforms.active():
        return offsets.to(like.device), n
    bounds = offsets.cpu()
    sizes = bounds.diff()
    first, last, least = int(bounds[0]), int(bounds[-1]), int(sizes.min()) if len(sizes) else 0
    _require(first == 0 and last == n, operator, f"offsets: must run from 0 to N = {n}, got {first} to {last}.")
    _require(least >= 0, operator, f"offsets: must not fall, but a day has {least} rows.")
    return offsets.to(like.device, non_blocking=True), int(sizes.max()) if len(sizes) else 0


def _check_floating(operator: str, name: str, tensor: Tensor) -> None:
    known = isinstance(tensor, Tensor) and tensor.dtype in (torch.float32, torch.float64)
    got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
    _require(known, operator, f"{name}: expected a tensor of float32 or float64, got {got}.")


def _check_like(operator: str, name: str, tensor: Tensor, first: str, like: Tensor) -> None:
    _check_floating(operator, name, tensor)
    alike = tensor.dtype == like.dtype and tensor.device == like.device
    message = f"{name}: expected dtype and device of {first} ({like.dtype}, {like.device}), got {tensor.dtype}, "
    _require(alike, operator, message + f"{tensor.device}. Remedy: {name}.to({first}).")


def _fits(tensor: Any, like: Any, shape: tuple[int, ...]) -> bool:
    """The usual case in one look: the messages below are not made up for it."""
    if not isinstance(tensor, Tensor) or not isinstance(like, Tensor):
        return False
    known = like.dtype is torch.float32 or like.dtype is torch.float64
    return known and tensor.dtype is like.dtype and tensor.device == like.device and tensor.shape == shape


def _check_attention(query: Tensor, key: Tensor, value: Tensor) -> None:
    name = "additive_attention"
    if isinstance(query, Tensor) and query.dim() in (1, 2) and _fits(key, query, query.shape):
        width = value.shape[-1] if isinstance(value, Tensor) and value.dim() else 0
        if width > 0 and _fits(value, query, (*query.shape, width)):
            return
    _check_floating(name, "query", query)
    _require(query.dim() in (1, 2), name, f"query: expected shape [N] or [heads, N], got {tuple(query.shape)}.")
    _check_like(name, "key", key, "query", query)
    _check_like(name, "value", value, "query", query)
    fits = key.shape == query.shape
    _require(fits, name, f"key: expected the shape of query, {tuple(query.shape)}, got {tuple(key.shape)}.")
    fits = value.dim() == query.dim() + 1 and value.shape[:-1] == query.shape and value.shape[-1] > 0
    _require(
        fits,
        name,
        f"value: expected shape ({', '.join(map(str, query.shape))}, H) with H > 0, got {tuple(value.shape)}.",
    )


def _check_graph(hidden: Tensor, weight: Tensor, bias: Tensor) -> None:
    name = "graph_attention"
    width = hidden.shape[1] if isinstance(hidden, Tensor) and hidden.dim() == 2 else 0
    if width > 0 and _fits(weight, hidden, (2, width)) and _fits(bias, hidden, (2,)):
        return
    _check_floating(name, "hidden", hidden)
    fits = hidden.dim() == 2 and hidden.shape[1] > 0
    _require(fits, name, f"hidden: expected shape [N, H] with H > 0, got {tuple(hidden.shape)}.")
    for label, tensor, shape in (("weight", weight, (2, hidden.shape[1])), ("bias", bias, (2,))):
        _check_like(name, label, tensor, "hidden", hidden)
        fits = tuple(tensor.shape) == shape
        _require(fits, name, f"{label}: expected shape {shape}, got {tuple(tensor.shape)}.")


# ---------------------------------------------------------------- plain-torch twins
# `_attend` also serves inside torch's transforms, so it changes nothing in place.
def _each_day(offsets: Tensor | None, n: int) -> Iterator[slice]:
    bounds = [0, n] if offsets is None else offsets.tolist()
    for begin, end in pairwise(bounds):
        yield slice(begin, end)


def _weights(query: Tensor, key: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """Dense softmax weights of one day [.., n, n], and whether their scores are above 0."""
    scores = query.unsqueeze(-1) + key.unsqueeze(-2)
    return functional.leaky_relu(scores, slope).softmax(-1), scores > 0


def _attend(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor | None, slope: float) -> Tensor:
    parts = [
        _weights(query[..., day], key[..., day], slope)[0] @ value[..., day, :]
        for day in _each_day(offsets, query.shape[-1])
    ]
    return torch.cat(parts, -2) if parts else value.clone()


# What is kept for the backward, besides the result: `share` and `share_weight`, the part of a row's sum that came
# from scores above the bend, or minus the part from those below it, whichever has the smaller weight; and the two
# sort orders of every day, keys ascending and queries descending.
def _attention_twin(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor | None, longest: int, slope: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    share, share_weight, orders = _empty_kept(value, keep)
    for day in _each_day(offsets, query.shape[-1]):
        weights, above = _weights(query[:, day], key[:, day], slope)
        out[:, day] = weights @ value[:, day]
        if not keep:
            continue
        upper, lower = weights * above, weights * ~above
        smaller = torch.where(upper.sum(-1, keepdim=True) <= 0.5, upper, -lower)
        share[:, day] = smaller @ value[:, day]
        share_weight[:, day] = smaller.sum(-1)
        orders[0, :, day] = key[:, day].argsort(dim=-1, stable=True).int()
        orders[1, :, day] = query[:, day].argsort(dim=-1, descending=True, stable=True).int()
    return out, share, share_weight, orders


def _attention_backward_twin(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor | None, longest: int, slope: float,
    out: Tensor, share: Tensor, share_weight: Tensor, orders: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_query, grad_key, grad_value = (torch.empty_like(t, memory_format=torch.contiguous_format)
                                        for t in (query, key, value))  # fmt: skip
    for day in _each_day(offsets, query.shape[-1]):
        weights, above = _weights(query[:, day], key[:, day], slope)
        of_weights = grad[:, day] @ value[:, day].mT
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
        of_scores = torch.where(above, of_scores, of_scores * slope)
        grad_query[:, day], grad_key[:, day] = of_scores.sum(-1), of_scores.sum(-2)
        grad_value[:, day] = weights.mT @ grad[:, day]
    return grad_query, grad_key, grad_value


def _graph_twin(
    hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor | None, longest: int, slope: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scores = weight @ hidden.t() + bias.unsqueeze(1)
    query, key = scores.unsqueeze(1)
    attended, *kept = _attention_twin(query, key, hidden.unsqueeze(0), offsets, longest, slope, keep)
    share, share_weight, orders = kept
    return hidden + attended.squeeze(0), scores, share, share_weight, orders


def _graph_backward_twin(
    grad: Tensor, hidden: Tensor, weight: Tensor, offsets: Tensor | None, longest: int, slope: float,
    out: Tensor, scores: Tensor, share: Tensor, share_weight: Tensor, orders: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    query, key = scores.unsqueeze(1)
    given = (grad.unsqueeze(0), query, key, hidden.unsqueeze(0), offsets, longest, slope)
    of_query, of_key, of_value = _attention_backward_twin(
        *given, (out - hidden).unsqueeze(0), share, share_weight, orders
    )
    of_scores = torch.cat((of_query, of_key))
    return grad + of_value.squeeze(0) + of_scores.t() @ weight, of_scores @ hidden, of_scores.sum(1)


# ---------------------------------------------------------------- schemas and fakes
_DAYS = "Tensor? offsets, int longest, float negative_slope"
_KEPT = "Tensor share, Tensor share_weight, Tensor orders"
_SCHEMAS: dict[str, tuple[str, Callable[..., Any]]] = {
    "additive_attention": (
        f"(Tensor query, Tensor key, Tensor value, {_DAYS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
        _attention_twin,
    ),
    "additive_attention_backward": (
        f"(Tensor grad, Tensor query, Tensor key, Tensor value, {_DAYS}, Tensor out, {_KEPT}) "
        "-> (Tensor, Tensor, Tensor)",
        _attention_backward_twin,
    ),
    "graph_attention": (
        f"(Tensor hidden, Tensor weight, Tensor bias, {_DAYS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _graph_twin,
    ),
    "graph_attention_backward": (
        f"(Tensor grad, Tensor hidden, Tensor weight, {_DAYS}, Tensor out, Tensor scores, {_KEPT}) "
        "-> (Tensor, Tensor, Tensor)",
        _graph_backward_twin,
    ),
}
for _name, (_schema, _twin) in _SCHEMAS.items():  # the twin serves wherever no kernel is loaded
    torch.library.define(f"qfast::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"qfast::{_name}", "CompositeExplicitAutograd", _twin)


def _empty_kept(value: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for share, share_weight and orders of value [heads, N, H]; of no rows where nothing is kept."""
    heads, n, width = value.shape
    kept = n if keep else 0
    share, share_weight = value.new_empty((heads, kept, width)), value.new_empty((heads, kept))
    return share, share_weight, value.new_empty((2, heads, kept), dtype=torch.int32)


@torch.library.register_fake("qfast::additive_attention")
def _(query, key, value, offsets, longest, slope, keep):  # type: ignore[no-untyped-def]
    return value.new_empty(value.shape), *_empty_kept(value, keep)


@torch.library.register_fake("qfast::additive_attention_backward")
def _(grad, query, key, value, offsets, longest, slope, out, share, share_weight, orders):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


@torch.library.register_fake("qfast::graph_attention")
def _(hidden, weight, bias, offsets, longest, slope, keep):  # type: ignore[no-untyped-def]
    scores = hidden.new_empty((2, hidden.shape[0]))
    return hidden.new_empty(hidden.shape), scores, *_empty_kept(hidden.unsqueeze(0), keep)


@torch.library.register_fake("qfast::graph_attention_backward")
def _(grad, hidden, weight, offsets, longest, slope, out, scores, share, share_weight, orders):  # type: ignore[no-untyped-def]
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), weight.new_empty((2,))


# ---------------------------------------------------------------- gradients
# Each gradient is registered for the operator, where torch.compile finds it, and stands in a Function as well:
# eager calls through the registered one cost 80 us more, as much as the kernels take for 800 rows.
def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, offsets, longest, slope, keep = inputs
    if not keep:
        raise DataError("keep: must be true where a gradient is wanted.")
    out, *kept = output
    ctx.save_for_backward(*tensors[: 3 if len(kept) == 3 else 2], offsets, out, *kept)  # the bias is not needed
    ctx.longest, ctx.slope = longest, slope
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _attention_backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 7
    query, key, value, offsets, *kept = ctx.saved_tensors
    days = offsets, ctx.longest, ctx.slope
    return *torch.ops.qfast.additive_attention_backward(grad, query, key, value, *days, *kept), None, None, None, None


def _graph_backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 7
    hidden, weight, offsets, *kept = ctx.saved_tensors
    days = offsets, ctx.longest, ctx.slope
    return *torch.ops.qfast.graph_attention_backward(grad, hidden, weight, *days, *kept), None, None, None, None


def _no_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise NotImplementedError(
        "additive_attention: double backward is not supported. Remedy: torch.func.grad within torch.func.grad, "
        "which computes with the dense softmax."
    )


for _name, _backward in (("additive_attention", _attention_backward), ("graph_attention", _graph_backward)):
    torch.library.register_autograd(f"qfast::{_name}", _backward, setup_context=_save)
    torch.library.register_autograd(f"qfast::{_name}_backward", _no_double_backward)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, days, longest, slope):  # type: ignore[no-untyped-def]
        with _kernel():
            found = _with_heads(query, key, value, days, longest, slope, True)
        output = found[0].view(value.shape), *found[1:]
        _save(ctx, (query, key, value, days, longest, slope, True), output)
        return output

    @staticmethod
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        if grad is None:
            return (None,) * 6
        query, key, value, offsets, out, *kept = ctx.saved_tensors
        given = [grad, query, key, value, out]
        if query.dim() == 1:
            given = [t.unsqueeze(0) for t in given]
        days = offsets, ctx.longest, ctx.slope
        with _kernel():
            grads = torch.ops.qfast.additive_attention_backward(*given[:4], *days, given[4], *kept)
        return *(g.view(t.shape) for g, t in zip(grads, (query, key, value), strict=True)), None, None, None


class _Graph(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, days, longest, slope):  # type: ignore[no-untyped-def]
        with _kernel():
            found = torch.ops.qfast.graph_attention(hidden, weight, bias, days, longest, slope, True)
        _save(ctx, (hidden, weight, bias, days, longest, slope, True), found)
        return found

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        with _kernel():
            return _graph_backward(ctx, *grads)[:6]


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
    offsets = torch.tensor([0, 1, 1, 8, 300, 301])
    sizes = [(1, n), (1, n), (1, n, width)] if name == "additive_attention" else [(n, width), (2, width), (2,)]
    given = [torch.randn(size, generator=rng, dtype=torch.float64).to(device) for size in sizes]
    days = offsets.to(device), 292, 0.1
    forward = _SCHEMAS[name][1](*given, *days, True)
    pairs = [(getattr(torch.ops.qfast, name)(*given, *days, True)[0], forward[0])]
    own = getattr(torch.ops.qfast, name)(*given, *days, True)  # what is kept is each side's own affair
    grad = torch.randn(forward[0].shape, generator=rng, dtype=torch.float64).to(device)
    tensors = given if name == "additive_attention" else given[:2]
    found = getattr(torch.ops.qfast, f"{name}_backward")(grad, *tensors, *days, *own)
    pairs += zip(found, _SCHEMAS[f"{name}_backward"][1](grad, *tensors, *days, *forward), strict=True)
    for ours, theirs in pairs:
        error = float((ours - theirs).norm() / theirs.norm())
        if not error < 1e-12:
            raise ArithmeticError(f"{name}: native and plain torch differ by {error:.1e} (relative norm).")
