"""What the recurrent operators compute, in plain torch: two cells, one time loop, its gradient.

Serves wherever no kernel is loaded, and is what the kernels are tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qfast.ops.philox import dropout_mask

__all__ = ["GRU", "LSTM", "Cell", "backward_twin", "empty_kept", "forward_twin"]


# ---------------------------------------------------------------- the cells
# Also serve inside torch's transforms, so nothing is changed in place.
class Cell(NamedTuple):
    name: str
    gates: int  # blocks of H rows in the weights
    state_names: tuple[str, ...]
    # (from_input, from_hidden, state) -> (state, 4 kept gates): products with biases [B, gates * H], the rest [B, H]
    step: Callable[[Tensor, Tensor, Sequence[Tensor]], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
    # (gradients of the state after, kept gates, state before, c or h after)
    #   -> (gradients of from_input and of from_hidden, gradients of the state before except by way of from_hidden)
    step_backward: Callable[..., tuple[Tensor, Tensor, tuple[Tensor, ...]]]


def _lstm_step(from_input: Tensor, from_hidden: Tensor, state: Sequence[Tensor]) -> Any:
    i, f, g, o = (from_input + from_hidden).chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cell = f * state[1] + i * g
    return (o * cell.tanh(), cell), (i, f, g, o)


def _lstm_step_backward(grads: Sequence[Tensor], gates: Sequence[Tensor], before: Tensor, after: Tensor) -> Any:
    (grad_h, grad_cell), (i, f, g, o), tanh_cell = grads, gates, after.tanh()
    grad_cell = grad_cell + grad_h * o * (1 - tanh_cell**2)
    parts = (
        grad_cell * g * (i - i * i),
        grad_cell * before * (f - f * f),
        grad_cell * i * (1 - g * g),
        grad_h * tanh_cell * (o - o * o),
    )
    of_gates = torch.cat(parts, 1)
    return of_gates, of_gates, (torch.zeros_like(grad_h), grad_cell * f)


def _gru_step(from_input: Tensor, from_hidden: Tensor, state: Sequence[Tensor]) -> Any:
    (x_r, x_z, x_n), (h_r, h_z, reset) = from_input.chunk(3, 1), from_hidden.chunk(3, 1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * reset).tanh()
    return (n + z * (state[0] - n),), (n, r, z, reset)


def _gru_step_backward(grads: Sequence[Tensor], gates: Sequence[Tensor], before: Tensor, after: Tensor) -> Any:
    (grad_h,), (n, r, z, reset) = grads, gates
    grad_n = grad_h * (1 - z) * (1 - n * n)
    grad_r, grad_z = grad_n * reset * (r - r * r), grad_h * (before - n) * (z - z * z)
    of_input, of_hidden = torch.cat((grad_r, grad_z, grad_n), 1), torch.cat((grad_r, grad_z, grad_n * r), 1)
    return of_input, of_hidden, (grad_h * z,)


LSTM = Cell("lstm", 4, ("h", "c"), _lstm_step, _lstm_step_backward)
GRU = Cell("gru", 3, ("h",), _gru_step, _gru_step_backward)


# ---------------------------------------------------------------- the time loop
def _by_layer(weights: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    return [weights[at : at + 4] for at in range(0, len(weights), 4)]


def _layer_steps(
    cell: Cell, x: Tensor, weights: Sequence[Tensor], state: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...], list[tuple[Tensor, ...]], list[Tensor]]:
    """h [B, T, H] of every step of a layer, the state after them, each step's kept gates, and its c (or h)."""
    w_ih, w_hh, b_ih, b_hh = weights
    outputs, gates, kept = [], [], []
    for from_input in (x @ w_ih.t() + b_ih).unbind(1):
        state, step_gates = cell.step(from_input, state[0] @ w_hh.t() + b_hh, state)
        outputs.append(state[0])
        gates.append(step_gates)
        kept.append(state[-1])
    h = torch.stack(outputs, 1) if outputs else x.new_zeros((x.shape[0], 0, w_hh.shape[1]))
    return h, state, gates, kept


def _initial(cell: Cell, x: Tensor, weights: Sequence[Tensor], state: Sequence[Tensor], layer: int) -> Any:
    if state:
        return tuple(part[layer] for part in state)
    return (x.new_zeros((x.shape[0], weights[1].shape[1])),) * len(cell.state_names)


def forward_twin(
    cell: Cell, x: Tensor, weights: Sequence[Tensor], state: Sequence[Tensor], dropout: float, seed: Tensor | None,
    all_steps: bool, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    layers, h = _by_layer(weights), x
    states, all_gates, all_kept = [], [], []
    for number, layer in enumerate(layers):
        if number and dropout and seed is not None:
            h = h * dropout_mask(h, number - 1, dropout, seed)
        h, after, gates, kept = _layer_steps(cell, h, layer, _initial(cell, x, weights, state, number))
        states.append(after)
        if keep and gates:
            all_gates.append(torch.stack([torch.stack(parts, 1) for parts in gates]))
            all_kept.append(torch.stack(kept))
    output = h.contiguous() if all_steps else states[-1][0].clone()
    after_all = [torch.stack(parts) for parts in zip(*states, strict=True)]
    if all_gates:
        return output, *after_all, torch.stack(all_gates), torch.stack(all_kept)
    return output, *after_all, *empty_kept(x, weights, keep)


def empty_kept(x: Tensor, weights: Sequence[Tensor], keep: bool) -> tuple[Tensor, Tensor]:
    """What is kept for the backward: of each step four gates a unit in the cell's own order and c, or of the GRU h."""
    layers, hidden = len(weights) // 4, weights[1].shape[1]
    steps = x.shape[1] if keep else 0
    return x.new_empty((layers, steps, x.shape[0], 4, hidden)), x.new_empty((layers, steps, x.shape[0], hidden))


def backward_twin(
    cell: Cell, grad_output: Tensor | None, grad_state: Sequence[Tensor | None], x: Tensor, weights: Sequence[Tensor],
    state: Sequence[Tensor], dropout: float, seed: Tensor | None, all_steps: bool, gates: Tensor, kept: Tensor,
    input_grad: bool, state_grad: bool,
) -> tuple[Any, ...]:  # fmt: skip
    layers, (batch, steps, _) = _by_layer(weights), x.shape
    hidden = weights[1].shape[1]
    zero = x.new_zeros((batch, hidden))
    entering = grad_output if all_steps and grad_output is not None else None  # of the layer's every step [B, T, H]
    outputs = [_kept_outputs(cell, gates[number], kept[number]) for number in range(len(layers))]
    of_weights: list[Tensor] = []
    of_states = []
    for number in range(len(layers) - 1, -1, -1):
        w_ih, w_hh, *_ = layers[number]
        before = _initial(cell, x, weights, state, number)
        grads: Sequence[Tensor] = [zero if part is None else part[number] for part in grad_state]
        if number == len(layers) - 1 and not all_steps and grad_output is not None:
            grads = [grads[0] + grad_output, *grads[1:]]
        of_input, of_hidden = x.new_zeros((batch, steps, len(w_ih))), x.new_zeros((batch, steps, len(w_ih)))
        for t in range(steps - 1, -1, -1):
            if entering is not None:
                grads = [grads[0] + entering[:, t], *grads[1:]]
            earlier = kept[number, t - 1] if t else before[-1]
            now = gates[number, t].unbind(1), earlier, kept[number, t]
            of_input[:, t], of_hidden[:, t], grads = cell.step_backward(grads, *now)
            grads = [grads[0] + of_hidden[:, t] @ w_hh, *grads[1:]]
        of_states.append(grads)
        given, mask = x, None
        if number:
            given = outputs[number - 1]
            if dropout and seed is not None:
                mask = dropout_mask(given, number - 1, dropout, seed)
                given = given * mask
        shifted = torch.cat((before[0].unsqueeze(1), outputs[number]), 1)[:, :steps]
        flat_input, flat_hidden = of_input.flatten(0, 1).t(), of_hidden.flatten(0, 1).t()
        products = [flat_input @ given.flatten(0, 1), flat_hidden @ shifted.flatten(0, 1)]
        of_weights = [*products, flat_input.sum(1), flat_hidden.sum(1), *of_weights]
        if number or input_grad:
            entering = of_input @ w_ih
            entering = entering if mask is None else entering * mask
    of_x = entering if input_grad and entering is not None else x.new_empty((0, steps, x.shape[2]))
    if state_grad:
        initial = [torch.stack(parts[::-1]) for parts in zip(*of_states, strict=True)]
    else:
        initial = [x.new_empty((0, batch, hidden)) for _ in cell.state_names]
    return of_x.contiguous(), *initial, of_weights


def _kept_outputs(cell: Cell, gates: Tensor, kept: Tensor) -> Tensor:
    """h [B, T, H] of a layer from what it kept: [T, B, 4, H] and [T, B, H]."""
    return (gates[:, :, 3] * kept.tanh() if cell is LSTM else kept).transpose(0, 1)
