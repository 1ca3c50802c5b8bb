"""Stacks of LSTM and GRU layers, at the last step only or at all of them.

Reading order: the two public functions and their checks, recurrent_cells.py for the meaning in plain torch, then
schemas, fakes and gradients.
The kernels are in csrc/recurrent: recurrent_kernels.h (behind recurrent.cpp) and recurrent.cu.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from qfast.errors import ConfigError, DataError
from qfast.ops import transforms
from qfast.ops.philox import draw_seed
from qfast.ops.recurrent_cells import GRU, LSTM, Cell, backward_twin, empty_kept, forward_twin

__all__ = ["gru", "lstm"]

Layers = Sequence[Sequence[Tensor]]
_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_HALVES = (torch.float16, torch.bfloat16)


def lstm(
    x: Tensor,
    layers: Layers,
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
    training: bool = False,
    all_steps: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Stacked LSTM in one operator.

    Parameters
    ----------
    x : Tensor [B, T, F], float32 or float64
        Any strides, read in place; float16 and bfloat16, also beside float32 weights, are computed in float32 and
        rounded once, at the end.
    layers : sequence of (weight_ih, weight_hh, bias_ih, bias_hh)
        Per layer [4H, F or H], [4H, H], [4H], [4H], gates in torch's order: input, forget, cell, output.
    initial_state : (h, c), each Tensor [L, B, H], optional
        State of each layer before the first step; zeros if None.
    dropout : float
        Applied to the output of each layer but the last, if `training`. Element (b, t, j) of layer l has word b % 4 of
        the Philox counter (j, t, l, b // 4) under one seed a call, drawn from torch's generator of x's device.
    all_steps : bool
        Whether `output` holds h of every step of the last layer or of the last step alone, which is cheaper.

    Returns
    -------
    output : Tensor [B, T, H] if all_steps, else [B, H]
    (h, c) : Tensors [L, B, H]
        State of each layer after the last step. Without a step (T = 0) the initial one.

    Raises
    ------
    ValueError
        Wrong dtype, shape or device, no layer, dropout outside [0, 1].
    NotImplementedError
        A gradient of a gradient by `backward` or `torch.autograd.grad(create_graph=True)`: take torch's layer
        for it, or torch.func.grad twice.

    Notes
    -----
    Without a gradient, windows of consecutive rows (`rows.unfold(0, T, 1).transpose(1, 2)`) share the products of
    their rows with the first layer's weight_ih on the CPU; the numbers stay the same up to rounding.

    The same call gives the same bits every time and with any number of threads.

    Under torch.func's transforms (grad, jvp, vmap, jacrev, hessian, ...) and in forward-mode levels the
    steps are torch's own operations: every derivative is there, at torch's speed.

    Source
    ------
    Hochreiter and Schmidhuber 1997; values and gradients as torch.nn.LSTM(batch_first=True).

    Examples
    --------
    >>> layer = [torch.zeros(8, 3), torch.zeros(8, 2), torch.zeros(8), torch.zeros(8)]
    >>> output, (h, c) = lstm(torch.ones(5, 7, 3), [layer])
    >>> output.shape, h.shape
    (torch.Size([5, 2]), torch.Size([1, 5, 2]))
    """
    if initial_state is not None and (not isinstance(initial_state, (tuple, list)) or len(initial_state) != 2):
        raise DataError(f"lstm: initial_state: expected a pair (h, c), got {type(initial_state).__name__}.")
    output, h, c = _run(LSTM, x, layers, initial_state or (), dropout if training else 0.0, dropout, all_steps)
    return output, (h, c)


def gru(
    x: Tensor,
    layers: Layers,
    *,
    initial_state: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = False,
    all_steps: bool = False,
) -> tuple[Tensor, Tensor]:
    """Stacked GRU in one operator. Arguments, results and notes as `lstm`; the state is h alone.

    The gates stand in torch's order (reset, update, new) in [3H, .] weights, and as in torch the reset gate
    multiplies h W_hn^T + b_hn, not h.

    Source
    ------
    Cho et al. 2014; values and gradients as torch.nn.GRU(batch_first=True).

    Examples
    --------
    >>> layer = [torch.zeros(6, 3), torch.zeros(6, 2), torch.zeros(6), torch.zeros(6)]
    >>> output, h = gru(torch.ones(5, 7, 3), [layer], all_steps=True)
    >>> output.shape, h.shape
    (torch.Size([5, 7, 2]), torch.Size([1, 5, 2]))
    """
    given = () if initial_state is None else (initial_state,)
    output, h = _run(GRU, x, layers, given, dropout if training else 0.0, dropout, all_steps)
    return output, h


# ---------------------------------------------------------------- arguments
def _run(
    cell: Cell, x: Tensor, layers: Layers, state: Sequence[Tensor], active_dropout: float, dropout: Any, all_steps: bool
) -> tuple[Tensor, ...]:
    _check_structure(cell, x, layers, state)
    if x.dtype in _HALVES:
        half = x.dtype  # weights of other types are left to the checks
        widened = [[part.float() if part.dtype == half else part for part in layer] for layer in layers]
        states = [part.float() if part.dtype == half else part for part in state]
        results = _run(cell, x.float(), widened, states, active_dropout, dropout, all_steps)
        return tuple(part.to(half) for part in results)
    weights = _checked(cell, x, layers, state, dropout)
    p = float(active_dropout) if len(layers) > 1 else 0.0
    seed = draw_seed(x.device) if p else None
    if transforms.active():
        return forward_twin(cell, x, weights, state, p, seed, all_steps, False)[: 1 + len(cell.state_names)]
    wants_grad = torch.is_grad_enabled() and any(part.requires_grad for part in (x, *state, *weights))
    if wants_grad and not torch.compiler.is_compiling():
        out: tuple[Tensor, ...] = _Recurrent.apply(cell, len(state), p, seed, all_steps, x, *state, *weights)
        return out
    optional = (*state, None, None)[: len(cell.state_names)]
    run = getattr(torch.ops.qfast, cell.name)
    result: tuple[Tensor, ...] = run(x, weights, *optional, p, seed, all_steps, wants_grad)
    return result[: 1 + len(cell.state_names)]


def _require(condition: bool, operator: str, message: str) -> None:
    if not condition:
        raise DataError(f"{operator}: {message}")


def _check_structure(cell: Cell, x: Any, layers: Any, state: Sequence[Any]) -> None:
    """Tensors where tensors belong; their shapes and dtypes are looked at later."""
    _require_tensor(cell, "x", x)
    wanted = f"{cell.name}: layers: expected at least one (weight_ih, weight_hh, bias_ih, bias_hh), got "
    if not isinstance(layers, Sequence) or not all(isinstance(layer, Sequence) for layer in layers):
        raise DataError(f"{wanted}{type(layers).__name__}: a list of lists of tensors is needed.")
    counts = [len(layer) for layer in layers]
    if set(counts) != {4}:
        raise DataError(f"{wanted}{counts} tensors per layer.")
    for number, layer in enumerate(layers):
        for part, tensor in zip(_WEIGHTS, layer, strict=True):
            _require_tensor(cell, f"layers[{number}].{part}", tensor)
    for part, tensor in zip(cell.state_names, state, strict=False):
        _require_tensor(cell, f"initial_state.{part}", tensor)


def _require_tensor(cell: Cell, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise DataError(f"{cell.name}: {name}: expected a tensor, got {type(value).__name__}.")


def _checked(cell: Cell, x: Tensor, layers: Layers, state: Sequence[Tensor], dropout: Any) -> list[Tensor]:
    """The weights of all layers in a row, once everything fits."""
    name = cell.name
    known = x.dtype in (torch.float32, torch.float64)
    _require(known, name, f"x: expected dtype float32 or float64, got {x.dtype}.")
    fits = x.dim() == 3 and x.shape[2] > 0
    _require(fits, name, f"x: expected shape [B, T, F] with F of at least 1, got {tuple(x.shape)}.")
    if isinstance(dropout, bool) or not isinstance(dropout, Real) or not 0.0 <= float(dropout) <= 1.0:
        raise ConfigError(f"{name}: dropout must lie in [0, 1], got {dropout!r}.")
    first = layers[0][1]
    fits, got = first.dim() == 2 and first.shape[1] > 0, tuple(first.shape)
    _require(fits, name, f"layers[0].weight_hh: expected shape [{cell.gates} * H, H] with H of at least 1, got {got}.")
    hidden, rows = first.shape[1], cell.gates * first.shape[1]
    for number, layer in enumerate(layers):
        shapes = (rows, x.shape[2] if number == 0 else hidden), (rows, hidden), (rows,), (rows,)
        for part, tensor, shape in zip(_WEIGHTS, layer, shapes, strict=True):
            _require_fits(name, f"layers[{number}].{part}", tensor, x, shape)
    for part, tensor in zip(cell.state_names, state, strict=False):
        _require_fits(name, f"initial_state.{part}", tensor, x, (len(layers), x.shape[0], hidden))
    return [tensor for layer in layers for tensor in layer]


def _require_fits(operator: str, name: str, tensor: Any, x: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise DataError(
            f"{operator}: {name}: expected dtype and device of x ({x.dtype} on {x.device}), got {tensor.dtype} on "
            f"{tensor.device}. Remedy: x.to({tensor.dtype}), or the weights' module .to(x). New modules take torch's "
            "default dtype (torch.set_default_dtype)."
        )
    _require(tuple(tensor.shape) == shape, operator, f"{name}: expected shape {shape}, got {tuple(tensor.shape)}.")


# ---------------------------------------------------------------- schemas and fakes
def _schemas(cell: Cell) -> dict[str, tuple[str, Callable[..., Any]]]:
    n = len(cell.state_names)
    initial = "".join(f", Tensor? {name}0" for name in cell.state_names)
    entering = "".join(f", Tensor? grad_{name}" for name in cell.state_names)
    given = f"Tensor x, Tensor[] weights{initial}, float dropout, Tensor? seed, bool all_steps"
    states = ", Tensor" * n

    def forward(x: Tensor, weights: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
        state = [part for part in rest[:n] if part is not None]
        with torch.autocast(x.device.type, enabled=False):
            return forward_twin(cell, x, weights, state, *rest[n:])

    def backward(grad_output: Tensor | None, *rest: Any) -> tuple[Any, ...]:
        grads, (x, weights, *given) = rest[:n], rest[n:]
        state = [part for part in given[:n] if part is not None]
        return backward_twin(cell, grad_output, grads, x, weights, state, *given[n:])

    return {
        cell.name: (f"({given}, bool keep) -> (Tensor{states}, Tensor, Tensor)", forward),
        f"{cell.name}_backward": (
            f"(Tensor? grad_output{entering}, {given}, Tensor gates, Tensor kept, bool input_grad, bool state_grad) "
            f"-> (Tensor{states}, Tensor[])",
            backward,
        ),
    }


def _fake_forward(cell: Cell, x: Tensor, weights: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    all_steps, keep = rest[-2:]
    batch, hidden = x.shape[0], weights[1].shape[1]
    output = x.new_empty((batch, x.shape[1], hidden) if all_steps else (batch, hidden))
    states = [x.new_empty((len(weights) // 4, batch, hidden)) for _ in cell.state_names]
    return output, *states, *empty_kept(x, weights, keep)


def _fake_backward(cell: Cell, grad_output: Any, *rest: Any) -> tuple[Any, ...]:
    n = len(cell.state_names)
    x, weights, input_grad, state_grad = rest[n], rest[n + 1], *rest[-2:]
    of_x = x.new_empty((x.shape[0] if input_grad else 0, *x.shape[1:]))
    layers = len(weights) // 4 if state_grad else 0
    of_states = [x.new_empty((layers, x.shape[0], weights[1].shape[1])) for _ in range(n)]
    return of_x, *of_states, [part.new_empty(part.shape) for part in weights]


# ---------------------------------------------------------------- gradients
def _backward(cell: Cell, ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Gradients of x, of the initial state (None each where there was none) and of the weights."""
    n = len(cell.state_names)
    x, seed, gates, kept, *rest = ctx.saved_tensors
    state, weights = rest[: ctx.n_states], rest[ctx.n_states :]
    optional = (*state, None, None)[:n]
    run = getattr(torch.ops.qfast, f"{cell.name}_backward")
    given = (x, weights, *optional, ctx.dropout, seed, ctx.all_steps, gates, kept)
    of_x, *of_states, of_weights = run(*grads[: 1 + n], *given, ctx.input_grad, ctx.n_states > 0)
    return of_x if ctx.input_grad else None, of_states if ctx.n_states else [None] * n, of_weights


def _save(cell: Cell, ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor], input_grad: bool) -> None:
    n = len(cell.state_names)
    x, weights, *rest = inputs
    dropout, seed, all_steps, keep = rest[n:]
    if not keep:
        raise DataError("keep: must be true where a gradient is wanted.")
    state = [part for part in rest[:n] if part is not None]
    ctx.save_for_backward(x, seed, *output[1 + n :], *state, *weights)
    ctx.dropout, ctx.all_steps, ctx.n_states, ctx.input_grad = dropout, all_steps, len(state), input_grad
    ctx.mark_non_differentiable(*output[1 + n :])
    ctx.set_materialize_grads(False)


class _Recurrent(torch.autograd.Function):
    """The operators in eager mode, where torch.library's own wrapping would cost more than a small batch."""

    @staticmethod
    def forward(ctx, cell, n_states, dropout, seed, all_steps, x, *tensors):  # type: ignore[no-untyped-def]
        n = len(cell.state_names)
        state, weights = tensors[:n_states], list(tensors[n_states:])
        inputs = (x, weights, *(*state, None, None)[:n], dropout, seed, all_steps, True)
        output = getattr(torch.ops.qfast, cell.name)(*inputs)
        _save(cell, ctx, inputs, output, ctx.needs_input_grad[5])
        ctx.cell = cell
        return output[: 1 + n]

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        of_x, of_states, of_weights = _backward(ctx.cell, ctx, grads)
        return None, None, None, None, None, of_x, *of_states[: ctx.n_states], *of_weights


def _register(cell: Cell) -> None:
    n = len(cell.state_names)
    for name, (schema, twin) in _schemas(cell).items():  # the twin serves wherever no kernel is loaded
        torch.library.define(f"qfast::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(f"qfast::{name}", "CompositeExplicitAutograd", twin)
    torch.library.register_fake(f"qfast::{cell.name}", partial(_fake_forward, cell))
    torch.library.register_fake(f"qfast::{cell.name}_backward", partial(_fake_backward, cell))

    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _save(cell, ctx, inputs, output, ctx.needs_input_grad[0])

    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        n_weights = len(ctx.saved_tensors) - 4 - ctx.n_states
        if all(grad is None for grad in grads):
            return None, [None] * n_weights, *(None,) * n, None, None, None, None
        of_x, of_states, of_weights = _backward(cell, ctx, grads)
        return of_x, of_weights, *of_states, None, None, None, None

    def refuse(ctx, *grads):  # type: ignore[no-untyped-def]
        raise NotImplementedError(
            f"{cell.name}: double backward is not supported. Remedy: torch.nn.{cell.name.upper()} where gradients of "
            "gradients are wanted (the networks of qfast.nn are such a layer with QFAST_BACKEND=torch), or "
            "torch.func.grad within torch.func.grad, which these functions support."
        )

    torch.library.register_autograd(f"qfast::{cell.name}", backward, setup_context=save)
    torch.library.register_autograd(f"qfast::{cell.name}_backward", refuse)


for _cell in (LSTM, GRU):
    _register(_cell)


# ---------------------------------------------------------------- self-test
def self_test(name: str, device: torch.device) -> None:
    """The kernels that serve `device` against plain torch, forward and backward, in float64, with dropout.

    Parameters
    ----------
    name : "lstm" or "gru"

    Raises
    ------
    ArithmeticError
        They differ.
    """
    cell = {"lstm": LSTM, "gru": GRU}[name]
    rng = torch.Generator().manual_seed(0)
    batch, steps, features, hidden = 7, 5, 3, 19  # 19: whole vectors and a rest
    sizes = [(cell.gates * hidden, features), (cell.gates * hidden, hidden), (cell.gates * hidden,)]
    shapes = [*sizes, sizes[2], sizes[1], sizes[1], sizes[2], sizes[2]]
    weights = [(torch.randn(size, generator=rng, dtype=torch.float64) * 0.3).to(device) for size in shapes]
    x = torch.randn((batch, steps, features), generator=rng, dtype=torch.float64).to(device)
    state = [torch.randn((2, batch, hidden), generator=rng, dtype=torch.float64).to(device) for _ in cell.state_names]
    seed = torch.tensor([3], device=device)
    for all_steps in (False, True):
        given = (x, weights, *state, 0.25, seed, all_steps)
        found = getattr(torch.ops.qfast, name)(*given, True)
        expected = forward_twin(cell, x, weights, state, 0.25, seed, all_steps, True)
        n = 1 + len(state)
        back = (*found[:n], *given, *found[n:], True, True)  # the results will do as their own gradients
        *of_inputs, of_weights = getattr(torch.ops.qfast, f"{name}_backward")(*back)
        twin_back = (found[0], found[1:n], x, weights, state, 0.25, seed, all_steps, *expected[n:], True, True)
        *twin_inputs, twin_weights = backward_twin(cell, *twin_back)
        pairs = [*zip(found[:n], expected[:n], strict=True), *zip(of_inputs, twin_inputs, strict=True)]
        for ours, theirs in [*pairs, *zip(of_weights, twin_weights, strict=True)]:
            error = float((ours - theirs).norm() / theirs.norm())
            if not error < 1e-12:
                raise ArithmeticError(f"{name}: native and plain torch differ by {error:.1e} (relative norm).")
