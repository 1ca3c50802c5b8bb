"""Hyperbolic tangent by a polynomial.

The kernel is in csrc/activations/activations.h. Where no kernel is loaded, torch.tanh is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qfast.ops import transforms
from qfast.ops._common import (
    FLOATING,
    check_same,
    define,
    explain_memory,
    needs_grad,
    require_tensor,
    skip_autograd,
)

__all__ = ["tanh"]


@explain_memory("tanh", "fewer elements per call")
def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent of every element.

    Parameters
    ----------
    x : Tensor of any shape, float32 or float64
        Other dtypes, and tensors under autocast, are passed to torch.tanh.

    Returns
    -------
    Tensor
        Same shape and dtype as x. The error is at most 3 units in the last place.

    Raises
    ------
    DataError
        x is not a tensor.
    torch.OutOfMemoryError
        Insufficient memory, on any device. The message states the size.

    Notes
    -----
    Derivatives of every order are supported. torch.func transforms and forward mode use torch.tanh. On CUDA the
    operator calls torch.tanh.

    Source
    ------
    tanh(x) = (exp(2x) - 1) / (exp(2x) + 1). The exponential of the reduced argument is a polynomial: of degree 6 for
    float32 (minimax, by Lawson's iteration) and of degree 13 for float64 (Taylor). See csrc/activations/activations.h.

    Examples
    --------
    >>> tanh(torch.tensor([0.0, 100.0, -100.0]))
    tensor([ 0.,  1., -1.])
    """
    require_tensor("tanh", "x", x)
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if x.dtype not in FLOATING or autocast or transforms.active():
        return torch.tanh(x)
    if needs_grad(x) and not torch.compiler.is_compiling():
        return _Function.apply(x)
    with skip_autograd():
        return torch.ops.qfast.tanh(x)


def _twin(x: Tensor) -> Tensor:
    return torch.tanh(x).contiguous()


define("tanh", "(Tensor x) -> Tensor", _twin)


@torch.library.register_fake("qfast::tanh")
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output)


@explain_memory("tanh", "fewer elements per call")
def _gradient(ctx, grad):  # type: ignore[no-untyped-def]
    (output,) = ctx.saved_tensors
    return torch.ops.aten.tanh_backward(grad, output)


torch.library.register_autograd("qfast::tanh", _gradient, setup_context=_save)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        with skip_autograd():
            output = torch.ops.qfast.tanh(x)
        _save(ctx, (x,), output)
        return output

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _gradient(ctx, grad)


def self_test(device: torch.device) -> None:
    """Compare the operator on `device` with torch.tanh.

    Raises
    ------
    ArithmeticError
        The results differ.
    """
    x = torch.linspace(-30, 30, 1001, dtype=torch.float64, device=device)
    check_same("tanh", [torch.ops.qfast.tanh(x)], [torch.tanh(x)], tolerance=1e-15)
