"""Code that the operator modules share: definitions, argument checks, half precision and self-tests.

A differentiable operator registers its gradient for torch.compile and has an autograd.Function, `_Function`, for eager
mode. In eager mode, a call through the registered gradient takes longer than the kernel does for a small batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from numbers import Real
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from qfast.device import memory_shortage
from qfast.errors import ConfigError, DataError

FLOATING = (torch.float32, torch.float64)
_HALF = (torch.float16, torch.bfloat16)
_FUNC_GRAD = "torch.func.grad within torch.func.grad, which computes with torch's own operations"


# ---------------------------------------------------------------- definitions
def define(name: str, schema: str, twin: Callable[..., Any]) -> None:
    """Define torch.ops.qfast.<name>. Devices without a kernel use the plain-torch twin."""
    torch.library.define(f"qfast::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"qfast::{name}", "CompositeExplicitAutograd", twin)


def refuse_double_backward(name: str, remedy: str = _FUNC_GRAD) -> None:
    """Make double backward through operator <name> raise a NotImplementedError with this remedy."""

    def refuse(ctx: object, *grads: object) -> None:
        raise NotImplementedError(f"{name}: double backward is not supported. Remedy: {remedy}.")

    torch.library.register_autograd(f"qfast::{name}_backward", refuse)


def needs_grad(*tensors: Tensor) -> bool:
    """Return whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def skip_autograd() -> AbstractContextManager[None]:
    """Context in which an operator runs its kernel without the registered gradient, a Python function of torch.

    This saves 10 us of a call without gradients, and up to 80 us with them. It has no effect while autograd records:
    with create_graph=True, the registered gradient raises the error about double backward.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


# ---------------------------------------------------------------- memory
_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

FEWER_ROWS = "fewer rows per call"


def explain_memory(
    operator: str, remedy: str = FEWER_ROWS
) -> Callable[[Callable[_Parameters, _Result]], Callable[_Parameters, _Result]]:
    """Decorator: insufficient memory raises a torch.OutOfMemoryError with the size, the device and a remedy.

    The kernels raise a MemoryError, because the stable ABI has no error type for it. Graphs of torch.compile call the
    kernels directly and leave it at that.
    """

    def decorate(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        @wraps(function)
        def with_explanation(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
            try:
                return function(*args, **kwargs)
            except (MemoryError, RuntimeError) as error:
                raise_out_of_memory(operator, error, remedy)
                raise

        return with_explanation

    return decorate


def raise_out_of_memory(operator: str, error: MemoryError | RuntimeError, remedy: str = FEWER_ROWS) -> None:
    """Raise a torch.OutOfMemoryError if `error` means insufficient memory and is not one already."""
    shortage = memory_shortage(error)
    if shortage is None or isinstance(error, torch.OutOfMemoryError):
        return
    device = re.search(r" on (cuda:\d+)", shortage)
    if device is not None and not torch.cuda.is_current_stream_capturing():
        # An earlier kernel that failed also makes allocations fail. Then this call raises that kernel's error.
        shortage += f", {torch.cuda.mem_get_info(device[1])[0] / 2**20:.1f} MiB are free"
    raise torch.OutOfMemoryError(f"{operator}: {shortage}. Remedy: {remedy}.") from error


# ---------------------------------------------------------------- half precision
def is_half(value: object) -> bool:
    """Return whether this is a float16 or bfloat16 tensor. Operators compute in float32 and round the result once."""
    return isinstance(value, Tensor) and value.dtype in _HALF


def widened(tensors: Iterable[Any], half: torch.dtype) -> list[Any]:
    """Convert the tensors of dtype `half` to float32. Everything else is left to the argument checks."""
    return [part.float() if isinstance(part, Tensor) and part.dtype == half else part for part in tensors]


# ---------------------------------------------------------------- argument checks
def require(condition: bool, operator: str, message: str) -> None:
    """Raise a DataError that starts with the operator's name unless the condition holds."""
    if not condition:
        raise DataError(f"{operator}: {message}")


def require_saved(operator: str, keep: bool) -> None:
    """Raise a DataError if the forward pass did not save what the backward pass needs."""
    require(keep, operator, "keep: must be True if a gradient is needed, got False.")


def require_tensor(operator: str, name: str, value: object) -> None:
    """Raise a DataError unless `value` is a dense tensor."""
    if not isinstance(value, Tensor):
        remedy = "" if value is None else f" Remedy: torch.as_tensor({name})."
        raise DataError(f"{operator}: {name}: expected a tensor, got {type(value).__name__}.{remedy}")
    if value.layout != torch.strided:
        raise DataError(f"{operator}: {name}: expected a dense tensor, got {value.layout}. Remedy: {name}.to_dense().")


def check_floating(operator: str, name: str, value: object) -> None:
    """Raise a DataError unless `value` is a tensor of float32 or float64."""
    require_tensor(operator, name, value)
    tensor: Any = value
    require(tensor.dtype in FLOATING, operator, f"{name}: expected dtype float32 or float64, got {tensor.dtype}.")


def check_alike(operator: str, name: str, value: object, like: tuple[str, Tensor], shape: tuple[int, ...]) -> None:
    """Raise a DataError unless `value` is a tensor of this shape. `like` names the tensor with its dtype and device."""
    other, first = like
    tensor: Any = value
    if (
        isinstance(tensor, Tensor)
        and tensor.layout == first.layout
        and tensor.dtype == first.dtype
        and tensor.device == first.device
        and tensor.shape == shape
    ):
        return
    require_tensor(operator, name, tensor)
    if tensor.dtype != first.dtype or tensor.device != first.device:
        raise DataError(
            f"{operator}: {name}: expected dtype and device of {other} ({first.dtype} on {first.device}), got "
            f"{tensor.dtype} on {tensor.device}. Remedy: {other}.to({name}), or module.to({other}) for the module that "
            "contains the weights. New modules have torch's default dtype (torch.set_default_dtype)."
        )
    raise DataError(f"{operator}: {name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}.")


def active_dropout(operator: str, dropout: object, training: bool) -> float:
    """Return the dropout probability in effect, 0 unless training. Raise a ConfigError if it is not in [0, 1]."""
    if isinstance(dropout, bool) or not isinstance(dropout, Real) or not 0.0 <= float(dropout) <= 1.0:
        raise ConfigError(f"{operator}: dropout must be a number in [0, 1], got {dropout!r}.")
    return float(dropout) if training else 0.0


# ---------------------------------------------------------------- self-tests
def check_same(operator: str, results: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float = 1e-12) -> None:
    """Raise an ArithmeticError unless the results equal plain torch's within `tolerance`, as a relative norm."""
    for ours, theirs in zip(results, expected, strict=True):
        error = float((ours - theirs).double().norm() / theirs.double().norm().clamp_min(1e-300))
        if not error < tolerance:  # also true for NaN
            raise ArithmeticError(
                f"{operator}: native and plain torch differ by {error:.1e} (relative norm, allowed {tolerance:.0e})."
            )


def check_equal(subject: str, result: Tensor, expected: Tensor) -> None:
    """Raise an ArithmeticError unless the tensors are equal."""
    if not torch.equal(result, expected):
        different = int((result != expected).sum())
        raise ArithmeticError(
            f"{subject}: native and plain torch differ in {different} of {expected.numel()} elements."
        )
