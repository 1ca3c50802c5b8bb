"""Counter-based random numbers in plain torch: Philox 4x32-10 (Salmon et al. 2011), the same bits on every device.

The native kernels have their own implementation, csrc/philox.h. Tests compare both with the published vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_seed", "dropout_mask", "keep_threshold", "philox"]

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four independent 32-bit words for each counter.

    Parameters
    ----------
    seed : Tensor int64, one element
        The key is its low and high 32 bits.
    counter : four int64 tensors, values below 2**32
        They broadcast against each other.

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


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of the product, from two halves because int64 cannot represent it."""
    upper, lower = (word >> 16) * factor, (word & 0xFFFF) * factor
    total = (upper & 0xFFFF_FFFF_FFFF) + (lower >> 16)
    return (total >> 16) & _LOW, ((total & 0xFFFF) << 16 | (lower & 0xFFFF)) & _LOW


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed, int64 [1], from torch's generator of `device`. `torch.manual_seed` makes it reproducible."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def keep_threshold(dropout: float) -> int:
    """Return the smallest random word whose element is kept. 2**32 drops every element."""
    return round(dropout * 2.0**32)


def dropout_mask(like: Tensor, place: int, dropout: float, seed: Tensor, first_step: int = 0) -> Tensor:
    """Return the factors of dropout, 0 or 1 / (1 - dropout), for a tensor [B, T, H].

    Element (b, t, j) has word b % 4 of the counter (j, first_step + t, place, b // 4).

    Parameters
    ----------
    like : Tensor [B, T, H]
        Its shape, dtype and device are used, not its values.
    place : int
        Third word of the counter, for example the number of a layer.
    dropout : float
        Probability of a 0.
    seed : Tensor int64, one element
    first_step : int

    Returns
    -------
    Tensor [B, T, H]

    Examples
    --------
    >>> dropout_mask(torch.zeros(1, 1, 6), 0, 0.5, torch.tensor([3])).tolist()
    [[[2.0, 0.0, 2.0, 0.0, 2.0, 2.0]]]
    """
    batch, steps, width = like.shape
    groups, t, j = (torch.arange(n, device=like.device) for n in ((batch + 3) // 4, steps, width))
    counter = (
        j.view(1, 1, -1),
        (t + first_step).view(1, -1, 1),
        torch.full((), place, device=like.device),  # unlike torch.tensor, it does not synchronize
        groups.view(-1, 1, 1),
    )
    words = torch.stack(torch.broadcast_tensors(*philox(seed, counter)), 1).flatten(0, 1)[:batch]
    scale = 0.0 if dropout == 1.0 else 1.0 / (1.0 - dropout)
    return (words >= keep_threshold(dropout)).to(like.dtype) * scale
