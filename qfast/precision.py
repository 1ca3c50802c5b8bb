"""Precision of float32 matrix products on a GPU, for the operators that offer a choice.

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

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qfast.errors import ConfigError

__all__ = ["precision", "set_precision", "using_precision"]

NAMES = ("ieee", "3xtf32", "tf32", "bf16")  # in the order of csrc/tensor_core.cuh
_NAMES_BY_TORCH_SETTING = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
_setting = "auto"


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


def torch_precision() -> str:
    """Return the name of torch's own setting, which cuBLAS follows."""
    try:
        return _NAMES_BY_TORCH_SETTING[torch.get_float32_matmul_precision()]
    except RuntimeError:  # torch.backends.cuda.matmul.fp32_precision was set, which has no name for bf16
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# torch.compile has a guard on torch's setting, so the result is constant within a compiled graph.
torch_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]
