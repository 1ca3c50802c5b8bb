"""Cases of the linear layer with tanh, defined in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qfast.ops import linear_tanh
from support.operator_case import F32, F64
from support.tensors import laid_out


@dataclass(frozen=True)
class LinearTanhCase:
    """Sizes of one call: B windows, T steps, F features and H units; `layout` as in `laid_out`."""

    batch: int
    steps: int
    features: int
    units: int
    layout: str = "plain"

    @property
    def name(self) -> str:
        sizes = zip("BTFH", (self.batch, self.steps, self.features, self.units), strict=True)
        return "-".join([*(f"{letter}{size}" for letter, size in sizes), *[self.layout] * (self.layout != "plain")])

    def inputs(self, dtype: torch.dtype = F64, seed: int = 0) -> list[Tensor]:
        """x [B, T, F], weight [H, F] and bias [H]."""
        rng = torch.Generator().manual_seed(seed)
        weight = torch.randn(self.units, self.features, generator=rng) / self.features**0.5
        bias = torch.randn(self.units, generator=rng)
        x = laid_out(rng, self.layout, self.batch, self.steps, self.features, dtype)
        return [x, weight.to(F32).to(dtype), bias.to(F32).to(dtype)]

    def reference(self, tensors: Sequence[Tensor]) -> Tensor:
        return functional.linear(*tensors).tanh()

    def operator(self, tensors: Sequence[Tensor]) -> Tensor:
        return linear_tanh(*tensors)


LINEAR_TANH_CASES = [
    LinearTanhCase(0, 5, 3, 4),
    LinearTanhCase(3, 0, 3, 4),
    LinearTanhCase(3, 2, 5, 0),
    LinearTanhCase(1, 1, 1, 1),
    LinearTanhCase(5, 7, 1, 9),
    LinearTanhCase(5, 7, 9, 1),
    LinearTanhCase(13, 20, 20, 64),
    LinearTanhCase(100, 20, 20, 64),
    LinearTanhCase(97, 1, 33, 17),
    LinearTanhCase(1, 300, 6, 64),
    LinearTanhCase(4, 60, 158, 100),
    LinearTanhCase(2, 110, 70, 129),
]
