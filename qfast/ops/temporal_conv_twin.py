"""What a temporal convolution stack computes, in plain torch: values, and gradients out of the input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qfast.ops.philox import dropout_mask
from qfast.ops.temporal_conv_plan import Plan, cone

__all__ = ["all_steps_twin", "backward_twin", "by_block", "empty_kept", "forward_twin"]


def by_block(weights: Sequence[Tensor], features: int) -> list[list[Tensor]]:
    """The flat list of weights cut into blocks of 4, or 6 where the width changes."""
    blocks: list[list[Tensor]] = []
    at, width = 0, features
    while at < len(weights):
        count = 4 if weights[at].shape[0] == width else 6
        blocks.append(list(weights[at : at + count]))
        width = weights[at].shape[0]
        at += count
    return blocks


def _plan_of(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], all_steps: bool) -> Plan:
    """x as the operator takes it: [B, T, F]."""
    kernels = tuple(int(block[0].shape[2]) for block in by_block(weights, x.shape[2]))
    return cone(int(x.shape[1]), kernels, tuple(dilations), all_steps)


# ---------------------------------------------------------------- plain-torch form
# Also serves inside torch's transforms, so it changes nothing in place.
def all_steps_twin(
    x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], dropout: float, seed: Tensor | None
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """All steps of what stands between the convolutions of each block, of its second convolution, and the output.

    x [B, F, T] and all results channel first.
    """
    between: list[Tensor] = []
    second: list[Tensor] = []
    for number, (block, dilation) in enumerate(zip(by_block(weights, x.shape[1]), dilations, strict=True)):
        w1, b1, w2, b2, *down = block
        h = _drop(_causal(x, w1, b1, dilation).relu(), 2 * number, dropout, seed)
        y = _drop(_causal(h, w2, b2, dilation).relu(), 2 * number + 1, dropout, seed)
        beside = functional.conv1d(x, down[0], down[1]) if down else x
        between.append(h)
        second.append(y)
        x = (y + beside).relu()
    return between, second, x


def _causal(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    dilation = min(dilation, x.shape[2])  # farther taps only read zeros
    before = (weight.shape[2] - 1) * dilation
    return functional.conv1d(functional.pad(x, (before, 0)), weight, bias, dilation=dilation)


def _drop(x: Tensor, convolution: int, dropout: float, seed: Tensor | None) -> Tensor:
    """x [B, C, T] with the elements dropped that fall below the threshold.

    Element (b, c, t) of convolution m has word b % 4 of the counter (c, t, m, b // 4).
    """
    if not dropout or seed is None:
        return x
    return x * dropout_mask(x.transpose(1, 2), convolution, dropout, seed).transpose(1, 2)


# ---------------------------------------------------------------- twins of the operators
# What is kept for the backward: `activations`, of each row the positions of the plan of every tensor between the
# convolutions and of every block's output but the last, and `signs`, one bit an element of the second convolutions'
# outputs, set where it is above 0. How they are laid out is the kernels' own affair: these twins compute again.
def forward_twin(
    x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], dropout: float, seed: Tensor | None,
    all_steps: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        out = all_steps_twin(x.transpose(1, 2), weights, dilations, dropout, seed)[-1].transpose(1, 2)
    activations, signs = empty_kept(x, weights, dilations, all_steps, keep)
    out = (out if all_steps else out[:, -1]).clone(memory_format=torch.contiguous_format)
    return out, activations.zero_(), signs.zero_()


def backward_twin(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], dropout: float, seed: Tensor | None,
    all_steps: bool, output: Tensor, activations: Tensor, signs: Tensor, input_grad: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    unseen = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    unseen[list(_plan_of(x, weights, dilations, all_steps).blocks[0].input)] = False
    steps = x.masked_fill(unseen.unsqueeze(1), 0).transpose(1, 2)  # a NaN there must not count
    between, second, _ = states = all_steps_twin(steps, weights, dilations, dropout, seed)
    outputs = _block_outputs(states, steps, weights)
    scale = 0.0 if dropout == 1.0 else 1.0 / (1.0 - dropout)
    if all_steps:
        grad = grad.transpose(1, 2)
    else:
        grad = torch.cat((torch.zeros_like(outputs[-1][:, :, 1:]), grad.unsqueeze(2)), 2)
    grads: list[Tensor] = []
    blocks = by_block(weights, x.shape[2])
    for number in range(len(blocks) - 1, -1, -1):
        w1, _, w2, _, *down = blocks[number]
        given = outputs[number - 1] if number else steps
        beside = _passed(grad, outputs[number])
        of_second = _passed(beside, second[number]) * scale
        of_h, *of_second_weights = _causal_backward(of_second, between[number], w2, dilations[number])
        of_h = _passed(of_h, between[number]) * scale
        grad, *of_first = _causal_backward(of_h, given, w1, dilations[number])
        of_down: list[Tensor] = []
        if down:
            beside, *of_down = _causal_backward(beside, given, down[0], 1)
        grad = grad + beside
        grads = [*of_first, *of_second_weights, *of_down, *grads]
    of_x = grad.transpose(1, 2).contiguous() if input_grad else x.new_empty((0, *x.shape[1:]))
    return of_x, grads


def _passed(grad: Tensor, output: Tensor) -> Tensor:
    """Gradient past a ReLU of this output; as in torch NaN lets it pass."""
    return grad.masked_fill(output <= 0, 0)


def _block_outputs(
    states: tuple[list[Tensor], list[Tensor], Tensor], x: Tensor, weights: Sequence[Tensor]
) -> list[Tensor]:
    outputs = []
    for y, (_, _, _, _, *down) in zip(states[1], by_block(weights, x.shape[1]), strict=True):
        x = (y + (functional.conv1d(x, down[0], down[1]) if down else x)).relu()
        outputs.append(x)
    return outputs


def _causal_backward(grad: Tensor, x: Tensor, weight: Tensor, dilation: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias of `_causal`."""
    dilation = min(dilation, x.shape[2])
    before = (weight.shape[2] - 1) * dilation
    given = functional.pad(x, (before, 0)), weight, weight.shape[:1], [1], [0], [dilation], False, [0], 1, [True] * 3
    of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(grad.contiguous(), *given)
    return of_x[:, :, before:], of_weight, of_bias


def empty_kept(
    x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], all_steps: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    blocks = _plan_of(x, weights, dilations, all_steps).blocks
    widths = [block[0].shape[0] for block in by_block(weights, x.shape[2])]
    floats = sum(len(block.between) * width for block, width in zip(blocks, widths, strict=True))
    floats += sum(len(block.output) * width for block, width in zip(blocks[:-1], widths[:-1], strict=True))
    bits = sum(len(block.output) * ((width + 7) // 8) for block, width in zip(blocks, widths, strict=True))
    batch = x.shape[0] if keep else 0
    return x.new_empty(batch * floats), x.new_empty(batch * bits, dtype=torch.uint8)
