"""Cases of the convolution over the steps of windows, defined by torch's conv1d."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qfast.ops import window_conv
from support.operator_case import F64
from support.tensors import laid_out


@dataclass(frozen=True)
class WindowConvCase:
    """Sizes of one convolution; `layout` is the layout of x in memory, see `laid_out`."""

    batch: int
    steps: int
    features: int
    channels: int
    kernel: int
    layout: str = "plain"

    @property
    def name(self) -> str:
        sizes = zip("BTDOK", (self.batch, self.steps, self.features, self.channels, self.kernel), strict=True)
        return "-".join([*(f"{letter}{size}" for letter, size in sizes), *[self.layout] * (self.layout != "plain")])

    def inputs(self, dtype: torch.dtype = F64, seed: int = 0) -> list[Tensor]:
        """x [B, T, D], weight [O, D, K] and bias [O]."""
        rng = torch.Generator().manual_seed(seed)
        scale = (self.features * self.kernel) ** -0.5
        weight = torch.randn(self.channels, self.features, self.kernel, generator=rng) * scale
        bias = torch.randn(self.channels, generator=rng)
        x = laid_out(rng, self.layout, self.batch, self.steps, self.features, dtype)
        return [x, weight.to(dtype), bias.to(dtype)]

    def reference(self, tensors: Sequence[Tensor]) -> Tensor:
        x, weight, bias = tensors
        if x.shape[1] == 0 or len(x) == 0:  # torch refuses some of these
            return (x.sum() + weight.sum()) * 0 + bias.expand(*x.shape[:2], -1)
        return functional.conv1d(x.transpose(1, 2), weight, bias, padding=weight.shape[2] // 2).transpose(1, 2)

    def operator(self, tensors: Sequence[Tensor], **settings: object) -> Tensor:
        return window_conv(*tensors, **settings)


WINDOW_CONV_CASES = [
    WindowConvCase(0, 5, 3, 4, 3),
    WindowConvCase(3, 0, 3, 4, 3),
    WindowConvCase(0, 0, 3, 4, 3),
    WindowConvCase(2, 0, 3, 4, 7),
    WindowConvCase(1, 1, 1, 1, 1),
    WindowConvCase(2, 1, 3, 2, 3),
    WindowConvCase(1, 2, 3, 2, 7),
    WindowConvCase(3, 2, 5, 4, 5),
    WindowConvCase(5, 7, 1, 9, 3),
    WindowConvCase(5, 7, 9, 1, 3),
    WindowConvCase(2, 20, 16, 16, 3),
    WindowConvCase(13, 20, 20, 24, 1),
    WindowConvCase(13, 20, 17, 33, 5),
    WindowConvCase(4, 60, 64, 64, 3),
    WindowConvCase(40, 3, 8, 8, 7),
    WindowConvCase(3, 130, 10, 6, 3),
    WindowConvCase(2, 700, 3, 5, 3),
    WindowConvCase(100, 9, 31, 7, 3),
]
LARGE_WINDOW_CONV_CASES = [
    WindowConvCase(100, 60, 64, 64, 3),
    WindowConvCase(300, 20, 128, 100, 3),
    WindowConvCase(7, 60, 512, 512, 3),
    WindowConvCase(2048, 20, 65, 63, 5),
]
