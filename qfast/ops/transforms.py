"""Whether derivatives or batching are being traced through the tensors that an operator is given."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["active"]


def active() -> bool:
    """True inside torch.func's transforms (grad, jvp, vmap and what is built of them) and forward-mode levels.

    Our kernels have a gradient for ordinary backward only. torch hands them the values of dual tensors and
    drops the tangents without a word, so the public functions compute with torch's own operations here.

    Examples
    --------
    >>> active(), torch.func.vmap(lambda x: x * active())(torch.ones(2)).tolist()
    (False, [1.0, 1.0])
    """
    return forward_ad._current_level >= 0 or bool(torch._C._are_functorch_transforms_active())
