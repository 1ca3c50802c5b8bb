"""Stacks of residual blocks of dilated causal convolutions in one operator, at all steps or at the last step only.

temporal_conv_twin.py states in plain torch what they compute, and temporal_conv_plan.py which positions the last step
depends on. The kernels are in csrc/temporal_conv: temporal_conv_kernels.h, called by temporal_conv.cpp, and
temporal_conv.cu.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qfast.errors import DataError
from qfast.ops import transforms
from qfast.ops._common import (
    active_dropout,
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
    skip_autograd,
    widened,
)
from qfast.ops.philox import draw_seed
from qfast.ops.temporal_conv_plan import plan
from qfast.ops.temporal_conv_twin import (
    backward_twin,
    block_values,
    by_block,
    empty_saved,
    forward_twin,
)
from qfast.precision import BF16, products_for

__all__ = ["BlockWeights", "temporal_block", "temporal_conv_net"]

MIN_BF16_ROWS = 16
"""Fewest rows with products of bfloat16, which are tiles of 16 rows. Fewer rows are faster in float32."""


class BlockWeights(NamedTuple):
    """Parameters of one residual block.

    The weight of a convolution is g v / ||v|| per output channel, or v if g is None.

    Attributes
    ----------
    weight_v1 : Tensor [C, C_in, k]
    weight_g1 : Tensor [C, 1, 1] or None
    bias1 : Tensor [C]
    weight_v2 : Tensor [C, C, k]
    weight_g2 : Tensor [C, 1, 1] or None
    bias2 : Tensor [C]
    downsample_weight, downsample_bias : Tensor [C, C_in, 1] and [C], or None
        The 1x1 convolution of the residual connection: required if C_in != C, and an error if they are equal.
    """

    weight_v1: Tensor
    weight_g1: Tensor | None
    bias1: Tensor
    weight_v2: Tensor
    weight_g2: Tensor | None
    bias2: Tensor
    downsample_weight: Tensor | None = None
    downsample_bias: Tensor | None = None


@explain_memory("temporal_conv_net")
def temporal_conv_net(
    x: Tensor,
    blocks: Sequence[BlockWeights],
    *,
    dilations: Sequence[int] | None = None,
    dropout: float = 0.0,
    training: bool = False,
    all_steps: bool = False,
    precision: str = "float32",
) -> Tensor:
    """Compute a stack of residual blocks of dilated causal convolutions at the last step.

    Each block computes h = D(relu(conv1(x))), y = D(relu(conv2(h))) and relu(y + r). Both convolutions have the
    dilation of the block and read zeros before the window. D is dropout, and r is x or its 1x1 convolution. Only the
    positions that the last step depends on are computed and saved (`temporal_conv_net.plan` lists them).

    Parameters
    ----------
    x : Tensor [B, F, T], float32 or float64
        F and T are at least 1. Strides are arbitrary and nothing is copied: for windows [B, T, F], pass
        x.transpose(1, 2). float16 and bfloat16 are computed in float32; the result is rounded once. Overlapping windows
        of consecutive rows, rows.unfold(0, T, 1) of rows [R, F], share computations if no gradient is needed.
    blocks : sequence of BlockWeights
        At least one. Widths and kernel sizes are arbitrary.
    dilations : sequence of int, optional
        One for each block. The default is 1, 2, 4, ...
    dropout : float
        Probability that an output element of a convolution is dropped, if `training`. The other elements are
        multiplied by 1 / (1 - dropout).
    all_steps : bool
        Return the last block at all T steps, not only at the last one.
    precision : {"float32", "bf16", "bf16-if-available"}
        On a CPU, "bf16" rounds the operands of products to bfloat16 and sums in float32 (docs/precision.md). It needs
        float32 tensors. Fewer than 16 rows, and overlapping windows without gradients, are computed in float32.
        "bf16-if-available" computes in float32, with a warning, where the CPU lacks the instructions.

    Returns
    -------
    Tensor [B, C], or [B, C, T] (a view of [B, T, C]) if all_steps
        The bits do not depend on the number of threads. Differentiable in x and all weights.

    Raises
    ------
    DataError
        Wrong type, dtype, shape or device of a tensor, no block, or wrong dilations.
    ConfigError
        dropout is not in [0, 1], or precision is unknown.
    BackendError
        precision is "bf16" and the CPU lacks the instructions. The message names them.
    NotImplementedError
        Double backward. Use torch.func.grad twice.
    torch.OutOfMemoryError
        Insufficient memory, on any device. The message states the size.

    Notes
    -----
    Each call draws one seed from torch's generator of x's device. Element (b, c, t) of convolution m uses word b % 4 of
    the Philox counter (c, t, m, b // 4), so the same seed drops the same elements on every device.

    torch.func transforms and forward mode compute with torch's operations, which support every derivative.

    Source
    ------
    Bai, Kolter, Koltun 2018 (locuslab/TCN), as in pyqlib 0.9.7, qlib/contrib/model/tcn.py. Weight normalization:
    Salimans and Kingma 2016.

    Examples
    --------
    >>> block = BlockWeights(torch.ones(4, 2, 3), None, torch.zeros(4), torch.ones(4, 4, 3), None, torch.zeros(4),
    ...                      torch.ones(4, 2, 1), torch.zeros(4))
    >>> temporal_conv_net(torch.ones(5, 2, 9), [block])[0]
    tensor([74., 74., 74., 74.])
    """
    if is_half(x):
        wide = [BlockWeights(*widened(block, x.dtype)) for block in _named(blocks)]
        settings: dict[str, Any] = {"dilations": dilations, "dropout": dropout, "training": training}
        return temporal_conv_net(x.float(), wide, **settings, all_steps=all_steps, precision=precision).to(x.dtype)
    weights, spacing = _checked(x, blocks, dilations)
    products = products_for("temporal_conv_net", precision, x)
    if products == BF16 and len(x) < MIN_BF16_ROWS:
        products = 0
    p = active_dropout("temporal_conv_net", dropout, training)
    seed = draw_seed(x.device) if p else None
    if transforms.active():
        out = block_values(x, weights, spacing, p, seed)[-1][-1]
        return out if all_steps else out[:, :, -1]
    keep = needs_grad(x, *weights)
    steps = x.transpose(1, 2)
    if keep and not torch.compiler.is_compiling():
        out = _Function.apply(steps, seed, spacing, p, all_steps, products, *weights)
    else:
        with skip_autograd():
            out = torch.ops.qfast.temporal_conv_net(steps, weights, spacing, p, seed, all_steps, keep, products)[0]
    return out.transpose(1, 2) if all_steps else out


temporal_conv_net.plan = plan  # type: ignore[attr-defined]


def temporal_block(
    x: Tensor,
    block: BlockWeights,
    *,
    dilation: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    precision: str = "float32",
) -> Tensor:
    """Compute one residual block at all steps.

    Parameters
    ----------
    x : Tensor [B, C_in, T], float32 or float64
        As in `temporal_conv_net`.
    block : BlockWeights
    dilation : int
        At least 1.
    dropout, training, precision
        As in `temporal_conv_net`.

    Returns
    -------
    Tensor [B, C, T]
        A view of [B, T, C].

    Raises
    ------
    DataError, ConfigError, BackendError, NotImplementedError
        As in `temporal_conv_net`.

    Source
    ------
    Bai, Kolter, Koltun 2018; class TemporalBlock of pyqlib 0.9.7, qlib/contrib/model/tcn.py.

    Examples
    --------
    >>> block = BlockWeights(torch.ones(1, 1, 2), None, torch.zeros(1), torch.ones(1, 1, 2), None, torch.zeros(1))
    >>> temporal_block(torch.tensor([[[1.0, 2.0, 3.0]]]), block)
    tensor([[[ 2.,  6., 11.]]])
    """
    settings: dict[str, Any] = {"dropout": dropout, "training": training, "precision": precision}
    return temporal_conv_net(x, [block], dilations=[dilation], all_steps=True, **settings)


# ---------------------------------------------------------------- argument checks
def _checked(
    x: Tensor, blocks: Sequence[BlockWeights], dilations: Sequence[int] | None
) -> tuple[list[Tensor], list[int]]:
    """Check all arguments. Return the weights for the operator and the dilations.

    A block has four weights, or six with a 1x1 convolution; see `by_block`. Gains follow the last block if the operator
    normalizes the weights.
    """
    op = "temporal_conv_net"
    check_floating(op, "x", x)
    fits = x.dim() == 3 and x.shape[1] > 0 and x.shape[2] > 0
    require(fits, op, f"x: expected shape [B, F, T] with F and T of at least 1, got {tuple(x.shape)}.")
    named = _named(blocks)
    require(len(named) > 0, op, "blocks: expected at least one block, got none.")
    is_list = dilations is None or isinstance(dilations, Sequence)
    require(is_list, op, f"dilations: expected a list with one for each block, got {dilations!r}.")
    spacing = [2**i for i in range(len(blocks))] if dilations is None else list(dilations)
    fits = len(spacing) == len(blocks)
    require(fits, op, f"dilations: expected one for each of {len(blocks)} blocks, got {len(spacing)}.")
    for dilation in spacing:
        is_whole = isinstance(dilation, int) and not isinstance(dilation, bool) and dilation > 0
        require(is_whole, op, f"dilations: expected whole numbers above 0, got {dilation!r}.")
    spacing = [min(dilation, 2**31 - 1) for dilation in spacing]  # no window is longer
    weights: list[Tensor] = []
    width = x.shape[1]
    for number, block in enumerate(named):
        _check_block(f"blocks[{number}]", x, block, width)
        width = block.bias1.shape[0]
    gains = [gain for block in named for gain in (block.weight_g1, block.weight_g2) if gain is not None]
    in_operator = _normalizes(x.device) and len(gains) == 2 * len(named) and not transforms.active()
    for block in named:
        v1, g1, bias1, v2, g2, bias2, *downsample = block
        w1, w2 = (v1, v2) if in_operator else (_normalized(v1, g1), _normalized(v2, g2))
        weights += [w1, bias1, w2, bias2, *(part for part in downsample if part is not None)]
    return [*weights, *gains] if in_operator else weights, spacing


def _named(blocks: object) -> list[BlockWeights]:
    """The blocks as BlockWeights. Raise a DataError unless each is a tuple or list of their length."""
    op = "temporal_conv_net"
    if not isinstance(blocks, Sequence) or isinstance(blocks, str):
        raise DataError(f"{op}: blocks: expected a list of BlockWeights, got {type(blocks).__name__}.")
    for number, block in enumerate(blocks):
        if not isinstance(block, (tuple, list)) or not 6 <= len(block) <= 8:
            got = f"{len(block)} entries" if isinstance(block, (tuple, list)) else type(block).__name__
            raise DataError(f"{op}: blocks[{number}]: expected BlockWeights, 6 to 8 entries, got {got}.")
    return [BlockWeights(*block) for block in blocks]


def _check_block(where: str, x: Tensor, block: BlockWeights, width: int) -> None:
    """Check the weights of one block with `width` input channels."""
    op, v1, v2 = "temporal_conv_net", block.weight_v1, block.weight_v2
    if not isinstance(v1, Tensor) or v1.dim() != 3 or 0 in v1.shape:
        got = tuple(v1.shape) if isinstance(v1, Tensor) else type(v1).__name__
        raise DataError(f"{op}: {where}.weight_v1: expected shape [C, {width}, k], got {got}.")
    channels, kernel_size = v1.shape[0], v1.shape[2]
    second_size = v2.shape[2] if isinstance(v2, Tensor) and v2.dim() == 3 else kernel_size
    shapes = {
        "weight_v1": (channels, width, kernel_size),
        "weight_g1": (channels, 1, 1),
        "bias1": (channels,),
        "weight_v2": (channels, channels, second_size),
        "weight_g2": (channels, 1, 1),
        "bias2": (channels,),
        "downsample_weight": (channels, width, 1),
        "downsample_bias": (channels,),
    }
    for name, shape in shapes.items():
        tensor = getattr(block, name)
        if name.startswith("downsample"):
            if width == channels:
                require(tensor is None, op, f"{where}.{name}: the block's widths are both {width}: expected none.")
                continue
            if tensor is None:
                raise DataError(
                    f"{op}: {where}.{name}: the block's widths {width} and {channels} differ: expected a tensor of "
                    f"shape {shape}, got none."
                )
        if tensor is not None or not name.startswith("weight_g"):
            check_alike(op, f"{where}.{name}", tensor, ("x", x), shape)
    require(
        second_size == kernel_size, op, f"{where}.weight_v2: expected kernel size {kernel_size}, got {second_size}."
    )


def _normalizes(device: torch.device) -> bool:
    """Return whether the operator computes g v / ||v|| itself, as on a GPU, where each separate launch takes time."""
    return device.type == "cuda"


def _normalized(v: Tensor, g: Tensor | None) -> Tensor:
    """Return the weight g v / ||v||, or v if g is None."""
    if g is None:
        return v
    if transforms.active():  # torch._weight_norm has no forward-mode derivative
        return v * (g / v.norm(dim=(1, 2), keepdim=True))
    return torch._weight_norm(v, g, 0)


# ---------------------------------------------------------------- schemas and fakes
_ARGUMENTS = "Tensor x, Tensor[] weights, int[] dilations, float dropout, Tensor? seed, bool all_steps"
define("temporal_conv_net", f"({_ARGUMENTS}, bool keep, int precision=0) -> (Tensor, Tensor, Tensor)", forward_twin)
define(
    "temporal_conv_net_backward",
    f"(Tensor grad, {_ARGUMENTS}, Tensor output, Tensor activations, Tensor signs, bool input_grad, int precision=0) "
    "-> (Tensor, Tensor[])",
    backward_twin,
)


@torch.library.register_fake("qfast::temporal_conv_net")
def _(x, weights, dilations, dropout, seed, all_steps, keep, precision=0):  # type: ignore[no-untyped-def]
    width = by_block(weights, x.shape[2], len(dilations))[-1][0].shape[0]
    output = x.new_empty((x.shape[0], x.shape[1], width) if all_steps else (x.shape[0], width))
    return output, *empty_saved(x, weights, dilations, all_steps, keep)


@torch.library.register_fake("qfast::temporal_conv_net_backward")
def _(  # type: ignore[no-untyped-def]
    grad, x, weights, dilations, dropout, seed, all_steps, output, activations, signs, input_grad, precision=0
):
    grad_x = x.new_empty((x.shape[0] if input_grad else 0, *x.shape[1:]))
    return grad_x, [part.new_empty(part.shape) for part in weights]


# ---------------------------------------------------------------- gradients
def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weights, dilations, dropout, seed, all_steps, keep, precision = inputs
    require_saved("temporal_conv_net", keep)
    ctx.save_for_backward(x, seed, *output, *weights)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.settings = (dilations, dropout, all_steps, precision)


@explain_memory("temporal_conv_net")
def _gradients(ctx, grad, *_):  # type: ignore[no-untyped-def]
    x, seed, output, activations, signs, *weights = ctx.saved_tensors
    others = (None,) * (len(ctx.needs_input_grad) - 2)  # torch does not pass arguments that equal their defaults
    if grad is None:
        return None, [None] * len(weights), *others
    dilations, dropout, all_steps, precision = ctx.settings
    input_grad = ctx.needs_input_grad[0]
    grad_x, grad_weights = torch.ops.qfast.temporal_conv_net_backward(
        grad, x, weights, dilations, dropout, seed, all_steps, output, activations, signs, input_grad, precision
    )
    return grad_x if input_grad else None, grad_weights, *others


torch.library.register_autograd("qfast::temporal_conv_net", _gradients, setup_context=_save)
refuse_double_backward("temporal_conv_net")


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seed, dilations, dropout, all_steps, precision, *weights):  # type: ignore[no-untyped-def]
        inputs = (x, weights, dilations, dropout, seed, all_steps, True, precision)
        with skip_autograd():
            output = torch.ops.qfast.temporal_conv_net(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        with skip_autograd():
            grad_x, grad_weights, *_ = _gradients(ctx, grad)
        return grad_x, None, None, None, None, None, *grad_weights


# ---------------------------------------------------------------- self-test
def self_test(device: torch.device) -> None:
    """Compare the operator on `device` with plain torch, forward and backward, in float64, with dropout.

    Raises
    ------
    ArithmeticError
        The results differ.
    """
    rng = torch.Generator().manual_seed(0)
    sizes = [(19, 3, 3), (19,), (19, 19, 3), (19,), (19, 3, 1), (19,), (19, 19, 2), (19,), (19, 19, 2), (19,)]
    weights = [(torch.randn(size, generator=rng, dtype=torch.float64) * 0.3).to(device) for size in sizes]
    if _normalizes(device):
        weights += [torch.rand(19, 1, 1, generator=rng, dtype=torch.float64).to(device) + 0.5 for _ in range(4)]
    x = torch.randn(7, 9, 3, generator=rng, dtype=torch.float64).to(device)
    seed = torch.tensor([3], device=device)
    for all_steps in (False, True):
        arguments = (x, weights, [1, 3], 0.25, seed, all_steps)
        results = torch.ops.qfast.temporal_conv_net(*arguments, True)
        check_same("temporal_conv_net", results[:1], forward_twin(*arguments, True)[:1])
        backward = (results[0], *arguments, *results, True)  # any values serve as the gradient
        grad_x, grad_weights = torch.ops.qfast.temporal_conv_net_backward(*backward)
        twin_x, twin_weights = backward_twin(*backward)
        check_same("temporal_conv_net", [grad_x, *grad_weights], [twin_x, *twin_weights])
