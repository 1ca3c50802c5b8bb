"""A linear layer followed by tanh, as ALSTM applies it to every step of its windows.

The kernels are in csrc/linear_tanh: linear_tanh_kernels.h, called by linear_tanh.cpp. On CUDA torch computes the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qfast.ops import transforms
from qfast.ops._common import (
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
    require_tensor,
    skip_autograd,
    widened,
)

__all__ = ["linear_tanh"]


@explain_memory("linear_tanh")
def linear_tanh(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute tanh(weight x_t + bias) for every step x_t of every window.

    Parameters
    ----------
    x : Tensor [B, T, F], float32 or float64
        F is at least 1; B and T may be 0. Strides are arbitrary and nothing is copied. float16 and bfloat16, also with
        float32 weights, are computed in float32; the result is rounded once.
    weight : Tensor [H, F]
    bias : Tensor [H]

    Returns
    -------
    Tensor [B, T, H]
        The error of the tanh is at most 3 units in the last place. The bits do not depend on the number of threads.
        Differentiable in all three tensors.

    Raises
    ------
    DataError
        Wrong type, dtype, shape or device.
    NotImplementedError
        Double backward. Use torch.func.grad twice.
    torch.OutOfMemoryError
        Insufficient memory, on any device. The message states the size.

    Notes
    -----
    Only the result is saved for the backward pass. Gradients of the weights are summed over fixed parts of the rows.

    torch.func transforms and forward mode compute with torch's operations, which support every derivative.

    Source
    ------
    The input layer of ALSTM as in pyqlib 0.9.7, qlib/contrib/model/pytorch_alstm.py. `qfast.ops.tanh` describes the
    tanh.

    Examples
    --------
    >>> linear_tanh(torch.ones(2, 3, 4), torch.zeros(5, 4), torch.zeros(5)).shape
    torch.Size([2, 3, 5])
    """
    if is_half(x):
        return linear_tanh(x.float(), *widened((weight, bias), x.dtype)).to(x.dtype)
    _check(x, weight, bias)
    if transforms.active():
        return _layer(x, weight, bias)
    if needs_grad(x, weight, bias) and not torch.compiler.is_compiling():
        return _Function.apply(x, weight, bias, True)
    with skip_autograd():
        result: Tensor = torch.ops.qfast.linear_tanh(x, weight, bias, needs_grad(x, weight, bias))
    return result


# ---------------------------------------------------------------- argument checks
def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    op, like = "linear_tanh", ("x", x)
    check_floating(op, "x", x)
    fits = x.dim() == 3 and x.shape[2] > 0
    require(fits, op, f"x: expected shape [B, T, F] with F of at least 1, got {tuple(x.shape)}.")
    require_tensor(op, "weight", weight)
    fits = weight.dim() == 2 and weight.shape[1] == x.shape[2]
    require(fits, op, f"weight: expected shape [H, {x.shape[2]}], got {tuple(weight.shape)}.")
    check_alike(op, "weight", weight, like, tuple(weight.shape))
    check_alike(op, "bias", bias, like, (len(weight),))


# ---------------------------------------------------------------- plain-torch twin
def _layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(x, weight, bias).tanh()


def _forward_twin(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return _layer(x, weight, bias).contiguous()


def _backward_twin(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, input_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        through = (grad * (1 - out**2)).flatten(0, 1)
        grad_x = (through @ weight).view(x.shape) if input_grad else x.new_empty((0, *x.shape[1:]))
        return grad_x, through.t() @ x.flatten(0, 1), through.sum(0)


# ---------------------------------------------------------------- schemas and fakes
_ARGUMENTS = "Tensor x, Tensor weight, Tensor bias"
define("linear_tanh", f"({_ARGUMENTS}, bool keep) -> Tensor", _forward_twin)
define(
    "linear_tanh_backward",
    f"(Tensor grad, {_ARGUMENTS}, Tensor out, bool input_grad) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _backward_twin,
)


@torch.library.register_fake("qfast::linear_tanh")
def _(x, weight, bias, keep):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:2], weight.shape[0]))


@torch.library.register_fake("qfast::linear_tanh_backward")
def _(grad, x, weight, bias, out, input_grad):  # type: ignore[no-untyped-def]
    grad_x = x.new_empty((x.shape[0] if input_grad else 0, *x.shape[1:]))
    return grad_x, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


# ---------------------------------------------------------------- gradients
def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, keep = inputs
    require_saved("linear_tanh", keep)
    ctx.save_for_backward(*tensors, output)


@explain_memory("linear_tanh")
def _gradients(ctx, grad):  # type: ignore[no-untyped-def]
    input_grad = ctx.needs_input_grad[0]
    gradients = torch.ops.qfast.linear_tanh_backward(grad, *ctx.saved_tensors, input_grad)
    return gradients[0] if input_grad else None, *gradients[1:], None


torch.library.register_autograd("qfast::linear_tanh", _gradients, setup_context=_save)
refuse_double_backward("linear_tanh")


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        with skip_autograd():
            output = torch.ops.qfast.linear_tanh(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        with skip_autograd():
            return _gradients(ctx, grad)


# ---------------------------------------------------------------- self-test
def self_test(device: torch.device) -> None:
    """Compare the operator on `device` with plain torch, forward and backward, in float64.

    Raises
    ------
    ArithmeticError
        The results differ.
    """
    rng = torch.Generator().manual_seed(0)
    shapes = (5, 7, 11), (19, 11), (19,), (5, 7, 19)  # neither multiples nor divisors of a vector's lanes
    x, weight, bias, grad = (torch.randn(shape, generator=rng, dtype=torch.float64).to(device) for shape in shapes)
    out, expected = torch.ops.qfast.linear_tanh(x, weight, bias, True), _forward_twin(x, weight, bias, True)
    check_same("linear_tanh", [out], [expected])
    gradients = torch.ops.qfast.linear_tanh_backward(grad, x, weight, bias, out, True)
    check_same("linear_tanh", gradients, _backward_twin(grad, x, weight, bias, expected, True))
