"""Stacks of dilated causal convolutions with residual blocks, at the last step only or at all of them.

Reading order: the two public functions, the plain-torch form that states the meaning, then schemas, fakes and
gradients.
The kernels are in csrc/temporal_conv: temporal_conv_kernels.h (behind temporal_conv.cpp) and temporal_conv.cu.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qfast.ops import transforms
from qfast.ops._common import (
    active_dropout,
    check_alike,
    check_floating,
    check_same,
    define,
    is_half,
    needs_grad,
    refuse_double_backward,
    require,
    require_saved,
    widened,
)
from qfast.ops.philox import draw_seed
from qfast.ops.temporal_conv_plan import plan
from qfast.ops.temporal_conv_twin import all_steps_twin, backward_twin, by_block, empty_kept, forward_twin

__all__ = ["BlockWeights", "temporal_block", "temporal_conv_net"]


class BlockWeights(NamedTuple):
    """Parameters of one residual block; weight = g v / ||v|| per output channel, or v where g is None.

    Attributes
    ----------
    weight_v1 : Tensor [C, C_in, k]
    weight_g1 : Tensor [C, 1, 1] or None
    bias1 : Tensor [C]
    weight_v2 : Tensor [C, C, k]
    weight_g2 : Tensor [C, 1, 1] or None
    bias2 : Tensor [C]
    downsample_weight, downsample_bias : Tensor [C, C_in, 1] and [C], or None
        The 1x1 convolution of the input beside the block: needed where C_in != C, refused where they are equal.
    """

    weight_v1: Tensor
    weight_g1: Tensor | None
    bias1: Tensor
    weight_v2: Tensor
    weight_g2: Tensor | None
    bias2: Tensor
    downsample_weight: Tensor | None = None
    downsample_bias: Tensor | None = None


def temporal_conv_net(
    x: Tensor,
    blocks: Sequence[BlockWeights],
    *,
    dilations: Sequence[int] | None = None,
    dropout: float = 0.0,
    training: bool = False,
    all_steps: bool = False,
) -> Tensor:
    """Stack of residual blocks of dilated causal convolutions, read at the last step.

    Block i: h = D(relu(conv1(x))), y = D(relu(conv2(h))), out = relu(y + x'), where both convolutions have the
    dilation of the block and see zeros before the window, D drops elements and scales the others by
    1 / (1 - dropout), and x' is x or its 1x1 convolution. Only what the last step can see is computed and kept
    for the backward (`temporal_conv_net.plan`).

    Parameters
    ----------
    x : Tensor [B, F, T], float32 or float64
        Any strides, nothing is copied: for windows [B, T, F] give x.transpose(1, 2). T >= 1. Half precisions are
        computed in float32 and the result is rounded back. Windows of consecutive rows of one series,
        rows.unfold(0, T, 1) of rows [R, F], share what they have in common where no gradient is wanted.
    blocks : sequence of BlockWeights
        Any depth, widths and kernel sizes.
    dilations : sequence of int, optional
        1, 2, 4, ... unless given.
    dropout : float
        Probability that an element of either convolution's output is dropped, in [0, 1], if `training`.
    all_steps : bool
        All T steps of the last block instead of the last one.

    Returns
    -------
    Tensor [B, C], or [B, C, T] (a view of [B, T, C]) with `all_steps`
        Differentiable in x and all weights. The same bits every time on the same device, whatever the number of
        threads.

    Raises
    ------
    ValueError
        Wrong dtype, shape, device, dilation or dropout.
    NotImplementedError
        A gradient of a gradient by `backward`; torch.func.grad twice gives it.

    Notes
    -----
    The dropout of an element is a function of its convolution, row, time step and channel and of one 64-bit seed that
    each call draws from torch's generator of the device (Philox 4x32-10): the same on every device for the same seed.

    Source
    ------
    Bai, Kolter, Koltun 2018 (locuslab/TCN), as in pyqlib 0.9.7, qlib/contrib/model/tcn.py; weight normalisation:
    Salimans and Kingma 2016.

    Examples
    --------
    >>> block = BlockWeights(torch.ones(4, 2, 3), None, torch.zeros(4), torch.ones(4, 4, 3), None, torch.zeros(4),
    ...                      torch.ones(4, 2, 1), torch.zeros(4))
    >>> temporal_conv_net(torch.ones(5, 2, 9), [block])[0]
    tensor([74., 74., 74., 74.])
    """
    if is_half(x):
        wide = [BlockWeights(*widened(block, x.dtype)) for block in blocks]
        settings: dict[str, Any] = {"dilations": dilations, "dropout": dropout, "training": training}
        return temporal_conv_net(x.float(), wide, **settings, all_steps=all_steps).to(x.dtype)
    weights, spacing = _checked("temporal_conv_net", x, blocks, dilations)
    rate = active_dropout("temporal_conv_net", dropout, training)
    seed = draw_seed(x.device) if rate else None
    if transforms.active():
        out = all_steps_twin(x, weights, spacing, rate, seed)[-1]
        return out if all_steps else out[:, :, -1]
    keep = needs_grad(x, *weights)
    steps = x.transpose(1, 2)
    if keep and not torch.compiler.is_compiling():
        out = _Function.apply(steps, seed, spacing, rate, all_steps, *weights)
    else:
        out = torch.ops.qfast.temporal_conv_net(steps, weights, spacing, rate, seed, all_steps, keep)[0]
    return out.transpose(1, 2) if all_steps else out


temporal_conv_net.plan = plan  # type: ignore[attr-defined]


def temporal_block(
    x: Tensor, block: BlockWeights, *, dilation: int = 1, dropout: float = 0.0, training: bool = False
) -> Tensor:
    """One residual block at all steps: [B, C_in, T] -> [B, C, T]. Arguments and notes as `temporal_conv_net`.

    Examples
    --------
    >>> block = BlockWeights(torch.ones(1, 1, 2), None, torch.zeros(1), torch.ones(1, 1, 2), None, torch.zeros(1))
    >>> temporal_block(torch.tensor([[[1.0, 2.0, 3.0]]]), block)
    tensor([[[ 2.,  6., 11.]]])
    """
    return temporal_conv_net(x, [block], dilations=[dilation], dropout=dropout, training=training, all_steps=True)


# ---------------------------------------------------------------- arguments
def _checked(
    operator: str, x: Tensor, blocks: Sequence[BlockWeights], dilations: Sequence[int] | None
) -> tuple[list[Tensor], list[int]]:
    """The weights as the operator takes them, 4 or 6 a block (with 1x1 convolution), and the dilations."""
    check_floating(operator, "x", x)
    fits = x.dim() == 3 and x.shape[1] > 0 and x.shape[2] > 0
    require(fits, operator, f"x: expected shape [B, F, T] with F and T of at least 1, got {tuple(x.shape)}.")
    require(len(blocks) > 0, operator, "blocks: expected at least one block, got none.")
    known = dilations is None or isinstance(dilations, Sequence)
    require(known, operator, f"dilations: expected a list with one for each block, got {dilations!r}.")
    spacing = [2**i for i in range(len(blocks))] if dilations is None else list(dilations)
    fits = len(spacing) == len(blocks)
    require(fits, operator, f"dilations: expected one for each of {len(blocks)} blocks, got {len(spacing)}.")
    for dilation in spacing:
        whole = isinstance(dilation, int) and not isinstance(dilation, bool) and dilation > 0
        require(whole, operator, f"dilations: expected whole numbers above 0, got {dilation!r}.")
    spacing = [min(dilation, 2**31 - 1) for dilation in spacing]  # past any window, all are alike
    weights: list[Tensor] = []
    width = x.shape[1]
    for number, block in enumerate(blocks):
        weights += _checked_block(operator, f"blocks[{number}].", x, BlockWeights(*block), width)
        width = weights[-1].shape[0]
    return weights, spacing


def _checked_block(operator: str, where: str, x: Tensor, block: BlockWeights, width: int) -> list[Tensor]:
    v1 = block.weight_v1
    fits = isinstance(v1, Tensor) and v1.dim() == 3 and 0 not in v1.shape
    got = tuple(v1.shape) if isinstance(v1, Tensor) else type(v1).__name__
    require(fits, operator, f"{where}weight_v1: expected shape [C, {width}, k], got {got}.")
    channels, kernel = v1.shape[0], v1.shape[2]
    second = block.weight_v2.shape[2] if isinstance(block.weight_v2, Tensor) and block.weight_v2.dim() == 3 else kernel
    wanted = {
        "weight_v1": (channels, width, kernel), "weight_g1": (channels, 1, 1), "bias1": (channels,),
        "weight_v2": (channels, channels, second), "weight_g2": (channels, 1, 1), "bias2": (channels,),
        "downsample_weight": (channels, width, 1), "downsample_bias": (channels,),
    }  # fmt: skip
    for name, shape in wanted.items():
        tensor = getattr(block, name)
        known = isinstance(tensor, Tensor) and tensor.shape == shape
        known = known and tensor.dtype is x.dtype and tensor.device == x.device
        if known and (width != channels or not name.startswith("downsample")):
            continue
        _refuse_unfit(operator, f"{where}{name}", x, tensor, shape, width)
    require(second == kernel, operator, f"{where}weight_v2: expected kernel size {kernel}, got {second}.")
    folded = [_folded(v, g) for v, g in ((v1, block.weight_g1), (block.weight_v2, block.weight_g2))]
    parts = [folded[0], block.bias1, folded[1], block.bias2]
    if block.downsample_weight is not None and block.downsample_bias is not None:
        parts += [block.downsample_weight, block.downsample_bias]
    return parts


def _folded(v: Tensor, g: Tensor | None) -> Tensor:
    if g is None:
        return v
    if transforms.active():  # torch's fused form has no forward-mode derivative
        return v * (g / v.norm(dim=(1, 2), keepdim=True))
    return torch._weight_norm(v, g, 0)


def _refuse_unfit(operator: str, name: str, x: Tensor, tensor: object, shape: tuple[int, ...], width: int) -> None:
    """Says what is wrong with a weight, if anything is: some may be None."""
    if "downsample" in name:
        if width == shape[0]:
            require(tensor is None, operator, f"{name}: the block's widths are both {width}: expected none.")
            return
        text = (
            f"{name}: the block's widths {width} and {shape[0]} differ: expected a tensor of shape {shape}, got none."
        )
        require(tensor is not None, operator, text)
    if tensor is not None or "weight_g" not in name:
        check_alike(operator, name, tensor, ("x", x), shape)


# ---------------------------------------------------------------- schemas and fakes
_ARGUMENTS = "Tensor x, Tensor[] weights, int[] dilations, float dropout, Tensor? seed, bool all_steps"
define("temporal_conv_net", f"({_ARGUMENTS}, bool keep) -> (Tensor, Tensor, Tensor)", forward_twin)
define(
    "temporal_conv_net_backward",
    f"(Tensor grad, {_ARGUMENTS}, Tensor output, Tensor activations, Tensor signs, bool input_grad) "
    "-> (Tensor, Tensor[])",
    backward_twin,
)


@torch.library.register_fake("qfast::temporal_conv_net")
def _(x, weights, dilations, dropout, seed, all_steps, keep):  # type: ignore[no-untyped-def]
    width = by_block(weights, x.shape[2])[-1][0].shape[0]
    output = x.new_empty((x.shape[0], x.shape[1], width) if all_steps else (x.shape[0], width))
    return output, *empty_kept(x, weights, dilations, all_steps, keep)


@torch.library.register_fake("qfast::temporal_conv_net_backward")
def _(grad, x, weights, dilations, dropout, seed, all_steps, output, activations, signs, input_grad):  # type: ignore[no-untyped-def]
    of_x = x.new_empty((x.shape[0] if input_grad else 0, *x.shape[1:]))
    return of_x, [part.new_empty(part.shape) for part in weights]


# ---------------------------------------------------------------- gradients
def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weights, dilations, dropout, seed, all_steps, keep = inputs
    require_saved("temporal_conv_net", keep)
    ctx.save_for_backward(x, seed, *output, *weights)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.given = (dilations, dropout, all_steps)


def _gradients(ctx, grad, *_):  # type: ignore[no-untyped-def]
    x, seed, output, activations, signs, *weights = ctx.saved_tensors
    if grad is None:
        return None, [None] * len(weights), None, None, None, None, None
    dilations, dropout, all_steps = ctx.given
    of_x = ctx.needs_input_grad[0]
    grad_x, grads = torch.ops.qfast.temporal_conv_net_backward(
        grad, x, weights, dilations, dropout, seed, all_steps, output, activations, signs, of_x
    )
    return grad_x if of_x else None, grads, None, None, None, None, None


torch.library.register_autograd("qfast::temporal_conv_net", _gradients, setup_context=_save)
refuse_double_backward("temporal_conv_net")


class _Function(torch.autograd.Function):
    """The same in eager mode, where torch.library's own wrapping would cost more than a small batch."""

    @staticmethod
    def forward(ctx, x, seed, dilations, dropout, all_steps, *weights):  # type: ignore[no-untyped-def]
        out = torch.ops.qfast.temporal_conv_net(x, weights, dilations, dropout, seed, all_steps, True)
        _save(ctx, (x, weights, dilations, dropout, seed, all_steps, True), out)
        return out[0]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad_x, grads, *_ = _gradients(ctx, grad)
        return grad_x, None, None, None, None, *grads


# ---------------------------------------------------------------- self-test
def self_test(device: torch.device) -> None:
    """The kernels that serve `device` against plain torch, forward and backward, in float64, with dropout.

    Raises
    ------
    ArithmeticError
        They differ.
    """
    rng = torch.Generator().manual_seed(0)
    sizes = [(19, 3, 3), (19,), (19, 19, 3), (19,), (19, 3, 1), (19,), (19, 19, 2), (19,), (19, 19, 2), (19,)]
    weights = [(torch.randn(size, generator=rng, dtype=torch.float64) * 0.3).to(device) for size in sizes]
    x = torch.randn(7, 9, 3, generator=rng, dtype=torch.float64).to(device)
    seed = torch.tensor([3], device=device)
    for all_steps in (False, True):
        arguments = (x, weights, [1, 3], 0.25, seed, all_steps)
        results = torch.ops.qfast.temporal_conv_net(*arguments, True)
        check_same("temporal_conv_net", results[:1], forward_twin(*arguments, True)[:1])
        backward = (results[0], *arguments, *results, True)  # the output will do as its own gradient
        grad_x, grad_weights = torch.ops.qfast.temporal_conv_net_backward(*backward)
        twin_x, twin_weights = backward_twin(*backward)
        check_same("temporal_conv_net", [grad_x, *grad_weights], [twin_x, *twin_weights])
