"""What the feed-forward block and the encoder layer compute, by torch's autograd on the CPU, and inputs for them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qfast.ops.recurrent_cells import dropout_mask

F64 = torch.float64
SEED, EPS = 12345678901, 1e-5


class Block(NamedTuple):
    rows: int
    inputs: int
    hidden: int
    outputs: int
    dropout: float = 0.0


class Layer(NamedTuple):
    batch: int
    steps: int
    width: int
    heads: int
    hidden: int
    dropout: float = 0.0
    layout: str = "plain"
    last: bool = False


def draw(rng: torch.Generator, *shape: int) -> Tensor:
    """float64 that holds a number of float32."""
    return torch.randn(shape, generator=rng, dtype=F64).float().double()


def seed_for(dropout: float, device: str, seed: int = SEED) -> Tensor | None:
    return torch.tensor([seed], device=device) if dropout else None


def block_inputs(case: Block, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """x and the four parameters, and a gradient of the result."""
    rng = torch.Generator().manual_seed(case.rows + 7 * case.hidden + case.inputs)
    rows, wide, hidden, out = case[:4]
    parts = [draw(rng, rows, wide), draw(rng, hidden, wide) / wide**0.5, draw(rng, hidden)]
    parts += [draw(rng, out, hidden) / hidden**0.5, draw(rng, out)]
    return [part.to(device, dtype) for part in parts], draw(rng, rows, out).to(device, dtype)


def layer_inputs(case: Layer, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """x and the twelve parameters, and a gradient of the result."""
    rng = torch.Generator().manual_seed(case.batch + 7 * case.steps + case.width)
    batch, steps, width, _, hidden = case[:5]
    x = {
        "plain": lambda: draw(rng, batch, steps, width).to(device, dtype),
        "steps first": lambda: draw(rng, steps, batch, width).to(device, dtype).transpose(0, 1),
        "features first": lambda: draw(rng, batch, width, steps).to(device, dtype).transpose(1, 2),
        "part of a larger tensor": lambda: draw(rng, batch, steps + 2, width + 1).to(device, dtype)[:, 1:-1, 1:],
    }[case.layout]()
    shapes = [(3 * width, width), (3 * width,), (width, width), (width,), (hidden, width), (hidden,), (width, hidden)]
    shapes += [(width,)] * 5
    weights = [draw(rng, *shape) / (shape[1] ** 0.5 if len(shape) == 2 else 1) for shape in shapes]
    grad = draw(rng, batch, width) if case.last else draw(rng, batch, steps, width)
    return [x, *(part.to(device, dtype) for part in weights)], grad.to(device, dtype)


# ---------------------------------------------------------------- the definition, by torch's autograd on the CPU
def drop(values: Tensor, place: int, dropout: float, seed: Tensor | None) -> Tensor:
    """[batch, steps, columns]"""
    return values * dropout_mask(values, place, dropout, seed) if dropout and seed is not None else values


def define_block(x: Tensor, weights: list[Tensor], p: float, seed: Tensor | None) -> Tensor:
    """x is [batch, steps, D]"""
    w1, b1, w2, b2 = weights
    return drop((x @ w1.t() + b1).relu(), 1, p, seed) @ w2.t() + b2


def define_layer(x: Tensor, w: list[Tensor], heads: int, p: float, seed: Tensor | None) -> Tensor:
    steps, width = x.shape[1:]
    query, key, value = (
        part.unflatten(2, (heads, width // heads)).transpose(1, 2) for part in (x @ w[0].t() + w[1]).chunk(3, 2)
    )
    shares = (query @ key.transpose(2, 3) / (width // heads) ** 0.5).softmax(3)
    if p and seed is not None:
        like = x.new_empty(steps, len(x), steps)  # query, window, key
        shares = shares * torch.stack([dropout_mask(like, 3 + h, p, seed).transpose(0, 1) for h in range(heads)], 1)
    mixed = (shares @ value).transpose(1, 2).flatten(2)
    first = F.layer_norm(x + drop(mixed @ w[2].t() + w[3], 0, p, seed), (width,), w[8], w[9], EPS)
    second = first + drop(define_block(first, w[4:8], p, seed), 2, p, seed)
    return F.layer_norm(second, (width,), w[10], w[11], EPS)


def block_by_definition(case: Block, dtype: torch.dtype, seed: int = SEED) -> list[Tensor]:
    tensors, grad = block_inputs(case, dtype, "cpu")
    leaves = [part.requires_grad_() for part in tensors]
    seed_given = seed_for(case.dropout, "cpu", seed)
    out = define_block(leaves[0].unsqueeze(1), leaves[1:], case.dropout, seed_given).squeeze(1)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def layer_by_definition(case: Layer, dtype: torch.dtype, seed: int = SEED) -> list[Tensor]:
    tensors, grad = layer_inputs(case, dtype, "cpu")
    leaves = [part.requires_grad_() for part in tensors]
    out = define_layer(leaves[0], leaves[1:], case.heads, case.dropout, seed_for(case.dropout, "cpu", seed))
    out = out[:, -1] if case.last else out
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def by_definition(case: Block | Layer, dtype: torch.dtype, seed: int = SEED) -> list[Tensor]:
    return block_by_definition(case, dtype, seed) if isinstance(case, Block) else layer_by_definition(case, dtype, seed)
