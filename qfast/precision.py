"""With how many bits matrix products multiply on a GPU, for those operators that leave a choice.

`ieee` multiplies in float32. The others run on tensor cores, add up in float32 all the same, and take their operands
as: `3xtf32` two parts of 11 bits each, in three products, for about float32's own error; `tf32` 11 bits; `bf16` 8 bits.
`auto`, which holds until something else is set, follows torch: torch.get_float32_matmul_precision() of "highest" is
`ieee`, "high" `tf32`, "medium" `bf16`.

So far the feed-forward block reads it, also inside `encoder_layer`. float64 is always float64, and so is whatever is
computed on the CPU in float32 always float32. Products that an operator leaves to cuBLAS follow torch's setting alone.

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
_OF_TORCH = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
_chosen = "auto"


def set_precision(name: str) -> str:
    """For all threads, until it is set again.

    Parameters
    ----------
    name : {"auto", "ieee", "3xtf32", "tf32", "bf16"}

    Returns
    -------
    str
        What was set before.

    Raises
    ------
    ValueError
        Another name.
    """
    global _chosen
    if name != "auto" and name not in NAMES:
        raise ConfigError(f"set_precision: expected one of auto, {', '.join(NAMES)}, got {name!r}.")
    before, _chosen = _chosen, name
    return before


@contextmanager
def using_precision(name: str) -> Iterator[None]:
    """`set_precision` within a block. A backward has the precision of its forward, wherever it is called."""
    before = set_precision(name)
    try:
        yield
    finally:
        set_precision(before)


def precision() -> str:
    """What holds now; never "auto"."""
    return torchs_precision() if _chosen == "auto" else _chosen


def precision_for(x: Tensor) -> int:
    """As operators take it: 0 wherever there is nothing to choose."""
    return NAMES.index(precision()) if x.is_cuda and x.dtype == torch.float32 else 0


def torchs_precision() -> str:
    """The name of torch's own setting, which cuBLAS follows whatever is set here."""
    try:
        return _OF_TORCH[torch.get_float32_matmul_precision()]
    except RuntimeError:  # set by torch.backends.cuda.matmul.fp32_precision, which has no name for bf16
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


torchs_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile guards torch's setting by itself
