"""The calls that are timed: a whole training step, or scores without gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["inference", "training_step"]


def training_step(net: nn.Module, x: Tensor, fused: bool, weight_decay: float = 0.0) -> Callable[[], None]:
    """`fused` selects torch's fused Adam, which qfast uses; Qlib uses torch's default."""
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=fused, weight_decay=weight_decay)
    label = torch.randn(len(x), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        loss = (net(x) - label).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(net.parameters(), 3.0)
        optimizer.step()

    return step


def inference(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    net.eval()

    @torch.no_grad()
    def score() -> Tensor:
        return net(x)

    return score
