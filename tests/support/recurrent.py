"""Stacks of LSTM and GRU layers for the tests: inputs, the definition by torch's own layers, and comparisons.

Inputs are numbers of float32 in either dtype, so that both compute from the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from qfast import _backend
from qfast.ops import gru, lstm
from qfast.ops.recurrent_twin import GRU, LSTM, Cell
from support.temporal_conv import mask, relative

NAMES = ["lstm", "gru"]
CELLS: dict[str, Cell] = {"lstm": LSTM, "gru": GRU}
NATIVE = _backend.native is not None
F32, F64 = torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """Sizes of one stack. layout: how x lies in memory, see `laid_out`."""

    batch: int
    steps: int
    features: int
    hidden: int
    layers: int = 1
    all_steps: bool = False
    state: bool = False
    layout: str = "plain"

    @property
    def name(self) -> str:
        sizes = zip("BTFHL", (self.batch, self.steps, self.features, self.hidden, self.layers), strict=True)
        ends = ["all"] * self.all_steps + ["state"] * self.state + [self.layout] * (self.layout != "plain")
        return "-".join([*(f"{letter}{size}" for letter, size in sizes), *ends])


@dataclass(frozen=True)
class Inputs:
    """x [B, T, F]; four weights a layer in a row; h (and c) [L, B, H] or nothing."""

    x: Tensor
    weights: list[Tensor]
    state: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.x, *self.state, *self.weights]

    def like(self, tensors: Sequence[Tensor]) -> Inputs:
        n = 1 + len(self.state)
        return Inputs(tensors[0], list(tensors[n:]), list(tensors[1:n]))

    def to(self, dtype: torch.dtype) -> Inputs:
        return self.like([t.to(dtype) for t in self.tensors])

    @property
    def layers(self) -> list[list[Tensor]]:
        return [self.weights[at : at + 4] for at in range(0, len(self.weights), 4)]


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


def inputs_of(name: str, case: Case, dtype: torch.dtype = F64, scale: float = 1.0, seed: int = 0) -> Inputs:
    rng = torch.Generator().manual_seed(seed)
    cell, h = CELLS[name], case.hidden
    x = laid_out(rng, case.layout, case.batch, case.steps, case.features, dtype)
    weights = []
    for layer in range(case.layers):
        columns = case.features if layer == 0 else h
        for shape in ((cell.gates * h, columns), (cell.gates * h, h), (cell.gates * h,), (cell.gates * h,)):
            fan = shape[1] if len(shape) == 2 else 4
            weights.append((torch.randn(shape, generator=rng) * (scale * fan**-0.5)).to(dtype))
    shape = (case.layers, case.batch, h)
    state = [torch.randn(shape, generator=rng).to(dtype) for _ in cell.state_names] if case.state else []
    return Inputs(x, weights, state)


# ---------------------------------------------------------------- the definition
def definition(
    name: str, given: Inputs, *, all_steps: bool = False, dropout: float = 0.0, seed: int = 0
) -> list[Tensor]:
    """Output and final states by torch's layers, one after the other, with the masks of the rule between them."""
    cell, h = CELLS[name], given.x
    hidden, batch = given.weights[1].shape[1], given.x.shape[0]
    ends: list[list[Tensor]] = []
    for number, layer in enumerate(given.layers):
        if number and dropout:
            drawn = mask(seed, batch, hidden, h.shape[1], number - 1, dropout).transpose(1, 2)
            h = h * drawn.to(h.dtype)
        begin = [part[number : number + 1] for part in given.state]
        begin = begin or [h.new_zeros((1, batch, hidden)) for _ in cell.state_names]
        if h.shape[1] == 0:  # torch's layer refuses
            h, end = h.new_zeros((batch, 0, hidden)), begin
        elif cell is LSTM:
            h, *end = torch.lstm(h, begin, layer, True, 1, 0.0, False, False, True)
        else:
            h, *end = torch.gru(h, begin[0], layer, True, 1, 0.0, False, False, True)
        ends.append(end)
    states = [torch.cat(parts) for parts in zip(*ends, strict=True)]
    return [h if all_steps else states[0][-1], *states]


def operator(name: str, given: Inputs, **settings: object) -> list[Tensor]:
    """The public function; output and states as one list."""
    if name == "lstm":
        output, (h, c) = lstm(given.x, given.layers, initial_state=tuple(given.state) or None, **settings)
        return [output, h, c]
    output, h = gru(given.x, given.layers, initial_state=given.state[0] if given.state else None, **settings)
    return [output, h]


def results(call: Callable[[Inputs], list[Tensor]], given: Inputs, used: Sequence[bool] | None = None) -> list[Tensor]:
    """What `call` returns, and the gradients of x, the states and the weights of a random weighing of it.

    `used`: which of the results the weighing takes; all by default.
    """
    leaves = [t.detach().requires_grad_() for t in given.tensors]  # the strides stay
    with torch.enable_grad():
        found = call(given.like(leaves))
        rng = torch.Generator().manual_seed(9)
        weighed = [(part * torch.randn(part.shape, generator=rng).to(part.dtype)).sum() for part in found]
        total = sum(part for part, take in zip(weighed, used or [True] * len(found), strict=True) if take)
        total = total + sum(leaf.sum() * 0 for leaf in leaves)  # without a step nothing may depend on them
        grads = torch.autograd.grad(total, leaves)
    return [*(part.detach() for part in found), *grads]


def apart(found: Sequence[Tensor], exact: Sequence[Tensor], limit: float) -> list[tuple[int, float]]:
    """Those further from the exact ones than `limit` (relative norm), by number."""
    errors = [relative(a, b) for a, b in zip(found, exact, strict=True)]
    return [(i, error) for i, error in enumerate(errors) if not error <= limit]


@cache
def exact_results(name: str, case: Case) -> tuple[list[Tensor], list[float]]:
    """float64 results and gradients, and the relative errors of torch's own layers in float32."""
    call = partial(definition, name, all_steps=case.all_steps)
    exact = results(call, inputs_of(name, case))
    narrow = results(call, inputs_of(name, case, F32))
    return exact, [relative(a, b) for a, b in zip(narrow, exact, strict=True)]


def both_bits(name: str, given: Inputs, **settings: object) -> list[Tensor]:
    return results(lambda given: operator(name, given, **settings), given)


# ---------------------------------------------------------------- the raw operators
def raw(name: str, given: Inputs, dropout: float = 0.0, seed: Tensor | None = None, all_steps: bool = False) -> tuple:
    """Arguments of qfast::lstm and qfast::gru, all but the last (keep)."""
    state = (*given.state, None, None)[: len(CELLS[name].state_names)]
    return given.x, given.weights, *state, dropout, seed, all_steps
