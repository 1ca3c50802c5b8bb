"""Cases of the LSTM and GRU operators, defined by torch's layers.

Inputs are float32 numbers in either dtype, so both dtypes compute from the same values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qfast import _backend
from qfast.ops import gru, lstm
from qfast.ops.recurrent_twin import GRU, LSTM, Cell
from support.operator_case import F64
from support.tensors import LAYOUTS, laid_out, philox_mask

NAMES = ["lstm", "gru"]
CELLS: dict[str, Cell] = {"lstm": LSTM, "gru": GRU}
NATIVE = _backend.native is not None


class RecurrentInputs(list[Tensor]):
    """x [B, T, F]; h (and c) [L, B, H] if the case has a state; then four weights for each layer."""

    def __init__(self, tensors: Sequence[Tensor], n_states: int) -> None:
        super().__init__(tensors)
        self.n_states = n_states

    @property
    def x(self) -> Tensor:
        return self[0]

    @property
    def state(self) -> list[Tensor]:
        return self[1 : 1 + self.n_states]

    @property
    def weights(self) -> list[Tensor]:
        return self[1 + self.n_states :]

    @property
    def layers(self) -> list[list[Tensor]]:
        return [self.weights[at : at + 4] for at in range(0, len(self.weights), 4)]

    def to(self, dtype: torch.dtype) -> RecurrentInputs:
        return RecurrentInputs([t.to(dtype) for t in self], self.n_states)


@dataclass(frozen=True)
class RecurrentCase:
    """Sizes of one stack of layers; `layout` is the layout of x in memory, see `laid_out`."""

    cell: str  # "lstm" or "gru"
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
        return "-".join([self.cell, *(f"{letter}{size}" for letter, size in sizes), *ends])

    @property
    def n_outputs(self) -> int:
        """The output and the final states: h, and c of an LSTM."""
        return 1 + len(CELLS[self.cell].state_names)

    def inputs(self, dtype: torch.dtype = F64, scale: float = 1.0, seed: int = 0) -> RecurrentInputs:
        rng = torch.Generator().manual_seed(seed)
        cell, h = CELLS[self.cell], self.hidden
        x = laid_out(rng, self.layout, self.batch, self.steps, self.features, dtype)
        weights = []
        for layer in range(self.layers):
            columns = self.features if layer == 0 else h
            for shape in ((cell.gates * h, columns), (cell.gates * h, h), (cell.gates * h,), (cell.gates * h,)):
                fan = shape[1] if len(shape) == 2 else 4
                weights.append((torch.randn(shape, generator=rng) * (scale * fan**-0.5)).to(dtype))
        shape = (self.layers, self.batch, h)
        state = [torch.randn(shape, generator=rng).to(dtype) for _ in cell.state_names] if self.state else []
        return RecurrentInputs([x, *state, *weights], len(state))

    def split(self, tensors: Sequence[Tensor]) -> RecurrentInputs:
        """The tensors under their names."""
        return RecurrentInputs(tensors, len(CELLS[self.cell].state_names) if self.state else 0)

    def reference(
        self, tensors: Sequence[Tensor], *, all_steps: bool | None = None, dropout: float = 0.0, seed: int = 0
    ) -> list[Tensor]:
        """Output and final states by torch's layers, one after the other, with qfast's dropout masks between them."""
        cell, arguments = CELLS[self.cell], self.split(tensors)
        h, hidden, batch = arguments.x, arguments.weights[1].shape[1], arguments.x.shape[0]
        ends: list[list[Tensor]] = []
        for number, layer in enumerate(arguments.layers):
            if number and dropout:
                mask = philox_mask(seed, batch, hidden, h.shape[1], number - 1, dropout).transpose(1, 2)
                h = h * mask.to(h.dtype)
            begin = [part[number : number + 1] for part in arguments.state]
            begin = begin or [h.new_zeros((1, batch, hidden)) for _ in cell.state_names]
            if h.shape[1] == 0:  # torch's layer raises an error
                h, end = h.new_zeros((batch, 0, hidden)), begin
            elif cell is LSTM:
                h, *end = torch.lstm(h, begin, layer, True, 1, 0.0, False, False, True)
            else:
                h, *end = torch.gru(h, begin[0], layer, True, 1, 0.0, False, False, True)
            ends.append(end)
        states = [torch.cat(parts) for parts in zip(*ends, strict=True)]
        return [h if self._all_steps(all_steps) else states[0][-1], *states]

    def operator(self, tensors: Sequence[Tensor], *, all_steps: bool | None = None, **settings: object) -> list[Tensor]:
        """Output and final states by qfast.ops.lstm or gru, as one list."""
        arguments, settings = self.split(tensors), {"all_steps": self._all_steps(all_steps), **settings}
        if self.cell == "lstm":
            state = tuple(arguments.state) or None
            output, (h, c) = lstm(arguments.x, arguments.layers, initial_state=state, **settings)
            return [output, h, c]
        state = arguments.state[0] if arguments.state else None
        output, h = gru(arguments.x, arguments.layers, initial_state=state, **settings)
        return [output, h]

    def raw(
        self,
        tensors: Sequence[Tensor],
        dropout: float = 0.0,
        seed: Tensor | None = None,
        all_steps: bool | None = None,
    ) -> tuple:
        """Arguments of torch.ops.qfast.lstm and gru, all but the last (`keep`)."""
        arguments = self.split(tensors)
        state = (*arguments.state, None, None)[: len(CELLS[self.cell].state_names)]
        return arguments.x, arguments.weights, *state, dropout, seed, self._all_steps(all_steps)

    def _all_steps(self, all_steps: bool | None) -> bool:
        return self.all_steps if all_steps is None else all_steps


def cases_of(cell: str) -> list[RecurrentCase]:
    case = partial(RecurrentCase, cell)
    return [
        # no rows, one row, and every remainder of the tiles
        case(0, 3, 2, 4, 2, state=True),
        case(0, 3, 2, 4, 2, all_steps=True),
        case(3, 0, 2, 5, 2, state=True),
        case(3, 0, 2, 5, 1, all_steps=True),
        case(1, 1, 1, 1),
        case(1, 1, 1, 1, 3, all_steps=True, state=True),
        *(case(b, 4, 6, 16, 2, state=b % 2 == 0, all_steps=b % 3 == 0) for b in (1, 2, 3, 4, 5, 7, 13, 23, 24, 25, 49)),
        case(100, 7, 6, 19, 2, all_steps=True),
        case(259, 5, 3, 16, 2),
        case(530, 9, 5, 8, 2, all_steps=True, state=True),
        # time
        *(case(5, t, 6, 16, 2, state=True) for t in (2, 3, 20, 60)),
        case(3, 250, 6, 8, 2, all_steps=True),
        # the models' sizes, with few rows
        case(26, 20, 20, 64, 2),
        case(9, 60, 6, 64, 2),
        case(11, 20, 158, 64, 1, all_steps=True),
        # widths on both sides of every vector and panel length
        *(
            case(7, 3, 5, h, 2, state=h % 2 == 1, all_steps=h % 3 == 0)
            for h in (1, 2, 3, 7, 8, 9, 15, 17, 19, 31, 32, 33)
        ),
        *(case(6, 3, 6, h, 2, state=True) for h in (47, 63, 65, 100, 127, 128, 130)),
        case(5, 3, 20, 256, 2, all_steps=True),
        case(1, 4, 20, 256, 1, state=True),
        case(3, 2, 6, 512, 1, state=True),
        *(case(6, 3, f, 9) for f in (1, 2, 6, 7, 16, 20, 33, 64, 158)),
        # depth
        case(6, 5, 4, 12, 3, all_steps=True, state=True),
        case(6, 5, 4, 12, 6),
        # strides
        *(case(14, 6, 5, 12, 2, layout=layout, all_steps=layout < "m") for layout in LAYOUTS),
        case(60, 20, 6, 32, 2, layout="windows"),
    ]


RECURRENT_CASES = [case for cell in NAMES for case in cases_of(cell)]
