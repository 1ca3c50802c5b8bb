"""Stacks of LSTM and GRU layers in one operator, at all steps or at the last step only.

recurrent_twin.py states in plain torch what they compute. The kernels are in csrc/recurrent: recurrent_kernels.h,
called by recurrent.cpp, and recurrent.cu.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qfast.errors import DataError
from qfast.ops import transforms
from qfast.ops._common import (
    active_dropout,
    check_alike,
    check_floating,
    check_same,
    define,
    explain_memory,
    is_half,
    needs_grad,
    raise_out_of_memory,
    refuse_double_backward,
    require,
    require_saved,
    require_tensor,
    skip_autograd,
    widened,
)
from qfast.ops.philox import draw_seed
from qfast.ops.recurrent_twin import GRU, LSTM, Cell, backward_twin, empty_saved, forward_twin
from qfast.precision import products_for

__all__ = ["gru", "lstm"]

Layers = Sequence[Sequence[Tensor]]
_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@explain_memory("lstm")
def lstm(
    x: Tensor,
    layers: Layers,
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
    training: bool = False,
    all_steps: bool = False,
    precision: str = "float32",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Compute a stack of LSTM layers over each window.

    Parameters
    ----------
    x : Tensor [B, T, F], float32 or float64
        F is at least 1; B and T may be 0. Strides are arbitrary and nothing is copied. float16 and bfloat16, also with
        float32 weights, are computed in float32; the result is rounded once.
    layers : sequence of (weight_ih, weight_hh, bias_ih, bias_hh)
        At least one layer. Shapes [4H, F or H], [4H, H], [4H] and [4H], with torch's order of gates: input, forget,
        cell, output.
    initial_state : (h, c), optional
        State of each layer before the first step, each Tensor [L, B, H]. Zeros if None.
    dropout : float
        Probability that an output element of a layer, except the last layer, is dropped, if `training`. Each call draws
        one seed from torch's generator of x's device. Element (b, t, j) of layer l uses word b % 4 of the Philox
        counter (j, t, l, b // 4).
    all_steps : bool
        Return h of the last layer at all steps, not only at the last one. The last step alone is cheaper.
    precision : {"float32", "bf16", "bf16-if-available"}
        On a CPU, "bf16" rounds the operands of products to bfloat16 and sums in float32 (docs/precision.md). It needs
        float32 tensors. "bf16-if-available" computes in float32, with a warning, where the CPU lacks the instructions.

    Returns
    -------
    output : Tensor [B, T, H] if all_steps, else [B, H]
    (h, c) : Tensors [L, B, H]
        State of each layer after the last step, or the initial state if T is 0.

    Raises
    ------
    DataError
        Wrong type, dtype, shape or device, or no layer.
    ConfigError
        dropout is not in [0, 1], or precision is unknown.
    BackendError
        precision is "bf16" and the CPU lacks the instructions. The message names them.
    NotImplementedError
        Double backward, by `backward` or torch.autograd.grad(create_graph=True). Use torch.nn.LSTM, or torch.func.grad
        twice.
    torch.OutOfMemoryError
        Insufficient memory, on any device. The message states the size.

    Notes
    -----
    On the CPU without gradients, overlapping windows of consecutive rows (`rows.unfold(0, T, 1).transpose(1, 2)`)
    multiply each row by the first layer's weight_ih only once. The results are equal up to rounding.

    The bits do not depend on the number of threads.

    Without an initial state, the first step does not read weight_hh, so NaN or infinity in it has no effect there.

    torch.func transforms and forward mode compute with torch's operations, which support every derivative.

    Source
    ------
    Hochreiter and Schmidhuber 1997. Values and gradients equal those of torch.nn.LSTM(batch_first=True).

    Examples
    --------
    >>> layer = [torch.zeros(8, 3), torch.zeros(8, 2), torch.zeros(8), torch.zeros(8)]
    >>> output, (h, c) = lstm(torch.ones(5, 7, 3), [layer])
    >>> output.shape, h.shape
    (torch.Size([5, 2]), torch.Size([1, 5, 2]))
    """
    if initial_state is not None and (not isinstance(initial_state, (tuple, list)) or len(initial_state) != 2):
        raise DataError(f"lstm: initial_state: expected a pair (h, c), got {type(initial_state).__name__}.")
    state = tuple(initial_state or ())
    _check_structure(LSTM, x, layers, state)
    state = _like_input(x, state)
    if is_half(x):
        layers, state = _widened(x, layers, state)
        options: Any = {"dropout": dropout, "training": training, "all_steps": all_steps, "precision": precision}
        output, (h, c) = lstm(x.float(), layers, initial_state=state or None, **options)
        return output.to(x.dtype), (h.to(x.dtype), c.to(x.dtype))
    weights = _checked(LSTM, x, layers, state)
    products = products_for("lstm", precision, x)
    p = active_dropout("lstm", dropout, training and len(layers) > 1)
    seed = draw_seed(x.device) if p else None
    keep = needs_grad(x, *state, *weights)
    if transforms.active():
        output, h, c, *_ = forward_twin(LSTM, x, weights, state, p, seed, all_steps, False)
    elif keep and not torch.compiler.is_compiling():
        output, h, c = _Function.apply(LSTM, len(state), p, seed, all_steps, products, x, *state, *weights)
    else:
        h0, c0 = state or (None, None)
        with skip_autograd():
            output, h, c, *_ = torch.ops.qfast.lstm(x, weights, h0, c0, p, seed, all_steps, keep, products)
    return output, (h, c)


@explain_memory("gru")
def gru(
    x: Tensor,
    layers: Layers,
    *,
    initial_state: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = False,
    all_steps: bool = False,
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    """Compute a stack of GRU layers over each window.

    As in torch.nn.GRU, the reset gate multiplies h W_hn^T + b_hn, not h.

    Parameters
    ----------
    x : Tensor [B, T, F], float32 or float64
        As in `lstm`.
    layers : sequence of (weight_ih, weight_hh, bias_ih, bias_hh)
        At least one layer. Shapes [3H, F or H], [3H, H], [3H] and [3H], with torch's order of gates: reset, update,
        new.
    initial_state : Tensor [L, B, H], optional
        State of each layer before the first step. Zeros if None.
    dropout, training, all_steps, precision
        As in `lstm`.

    Returns
    -------
    output : Tensor [B, T, H] if all_steps, else [B, H]
    h : Tensor [L, B, H]
        State of each layer after the last step, or the initial state if T is 0.

    Raises
    ------
    DataError, ConfigError, BackendError, NotImplementedError
        As in `lstm`.

    Notes
    -----
    As in `lstm`.

    Source
    ------
    Cho et al. 2014. Values and gradients equal those of torch.nn.GRU(batch_first=True).

    Examples
    --------
    >>> layer = [torch.zeros(6, 3), torch.zeros(6, 2), torch.zeros(6), torch.zeros(6)]
    >>> output, h = gru(torch.ones(5, 7, 3), [layer], all_steps=True)
    >>> output.shape, h.shape
    (torch.Size([5, 7, 2]), torch.Size([1, 5, 2]))
    """
    state: tuple[Tensor, ...] = () if initial_state is None else (initial_state,)
    _check_structure(GRU, x, layers, state)
    state = _like_input(x, state)
    if is_half(x):
        layers, state = _widened(x, layers, state)
        options: Any = {"dropout": dropout, "training": training, "all_steps": all_steps, "precision": precision}
        output, h = gru(x.float(), layers, initial_state=state[0] if state else None, **options)
        return output.to(x.dtype), h.to(x.dtype)
    weights = _checked(GRU, x, layers, state)
    products = products_for("gru", precision, x)
    p = active_dropout("gru", dropout, training and len(layers) > 1)
    seed = draw_seed(x.device) if p else None
    keep = needs_grad(x, *state, *weights)
    if transforms.active():
        output, h, *_ = forward_twin(GRU, x, weights, state, p, seed, all_steps, False)
    elif keep and not torch.compiler.is_compiling():
        output, h = _Function.apply(GRU, len(state), p, seed, all_steps, products, x, *state, *weights)
    else:
        with skip_autograd():
            output, h, *_ = torch.ops.qfast.gru(x, weights, *(state or (None,)), p, seed, all_steps, keep, products)
    return output, h


# ---------------------------------------------------------------- argument checks
def _check_structure(cell: Cell, x: object, layers: Layers, state: Sequence[Tensor]) -> None:
    """Check that x, the weights and the state are tensors. `_checked` checks their dtypes and shapes."""
    name = cell.name
    require_tensor(name, "x", x)
    expected = f"{name}: layers: expected at least one (weight_ih, weight_hh, bias_ih, bias_hh), got "
    if not isinstance(layers, Sequence) or not all(isinstance(layer, Sequence) for layer in layers):
        raise DataError(f"{expected}{type(layers).__name__}. Remedy: a list of lists of tensors.")
    counts = [len(layer) for layer in layers]
    if set(counts) != {4}:
        raise DataError(f"{expected}{counts} tensors per layer.")
    for number, layer in enumerate(layers):
        for part, tensor in zip(_WEIGHTS, layer, strict=True):
            require_tensor(name, f"layers[{number}].{part}", tensor)
    for part, tensor in zip(cell.state_names, state, strict=False):
        require_tensor(name, f"initial_state.{part}", tensor)


def _like_input(x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the state in float32 if x is: under autocast it may be in half precision, unlike x."""
    return state if is_half(x) else tuple(part.float() if is_half(part) else part for part in state)


def _widened(x: Tensor, layers: Layers, state: Sequence[Tensor]) -> tuple[Layers, Any]:
    """Return the layers and the state with tensors of x's half precision converted to float32."""
    return [widened(layer, x.dtype) for layer in layers], tuple(widened(state, x.dtype))


def _checked(cell: Cell, x: Tensor, layers: Layers, state: Sequence[Tensor]) -> list[Tensor]:
    """Check dtypes, devices and shapes. Return the weights of all layers as one list."""
    name = cell.name
    check_floating(name, "x", x)
    fits = x.dim() == 3 and x.shape[2] > 0
    require(fits, name, f"x: expected shape [B, T, F] with F of at least 1, got {tuple(x.shape)}.")
    first = layers[0][1]
    fits, got = first.dim() == 2 and first.shape[1] > 0, tuple(first.shape)
    require(fits, name, f"layers[0].weight_hh: expected shape [{cell.gates} * H, H] with H of at least 1, got {got}.")
    hidden, rows = first.shape[1], cell.gates * first.shape[1]
    for number, layer in enumerate(layers):
        shapes = (rows, x.shape[2] if number == 0 else hidden), (rows, hidden), (rows,), (rows,)
        for part, tensor, shape in zip(_WEIGHTS, layer, shapes, strict=True):
            check_alike(name, f"layers[{number}].{part}", tensor, ("x", x), shape)
    for part, tensor in zip(cell.state_names, state, strict=False):
        check_alike(name, f"initial_state.{part}", tensor, ("x", x), (len(layers), x.shape[0], hidden))
    return [tensor for layer in layers for tensor in layer]


# ---------------------------------------------------------------- schemas and fakes
def _fake_forward(
    cell: Cell, x: Tensor, weights: Sequence[Tensor], *rest: Any, precision: int = 0
) -> tuple[Tensor, ...]:
    all_steps, keep = rest[len(cell.state_names) + 2 :][:2]
    batch, hidden = x.shape[0], weights[1].shape[1]
    output = x.new_empty((batch, x.shape[1], hidden) if all_steps else (batch, hidden))
    states = [x.new_empty((len(weights) // 4, batch, hidden)) for _ in cell.state_names]
    return output, *states, *empty_saved(x, weights, keep)


def _fake_backward(cell: Cell, grad_output: Tensor | None, *rest: Any, precision: int = 0) -> tuple[Any, ...]:
    n = len(cell.state_names)
    x, weights, (input_grad, state_grad) = rest[n], rest[n + 1], rest[2 * n + 7 :][:2]
    grad_x = x.new_empty((x.shape[0] if input_grad else 0, *x.shape[1:]))
    layers = len(weights) // 4 if state_grad else 0
    grad_states = [x.new_empty((layers, x.shape[0], weights[1].shape[1])) for _ in range(n)]
    return grad_x, *grad_states, [part.new_empty(part.shape) for part in weights]


# ---------------------------------------------------------------- gradients
def _save(cell, ctx, inputs, output, input_grad):  # type: ignore[no-untyped-def]
    n = len(cell.state_names)
    x, weights, *rest = inputs
    dropout, seed, all_steps, keep, ctx.precision = rest[n:]
    require_saved(cell.name, keep)
    state = [part for part in rest[:n] if part is not None]
    ctx.save_for_backward(x, seed, *output[1 + n :], *state, *weights)
    ctx.dropout, ctx.all_steps, ctx.n_states, ctx.input_grad = dropout, all_steps, len(state), input_grad
    ctx.mark_non_differentiable(*output[1 + n :])
    ctx.set_materialize_grads(False)


def _gradients(cell, ctx, grads):  # type: ignore[no-untyped-def]
    """Return the gradients of x, of the initial state (None for each part without one) and of the weights."""
    n = len(cell.state_names)
    x, seed, gates, carried, *rest = ctx.saved_tensors
    state, weights = rest[: ctx.n_states], rest[ctx.n_states :]
    optional_state = (*state, None, None)[:n]
    backward = getattr(torch.ops.qfast, f"{cell.name}_backward")
    inputs = (x, weights, *optional_state, ctx.dropout, seed, ctx.all_steps)
    try:
        grad_x, *grad_states, grad_weights = backward(
            *grads[: 1 + n], *inputs, gates, carried, ctx.input_grad, ctx.n_states > 0, ctx.precision
        )
    except (MemoryError, RuntimeError) as error:
        raise_out_of_memory(cell.name, error)
        raise
    return grad_x if ctx.input_grad else None, grad_states if ctx.n_states else [None] * n, grad_weights


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cell, n_states, dropout, seed, all_steps, precision, x, *tensors):  # type: ignore[no-untyped-def]
        n = len(cell.state_names)
        state, weights = tensors[:n_states], list(tensors[n_states:])
        inputs = (x, weights, *(*state, None, None)[:n], dropout, seed, all_steps, True, precision)
        with skip_autograd():
            output = getattr(torch.ops.qfast, cell.name)(*inputs)
        _save(cell, ctx, inputs, output, ctx.needs_input_grad[6])
        ctx.cell = cell
        return output[: 1 + n]

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        with skip_autograd():
            grad_x, grad_states, grad_weights = _gradients(ctx.cell, ctx, grads)
        return *(None,) * 6, grad_x, *grad_states[: ctx.n_states], *grad_weights


# ---------------------------------------------------------------- both operators
def _register(cell: Cell, schema: str, backward_schema: str) -> None:
    """Define torch.ops.qfast.<cell> and its backward, with twins, fakes and gradients."""
    n, name = len(cell.state_names), cell.name

    def forward(x: Tensor, weights: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
        state = [part for part in rest[:n] if part is not None]
        with torch.autocast(x.device.type, enabled=False):
            return forward_twin(cell, x, weights, state, *rest[n:])

    def backward(grad_output: Tensor | None, *rest: Any) -> tuple[Any, ...]:
        grads, (x, weights, *others) = rest[:n], rest[n:]
        state = [part for part in others[:n] if part is not None]
        return backward_twin(cell, grad_output, grads, x, weights, state, *others[n:])

    def save(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _save(cell, ctx, inputs, output, ctx.needs_input_grad[0])

    def gradients(ctx, *grads):  # type: ignore[no-untyped-def]
        others = (None,) * (len(ctx.needs_input_grad) - 2 - n)  # torch omits arguments that equal their defaults
        if all(grad is None for grad in grads):
            n_weights = len(ctx.saved_tensors) - 4 - ctx.n_states
            return None, [None] * n_weights, *(None,) * n, *others
        grad_x, grad_states, grad_weights = _gradients(cell, ctx, grads)
        return grad_x, grad_weights, *grad_states, *others

    define(name, schema, forward)
    define(f"{name}_backward", backward_schema, backward)
    torch.library.register_fake(f"qfast::{name}", partial(_fake_forward, cell))
    torch.library.register_fake(f"qfast::{name}_backward", partial(_fake_backward, cell))
    torch.library.register_autograd(f"qfast::{name}", gradients, setup_context=save)
    refuse_double_backward(
        name,
        remedy=f"torch.nn.{name.upper()} (the networks of qfast.nn use it with QFAST_BACKEND=torch), or "
        f"torch.func.grad within torch.func.grad, which {name} supports",
    )


_SETTINGS = "float dropout, Tensor? seed, bool all_steps"
_SAVED = "Tensor gates, Tensor kept, bool input_grad, bool state_grad, int precision=0"
_register(
    LSTM,
    f"(Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, {_SETTINGS}, bool keep, int precision=0) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "(Tensor? grad_output, Tensor? grad_h, Tensor? grad_c, "
    f"Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, {_SETTINGS}, {_SAVED}) "
    "-> (Tensor, Tensor, Tensor, Tensor[])",
)
_register(
    GRU,
    f"(Tensor x, Tensor[] weights, Tensor? h0, {_SETTINGS}, bool keep, int precision=0) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    f"(Tensor? grad_output, Tensor? grad_h, Tensor x, Tensor[] weights, Tensor? h0, {_SETTINGS}, {_SAVED}) "
    "-> (Tensor, Tensor, Tensor[])",
)


# ---------------------------------------------------------------- self-test
def self_test(name: str, device: torch.device) -> None:
    """Compare operator `name`, "lstm" or "gru", on `device` with plain torch, in float64, with gradients and dropout.

    Raises
    ------
    ArithmeticError
        The results differ.
    """
    cell = {"lstm": LSTM, "gru": GRU}[name]
    rng = torch.Generator().manual_seed(0)
    batch, steps, features, hidden = 7, 5, 3, 19  # 19 is not a multiple of a vector's lanes
    sizes = [(cell.gates * hidden, features), (cell.gates * hidden, hidden), (cell.gates * hidden,)]
    shapes = [*sizes, sizes[2], sizes[1], sizes[1], sizes[2], sizes[2]]
    weights = [(torch.randn(size, generator=rng, dtype=torch.float64) * 0.3).to(device) for size in shapes]
    x = torch.randn((batch, steps, features), generator=rng, dtype=torch.float64).to(device)
    state = [torch.randn((2, batch, hidden), generator=rng, dtype=torch.float64).to(device) for _ in cell.state_names]
    seed = torch.tensor([3], device=device)
    for all_steps in (False, True):
        arguments = (x, weights, *state, 0.25, seed, all_steps)
        results = getattr(torch.ops.qfast, name)(*arguments, True)
        expected = forward_twin(cell, x, weights, state, 0.25, seed, all_steps, True)
        *_, gates, carried = expected
        n = 1 + len(state)
        check_same(name, results[:n], expected[:n])  # kernel and twin may save different activations
        grads = results[:n]  # any values serve as gradients
        *grad_inputs, grad_weights = getattr(torch.ops.qfast, f"{name}_backward")(
            *grads, *arguments, *results[n:], True, True
        )
        *twin_inputs, twin_weights = backward_twin(
            cell, grads[0], grads[1:], x, weights, state, 0.25, seed, all_steps, gates, carried, True, True
        )
        check_same(name, [*grad_inputs, *grad_weights], [*twin_inputs, *twin_weights])
