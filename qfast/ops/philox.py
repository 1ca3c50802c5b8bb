"""Counter-based random numbers: Philox 4x32-10 (Salmon et al. 2011), the same bits on every device.

The plain-torch form. Native kernels carry their own (csrc/philox.h); tests hold both to the published vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_seed", "dropout_mask", "keep_threshold", "philox"]

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four independent 32-bit words for each counter.

    Parameters
    ----------
    seed : Tensor int64, one element
        The key: its low and its high 32 bits.
    counter : four int64 tensors that broadcast, values below 2**32

    Returns
    -------
    four int64 tensors, values below 2**32

    Source
    ------
    J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.

    Examples
    --------
    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> [hex(int(word)) for word in philox(zero, (zero, zero, zero, zero))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    key = [seed & _LOW, (seed >> 32) & _LOW]
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [(part + step) & _LOW for part, step in zip(key, _KEY_STEPS, strict=True)]
    return c0, c1, c2, c3


def _multiply(word: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product. By halves, as 64 signed bits do not hold it."""
    upper, lower = (word >> 16) * by, (word & 0xFFFF) * by
    total = (upper & 0xFFFF_FFFF_FFFF) + (lower >> 16)
    return (total >> 16) & _LOW, ((total & 0xFFFF) << 16 | (lower & 0xFFFF)) & _LOW


def draw_seed(device: torch.device) -> Tensor:
    """int64 [1] on `device` from torch's generator of that device: `torch.manual_seed` makes it repeat."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def keep_threshold(dropout: float) -> int:
    """An element is kept if its random word is at least this; 2**32 keeps none."""
    return round(dropout * 2.0**32)


def dropout_mask(like: Tensor, layer: int, dropout: float, seed: Tensor, first_step: int = 0) -> Tensor:
    """0 or 1 / (1 - dropout) for each element of a layer's output [B, T, H], steps from `first_step` on; see `lstm`."""
    batch, steps, hidden = like.shape
    groups, t, j = (torch.arange(n, device=like.device) for n in ((batch + 3) // 4, steps, hidden))
    t = t + first_step
    number = torch.tensor(layer, device=like.device)
    words = torch.stack(
        torch.broadcast_tensors(*philox(seed, (j.view(1, 1, -1), t.view(1, -1, 1), number, groups.view(-1, 1, 1)))), 1
    )
    kept = words.flatten(0, 1)[:batch] >= keep_threshold(dropout)
    return kept.to(like.dtype) * (0.0 if dropout == 1.0 else 1.0 / (1.0 - dropout))
