"""Stacks of dilated causal convolutions with residual blocks, at the last step only or at all of them.

Reading order: the two public functions, the plain-torch form that states the meaning, then schemas, fakes and
gradients.
The kernels are in csrc/temporal_conv: temporal_conv_kernels.h (behind temporal_conv.cpp) and temporal_conv.cu.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from qfast.errors import ConfigError, DataError
from qfast.ops import transforms
from qfast.ops.philox import draw_seed, keep_threshold, philox
from qfast.ops.temporal_conv_plan import Plan, cone, plan

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
    if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16):
        half = x.dtype  # weights of other types are left to the checks
        wide = [
            BlockWeights(*(part.float() if part is not None and part.dtype == half else part for part in block))  # type: ignore[arg-type]
            for block in blocks
        ]
        settings: dict[str, Any] = {"dilations": dilations, "dropout": dropout, "training": training}
        return temporal_conv_net(x.float(), wide, **settings, all_steps=all_steps).to(x.dtype)
    weights, spacing = _checked("temporal_conv_net", x, blocks, dilations)
    rate = _dropout("temporal_conv_net", dropout)
    rate = rate if training else 0.0
    seed = draw_seed(x.device) if rate else None
    if transforms.active():
        out = _all_steps(x, weights, spacing, rate, seed)[-1]
        return out if all_steps else out[:, :, -1]
    keep = torch.is_grad_enabled() and (x.requires_grad or any(part.requires_grad for part in weights))
    steps = x.transpose(1, 2)
    if keep and not torch.compiler.is_compiling():
        out = _TemporalConvNet.apply(steps, seed, spacing, rate, all_steps, *weights)
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
def _require(condition: bool, operator: str, message: str) -> None:
    if not condition:
        raise DataError(f"{operator}: {message}")


def _dropout(operator: str, dropout: Any) -> float:
    if not isinstance(dropout, Real) or not 0.0 <= float(dropout) <= 1.0:
        raise ConfigError(f"{operator}: dropout must lie in [0, 1], got {dropout!r}.")
    return float(dropout)


def _checked(
    operator: str, x: Tensor, blocks: Sequence[BlockWeights], dilations: Sequence[int] | None
) -> tuple[list[Tensor], list[int]]:
    """The weights as the operator takes them, 4 or 6 a block (with 1x1 convolution), and the dilations."""
    _require(isinstance(x, Tensor), operator, f"x: expected a tensor, got {type(x).__name__}.")
    known = x.dtype in (torch.float32, torch.float64)
    _require(known, operator, f"x: expected dtype float32 or float64, got {x.dtype}.")
    fits = x.dim() == 3 and x.shape[1] > 0 and x.shape[2] > 0
    _require(fits, operator, f"x: expected shape [B, F, T] with F and T of at least 1, got {tuple(x.shape)}.")
    _require(len(blocks) > 0, operator, "blocks: expected at least one block, got none.")
    known = dilations is None or isinstance(dilations, Sequence)
    _require(known, operator, f"dilations: expected a list with one for each block, got {dilations!r}.")
    spacing = [2**i for i in range(len(blocks))] if dilations is None else list(dilations)
    fits = len(spacing) == len(blocks)
    _require(fits, operator, f"dilations: expected one for each of {len(blocks)} blocks, got {len(spacing)}.")
    for dilation in spacing:
        whole = isinstance(dilation, int) and not isinstance(dilation, bool) and dilation > 0
        _require(whole, operator, f"dilations: expected whole numbers above 0, got {dilation!r}.")
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
    _require(fits, operator, f"{where}weight_v1: expected shape [C, {width}, k], got {got}.")
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
    _require(second == kernel, operator, f"{where}weight_v2: expected kernel size {kernel}, got {second}.")
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


def _refuse_unfit(operator: str, name: str, x: Tensor, tensor: Any, shape: tuple[int, ...], width: int) -> None:
    """Says what is wrong with a weight, if anything is: some may be None."""
    if "downsample" in name:
        if width == shape[0]:
            _require(tensor is None, operator, f"{name}: the block's widths are both {width}: expected none.")
            return
        text = (
            f"{name}: the block's widths {width} and {shape[0]} differ: expected a tensor of shape {shape}, got none."
        )
        _require(tensor is not None, operator, text)
    if tensor is None and "weight_g" in name:
        return
    _require(isinstance(tensor, Tensor), operator, f"{name}: expected a tensor, got {type(tensor).__name__}.")
    alike = tensor.dtype == x.dtype and tensor.device == x.device
    text = f"{name}: expected dtype and device of x ({x.dtype}, {x.device}), got {tensor.dtype}, {tensor.device}. "
    _require(alike, operator, text + f"Remedy: x.to({name}), or the weights' module .to(x).")
    _require(tuple(tensor.shape) == shape, operator, f"{name}: expected shape {shape}, got {tuple(tensor.shape)}.")


def _by_block(weights: Sequence[Tensor], features: int) -> list[list[Tensor]]:
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
    kernels = tuple(int(block[0].shape[2]) for block in _by_block(weights, x.shape[2]))
    return cone(int(x.shape[1]), kernels, tuple(dilations), all_steps)


# ---------------------------------------------------------------- plain-torch form
# Also serves inside torch's transforms, so it changes nothing in place.
def _all_steps(
    x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], dropout: float, seed: Tensor | None
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """All steps of what stands between the convolutions of each block, of its second convolution, and the output.

    x [B, F, T] and all results channel first.
    """
    between: list[Tensor] = []
    second: list[Tensor] = []
    for number, (block, dilation) in enumerate(zip(_by_block(weights, x.shape[1]), dilations, strict=True)):
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
    batch, channels, steps = x.shape
    groups, c, t = (torch.arange(n, device=x.device) for n in ((batch + 3) // 4, channels, steps))
    counter = c.view(1, -1, 1), t.view(1, 1, -1), torch.full_like(c[:1], convolution), groups.view(-1, 1, 1)
    words = torch.stack(torch.broadcast_tensors(*philox(seed, counter)), 1).reshape(-1, channels, steps)[:batch]
    scale = 0.0 if dropout == 1.0 else 1.0 / (1.0 - dropout)
    return x * ((words >= keep_threshold(dropout)).to(x.dtype) * scale)


# ---------------------------------------------------------------- twins of the operators
# What is kept for the backward: `activations`, of each row the positions of the plan of every tensor between the
# convolutions and of every block's output but the last, and `signs`, one bit an element of the second convolutions'
# outputs, set where it is above 0. How they are laid out is the kernels' own affair: these twins compute again.
def _forward_twin(
    x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], dropout: float, seed: Tensor | None,
    all_steps: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        out = _all_steps(x.transpose(1, 2), weights, dilations, dropout, seed)[-1].transpose(1, 2)
    activations, signs = _empty_kept(x, weights, dilations, all_steps, keep)
    out = (out if all_steps else out[:, -1]).clone(memory_format=torch.contiguous_format)
    return out, activations.zero_(), signs.zero_()


def _backward_twin(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], dropout: float, seed: Tensor | None,
    all_steps: bool, output: Tensor, activations: Tensor, signs: Tensor, input_grad: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    unseen = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    unseen[list(_plan_of(x, weights, dilations, all_steps).blocks[0].input)] = False
    steps = x.masked_fill(unseen.unsqueeze(1), 0).transpose(1, 2)  # a NaN there must not count
    between, second, _ = states = _all_steps(steps, weights, dilations, dropout, seed)
    outputs = _block_outputs(states, steps, weights)
    scale = 0.0 if dropout == 1.0 else 1.0 / (1.0 - dropout)
    if all_steps:
        grad = grad.transpose(1, 2)
    else:
        grad = torch.cat((torch.zeros_like(outputs[-1][:, :, 1:]), grad.unsqueeze(2)), 2)
    grads: list[Tensor] = []
    blocks = _by_block(weights, x.shape[2])
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
    for y, (_, _, _, _, *down) in zip(states[1], _by_block(weights, x.shape[1]), strict=True):
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


def _empty_kept(
    x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], all_steps: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    blocks = _plan_of(x, weights, dilations, all_steps).blocks
    widths = [block[0].shape[0] for block in _by_block(weights, x.shape[2])]
    floats = sum(len(block.between) * width for block, width in zip(blocks, widths, strict=True))
    floats += sum(len(block.output) * width for block, width in zip(blocks[:-1], widths[:-1], strict=True))
    bits = sum(len(block.output) * ((width + 7) // 8) for block, width in zip(blocks, widths, strict=True))
    batch = x.shape[0] if keep else 0
    return x.new_empty(batch * floats), x.new_empty(batch * bits, dtype=torch.uint8)


# ---------------------------------------------------------------- schemas and fakes
_GIVEN = "Tensor x, Tensor[] weights, int[] dilations, float dropout, Tensor? seed, bool all_steps"
_SCHEMAS: dict[str, tuple[str, Callable[..., Any]]] = {
    "temporal_conv_net": (f"({_GIVEN}, bool keep) -> (Tensor, Tensor, Tensor)", _forward_twin),
    "temporal_conv_net_backward": (
        f"(Tensor grad, {_GIVEN}, Tensor output, Tensor activations, Tensor signs, bool input_grad) "
        "-> (Tensor, Tensor[])",
        _backward_twin,
    ),
}
for _name, (_schema, _twin) in _SCHEMAS.items():  # the twin serves wherever no kernel is loaded
    torch.library.define(f"qfast::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"qfast::{_name}", "CompositeExplicitAutograd", _twin)


@torch.library.register_fake("qfast::temporal_conv_net")
def _(x, weights, dilations, dropout, seed, all_steps, keep):  # type: ignore[no-untyped-def]
    width = _by_block(weights, x.shape[2])[-1][0].shape[0]
    output = x.new_empty((x.shape[0], x.shape[1], width) if all_steps else (x.shape[0], width))
    return output, *_empty_kept(x, weights, dilations, all_steps, keep)


@torch.library.register_fake("qfast::temporal_conv_net_backward")
def _(grad, x, weights, dilations, dropout, seed, all_steps, output, activations, signs, input_grad):  # type: ignore[no-untyped-def]
    of_x = x.new_empty((x.shape[0] if input_grad else 0, *x.shape[1:]))
    return of_x, [part.new_empty(part.shape) for part in weights]


# ---------------------------------------------------------------- gradients
def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weights, dilations, dropout, seed, all_steps, keep = inputs
    if not keep:
        raise DataError("keep: must be true where a gradient is wanted.")
    ctx.save_for_backward(x, seed, *output, *weights)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.given = (dilations, dropout, all_steps)


def _backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    x, seed, output, activations, signs, *weights = ctx.saved_tensors
    if grad is None:
        return None, [None] * len(weights), None, None, None, None, None
    dilations, dropout, all_steps = ctx.given
    of_x = ctx.needs_input_grad[0]
    grad_x, grads = torch.ops.qfast.temporal_conv_net_backward(
        grad, x, weights, dilations, dropout, seed, all_steps, output, activations, signs, of_x
    )
    return grad_x if of_x else None, grads, None, None, None, None, None


def _no_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise NotImplementedError(
        "temporal_conv_net: double backward is not supported. Remedy: torch.func.grad within torch.func.grad, which "
        "this function supports."
    )


torch.library.register_autograd("qfast::temporal_conv_net", _backward, setup_context=_save)
torch.library.register_autograd("qfast::temporal_conv_net_backward", _no_double_backward)


class _TemporalConvNet(torch.autograd.Function):
    """The same in eager mode, where torch.library's own wrapping would cost more than a small batch."""

    @staticmethod
    def forward(ctx, x, seed, dilations, dropout, all_steps, *weights):  # type: ignore[no-untyped-def]
        out = torch.ops.qfast.temporal_conv_net(x, weights, dilations, dropout, seed, all_steps, True)
        _save(ctx, (x, weights, dilations, dropout, seed, all_steps, True), out)
        return out[0]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad_x, grads, *_ = _backward(ctx, grad)
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
        given = (x, weights, [1, 3], 0.25, seed, all_steps)
        found = torch.ops.qfast.temporal_conv_net(*given, True)
        pairs = [(found[0], _forward_twin(*given, True)[0])]
        back = (found[0], *given, *found, True)  # the output will do as its own gradient
        of_x, grads = torch.ops.qfast.temporal_conv_net_backward(*back)
        expected_x, expected_grads = _backward_twin(*back)
        pairs += [(of_x, expected_x), *zip(grads, expected_grads, strict=True)]
        for ours, expected in pairs:
            error = float((ours - expected).norm() / expected.norm())
            if not error < 1e-12:
                raise ArithmeticError(
                    f"temporal_conv_net: native and plain torch differ by {error:.1e} (relative norm)."
                )
