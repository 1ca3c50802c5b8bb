"""Seeded tensors in many memory layouts, and the dropout masks that the operators must draw."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, the same for every dtype up to rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


LAYOUTS = ["plain", "features first", "time first", "windows", "inner", "every other", "repeated", "one row"]


def laid_out(rng: torch.Generator, layout: str, batch: int, steps: int, features: int, dtype: torch.dtype) -> Tensor:
    """Random x [B, T, F] with the strides of `layout`."""

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(dtype)

    if layout == "features first":
        return numbers(batch, features * steps).view(batch, features, steps).transpose(1, 2)
    if layout == "time first":
        return numbers(steps, batch, features).transpose(0, 1)
    if layout == "windows":
        return numbers(batch + steps, features).unfold(0, steps, 1)[:batch].transpose(1, 2)
    if layout == "inner":
        return numbers(batch, steps + 3, features + 2)[:, 2 : steps + 2, 1 : features + 1]
    if layout == "every other":
        return numbers(batch, steps, 2 * features)[..., ::2]
    if layout == "repeated":
        return numbers(batch, 1, features).expand(batch, steps, features)
    if layout == "one row":
        return numbers(1, steps, features).expand(batch, steps, features)
    return numbers(batch, steps, features)


def philox_words(seed: int, counter: Sequence[np.ndarray | int]) -> list[np.ndarray]:
    """Philox 4x32-10 in 64-bit arithmetic: the four words of each counter. Counters broadcast."""
    low = np.uint64(0xFFFFFFFF)
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    for _ in range(10):
        products = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        (high0, low0), (high1, low1) = ((p >> np.uint64(32), p & low) for p in products)
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    return list(np.broadcast_arrays(*c))


def philox_mask(seed: int, batch: int, channels: int, steps: int, convolution: int, dropout: float) -> Tensor:
    """float64 [B, C, T]: 0 where dropped, otherwise 1 / (1 - dropout)."""
    groups, c, t = np.ogrid[: (batch + 3) // 4, :channels, :steps]
    words = np.stack(philox_words(seed, (c, t, convolution, groups)), 1)
    words = words.reshape(4 * len(groups), channels, steps)[:batch]
    saved = words >= round(dropout * 2**32)
    return torch.from_numpy(saved * (0.0 if dropout == 1 else 1 / (1 - dropout)))


SEEDS = [0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63), 0x9E3779B97F4A7C15 - 2**64]


def fix_dropout_seed(monkeypatch: pytest.MonkeyPatch, seed: int = 7) -> None:
    """Let every operator use one seed for dropout, whatever torch's generators contain.

    After `torch.manual_seed` the generators of a CPU and of a GPU draw different numbers.
    """

    def draw(device: torch.device) -> Tensor:
        return torch.tensor([seed], device=device)

    for name, module in list(sys.modules.items()):
        if name.startswith("qfast.ops.") and hasattr(module, "draw_seed"):
            monkeypatch.setattr(module, "draw_seed", draw)
