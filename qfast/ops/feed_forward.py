"""Feed-forward block of a Transformer in one operator: linear, ReLU, dropout, linear.

The hidden values are never written to memory. The kernels are in csrc/feed_forward: feed_forward_kernels.h, called by
feed_forward.cpp, and feed_forward.cu.
"""

from __future__ import annotations

from typing import Any

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
    skip_autograd,
    widened,
)
from qfast.ops.philox import draw_seed, dropout_mask
from qfast.precision import product, products_for

__all__ = ["feed_forward"]

HIDDEN_DROPOUT = 1  # third word of the Philox counters


@explain_memory("feed_forward")
def feed_forward(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    *,
    dropout: float = 0.0,
    training: bool = False,
    precision: str = "float32",
) -> Tensor:
    """Compute weight_out . drop(relu(weight_in x + bias_in)) + bias_out for each row.

    Parameters
    ----------
    x : Tensor [..., D], float32 or float64
        Strides are arbitrary. float16 and bfloat16 are computed in float32; the result is rounded once.
    weight_in : Tensor [M, D]
    bias_in : Tensor [M]
    weight_out : Tensor [O, M]
    bias_out : Tensor [O]
    dropout : float
        Probability that a hidden value is dropped, if `training`. Each call draws one seed from torch's generator of
        x's device. Hidden value m of row n, where rows are numbered over all leading axes, uses word n % 4 of the
        Philox counter (m, 0, 1, n // 4).
    precision : {"float32", "bf16", "bf16-if-available"}
        On a CPU, "bf16" rounds the operands of products to bfloat16 and sums in float32 (docs/precision.md). It needs
        float32 tensors. "bf16-if-available" computes in float32, with a warning, where the CPU lacks the instructions.

    Returns
    -------
    Tensor [..., O]
        The bits do not depend on the number of threads. Differentiable in all five tensors. On a GPU, `qfast.precision`
        determines how float32 is multiplied.

    Raises
    ------
    DataError
        Wrong type, dtype, shape or device, or D, M or O is 0.
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
    The hidden values [..., M] are computed slice by slice in the caches, and again in the backward pass, so memory does
    not grow with rows times M. The backward pass accumulates weight gradients in up to 16 partial sums of at most
    128 MB together.

    torch.func transforms and forward mode compute with torch's operations, which support every derivative.

    Source
    ------
    The feed-forward block of Vaswani et al. 2017. Values and gradients equal those of torch.nn.TransformerEncoderLayer.

    Examples
    --------
    >>> identity = torch.eye(2)
    >>> feed_forward(torch.tensor([[3.0, -4.0]]), identity, torch.zeros(2), identity, torch.ones(2)).tolist()
    [[4.0, 1.0]]
    """
    if is_half(x):
        parameters = widened((weight_in, bias_in, weight_out, bias_out), x.dtype)
        return feed_forward(x.float(), *parameters, dropout=dropout, training=training, precision=precision).to(x.dtype)
    _check(x, weight_in, bias_in, weight_out, bias_out)
    p = active_dropout("feed_forward", dropout, training)
    products = products_for("feed_forward", precision, x)
    seed = draw_seed(x.device) if p else None
    tensors = x.reshape(-1, x.shape[-1]), weight_in, bias_in, weight_out, bias_out
    if transforms.active():
        out = _block(*tensors, p, seed)
    elif needs_grad(*tensors) and not torch.compiler.is_compiling():
        out = _Function.apply(*tensors, p, seed, products)
    else:
        with skip_autograd():
            out = torch.ops.qfast.feed_forward(*tensors, p, seed, products)
    return out.reshape(*x.shape[:-1], weight_out.shape[0])


# ---------------------------------------------------------------- argument checks
def _check(x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor) -> None:
    check_floating("feed_forward", "x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise DataError(f"feed_forward: x: expected shape [..., D] with D of at least 1, got {tuple(x.shape)}.")
    sizes = []
    for name, weight in (("weight_in", weight_in), ("weight_out", weight_out)):
        if not isinstance(weight, Tensor) or weight.dim() != 2 or len(weight) == 0:
            got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise DataError(f"feed_forward: {name}: expected a matrix with at least one row, got {got}.")
        sizes.append(len(weight))
    hidden, out = sizes
    check_alike("feed_forward", "weight_in", weight_in, ("x", x), (hidden, x.shape[-1]))
    check_alike("feed_forward", "bias_in", bias_in, ("x", x), (hidden,))
    check_alike("feed_forward", "weight_out", weight_out, ("x", x), (out, hidden))
    check_alike("feed_forward", "bias_out", bias_out, ("x", x), (out,))


# ---------------------------------------------------------------- plain-torch twin
def hidden_values(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, precision: int = 0) -> Tensor:
    """Return drop(relu(weight x + bias)); `mask` contains the factors of dropout."""
    hidden = (product(x, weight.t(), precision) + bias).relu()
    return hidden if mask is None else hidden * mask


def block_gradients(
    grad: Tensor,
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_out: Tensor,
    mask: Tensor | None,
    precision: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x [N, D] and of the four parameters."""
    hidden = hidden_values(x, weight_in, bias_in, mask, precision)
    grad_hidden = torch.where(hidden <= 0, 0.0, product(grad, weight_out, precision))  # passes NaN, as torch does
    if mask is not None:
        grad_hidden = grad_hidden * mask
    return (
        product(grad_hidden, weight_in, precision),
        product(grad_hidden.t(), x, precision),
        grad_hidden.sum(0),
        product(grad.t(), hidden, precision),
        grad.sum(0),
    )


def _hidden_mask(x: Tensor, hidden: int, dropout: float, seed: Tensor | None) -> Tensor | None:
    if not dropout or seed is None:
        return None
    return dropout_mask(x.new_empty((len(x), 1, hidden)), HIDDEN_DROPOUT, dropout, seed).squeeze(1)


def _block(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    dropout: float,
    seed: Tensor | None,
    precision: int = 0,
) -> Tensor:
    mask = _hidden_mask(x, len(weight_in), dropout, seed)
    return product(hidden_values(x, weight_in, bias_in, mask, precision), weight_out.t(), precision) + bias_out


def _forward_twin(x: Tensor, *others: Any) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return _block(x, *others)


def _backward_twin(
    grad: Tensor,
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_out: Tensor,
    dropout: float,
    seed: Tensor | None,
    input_grad: bool,
    precision: int = 0,
) -> tuple[Tensor, ...]:
    mask = _hidden_mask(x, len(weight_in), dropout, seed)
    with torch.autocast(x.device.type, enabled=False):
        grad_x, *grad_parameters = block_gradients(grad, x, weight_in, bias_in, weight_out, mask, precision)
    return (grad_x if input_grad else grad_x[:0].clone()), *grad_parameters


# ---------------------------------------------------------------- schemas and fakes
define(
    "feed_forward",
    "(Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_out, Tensor bias_out, float dropout, Tensor? seed, "
    "int precision=0) -> Tensor",
    _forward_twin,
)
define(
    "feed_forward_backward",
    "(Tensor grad, Tensor x, Tensor weight_in, Tensor bias_in, Tensor weight_out, float dropout, Tensor? seed, "
    "bool input_grad, int precision=0) -> (Tensor grad_x, Tensor grad_weight_in, Tensor grad_bias_in, "
    "Tensor grad_weight_out, Tensor grad_bias_out)",
    _backward_twin,
)


@torch.library.register_fake("qfast::feed_forward")
def _(x, weight_in, bias_in, weight_out, bias_out, dropout, seed, precision=0):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], weight_out.shape[0]))


@torch.library.register_fake("qfast::feed_forward_backward")
def _(grad, x, weight_in, bias_in, weight_out, dropout, seed, input_grad, precision=0):  # type: ignore[no-untyped-def]
    grad_x = x.new_empty((x.shape[0] if input_grad else 0, x.shape[1]))
    grad_parameters = (part.new_empty(part.shape) for part in (weight_in, bias_in, weight_out))
    return grad_x, *grad_parameters, x.new_empty(weight_out.shape[:1])


# ---------------------------------------------------------------- gradients
def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight_in, bias_in, weight_out, _, ctx.dropout, seed, ctx.precision = inputs
    ctx.save_for_backward(x, weight_in, bias_in, weight_out, seed)
    ctx.set_materialize_grads(False)


@explain_memory("feed_forward")
def _gradients(ctx, grad):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 8
    *tensors, seed = ctx.saved_tensors
    input_grad = ctx.needs_input_grad[0]
    arguments = grad, *tensors, ctx.dropout, seed, input_grad, ctx.precision
    grad_x, *grad_parameters = torch.ops.qfast.feed_forward_backward(*arguments)
    return grad_x if input_grad else None, *grad_parameters, None, None, None


torch.library.register_autograd("qfast::feed_forward", _gradients, setup_context=_save)
refuse_double_backward("feed_forward")


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        with skip_autograd():
            output = torch.ops.qfast.feed_forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        with skip_autograd():
            return _gradients(ctx, grad)


# ---------------------------------------------------------------- self-test
def self_test(device: torch.device) -> None:
    """Compare the operator on `device` with plain torch, forward and backward, in float64, with dropout.

    Raises
    ------
    ArithmeticError
        The results differ.
    """
    rng = torch.Generator().manual_seed(0)
    rows, width, hidden, out = 7, 5, 83, 19  # neither a multiple nor a divisor of a vector's lanes
    shapes = (rows, out), (rows, width), (hidden, width), (hidden,), (out, hidden), (out,)
    grad, *tensors = (torch.randn(shape, generator=rng, dtype=torch.float64).to(device) for shape in shapes)
    dropout: Any = (0.25, torch.tensor([3], device=device))
    forward: Any = (*tensors, *dropout)
    check_same("feed_forward", [torch.ops.qfast.feed_forward(*forward)], [_block(*forward)])
    backward: Any = (grad, *tensors[:4], *dropout, True)
    check_same("feed_forward", torch.ops.qfast.feed_forward_backward(*backward), _backward_twin(*backward))
