"""Centred convolution over the steps of each window, with zeros outside the window.

The CPU kernels are in csrc/window_conv: window_conv_kernels.h, called by window_conv.cpp. CUDA tensors use torch's
convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qfast.errors import DataError
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
    skip_autograd,
    widened,
)
from qfast.precision import BF16, products_for, rounded

__all__ = ["window_conv"]


@explain_memory("window_conv")
def window_conv(x: Tensor, weight: Tensor, bias: Tensor, *, precision: str = "float32") -> Tensor:
    """Convolve the steps of each window: y_t = bias + sum over k of weight[:, :, k] x_(t + k - K // 2).

    x is 0 outside the window. Taps that meet only these zeros cost nothing and have no effect, even if they are NaN.

    Parameters
    ----------
    x : Tensor [B, T, D], float32 or float64
        Strides are arbitrary. float16 and bfloat16 are computed in float32; the result is rounded once.
    weight : Tensor [O, D, K]
        As in torch.nn.Conv1d. K is odd.
    bias : Tensor [O]
    precision : {"float32", "bf16", "bf16-if-available"}
        On a CPU, "bf16" rounds the operands of products to bfloat16 and sums in float32 (docs/precision.md). It needs
        float32 tensors. "bf16-if-available" computes in float32, with a warning, where the CPU lacks the instructions.

    Returns
    -------
    Tensor [B, T, O]
        The bits do not depend on the number of threads. Differentiable in all three tensors.

    Raises
    ------
    DataError
        Wrong type, dtype, shape or device, or an even K.
    ConfigError
        precision is unknown.
    BackendError
        precision is "bf16" and the CPU lacks the instructions. The message names them.
    NotImplementedError
        Double backward. Use torch.func.grad twice.
    torch.OutOfMemoryError
        Insufficient memory, on any device. The message states the size.

    Notes
    -----
    torch.func transforms and forward mode compute with torch's operations, which support every derivative.

    Source
    ------
    torch.nn.Conv1d(D, O, K, padding=K // 2) over the steps, as between the layers of Localformer (pyqlib 0.9.7,
    qlib/contrib/model/pytorch_localformer.py).

    Examples
    --------
    >>> x = torch.tensor([[[1.0], [2.0], [4.0]]])
    >>> window_conv(x, torch.tensor([[[1.0, 0.0, 10.0]]]), torch.zeros(1)).flatten().tolist()
    [20.0, 41.0, 2.0]
    """
    if is_half(x):
        return window_conv(x.float(), *widened((weight, bias), x.dtype), precision=precision).to(x.dtype)
    _check(x, weight, bias)
    products = products_for("window_conv", precision, x)
    weight = _within_windows(weight, x.shape[1])
    if transforms.active():
        return _convolve(x, weight, bias)
    if needs_grad(x, weight, bias) and not torch.compiler.is_compiling():
        return _Function.apply(x, weight, bias, products)
    with skip_autograd():
        return torch.ops.qfast.window_conv(x, weight, bias, products)


# ---------------------------------------------------------------- argument checks
def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_floating("window_conv", "x", x)
    if x.dim() != 3 or x.shape[2] == 0:
        raise DataError(f"window_conv: x: expected shape [B, T, D] with D of at least 1, got {tuple(x.shape)}.")
    if not isinstance(weight, Tensor) or weight.dim() != 3 or len(weight) == 0 or weight.shape[2] % 2 == 0:
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise DataError(f"window_conv: weight: expected shape [O, D, K] with odd K and O of at least 1, got {got}.")
    check_alike("window_conv", "weight", weight, ("x", x), (len(weight), x.shape[2], weight.shape[2]))
    check_alike("window_conv", "bias", bias, ("x", x), (len(weight),))


def _within_windows(weight: Tensor, steps: int) -> Tensor:
    """Leave out the taps that only meet zeros: step t reads the taps at most T - 1 steps before and after it."""
    half, reach = weight.shape[2] // 2, max(steps - 1, 0)
    return weight if half <= reach else weight[:, :, half - reach : half + reach + 1]


# ---------------------------------------------------------------- plain-torch twin
def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if x.shape[1] == 0:  # torch's convolution refuses windows without steps
        return x.new_empty((len(x), 0, len(weight))) + bias
    return functional.conv1d(x.transpose(1, 2), weight, bias, padding=weight.shape[2] // 2).transpose(1, 2)


def _taps(x: Tensor, kernel_size: int) -> Tensor:
    """Return the values that each output step reads, [B, T, D, K]."""
    if x.shape[1] == 0:  # too short for unfold
        return x.new_empty((*x.shape, kernel_size))
    half = kernel_size // 2
    return functional.pad(x, (0, 0, half, half)).unfold(1, kernel_size, 1)


def _forward_twin(x: Tensor, weight: Tensor, bias: Tensor, precision: int = 0) -> Tensor:
    if precision == BF16:
        x, weight = rounded(x), rounded(weight)
    with torch.autocast(x.device.type, enabled=False):
        return _convolve(x, weight, bias).contiguous()


def _backward_twin(
    grad: Tensor, x: Tensor, weight: Tensor, input_grad: bool, precision: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    kernel_size, grad_bias = weight.shape[2], grad.sum((0, 1))
    if precision == BF16:
        grad, x, weight = rounded(grad), rounded(x), rounded(weight)
    grad_weight = torch.einsum("bto,btdk->odk", grad, _taps(x, kernel_size))
    grad_x = torch.einsum("btok,odk->btd", _taps(grad, kernel_size), weight.flip(2)) if input_grad else x[:0]
    return grad_x.clone(memory_format=torch.contiguous_format), grad_weight.contiguous(), grad_bias


# ---------------------------------------------------------------- schemas and fakes
define("window_conv", "(Tensor x, Tensor weight, Tensor bias, int precision=0) -> Tensor", _forward_twin)
define(
    "window_conv_backward",
    "(Tensor grad, Tensor x, Tensor weight, bool input_grad, int precision=0) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _backward_twin,
)


@torch.library.register_fake("qfast::window_conv")
def _(x, weight, bias, precision=0):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], x.shape[1], weight.shape[0]))


@torch.library.register_fake("qfast::window_conv_backward")
def _(grad, x, weight, input_grad, precision=0):  # type: ignore[no-untyped-def]
    grad_x = x.new_empty((x.shape[0] if input_grad else 0, *x.shape[1:]))
    return grad_x, weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


# ---------------------------------------------------------------- gradients
def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:2])
    ctx.precision = inputs[3]


@explain_memory("window_conv")
def _gradients(ctx, grad):  # type: ignore[no-untyped-def]
    input_grad = ctx.needs_input_grad[0]
    arguments = *ctx.saved_tensors, input_grad, ctx.precision
    grad_x, *grad_parameters = torch.ops.qfast.window_conv_backward(grad, *arguments)
    return grad_x if input_grad else None, *grad_parameters, None


torch.library.register_autograd("qfast::window_conv", _gradients, setup_context=_save)
refuse_double_backward("window_conv")


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        _save(ctx, inputs, None)
        with skip_autograd():
            return torch.ops.qfast.window_conv(*inputs)

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
    shapes = (7, 5, 19), (11, 19, 3), (11,), (7, 5, 11)
    x, weight, bias, grad = (torch.randn(shape, generator=rng, dtype=torch.float64).to(device) for shape in shapes)
    check_same("window_conv", [torch.ops.qfast.window_conv(x, weight, bias)], [_convolve(x, weight, bias)])
    arguments = (grad, x, weight, True)
    check_same("window_conv", torch.ops.qfast.window_conv_backward(*arguments), _backward_twin(*arguments))
