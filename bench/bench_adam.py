"""Clipping and Adam's step in one call, compared with clip_grad_value_ and torch.optim.Adam.

    python -m pytest bench/bench_adam.py -s

Both sides step the same parameters with gradients inside the limit. They alternate in one process, see compare.py.
torch's default on the CPU is a loop over the tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compare import compare
from torch import nn

from qfast.training.optim import ClippedAdam

# The TCN of 5 x 128 channels has some 845,000 parameters in 40 tensors, the LSTM of hidden size 64 some 55,000 in 10.
NETWORKS = {
    "845k in 40": [(145, 146)] * 39 + [(19_470,)],
    "55k in 10": [(256, 20), (256, 64), (256,), (256,), (256, 64), (256, 64), (256,), (256,), (1, 64), (1,)],
}
TORCHS = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
LEAST = {"845k in 40": {"default": 3.5, "fused": 1.2}, "55k in 10": {"default": 3.0, "fused": 1.2}}


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 0.1
    return params


def our_step(shapes: list[tuple[int, ...]]) -> Callable[[], None]:
    optimizer = ClippedAdam(parameters(shapes), lr=1e-4)
    return lambda: optimizer.step()


def torchs_step(shapes: list[tuple[int, ...]], kind: dict[str, bool]) -> Callable[[], None]:
    params = parameters(shapes)
    optimizer = torch.optim.Adam(params, lr=1e-4, **kind)

    def step() -> None:
        nn.utils.clip_grad_value_(params, 3.0)
        optimizer.step()

    return step


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", TORCHS)
@pytest.mark.parametrize("network", NETWORKS)
def test_step(network: str, kind: str, threads: int) -> None:
    shapes = NETWORKS[network]
    ours, theirs = our_step(shapes), torchs_step(shapes, TORCHS[kind])
    for _ in range(10):
        ours(), theirs()
    result = compare(ours, theirs, rounds=20, calls=(20, 20), threads=threads)
    count = sum(torch.Size(shape).numel() for shape in shapes)
    print(f"\nclip and Adam, {count} parameters in {len(shapes)} tensors, torch {kind}, {threads} threads: {result}")
    if threads == 1:
        assert result.ratio >= LEAST[network].get(kind, 0)
