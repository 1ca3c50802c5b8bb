"""Detects torch.func transforms and forward-mode differentiation, which qfast's kernels do not support."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["active"]


def active() -> bool:
    """Return True inside torch.func transforms (grad, jvp, vmap, jacrev, ...) and forward-mode levels.

    qfast's kernels define a gradient for `backward` only. With dual tensors, torch passes the primal values to a
    kernel and silently drops the tangents. The public functions therefore use torch's operations when this is True.

    Examples
    --------
    >>> active(), torch.func.vmap(lambda x: x * active())(torch.ones(2)).tolist()
    (False, [1.0, 1.0])
    """
    return forward_ad._current_level >= 0 or bool(torch._C._are_functorch_transforms_active())
