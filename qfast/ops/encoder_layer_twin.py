"""What an encoder layer computes, in plain torch: values, what is kept of them, and gradients out of that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qfast.ops.feed_forward import HIDDEN_DROPOUT, block_gradients, hidden_values
from qfast.ops.philox import dropout_mask

__all__ = ["WEIGHTS", "backward_twin", "forward_twin"]

WEIGHTS = (
    "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias", "linear1.weight", "linear1.bias",
    "linear2.weight", "linear2.bias", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias",
)  # fmt: skip
# Third words of the Philox counters, beside HIDDEN_DROPOUT.
_ATTENTION_DROPOUT, _LEAVING_DROPOUT, _HEAD_DROPOUT = 0, 2, 3


class _Masks:
    """Dropout of one call; `results` steps of T have a result."""

    def __init__(self, x: Tensor, results: int, heads: int, dropout: float, seed: Tensor | None) -> None:
        self._x, self._results, self._heads, self._dropout, self._seed = x, results, heads, dropout, seed

    def of_rows(self, columns: int, place: int) -> Tensor | None:
        """[B, results, columns]"""
        if not self._dropout or self._seed is None:
            return None
        batch, steps, _ = self._x.shape
        like = self._x.new_empty((batch, self._results, columns))
        return dropout_mask(like, place, self._dropout, self._seed, steps - self._results)

    def of_weights(self) -> Tensor | None:
        """[B, heads, results, T]"""
        if not self._dropout or self._seed is None:
            return None
        batch, steps, _ = self._x.shape
        like = self._x.new_empty((steps, batch, steps))  # query, window, key
        places = [_HEAD_DROPOUT + head for head in range(self._heads)]
        masks = [dropout_mask(like, place, self._dropout, self._seed)[-self._results :] for place in places]
        return torch.stack(masks).permute(2, 0, 1, 3)


def _dropped(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values * mask


def _normalised(values: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(values - mean) / sqrt(variance + eps) over the last axis, and 1 over that root."""
    apart = values - values.mean(-1, keepdim=True)
    scale = (apart.square().mean(-1) + eps).rsqrt()
    return apart * scale.unsqueeze(-1), scale


def _split(values: Tensor, heads: int) -> Tensor:
    """[B, T, D] -> [B, heads, T, D / heads]"""
    return values.unflatten(-1, (heads, -1)).transpose(1, 2)


def _joined(values: Tensor) -> Tensor:
    return values.transpose(1, 2).flatten(2)


def _projected(x: Tensor, results: int, weights: Sequence[Tensor], heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the steps with a result, keys and values of all, by heads."""
    (in_query, in_key, in_value), (query, key, value) = weights[0].chunk(3), weights[1].chunk(3)
    return (
        _split(x[:, x.shape[1] - results :] @ in_query.t() + query, heads),
        _split(x @ in_key.t() + key, heads),
        _split(x @ in_value.t() + value, heads),
    )


def _scaled(query: Tensor) -> float:
    return float(query.shape[-1] ** -0.5)


def _attention(query: Tensor, key: Tensor) -> Tensor:
    return ((query * _scaled(query)) @ key.transpose(-1, -2)).softmax(-1)


def forward_twin(
    x: Tensor, weights: Sequence[Tensor], heads: int, eps: float, dropout: float, seed: Tensor | None, last_step: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Result [B, T, D] or [B, D], normalised [2, B, T or 1, D] and scales [2, B, T or 1]; see `encoder_layer`."""
    _, _, out, out_bias, linear1, bias1, linear2, bias2, norm1, norm1_bias, norm2, norm2_bias = weights
    results = 1 if last_step else x.shape[1]
    masks = _Masks(x, results, heads, dropout, seed)
    query, key, value = _projected(x, results, weights, heads)
    mixed = _joined(_dropped(_attention(query, key), masks.of_weights()) @ value)
    attended = _dropped(mixed @ out.t() + out_bias, masks.of_rows(x.shape[2], _ATTENTION_DROPOUT))
    first, scale1 = _normalised(x[:, x.shape[1] - results :] + attended, eps)
    entering = first * norm1 + norm1_bias
    hidden = hidden_values(entering, linear1, bias1, masks.of_rows(len(linear1), HIDDEN_DROPOUT))
    leaving = _dropped(hidden @ linear2.t() + bias2, masks.of_rows(x.shape[2], _LEAVING_DROPOUT))
    second, scale2 = _normalised(entering + leaving, eps)
    output = second * norm2 + norm2_bias
    return output.squeeze(1) if last_step else output, torch.stack((first, second)), torch.stack((scale1, scale2))


def _norm_gradients(grad: Tensor, weight: Tensor, normalised: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of what was normalised, weight and bias."""
    own = grad * weight
    along = (own * normalised).mean(-1, keepdim=True)
    of_values = (own - own.mean(-1, keepdim=True) - normalised * along) * scale.unsqueeze(-1)
    return of_values, (grad * normalised).sum((0, 1)), grad.sum((0, 1))


def _linear_gradients(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of weight and bias."""
    rows = grad.flatten(0, 1)
    return rows.t() @ x.flatten(0, 1), rows.sum(0)


def backward_twin(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], heads: int, dropout: float, seed: Tensor | None,
    last_step: bool, normalised: Tensor, scales: Tensor,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Gradients of x and of the twelve weights."""
    in_proj, _, out, _, linear1, bias1, linear2, _, norm1, norm1_bias, norm2, _ = weights
    results, width = 1 if last_step else x.shape[1], x.shape[2]
    masks = _Masks(x, results, heads, dropout, seed)
    grad = grad.unsqueeze(1) if last_step else grad
    # The feed-forward block and its norm.
    entering = normalised[0] * norm1 + norm1_bias
    of_sum, *of_norm2 = _norm_gradients(grad, norm2, normalised[1], scales[1])
    of_leaving = _dropped(of_sum, masks.of_rows(width, _LEAVING_DROPOUT))
    mask = masks.of_rows(len(linear1), HIDDEN_DROPOUT)
    rows = of_leaving.flatten(0, 1), entering.flatten(0, 1)
    of_rows, *of_block = block_gradients(*rows, linear1, bias1, linear2, None if mask is None else mask.flatten(0, 1))
    of_entering = of_sum + of_rows.view_as(of_sum)
    # The attention and its norm.
    of_first, *of_norm1 = _norm_gradients(of_entering, norm1, normalised[0], scales[0])
    of_attended = _dropped(of_first, masks.of_rows(width, _ATTENTION_DROPOUT))
    query, key, value = _projected(x, results, weights, heads)
    attention, mask = _attention(query, key), masks.of_weights()
    dropped = _dropped(attention, mask)
    of_mixed = _split(of_attended @ out, heads)
    of_attention = _dropped(of_mixed @ value.transpose(-1, -2), mask)
    of_scores = attention * (of_attention - (attention * of_attention).sum(-1, keepdim=True)) * _scaled(query)
    of_query = _joined(of_scores @ key)
    of_pairs = torch.cat(
        (_joined(of_scores.transpose(-1, -2) @ query), _joined(dropped.transpose(-1, -2) @ of_mixed)), 2
    )
    # What the projections read.
    of_x = of_pairs @ in_proj[width:]
    of_x[:, x.shape[1] - results :] += of_first + of_query @ in_proj[:width]
    of_in = zip(_linear_gradients(of_query, x[:, x.shape[1] - results :]), _linear_gradients(of_pairs, x), strict=True)
    of_out = _linear_gradients(of_attended, _joined(dropped @ value))
    return of_x, [*(torch.cat(pair) for pair in of_in), *of_out, *of_block, *of_norm1, *of_norm2]
