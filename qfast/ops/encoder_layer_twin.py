"""The encoder layer in plain torch: results, the saved activations, and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qfast.ops.feed_forward import HIDDEN_DROPOUT, block_gradients, hidden_values
from qfast.ops.philox import dropout_mask
from qfast.precision import BF16, product

__all__ = ["WEIGHTS", "backward_twin", "forward_twin"]

WEIGHTS = (
    "in_proj_weight",
    "in_proj_bias",
    "out_proj.weight",
    "out_proj.bias",
    "linear1.weight",
    "linear1.bias",
    "linear2.weight",
    "linear2.bias",
    "norm1.weight",
    "norm1.bias",
    "norm2.weight",
    "norm2.bias",
)
# Third words of the Philox counters. HIDDEN_DROPOUT is 1; head h uses _HEAD_DROPOUT + h.
_ATTENTION_DROPOUT, _OUTPUT_DROPOUT, _HEAD_DROPOUT = 0, 2, 3


class _Masks:
    """Factors of dropout for one call. The last `results` of T steps have a result."""

    def __init__(self, x: Tensor, results: int, heads: int, dropout: float, seed: Tensor | None) -> None:
        self._x, self._results, self._heads, self._dropout, self._seed = x, results, heads, dropout, seed

    def for_rows(self, columns: int, place: int) -> Tensor | None:
        """Return factors [B, results, columns], or None without dropout."""
        if not self._dropout or self._seed is None:
            return None
        batch, steps, _ = self._x.shape
        like = self._x.new_empty((batch, self._results, columns))
        return dropout_mask(like, place, self._dropout, self._seed, steps - self._results)

    def for_attention(self) -> Tensor | None:
        """Return factors [B, heads, results, T], or None without dropout."""
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
    """Return (values - mean) / sqrt(variance + eps) over the last axis, and 1 / sqrt(variance + eps)."""
    centred = values - values.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1) + eps).rsqrt()
    return centred * scale.unsqueeze(-1), scale


def _split(values: Tensor, heads: int) -> Tensor:
    """Split the last axis into heads: [B, T, D] -> [B, heads, T, D / heads]."""
    return values.unflatten(-1, (heads, -1)).transpose(1, 2)


def _joined(values: Tensor) -> Tensor:
    """Undo `_split`."""
    return values.transpose(1, 2).flatten(2)


def _projected(
    x: Tensor, results: int, weights: Sequence[Tensor], heads: int, precision: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries of the steps with a result, and the keys and values of all steps, split into heads."""
    (in_query, in_key, in_value), (query, key, value) = weights[0].chunk(3), weights[1].chunk(3)
    return (
        _split(product(x[:, x.shape[1] - results :], in_query.t(), precision) + query, heads),
        _split(product(x, in_key.t(), precision) + key, heads),
        _split(product(x, in_value.t(), precision) + value, heads),
    )


def _query_scale(query: Tensor) -> float:
    return float(query.shape[-1] ** -0.5)


def _attention(query: Tensor, key: Tensor, precision: int) -> Tensor:
    if precision == BF16:  # like the kernel, which scales the keys before they are rounded
        query, key = query, key * _query_scale(query)
    else:
        query = query * _query_scale(query)
    return product(query, key.transpose(-1, -2), precision).softmax(-1)


def forward_twin(
    x: Tensor,
    weights: Sequence[Tensor],
    heads: int,
    eps: float,
    dropout: float,
    seed: Tensor | None,
    last_step: bool,
    precision: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result [B, T, D] or [B, D], and the normalised values and scales of both norms.

    Parameters as in `encoder_layer`. The normalised values have shape [2, B, T or 1, D], the scales [2, B, T or 1].
    """
    _, _, out, out_bias, linear1, bias1, linear2, bias2, norm1, norm1_bias, norm2, norm2_bias = weights
    results = 1 if last_step else x.shape[1]
    masks = _Masks(x, results, heads, dropout, seed)
    query, key, value = _projected(x, results, weights, heads, precision)
    mixed = _joined(product(_dropped(_attention(query, key, precision), masks.for_attention()), value, precision))
    attended = _dropped(product(mixed, out.t(), precision) + out_bias, masks.for_rows(x.shape[2], _ATTENTION_DROPOUT))
    first, scale1 = _normalised(x[:, x.shape[1] - results :] + attended, eps)
    block_input = first * norm1 + norm1_bias
    hidden = hidden_values(block_input, linear1, bias1, masks.for_rows(len(linear1), HIDDEN_DROPOUT), precision)
    block_output = _dropped(
        product(hidden, linear2.t(), precision) + bias2, masks.for_rows(x.shape[2], _OUTPUT_DROPOUT)
    )
    second, scale2 = _normalised(block_input + block_output, eps)
    output = second * norm2 + norm2_bias
    return output.squeeze(1) if last_step else output, torch.stack((first, second)), torch.stack((scale1, scale2))


def _norm_gradients(grad: Tensor, weight: Tensor, normalised: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the input, weight and bias of a norm."""
    grad_normalised = grad * weight
    projection = (grad_normalised * normalised).mean(-1, keepdim=True)
    centred = grad_normalised - grad_normalised.mean(-1, keepdim=True)
    grad_input = (centred - normalised * projection) * scale.unsqueeze(-1)
    return grad_input, (grad * normalised).sum((0, 1)), grad.sum((0, 1))


def _linear_gradients(grad: Tensor, x: Tensor, precision: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and bias of a linear layer with input x."""
    rows = grad.flatten(0, 1)
    return product(rows.t(), x.flatten(0, 1), precision), rows.sum(0)


def backward_twin(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    heads: int,
    dropout: float,
    seed: Tensor | None,
    last_step: bool,
    normalised: Tensor,
    scales: Tensor,
    precision: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of x and of the twelve weights."""
    in_proj, _, out, _, linear1, bias1, linear2, _, norm1, norm1_bias, norm2, _ = weights
    results, width = 1 if last_step else x.shape[1], x.shape[2]
    x_results = x[:, x.shape[1] - results :]
    masks = _Masks(x, results, heads, dropout, seed)
    grad = grad.unsqueeze(1) if last_step else grad
    # The feed-forward block and its norm.
    block_input = normalised[0] * norm1 + norm1_bias
    grad_sum, *grad_norm2 = _norm_gradients(grad, norm2, normalised[1], scales[1])
    grad_block_output = _dropped(grad_sum, masks.for_rows(width, _OUTPUT_DROPOUT))
    hidden_mask = masks.for_rows(len(linear1), HIDDEN_DROPOUT)
    grad_rows, *grad_block = block_gradients(
        grad_block_output.flatten(0, 1),
        block_input.flatten(0, 1),
        linear1,
        bias1,
        linear2,
        None if hidden_mask is None else hidden_mask.flatten(0, 1),
        precision,
    )
    grad_block_input = grad_sum + grad_rows.view_as(grad_sum)
    # The attention and its norm.
    grad_first, *grad_norm1 = _norm_gradients(grad_block_input, norm1, normalised[0], scales[0])
    grad_attended = _dropped(grad_first, masks.for_rows(width, _ATTENTION_DROPOUT))
    query, key, value = _projected(x, results, weights, heads, precision)
    attention, attention_mask = _attention(query, key, precision), masks.for_attention()
    dropped = _dropped(attention, attention_mask)
    grad_mixed = _split(product(grad_attended, out, precision), heads)
    grad_attention = _dropped(product(grad_mixed, value.transpose(-1, -2), precision), attention_mask)
    row_sums = (attention * grad_attention).sum(-1, keepdim=True)
    grad_scores = attention * (grad_attention - row_sums) * _query_scale(query)
    grad_query = _joined(product(grad_scores, key, precision))
    grad_key = product(grad_scores.transpose(-1, -2), query, precision)
    grad_value = product(dropped.transpose(-1, -2), grad_mixed, precision)
    grad_key_value = torch.cat((_joined(grad_key), _joined(grad_value)), 2)
    # The projections.
    grad_x = product(grad_key_value, in_proj[width:], precision)
    grad_x[:, x.shape[1] - results :] += grad_first + product(grad_query, in_proj[:width], precision)
    grad_query_in = _linear_gradients(grad_query, x_results, precision)
    grad_in = zip(grad_query_in, _linear_gradients(grad_key_value, x, precision), strict=True)
    grad_out = _linear_gradients(grad_attended, _joined(product(dropped, value, precision)), precision)
    return grad_x, [*(torch.cat(pair) for pair in grad_in), *grad_out, *grad_block, *grad_norm1, *grad_norm2]
