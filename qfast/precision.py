"""Precision of matrix products of float32 tensors.

On a CPU, the argument `precision` of an operator, a network or an estimator is one of

- `float32`, the default,
- `bf16`: products have bfloat16 operands and float32 sums (docs/precision.md); an error if the CPU cannot,
- `bf16-if-available`: `bf16`, or `float32` with a warning if the CPU cannot.

On a GPU, the settings of this module apply to the operators that offer a choice.

`ieee` multiplies in float32. The other precisions use tensor cores, which accumulate in float32 but round the operands:

- `3xtf32` splits each operand into two parts of 11 bits and adds three products. Its error is close to float32's.
- `tf32` rounds operands to 11 bits.
- `bf16` rounds operands to 8 bits.

The default `auto` follows torch.get_float32_matmul_precision(): "highest" is `ieee`, "high" is `tf32` and "medium" is
`bf16`.

The setting applies to the feed-forward block, also inside `encoder_layer`. It does not apply to float64, to the CPU, or
to products that an operator passes to cuBLAS, which follow torch's setting.

Examples
--------
>>> precision()
'ieee'
>>> with using_precision("3xtf32"):
...     precision()
'3xtf32'
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qfast import _backend
from qfast.errors import BackendError, ConfigError, DataError, suggest

__all__ = ["bf16_obstacle", "precision", "set_precision", "using_precision"]

NAMES = ("ieee", "3xtf32", "tf32", "bf16")  # in the order of csrc/tensor_core.cuh
_NAMES_BY_TORCH_SETTING = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
_setting = "auto"
BF16 = NAMES.index("bf16")
PRODUCTS = ("float32", "bf16", "bf16-if-available")
_warned = False  # whether a call has warned about bf16-if-available


def set_precision(name: str) -> str:
    """Set the precision for all threads.

    Parameters
    ----------
    name : {"auto", "ieee", "3xtf32", "tf32", "bf16"}

    Returns
    -------
    str
        The previous setting.

    Raises
    ------
    ConfigError
        Unknown name.

    Examples
    --------
    >>> set_precision(set_precision("tf32"))
    'tf32'
    """
    global _setting
    if name != "auto" and name not in NAMES:
        raise ConfigError(f"set_precision: expected one of auto, {', '.join(NAMES)}, got {name!r}.")
    previous, _setting = _setting, name
    return previous


@contextmanager
def using_precision(name: str) -> Iterator[None]:
    """Context manager that sets the precision within a block.

    A backward pass uses the precision of its forward pass, wherever `backward` is called.
    """
    previous = set_precision(name)
    try:
        yield
    finally:
        set_precision(previous)


def precision() -> str:
    """Return the name of the precision in effect. It is never "auto"."""
    return torch_precision() if _setting == "auto" else _setting


def precision_for(x: Tensor) -> int:
    """Return the precision as the code that operators accept: 0 unless x is a float32 tensor on a GPU."""
    return NAMES.index(precision()) if x.is_cuda and x.dtype == torch.float32 else 0


# ---------------------------------------------------------------- bfloat16 on a CPU
def bf16_obstacle() -> str:
    """Return the reason why products cannot have bfloat16 operands on this CPU, or an empty string.

    Examples
    --------
    >>> isinstance(bf16_obstacle(), str)
    True
    """
    if _backend.native is None:
        return f"the CPU library of qfast is not in use: {_backend.status()['cpu']['reason']}"
    obstacle: str = _backend.native.bf16_obstacle()
    return obstacle


# torch.compile cannot trace the call. The result changes only if a test selects another instruction set.
bf16_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_products(value: object) -> str:
    """Return `value` if it is a name of a precision of products.

    Raises
    ------
    ConfigError
        It is another value.
    """
    if not isinstance(value, str) or value not in PRODUCTS:
        hint = suggest(value, PRODUCTS) if isinstance(value, str) else ""
        raise ConfigError(f"precision must be one of {', '.join(PRODUCTS)}, got {value!r}.{hint}")
    return value


def available_products(value: str, device: torch.device) -> tuple[str, str]:
    """Return the precision in effect on a device, "float32" or "bf16", and the reason if it is not the requested one.

    Raises
    ------
    ConfigError
        An unknown name, or "bf16" on a GPU.
    BackendError
        "bf16" on a CPU that lacks an instruction set. The message contains its name.
    """
    if check_products(value) == "float32":
        return "float32", ""
    if device.type != "cpu":
        reason = f"it applies to the CPU, and the device is {device}"
        if value == "bf16":
            raise ConfigError(
                f"precision='bf16': {reason}. Remedy: qfast.precision.set_precision('bf16') for the feed-forward "
                "blocks on a GPU, or precision='float32'."
            )
        return "float32", reason
    reason = bf16_obstacle()
    if reason and value == "bf16":
        raise BackendError(f"precision='bf16': {reason}. Remedy: precision='bf16-if-available', or 'float32'.")
    return ("float32", reason) if reason else ("bf16", "")


def products_for(operator: str, value: str, x: Tensor) -> int:
    """Return the precision of an operator's products as the code that its kernels accept.

    Raises
    ------
    ConfigError, BackendError
        As in `available_products`.
    DataError
        bf16 with a float64 tensor.
    """
    if value == "float32":
        return precision_for(x)
    if check_products(value) and x.dtype != torch.float32:
        raise DataError(
            f"{operator}: precision={value!r} needs float32 tensors, got {x.dtype}. Remedy: precision='float32', which "
            "computes in the dtype of the tensors, or x.float() with float32 weights."
        )
    effective, reason = available_products(value, x.device)
    if reason:
        _warn_once(f"{operator}: precision='bf16-if-available' computes in float32: {reason}.")
    return BF16 if effective == "bf16" else precision_for(x)


def _warn_once(message: str) -> None:
    global _warned
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(message, stacklevel=4)


def product(a: Tensor, b: Tensor, precision: int) -> Tensor:
    """Return a @ b, with operands rounded to bfloat16 if the precision is `BF16`.

    This is the definition of bf16 for the plain-torch twins. GPUs without a kernel use torch's own setting.
    """
    return a @ b if precision != BF16 or a.is_cuda else rounded(a) @ rounded(b)


def rounded(x: Tensor) -> Tensor:
    """Return x rounded to the nearest bfloat16, ties to even, in its own dtype."""
    return x.bfloat16().to(x.dtype)


def torch_precision() -> str:
    """Return the name of torch's own setting, which cuBLAS follows."""
    try:
        return _NAMES_BY_TORCH_SETTING[torch.get_float32_matmul_precision()]
    except RuntimeError:  # torch.backends.cuda.matmul.fp32_precision was set, which has no name for bf16
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# torch.compile has a guard on torch's setting, so the result is constant within a compiled graph.
torch_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]
