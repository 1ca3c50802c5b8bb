"""Code that the operator modules share: definitions, argument checks, half precision and self-tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from qfast.errors import ConfigError, DataError

FLOATING = (torch.float32, torch.float64)
_HALF = (torch.float16, torch.bfloat16)
_FUNC_GRAD = "torch.func.grad within torch.func.grad, which computes with torch's own operations"


# ---------------------------------------------------------------- definitions
def define(name: str, schema: str, twin: Callable[..., Any]) -> None:
    """Define torch.ops.qfast.<name>. The plain-torch twin serves every device without a kernel."""
    torch.library.define(f"qfast::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"qfast::{name}", "CompositeExplicitAutograd", twin)


def refuse_double_backward(name: str, remedy: str = _FUNC_GRAD) -> None:
    """Make the gradient of torch.ops.qfast.<name>_backward raise NotImplementedError with this remedy."""

    def refuse(ctx: object, *grads: object) -> None:
        raise NotImplementedError(f"{name}: double backward is not supported. Remedy: {remedy}.")

    torch.library.register_autograd(f"qfast::{name}_backward", refuse)


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


# ---------------------------------------------------------------- half precision
def is_half(tensor: object) -> bool:
    """Whether this is a tensor of float16 or bfloat16. Operators compute these in float32 and round the result."""
    return isinstance(tensor, Tensor) and tensor.dtype in _HALF


def widened(tensors: Iterable[Any], half: torch.dtype) -> list[Any]:
    """Convert the tensors of dtype `half` to float32. Everything else is left for the checks to report."""
    return [part.float() if isinstance(part, Tensor) and part.dtype == half else part for part in tensors]


# ---------------------------------------------------------------- argument checks
def require(condition: bool, operator: str, message: str) -> None:
    """Raise DataError unless the condition holds."""
    if not condition:
        raise DataError(f"{operator}: {message}")


def require_tensor(operator: str, name: str, value: object) -> None:
    """Raise DataError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        remedy = "" if value is None else f" Remedy: torch.as_tensor({name})."
        raise DataError(f"{operator}: {name}: expected a tensor, got {type(value).__name__}.{remedy}")


def check_floating(operator: str, name: str, value: object) -> None:
    """Raise DataError unless `value` is a tensor of float32 or float64."""
    require_tensor(operator, name, value)
    if value.dtype not in FLOATING:  # type: ignore[attr-defined]
        raise DataError(f"{operator}: {name}: expected dtype float32 or float64, got {value.dtype}.")  # type: ignore[attr-defined]


def check_alike(operator: str, name: str, value: object, like: tuple[str, Tensor], shape: tuple[int, ...]) -> None:
    """Raise DataError unless `value` is a tensor of this shape with the dtype and device of `like` (name, tensor)."""
    tensor: Any = value
    other, first = like
    require_tensor(operator, name, tensor)
    if tensor.dtype != first.dtype or tensor.device != first.device:
        raise DataError(
            f"{operator}: {name}: expected dtype and device of {other} ({first.dtype} on {first.device}), got "
            f"{tensor.dtype} on {tensor.device}. Remedy: {other}.to({name}), or module.to({other}) for the module with "
            "the weights. New modules have torch's default dtype (torch.set_default_dtype)."
        )
    if tuple(tensor.shape) != shape:
        raise DataError(f"{operator}: {name}: expected shape {shape}, got {tuple(tensor.shape)}.")


def active_dropout(operator: str, dropout: object, training: bool) -> float:
    """Return the probability that applies, 0 unless training. Raise ConfigError unless it is a number in [0, 1]."""
    if isinstance(dropout, bool) or not isinstance(dropout, Real) or not 0.0 <= float(dropout) <= 1.0:
        raise ConfigError(f"{operator}: dropout must lie in [0, 1], got {dropout!r}.")
    return float(dropout) if training else 0.0


# ---------------------------------------------------------------- self-tests
def check_same(operator: str, results: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float = 1e-12) -> None:
    """Raise ArithmeticError unless the results equal those of plain torch within a relative norm of `tolerance`."""
    for ours, theirs in zip(results, expected, strict=True):
        error = float((ours - theirs).double().norm() / theirs.double().norm().clamp_min(1e-300))
        if not error < tolerance:  # also raises for NaN
            raise ArithmeticError(
                f"{operator}: native and plain torch differ by {error:.1e} (relative norm, allowed {tolerance:.0e})."
            )
