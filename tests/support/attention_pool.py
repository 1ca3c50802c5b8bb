"""Cases of attention over time, defined in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qfast.ops import attention_pool
from support.operator_case import F32, F64


@dataclass(frozen=True)
class AttentionPoolCase:
    """Sizes of one call: B rows, T steps, H columns and A columns of the layer that scores a step."""

    batch: int
    steps: int
    hidden: int
    width: int

    @property
    def name(self) -> str:
        return f"B{self.batch}-T{self.steps}-H{self.hidden}-A{self.width}"

    def inputs(self, dtype: torch.dtype = F64) -> list[Tensor]:
        """h [B, T, H], weight [A, H], bias [A] and score [A]."""
        return self._draw(dtype)[:4]

    def grad(self, dtype: torch.dtype = F64) -> Tensor:
        """A gradient of the result, [B, H]."""
        return self._draw(dtype)[4]

    def _draw(self, dtype: torch.dtype) -> list[Tensor]:
        rng = torch.Generator().manual_seed(self.batch + 10 * self.steps + self.hidden)
        shapes = (
            (self.batch, self.steps, self.hidden),
            (self.width, self.hidden),
            (self.width,),
            (self.width,),
            (self.batch, self.hidden),
        )
        h, weight, bias, score, grad = (torch.randn(s, generator=rng, dtype=F64) for s in shapes)
        weight = weight / max(self.hidden, 1) ** 0.5
        return [part.to(F32).to(dtype) for part in (h, weight, bias, score, grad)]

    def reference(self, tensors: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """The definition in torch's operations; `mask` [B, T, A] is the dropout mask."""
        h, weight, bias, score = tensors
        projected = functional.linear(h, weight, bias)
        if mask is not None:
            projected = projected * mask
        scores = functional.linear(projected.tanh(), score.view(1, -1))
        return (scores.softmax(1) * h).sum(1)

    def operator(self, tensors: Sequence[Tensor], **settings: object) -> Tensor:
        return attention_pool(*tensors, **settings)


ATTENTION_POOL_CASES = [
    AttentionPoolCase(0, 3, 4, 2),
    AttentionPoolCase(1, 1, 1, 1),
    AttentionPoolCase(1, 1, 1, 0),
    AttentionPoolCase(2, 3, 2, 1),
    AttentionPoolCase(5, 7, 7, 3),
    AttentionPoolCase(3, 20, 16, 8),
    AttentionPoolCase(13, 20, 64, 32),
    AttentionPoolCase(100, 20, 64, 32),
    AttentionPoolCase(3, 300, 64, 32),
    AttentionPoolCase(9, 60, 100, 50),
    AttentionPoolCase(259, 5, 19, 9),
    AttentionPoolCase(4, 1000, 33, 16),
    AttentionPoolCase(7, 20, 512, 256),
    AttentionPoolCase(97, 1, 128, 64),
]
