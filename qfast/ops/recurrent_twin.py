"""The recurrent operators in plain torch: the LSTM and GRU cells, the loop over steps, and gradients.

Devices without a kernel use it, and the tests compare the kernels with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qfast.ops.philox import dropout_mask
from qfast.precision import product

__all__ = ["GRU", "LSTM", "Cell", "backward_twin", "empty_saved", "forward_twin"]


Tensors = tuple[Tensor, ...]


# ---------------------------------------------------------------- cells
# torch.func transforms use them too, so they modify nothing in place.
class Cell(NamedTuple):
    """One kind of recurrent cell.

    Attributes
    ----------
    name : str
    gates : int
        Number of blocks of H rows in the weights.
    state_names : tuple of str
    step : callable
        (from_input, from_hidden, state) -> (state, four saved gates). The first two are the products with the weights,
        biases included, [B, gates * H]. The others have shape [B, H].
    step_backward : callable
        (gradients of the state after the step, saved gates, state before, c or h after) -> (gradient of from_input,
        gradient of from_hidden, gradients of the state before, except for the part through from_hidden).
    """

    name: str
    gates: int
    state_names: tuple[str, ...]
    step: Callable[[Tensor, Tensor, Tensors], tuple[Tensors, Tensors]]
    step_backward: Callable[[Tensors, Tensors, Tensor, Tensor], tuple[Tensor, Tensor, Tensors]]


def _lstm_step(from_input: Tensor, from_hidden: Tensor, state: Tensors) -> tuple[Tensors, Tensors]:
    i, f, g, o = (from_input + from_hidden).chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cell = f * state[1] + i * g
    return (o * cell.tanh(), cell), (i, f, g, o)


def _lstm_step_backward(
    grads: Tensors, gates: Tensors, before: Tensor, after: Tensor
) -> tuple[Tensor, Tensor, Tensors]:
    (grad_h, grad_cell), (i, f, g, o), tanh_cell = grads, gates, after.tanh()
    grad_cell = grad_cell + grad_h * o * (1 - tanh_cell**2)
    parts = (
        grad_cell * g * (i - i * i),
        grad_cell * before * (f - f * f),
        grad_cell * i * (1 - g * g),
        grad_h * tanh_cell * (o - o * o),
    )
    grad_gates = torch.cat(parts, 1)
    return grad_gates, grad_gates, (torch.zeros_like(grad_h), grad_cell * f)


def _gru_step(from_input: Tensor, from_hidden: Tensor, state: Tensors) -> tuple[Tensors, Tensors]:
    (x_r, x_z, x_n), (h_r, h_z, reset) = from_input.chunk(3, 1), from_hidden.chunk(3, 1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * reset).tanh()
    return (n + z * (state[0] - n),), (n, r, z, reset)


def _gru_step_backward(grads: Tensors, gates: Tensors, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensors]:
    (grad_h,), (n, r, z, reset) = grads, gates
    grad_n = grad_h * (1 - z) * (1 - n * n)
    grad_r, grad_z = grad_n * reset * (r - r * r), grad_h * (before - n) * (z - z * z)
    grad_input, grad_hidden = torch.cat((grad_r, grad_z, grad_n), 1), torch.cat((grad_r, grad_z, grad_n * r), 1)
    return grad_input, grad_hidden, (grad_h * z,)


LSTM = Cell("lstm", 4, ("h", "c"), _lstm_step, _lstm_step_backward)
GRU = Cell("gru", 3, ("h",), _gru_step, _gru_step_backward)


# ---------------------------------------------------------------- loop over steps
def _by_layer(weights: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    return [weights[at : at + 4] for at in range(0, len(weights), 4)]


def _layer_steps(
    cell: Cell, x: Tensor, weights: Sequence[Tensor], state: tuple[Tensor, ...], precision: int
) -> tuple[Tensor, tuple[Tensor, ...], list[tuple[Tensor, ...]], list[Tensor]]:
    """Return a layer's h at every step [B, T, H], its last state, and the gates and c (GRU: h) of each step."""
    w_ih, w_hh, b_ih, b_hh = weights
    outputs, gates, carried = [], [], []
    for from_input in (product(x, w_ih.t(), precision) + b_ih).unbind(1):
        state, step_gates = cell.step(from_input, product(state[0], w_hh.t(), precision) + b_hh, state)
        outputs.append(state[0])
        gates.append(step_gates)
        carried.append(state[-1])
    h = torch.stack(outputs, 1) if outputs else x.new_zeros((x.shape[0], 0, w_hh.shape[1]))
    return h, state, gates, carried


def _initial(
    cell: Cell, x: Tensor, weights: Sequence[Tensor], state: Sequence[Tensor], layer: int
) -> tuple[Tensor, ...]:
    """Return the initial state of a layer, zeros if `state` is empty."""
    if state:
        return tuple(part[layer] for part in state)
    return (x.new_zeros((x.shape[0], weights[1].shape[1])),) * len(cell.state_names)


def forward_twin(
    cell: Cell,
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    dropout: float,
    seed: Tensor | None,
    all_steps: bool,
    keep: bool,
    precision: int = 0,
) -> tuple[Tensor, ...]:
    """Return the output, the last states and the saved activations (gates, c or h). Parameters as in `lstm`."""
    layers, h = _by_layer(weights), x
    states, all_gates, all_carried = [], [], []
    for number, layer in enumerate(layers):
        if number and dropout and seed is not None:
            h = h * dropout_mask(h, number - 1, dropout, seed)
        initial = _initial(cell, x, weights, state, number)
        h, last_state, gates, carried = _layer_steps(cell, h, layer, initial, precision)
        states.append(last_state)
        if keep and gates:
            all_gates.append(torch.stack([torch.stack(parts, 1) for parts in gates]))
            all_carried.append(torch.stack(carried))
    output = h.contiguous() if all_steps else states[-1][0].clone()
    last_states = [torch.stack(parts) for parts in zip(*states, strict=True)]
    if all_gates:
        return output, *last_states, torch.stack(all_gates), torch.stack(all_carried)
    return output, *last_states, *empty_saved(x, weights, keep)


def empty_saved(x: Tensor, weights: Sequence[Tensor], keep: bool) -> tuple[Tensor, Tensor]:
    """Allocate the saved activations: four gates per unit and step, in the cell's order, and c (GRU: h)."""
    layers, hidden = len(weights) // 4, weights[1].shape[1]
    steps = x.shape[1] if keep else 0
    return x.new_empty((layers, steps, x.shape[0], 4, hidden)), x.new_empty((layers, steps, x.shape[0], hidden))


def backward_twin(
    cell: Cell,
    grad_output: Tensor | None,
    grad_state: Sequence[Tensor | None],
    x: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    dropout: float,
    seed: Tensor | None,
    all_steps: bool,
    gates: Tensor,
    carried: Tensor,
    input_grad: bool,
    state_grad: bool,
    precision: int = 0,
) -> tuple[Any, ...]:
    """Return the gradients of x, of each part of the initial state, and of the weights (a list)."""
    layers, (batch, steps, _) = _by_layer(weights), x.shape
    hidden = weights[1].shape[1]
    zero = x.new_zeros((batch, hidden))
    grad_steps = grad_output if all_steps and grad_output is not None else None  # of the layer's output [B, T, H]
    outputs = [_saved_outputs(cell, gates[number], carried[number]) for number in range(len(layers))]
    grad_weights: list[Tensor] = []
    grad_states = []
    for number in range(len(layers) - 1, -1, -1):
        w_ih, w_hh, *_ = layers[number]
        initial = _initial(cell, x, weights, state, number)
        grads: Tensors = tuple(zero if part is None else part[number] for part in grad_state)
        if number == len(layers) - 1 and not all_steps and grad_output is not None:
            grads = (grads[0] + grad_output, *grads[1:])
        grad_input, grad_hidden = x.new_zeros((batch, steps, len(w_ih))), x.new_zeros((batch, steps, len(w_ih)))
        for t in range(steps - 1, -1, -1):
            if grad_steps is not None:
                grads = (grads[0] + grad_steps[:, t], *grads[1:])
            before = carried[number, t - 1] if t else initial[-1]
            activations = gates[number, t].unbind(1), before, carried[number, t]
            grad_input[:, t], grad_hidden[:, t], grads = cell.step_backward(grads, *activations)
            grads = (grads[0] + product(grad_hidden[:, t], w_hh, precision), *grads[1:])
        grad_states.append(grads)
        layer_input, mask = x, None
        if number:
            layer_input = outputs[number - 1]
            if dropout and seed is not None:
                mask = dropout_mask(layer_input, number - 1, dropout, seed)
                layer_input = layer_input * mask
        previous = torch.cat((initial[0].unsqueeze(1), outputs[number]), 1)[:, :steps]
        flat_input, flat_hidden = grad_input.flatten(0, 1).t(), grad_hidden.flatten(0, 1).t()
        pairs = (flat_input, layer_input.flatten(0, 1)), (flat_hidden, previous.flatten(0, 1))
        grad_weights = [
            *(product(*pair, precision) for pair in pairs),
            flat_input.sum(1),
            flat_hidden.sum(1),
            *grad_weights,
        ]
        if number or input_grad:
            grad_steps = product(grad_input, w_ih, precision)
            grad_steps = grad_steps if mask is None else grad_steps * mask
    grad_x = grad_steps if input_grad and grad_steps is not None else x.new_empty((0, steps, x.shape[2]))
    if state_grad:
        grad_initial = [torch.stack(parts[::-1]) for parts in zip(*grad_states, strict=True)]
    else:
        grad_initial = [x.new_empty((0, batch, hidden)) for _ in cell.state_names]
    return grad_x.contiguous(), *grad_initial, grad_weights


def _saved_outputs(cell: Cell, gates: Tensor, carried: Tensor) -> Tensor:
    """Return a layer's h [B, T, H] from its saved activations, [T, B, 4, H] and [T, B, H]."""
    return (gates[:, :, 3] * carried.tanh() if cell is LSTM else carried).transpose(0, 1)
