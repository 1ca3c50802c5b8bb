"""Attention within days in plain torch: the dense softmax of each day, and its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["attend", "attention_backward_twin", "attention_twin", "empty_saved", "graph_backward_twin", "graph_twin"]


def attend(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor | None, slope: float) -> Tensor:
    """Return the result of `additive_attention`. torch.func transforms use it, so it modifies nothing in place."""
    parts = [
        _weights(query[..., day], key[..., day], slope)[0] @ value[..., day, :]
        for day in _each_day(offsets, query.shape[-1])
    ]
    return torch.cat(parts, -2) if parts else value.clone()


def _each_day(offsets: Tensor | None, n: int) -> Iterator[slice]:
    bounds = [0, n] if offsets is None else offsets.tolist()
    for begin, end in pairwise(bounds):
        yield slice(begin, end)


def _weights(query: Tensor, key: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """Return the softmax weights of one day, [..., n, n], and whether their scores are above 0."""
    scores = query.unsqueeze(-1) + key.unsqueeze(-2)
    return functional.leaky_relu(scores, slope).softmax(-1), scores > 0


# ---------------------------------------------------------------- twins of the operators
# The operators return the result and the tensors saved for the backward pass. A row's sums of weight * value and of
# weight have two parts: scores above 0 and the others. `share` and `share_weight` are the part with the smaller weight,
# negated if it is the second. `orders` contains two sort orders of each day: keys ascending and queries descending.
def attention_twin(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor | None, longest: int, slope: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the result, share, share_weight and orders for query and key [heads, N], value [heads, N, H]."""
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    share, share_weight, orders = empty_saved(value, keep)
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


def attention_backward_twin(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    longest: int,
    slope: float,
    out: Tensor,
    share: Tensor,
    share_weight: Tensor,
    orders: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    grad_query, grad_key, grad_value = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)
    )
    for day in _each_day(offsets, query.shape[-1]):
        weights, above = _weights(query[:, day], key[:, day], slope)
        grad_weights = grad[:, day] @ value[:, day].mT
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
        grad_scores = torch.where(above, grad_scores, grad_scores * slope)
        grad_query[:, day], grad_key[:, day] = grad_scores.sum(-1), grad_scores.sum(-2)
        grad_value[:, day] = weights.mT @ grad[:, day]
    return grad_query, grad_key, grad_value


def graph_twin(
    hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor | None, longest: int, slope: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the result, the scores [2, N] (queries and keys), share, share_weight and orders."""
    scores = weight @ hidden.t() + bias.unsqueeze(1)
    query, key = scores.unsqueeze(1)
    attended, share, share_weight, orders = attention_twin(
        query, key, hidden.unsqueeze(0), offsets, longest, slope, keep
    )
    return hidden + attended.squeeze(0), scores, share, share_weight, orders


def graph_backward_twin(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor | None,
    longest: int,
    slope: float,
    out: Tensor,
    scores: Tensor,
    share: Tensor,
    share_weight: Tensor,
    orders: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias."""
    query, key = scores.unsqueeze(1)
    inputs = (grad.unsqueeze(0), query, key, hidden.unsqueeze(0), offsets, longest, slope)
    saved = ((out - hidden).unsqueeze(0), share, share_weight, orders)
    grad_query, grad_key, grad_value = attention_backward_twin(*inputs, *saved)
    grad_scores = torch.cat((grad_query, grad_key))
    return grad + grad_value.squeeze(0) + grad_scores.t() @ weight, grad_scores @ hidden, grad_scores.sum(1)


def empty_saved(value: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate share, share_weight and orders for value [heads, N, H], without rows unless `keep`."""
    heads, n, width = value.shape
    rows = n if keep else 0
    share, share_weight = value.new_empty((heads, rows, width)), value.new_empty((heads, rows))
    return share, share_weight, value.new_empty((2, heads, rows), dtype=torch.int32)
