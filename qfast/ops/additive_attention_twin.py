"""What attention within days computes, in plain torch: the dense softmax of each day, and its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "attend",
    "attention_backward_twin",
    "attention_twin",
    "empty_kept",
    "graph_backward_twin",
    "graph_twin",
]


# ---------------------------------------------------------------- plain-torch twins
# `attend` also serves inside torch's transforms, so it changes nothing in place.
def _each_day(offsets: Tensor | None, n: int) -> Iterator[slice]:
    bounds = [0, n] if offsets is None else offsets.tolist()
    for begin, end in pairwise(bounds):
        yield slice(begin, end)


def _weights(query: Tensor, key: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """Dense softmax weights of one day [.., n, n], and whether their scores are above 0."""
    scores = query.unsqueeze(-1) + key.unsqueeze(-2)
    return functional.leaky_relu(scores, slope).softmax(-1), scores > 0


def attend(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor | None, slope: float) -> Tensor:
    parts = [
        _weights(query[..., day], key[..., day], slope)[0] @ value[..., day, :]
        for day in _each_day(offsets, query.shape[-1])
    ]
    return torch.cat(parts, -2) if parts else value.clone()


# What is kept for the backward, besides the result: `share` and `share_weight`, the part of a row's sum that came
# from scores above the bend, or minus the part from those below it, whichever has the smaller weight; and the two
# sort orders of every day, keys ascending and queries descending.
def attention_twin(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor | None, longest: int, slope: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    share, share_weight, orders = empty_kept(value, keep)
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


def graph_twin(
    hidden: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor | None, longest: int, slope: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scores = weight @ hidden.t() + bias.unsqueeze(1)
    query, key = scores.unsqueeze(1)
    attended, *kept = attention_twin(query, key, hidden.unsqueeze(0), offsets, longest, slope, keep)
    share, share_weight, orders = kept
    return hidden + attended.squeeze(0), scores, share, share_weight, orders


def graph_backward_twin(
    grad: Tensor, hidden: Tensor, weight: Tensor, offsets: Tensor | None, longest: int, slope: float,
    out: Tensor, scores: Tensor, share: Tensor, share_weight: Tensor, orders: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    query, key = scores.unsqueeze(1)
    given = (grad.unsqueeze(0), query, key, hidden.unsqueeze(0), offsets, longest, slope)
    of_query, of_key, of_value = attention_backward_twin(
        *given, (out - hidden).unsqueeze(0), share, share_weight, orders
    )
    of_scores = torch.cat((of_query, of_key))
    return grad + of_value.squeeze(0) + of_scores.t() @ weight, of_scores @ hidden, of_scores.sum(1)


def empty_kept(value: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for share, share_weight and orders of value [heads, N, H]; of no rows where nothing is kept."""
    heads, n, width = value.shape
    kept = n if keep else 0
    share, share_weight = value.new_empty((heads, kept, width)), value.new_empty((heads, kept))
    return share, share_weight, value.new_empty((2, heads, kept), dtype=torch.int32)
