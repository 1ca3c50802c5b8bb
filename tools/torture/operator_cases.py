"""Random cases of every operator: how to draw one as plain JSON, and how to turn it into a case of tests/support."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qfast.ops import additive_attention, clipped_adam_, graph_attention, tanh
from support.attention import dense, dense_graph, offsets_of
from support.attention_pool import AttentionPoolCase
from support.encoder import BlockCase, LayerCase, block_of_masks, layer_of_masks
from support.linear_tanh import LinearTanhCase
from support.operator_case import F32, F64, OperatorCase
from support.recurrent import RecurrentCase
from support.temporal_conv import StackCase
from support.tensors import LAYOUTS, philox_mask, randn
from support.window_conv import WindowConvCase
from support.window_gather import FILLS, GatherCase
from torture.protocol import Case, choose, size

TRANSFORMS = ("grad", "jvp", "vmap", "grad of grad")
WITHOUT_VMAP = ("grad", "jvp", "grad of grad")  # of cases that draw random numbers in a call, which vmap does not allow
POOL_PLACE = 2**31  # of the random numbers of attention_pool
Masked = Callable[[Any, Sequence[Tensor], float, int], Any]


# ---------------------------------------------------------------- operators without a table in tests/support
@dataclass(frozen=True)
class TanhCase:
    """Element-wise tanh."""

    shape: tuple[int, ...]

    def inputs(self, dtype: torch.dtype = F64, seed: int = 0) -> list[Tensor]:
        return [(3 * randn(*self.shape, seed=seed, dtype=F32)).to(dtype)]

    def reference(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].tanh()

    def operator(self, tensors: Sequence[Tensor]) -> Tensor:
        return tanh(tensors[0])


@dataclass(frozen=True)
class DaysCase:
    """Attention within days of different lengths: additive_attention, or graph_attention if `graph`."""

    days: tuple[int, ...]
    width: int
    graph: bool
    slope: float = 0.01

    def inputs(self, dtype: torch.dtype = F64, seed: int = 0) -> list[Tensor]:
        rows = sum(self.days)
        value = randn(rows, self.width, seed=seed, dtype=F32).to(dtype)
        if self.graph:
            weight = (randn(2, self.width, seed=seed + 1) / self.width**0.5).to(F32).to(dtype)
            return [value, weight, randn(2, seed=seed + 2, dtype=F32).to(dtype)]
        return [*(part.to(dtype) for part in randn(2, rows, seed=seed + 3, dtype=F32)), value]

    def reference(self, tensors: Sequence[Tensor]) -> Tensor:
        return (dense_graph if self.graph else dense)(*tensors, offsets_of(self.days), self.slope)

    def operator(self, tensors: Sequence[Tensor]) -> Tensor:
        return (graph_attention if self.graph else additive_attention)(*tensors, offsets_of(self.days), self.slope)


@dataclass(frozen=True)
class AdamCase:
    """One step of clipped_adam_. The results are the new parameters and moving averages."""

    shapes: tuple[tuple[int, ...], ...]
    steps: int
    lr: float
    weight_decay: float
    limit: float

    def inputs(self, dtype: torch.dtype = F64, seed: int = 0) -> list[Tensor]:
        kinds = [
            [randn(*s, seed=seed + 9 * i + kind, dtype=F32) for i, s in enumerate(self.shapes)] for kind in range(4)
        ]
        kinds[3] = [part.square() for part in kinds[3]]
        return [part.to(dtype) for kind in kinds for part in kind]

    def reference(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        n, t = len(self.shapes), self.steps + 1
        results: list[list[Tensor]] = [[], [], []]
        for p, g, m, v in zip(*(tensors[k * n : (k + 1) * n] for k in range(4)), strict=True):
            d = g.clamp(-self.limit, self.limit) + self.weight_decay * p
            m, v = 0.9 * m + 0.1 * d, 0.999 * v + 0.001 * d.square()
            step = self.lr / (1 - 0.9**t) * m / (v.sqrt() / (1 - 0.999**t) ** 0.5 + 1e-8)
            for parts, part in zip(results, (p - step, m, v), strict=True):
                parts.append(part)
        return [part for parts in results for part in parts]

    def operator(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        n = len(self.shapes)
        copies = [torch.empty_like(part).copy_(part.detach()) for part in tensors]
        p, g, m, v = (copies[k * n : (k + 1) * n] for k in range(4))
        steps = [torch.tensor(float(self.steps)) for _ in range(n)]
        clipped_adam_(p, g, m, v, steps, lr=self.lr, weight_decay=self.weight_decay, limit=self.limit)
        return [*p, *m, *v]


# ---------------------------------------------------------------- draws
def _recurrent(cell: str) -> Callable[[random.Random], Case]:
    def draw(rng: random.Random) -> Case:
        return {
            "cell": cell,
            "batch": size(rng, 0, 60),
            "steps": size(rng, 0, 25),
            "features": size(rng, 1, 70),
            "hidden": size(rng, 1, 70),
            "layers": rng.choice([1, 1, 2, 3]),
            "all_steps": rng.random() < 0.5,
            "state": rng.random() < 0.5,
            "layout": rng.choice(LAYOUTS),
        }

    return draw


def _stack(rng: random.Random) -> Case:
    depth = rng.randint(1, 4)
    return {
        "steps": size(rng, 1, 40),
        "kernel": [rng.randint(1, 8) for _ in range(depth)],
        "channels": [size(rng, 1, 40)] * depth if rng.random() < 0.5 else [size(rng, 1, 40) for _ in range(depth)],
        "features": size(rng, 1, 30),
        "batch": size(rng, 0, 30),
        "all_steps": rng.random() < 0.5,
        "norm": rng.random() < 0.7,
        "dilations": None if rng.random() < 0.6 else [rng.choice([1, 2, 3, 7, 100]) for _ in range(depth)],
    }


def _layer(rng: random.Random) -> Case:
    heads = rng.choice([1, 2, 3, 4, 8])
    return {
        "batch": size(rng, 0, 30),
        "steps": size(rng, 1, 30),
        "width": heads * size(rng, 1, 20),
        "heads": heads,
        "hidden": size(rng, 1, 130),
        "last": rng.random() < 0.5,
        "layout": rng.choice(LAYOUTS),
        "eps": rng.choice([1e-5, 1e-2]),
    }


def _block(rng: random.Random) -> Case:
    lead = [size(rng, 0, 30) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
    return {"lead": lead[:2] + [min(n, 4) for n in lead[2:]]} | {
        k: size(rng, 1, 130) for k in ("width", "hidden", "out")
    }


def _pool(rng: random.Random) -> Case:
    return {
        "batch": size(rng, 0, 60),
        "steps": size(rng, 1, 60),
        "hidden": size(rng, 1, 70),
        "width": size(rng, 0, 40),
    }


def _conv(rng: random.Random) -> Case:
    return {
        "batch": size(rng, 0, 40),
        "steps": size(rng, 0, 60),
        "features": size(rng, 1, 40),
        "channels": size(rng, 1, 40),
        "kernel": 2 * rng.choice([0, 1, 1, 2, 3, 8, 40]) + 1,
        "layout": rng.choice(LAYOUTS),
    }


def _gather(rng: random.Random) -> Case:
    columns = size(rng, 1, 40)
    begin = rng.randint(0, columns)
    return {
        "name": "random",
        "instruments": rng.randint(3, 12),
        "dates": size(rng, 6, 60),
        "columns_all": columns,
        "windows": size(rng, 0, 100),
        "steps": size(rng, 1, 70),
        "fill": rng.choice(sorted(FILLS)),
        "first_position": rng.choice([0, 0, -5, 11, 999]),
        "columns": None if rng.random() < 0.5 else [begin, rng.randint(begin, columns)],
        "layout": rng.choice(["BTD", "BDT"]),
        "holes": rng.choice([0.0, 0.15, 0.5]),
        "padding": rng.randint(0, 5),
    }


def _days(graph: bool) -> Callable[[random.Random], Case]:
    def draw(rng: random.Random) -> Case:
        days = [size(rng, 0, 140) for _ in range(rng.randint(1, 5))]
        return {"days": days, "width": size(rng, 1, 70), "graph": graph, "slope": rng.choice([0.01, 0.0, 0.3, 1.0])}

    return draw


def _adam(rng: random.Random) -> Case:
    shapes = [[size(rng, 0, 40) for _ in range(rng.randint(0, 3))] for _ in range(rng.randint(1, 4))]
    return {
        "shapes": shapes,
        "steps": rng.choice([0, 1, 100, 10**6]),
        "lr": rng.choice([0.0, 1e-3, 0.5]),
        "weight_decay": rng.choice([0.0, 0.1]),
        "limit": rng.choice([3.0, 0.5, float("inf")]),
    }


def _linear_tanh(rng: random.Random) -> Case:
    return {
        "batch": size(rng, 0, 60),
        "steps": size(rng, 0, 25),
        "features": size(rng, 1, 70),
        "units": size(rng, 1, 140),
        "layout": rng.choice(LAYOUTS),
    }


def _tanh(rng: random.Random) -> Case:
    return {"shape": [size(rng, 0, 40) for _ in range(rng.randint(0, 4))]}


# ---------------------------------------------------------------- dropout masks
def _pool_of_masks(case: AttentionPoolCase, tensors: Sequence[Tensor], dropout: float, seed: int) -> Tensor:
    mask = philox_mask(seed, case.batch, case.width, case.steps, POOL_PLACE, dropout).transpose(1, 2)
    return case.reference(tensors, mask.to(tensors[0].dtype))


def _block_of_masks(case: BlockCase, tensors: Sequence[Tensor], dropout: float, seed: int) -> Tensor:
    return block_of_masks(tensors, dropout, seed)


def _by_reference(case: Any, tensors: Sequence[Tensor], dropout: float, seed: int) -> Any:
    return case.reference(tensors, dropout=dropout, seed=seed)


@dataclass(frozen=True)
class Operator:
    """How cases of one operator are drawn and checked.

    Attributes
    ----------
    draw, build : callable
        Draw the sizes; the case with these sizes.
    weight : float
        Frequency of the operator.
    kinks : bool
        Whether the operator has ReLUs: the sign of a value near 0, and with it a gradient, depends on rounding.
    masked : callable, optional
        The definition with the dropout masks of a seed.
    transforms : tuple of str
        The transforms of torch.func that cases can check.
    """

    draw: Callable[[random.Random], Case]
    build: Callable[..., OperatorCase]
    weight: float
    kinks: bool = False
    masked: Masked | None = None
    transforms: tuple[str, ...] = TRANSFORMS


OPERATORS = {
    "lstm": Operator(_recurrent("lstm"), RecurrentCase, 2, masked=_by_reference),
    "gru": Operator(_recurrent("gru"), RecurrentCase, 2, masked=_by_reference),
    "temporal_conv_net": Operator(_stack, StackCase, 2, kinks=True, masked=_by_reference, transforms=WITHOUT_VMAP),
    "encoder_layer": Operator(_layer, LayerCase, 2, kinks=True, masked=layer_of_masks),
    "feed_forward": Operator(_block, BlockCase, 1, kinks=True, masked=_block_of_masks),
    "attention_pool": Operator(_pool, AttentionPoolCase, 1, masked=_pool_of_masks),
    "window_conv": Operator(_conv, WindowConvCase, 1),
    "gather_windows": Operator(_gather, GatherCase, 1, transforms=WITHOUT_VMAP),
    "additive_attention": Operator(_days(False), DaysCase, 1, kinks=True),
    "graph_attention": Operator(_days(True), DaysCase, 1, kinks=True),
    "linear_tanh": Operator(_linear_tanh, LinearTanhCase, 0.5),
    "tanh": Operator(_tanh, TanhCase, 0.5),
    "clipped_adam_": Operator(_adam, AdamCase, 0.5, transforms=()),
}


def draw_operator(rng: random.Random) -> Case:
    """An operator and its sizes."""
    name = choose(rng, {name: operator.weight for name, operator in OPERATORS.items()})
    return {"operator": name, "sizes": OPERATORS[name].draw(rng), "data": rng.randrange(10**6)}


def build(case: Case) -> tuple[Operator, Any]:
    """The operator of a drawn case, and its case object."""
    operator = OPERATORS[case["operator"]]
    return operator, operator.build(**{name: _frozen(value) for name, value in case["sizes"].items()})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def make_inputs(operator_case: Any, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Inputs of a case, seeded where its class accepts a seed."""
    try:
        return list(operator_case.inputs(dtype, seed=seed))
    except TypeError:
        return list(operator_case.inputs(dtype))


def relaid(tensor: Tensor, rng: random.Random) -> Tensor:
    """The same values at other addresses: axes in another order, gaps with NaN between elements, any offset."""
    if rng.random() < 0.4:
        return tensor
    order = rng.sample(range(tensor.dim()), tensor.dim())
    strides, stride = [0] * tensor.dim(), 1
    for axis in order:
        strides[axis] = stride
        stride *= max(tensor.shape[axis], 1)
        stride += rng.choice([0, 0, 1, 3])
        if rng.random() < 0.15:
            stride *= 2
    offset = rng.choice([0, 0, 1, 3, 17])
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)) if tensor.numel() else 0
    buffer = torch.full((offset + span,), torch.nan, dtype=tensor.dtype)
    return buffer.as_strided(tensor.shape, strides, offset).copy_(tensor)
