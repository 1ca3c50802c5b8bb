"""Temporal convolution stacks in plain torch: results, and gradients from the input."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from qfast.ops.philox import dropout_mask
from qfast.ops.temporal_conv_plan import Plan, cone
from qfast.precision import BF16, rounded

__all__ = ["backward_twin", "block_values", "by_block", "empty_saved", "forward_twin"]


def by_block(weights: Sequence[Tensor], features: int, count: int) -> list[list[Tensor]]:
    """Return the weights of each of `count` blocks in the operator's list.

    A block has 4 weights: weight and bias of both convolutions. If its output width differs from its input width,
    weight and bias of the 1x1 convolution follow.
    """
    blocks: list[list[Tensor]] = []
    begin, width = 0, features
    for _ in range(count):
        size = 4 if weights[begin].shape[0] == width else 6
        blocks.append(list(weights[begin : begin + size]))
        width = weights[begin].shape[0]
        begin += size
    return blocks


def _plan_of(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], all_steps: bool) -> Plan:
    """Return the plan of a call of the operator, where x is [B, T, F]."""
    kernel_sizes = tuple(int(block[0].shape[2]) for block in by_block(weights, x.shape[2], len(dilations)))
    return cone(int(x.shape[1]), kernel_sizes, tuple(dilations), all_steps)


# ---------------------------------------------------------------- values
# torch.func transforms use these functions too, so they modify nothing in place.
def block_values(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    dropout: float,
    seed: Tensor | None,
    precision: int = 0,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return h, y and the output of every block at all steps, in the notation of `temporal_conv_net`.

    x has shape [B, F, T], the results [B, C, T]. If the precision is `BF16`, convolutions round x and the weight.
    """
    between: list[Tensor] = []
    second: list[Tensor] = []
    outputs: list[Tensor] = []
    for number, (block, dilation) in enumerate(
        zip(by_block(weights, x.shape[1], len(dilations)), dilations, strict=True)
    ):
        w1, b1, w2, b2, *downsample = block
        h = _drop(_causal(x, w1, b1, dilation, precision).relu(), 2 * number, dropout, seed)
        y = _drop(_causal(h, w2, b2, dilation, precision).relu(), 2 * number + 1, dropout, seed)
        residual = _causal(x, downsample[0], downsample[1], 1, precision) if downsample else x
        x = (y + residual).relu()
        between.append(h)
        second.append(y)
        outputs.append(x)
    return between, second, outputs


def _causal(x: Tensor, weight: Tensor, bias: Tensor, dilation: int, precision: int) -> Tensor:
    if precision == BF16:
        x, weight = rounded(x), rounded(weight)
    dilation = min(dilation, x.shape[2])  # with any larger dilation, all but the last tap read zeros
    padding = (weight.shape[2] - 1) * dilation
    return functional.conv1d(functional.pad(x, (padding, 0)), weight, bias, dilation=dilation)


def _drop(x: Tensor, convolution: int, dropout: float, seed: Tensor | None) -> Tensor:
    """Apply dropout to the output x [B, C, T] of a convolution."""
    if not dropout or seed is None:
        return x
    return x * dropout_mask(x.transpose(1, 2), convolution, dropout, seed).transpose(1, 2)


# ---------------------------------------------------------------- twins of the operators
# The operators save two tensors for the backward pass. `activations` contains, for each row, h and the output of every
# block (except the last output) at the positions of the plan. `signs` has one bit per element of y, set if it is above
# 0. Their layout is private to the kernels. The twins leave both at 0 and compute the values again.
def forward_twin(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    dropout: float,
    seed: Tensor | None,
    all_steps: bool,
    keep: bool,
    precision: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result [B, C] or [B, T, C] for x [B, T, F], and two tensors of zeros for the saved values."""
    activations, signs = empty_saved(x, weights, dilations, all_steps, keep)
    weights, _ = _normalized(weights, x.shape[2], len(dilations))
    with torch.autocast(x.device.type, enabled=False):
        _, _, outputs = block_values(x.transpose(1, 2), weights, dilations, dropout, seed, precision)
    steps = outputs[-1].transpose(1, 2)
    result = (steps if all_steps else steps[:, -1]).clone(memory_format=torch.contiguous_format)
    return result, activations.zero_(), signs.zero_()


def backward_twin(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    dropout: float,
    seed: Tensor | None,
    all_steps: bool,
    output: Tensor,
    activations: Tensor,
    signs: Tensor,
    input_grad: bool,
    precision: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of x (empty unless `input_grad`) and of the weights."""
    weights, normalizations = _normalized(weights, x.shape[2], len(dilations))
    unused = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    unused[list(_plan_of(x, weights, dilations, all_steps).blocks[0].input)] = False
    steps = x.masked_fill(unused.unsqueeze(1), 0).transpose(1, 2)  # a NaN at an unused position has no effect
    between, second, outputs = block_values(steps, weights, dilations, dropout, seed, precision)
    scale = 0.0 if dropout == 1.0 else 1.0 / (1.0 - dropout)
    if all_steps:
        grad = grad.transpose(1, 2)
    else:
        grad = torch.cat((torch.zeros_like(outputs[-1][:, :, 1:]), grad.unsqueeze(2)), 2)
    grad_weights: list[Tensor] = []
    blocks = by_block(weights, x.shape[2], len(dilations))
    for number in range(len(blocks) - 1, -1, -1):
        w1, _, w2, _, *downsample = blocks[number]
        block_input = outputs[number - 1] if number else steps
        grad_residual = _relu_gradient(grad, outputs[number])
        grad_y = _relu_gradient(grad_residual, second[number]) * scale
        grad_h, *grad_second = _causal_gradients(grad_y, between[number], w2, dilations[number], precision)
        grad_h = _relu_gradient(grad_h, between[number]) * scale
        grad, *grad_first = _causal_gradients(grad_h, block_input, w1, dilations[number], precision)
        grad_downsample: list[Tensor] = []
        if downsample:
            grad_residual, *grad_downsample = _causal_gradients(grad_residual, block_input, downsample[0], 1, precision)
        grad = grad + grad_residual
        grad_weights = [*grad_first, *grad_second, *grad_downsample, *grad_weights]
    grad_x = grad.transpose(1, 2).contiguous() if input_grad else x.new_empty((0, *x.shape[1:]))
    return grad_x, _normalization_gradients(grad_weights, normalizations)


class _Normalization(NamedTuple):
    """A normalized weight of the operator's list, and where it is in the list."""

    place: int
    v: Tensor
    gain: Tensor
    norms: Tensor


def _normalized(weights: Sequence[Tensor], features: int, count: int) -> tuple[list[Tensor], list[_Normalization]]:
    """Return the weights of `count` blocks, and what was normalized.

    The operator's list may have further tensors, the gains [C, 1, 1] of both convolutions of every block. Then a
    convolution has the weight g v / ||v|| for each output channel, where v is its weight in the list.
    """
    sizes = [len(block) for block in by_block(weights, features, count)]
    starts = list(accumulate(sizes, initial=0))
    results, gains = list(weights[: starts[-1]]), weights[starts[-1] :]
    convolutions = [start + offset for start in starts[:-1] for offset in (0, 2)]  # weight, bias, weight, bias, ...
    normalizations = []
    for place, gain in zip(convolutions if gains else [], gains, strict=True):
        v, g = results[place].contiguous(), gain.contiguous()
        results[place], norms = torch._weight_norm_interface(v, g, 0)
        normalizations.append(_Normalization(place, v, g, norms))
    return results, normalizations


def _normalization_gradients(grads: list[Tensor], normalizations: list[_Normalization]) -> list[Tensor]:
    """Return the gradients of the operator's list from those of the normalized weights."""
    of_gains = []
    for place, v, gain, norms in normalizations:
        of = torch.ops.aten._weight_norm_interface_backward(grads[place].contiguous(), v, gain, norms, 0)
        grads[place] = of[0]
        of_gains.append(of[1])
    return [*grads, *of_gains]


def _relu_gradient(grad: Tensor, output: Tensor) -> Tensor:
    """Return the gradient of a ReLU's input. A NaN output passes the gradient, as in torch."""
    return grad.masked_fill(output <= 0, 0)


def _causal_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: int, precision: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias of `_causal`."""
    grad_bias = grad.sum((0, 2)) if precision == BF16 else None
    if precision == BF16:
        grad, x, weight = rounded(grad), rounded(x), rounded(weight)
    dilation = min(dilation, x.shape[2])
    padding = (weight.shape[2] - 1) * dilation
    padded = functional.pad(x, (padding, 0))
    settings = [1], [0], [dilation], False, [0], 1, [True] * 3
    grad_x, grad_weight, bias_sums = torch.ops.aten.convolution_backward(
        grad.contiguous(), padded, weight, weight.shape[:1], *settings
    )
    return grad_x[:, :, padding:], grad_weight, bias_sums if grad_bias is None else grad_bias


def empty_saved(
    x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], all_steps: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """Allocate `activations` and `signs`, with no elements unless `keep`."""
    blocks = _plan_of(x, weights, dilations, all_steps).blocks
    widths = [block[0].shape[0] for block in by_block(weights, x.shape[2], len(dilations))]
    floats = sum(len(block.between) * width for block, width in zip(blocks, widths, strict=True))
    floats += sum(len(block.output) * width for block, width in zip(blocks[:-1], widths[:-1], strict=True))
    sign_bytes = sum(len(block.output) * ((width + 7) // 8) for block, width in zip(blocks, widths, strict=True))
    batch = x.shape[0] if keep else 0
    return x.new_empty(batch * floats), x.new_empty(batch * sign_bytes, dtype=torch.uint8)
