"""LSTM and GRU over time-major sequences, one operator a layer, with gradients.

Reading order: the two public steps (`lstm`, `gru`), the plain-torch twins that state the meaning, then
schemas, fakes and gradients. The native kernels are csrc/recurrent.cpp and csrc/recurrent_kernels.h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qfast.errors import ConfigError, DataError
from qfast.ops import transforms

__all__ = ["gru", "lstm"]

Layers = Sequence[Sequence[Tensor]]
_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def lstm(x: Tensor, layers: Layers, *, dropout: float = 0.0, training: bool = False) -> tuple[Tensor, Tensor]:
    """Stacked LSTM that starts from a zero state.

    Parameters
    ----------
    x : Tensor [B, T, F], float32 or float64
        Any strides; T >= 1.
    layers : sequence of (weight_ih, weight_hh, bias_ih, bias_hh)
        Per layer [4H, F or H], [4H, H], [4H], [4H], gates in torch's order: input, forget, cell, output.
    dropout : float
        Applied to the output of each layer but the last, with torch's generator, if `training`.

    Returns
    -------
    output : Tensor [B, T, H]
        h of every step of the last layer (a view of [T, B, H]).
    last : Tensor [B, H]
        Its last step. Where only that is wanted, read it here: the gradient of `output` need not be built.

    Raises
    ------
    ValueError
        Wrong dtype, shape or device, no step, no layer.
    NotImplementedError
        A gradient of a gradient by `backward` or `torch.autograd.grad(create_graph=True)`: take torch's layer
        for it, or torch.func.grad twice.

    Notes
    -----
    Under torch.func's transforms (grad, jvp, vmap, jacrev, hessian, ...) and in forward-mode levels the
    steps are torch's own operations: every derivative is there, at torch's speed.

    The same call gives the same bits every time, but gradients of the weights are sums over tiles of rows
    whose number follows the thread count: other counts differ in the last bits.

    Source
    ------
    Hochreiter and Schmidhuber 1997; values and gradients as torch.nn.LSTM.

    Examples
    --------
    >>> layer = [torch.zeros(8, 3), torch.zeros(8, 2), torch.zeros(8), torch.zeros(8)]
    >>> output, last = lstm(torch.ones(5, 7, 3), [layer])
    >>> output.shape, last.shape
    (torch.Size([5, 7, 2]), torch.Size([5, 2]))
    """

    def layer(x: Tensor, keep: bool, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
        bias = b_ih + b_hh
        if transforms.active():
            output, last, *_ = _lstm_layer_twin(x, w_ih, w_hh, bias, False)
            return output, last
        return torch.ops.qfast.lstm_layer(x, w_ih, w_hh, bias, keep)[:2]

    return _stack("lstm", layer, x, layers, dropout if training else 0.0)


def gru(x: Tensor, layers: Layers, *, dropout: float = 0.0, training: bool = False) -> tuple[Tensor, Tensor]:
    """Stacked GRU that starts from a zero state. Arguments, results and notes as `lstm`.

    The gates stand in torch's order (reset, update, new) in [3H, .] weights, and as in torch the reset gate
    multiplies h W_hn^T + b_hn, not h.

    Source
    ------
    Cho et al. 2014; values and gradients as torch.nn.GRU.

    Examples
    --------
    >>> layer = [torch.zeros(6, 3), torch.zeros(6, 2), torch.zeros(6), torch.zeros(6)]
    >>> gru(torch.ones(5, 7, 3), [layer])[1].shape
    torch.Size([5, 2])
    """

    def layer(x: Tensor, keep: bool, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
        if transforms.active():
            output, last, _ = _gru_layer_twin(x, w_ih, w_hh, b_ih, b_hh, False)
            return output, last
        return torch.ops.qfast.gru_layer(x, w_ih, w_hh, b_ih, b_hh, keep)[:2]

    return _stack("gru", layer, x, layers, dropout if training else 0.0)


def _stack(
    operator: str, layer: Callable[..., tuple[Tensor, Tensor]], x: Tensor, layers: Layers, dropout: float
) -> tuple[Tensor, Tensor]:
    if not layers or any(len(weights) != 4 for weights in layers):
        raise DataError(
            f"{operator}: layers: expected at least one (weight_ih, weight_hh, bias_ih, bias_hh), "
            f"got {[len(weights) for weights in layers]} tensors per layer."
        )
    if not 0.0 <= dropout <= 1.0:
        raise ConfigError(f"{operator}: dropout must lie in [0, 1], got {dropout!r}.")
    _require(x.dim() == 3, operator, f"x: expected shape [B, T, F], got {tuple(x.shape)}.")
    steps = x.transpose(0, 1)
    for number, weights in enumerate(layers):
        for name, tensor in zip(_WEIGHTS, weights, strict=True):
            _require_alike(operator, name, tensor, x)
        if number and dropout:
            steps = functional.dropout(steps, dropout)
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (steps, *weights))
        steps, last = layer(steps, keep, *weights)
    return steps.transpose(0, 1), last


# ---------------------------------------------------------------- arguments
def _require(condition: bool, operator: str, message: str) -> None:
    if not condition:
        raise DataError(f"{operator}: {message}")


def _require_alike(operator: str, name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise DataError(
            f"{operator}: {name}: expected dtype and device of x ({x.dtype} on {x.device}), got {tensor.dtype} on "
            f"{tensor.device}. Remedy: x.to({name}), or the weights' module .to(x). New modules take torch's "
            "default dtype (torch.set_default_dtype)."
        )


def _check_layer(operator: str, x: Tensor, w_ih: Tensor, w_hh: Tensor, biases: dict[str, Tensor], gates: int) -> int:
    """H, once everything fits."""
    known = x.dtype in (torch.float32, torch.float64)
    _require(known, operator, f"x: expected dtype float32 or float64, got {x.dtype}.")
    _require(x.dim() == 3, operator, f"x: expected shape [T, B, F], got {tuple(x.shape)}.")
    _require(w_hh.dim() == 2, operator, f"weight_hh: expected shape [gates * H, H], got {tuple(w_hh.shape)}.")
    n_hidden = w_hh.shape[1]
    _require(
        x.shape[0] > 0 and x.shape[2] > 0 and n_hidden > 0,
        operator,
        "x: expected at least one step and one feature, weight_hh at least one unit, got "
        f"{tuple(x.shape)} and {tuple(w_hh.shape)}.",
    )
    wanted: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "weight_ih": (w_ih, (gates * n_hidden, x.shape[2])),
        "weight_hh": (w_hh, (gates * n_hidden, n_hidden)),
    }
    wanted |= {name: (bias, (gates * n_hidden,)) for name, bias in biases.items()}
    for name, (tensor, shape) in wanted.items():
        _require_alike(operator, name, tensor, x)
        fits = tuple(tensor.shape) == shape
        _require(fits, operator, f"{name}: expected shape {shape}, got {tuple(tensor.shape)}.")
    return n_hidden


# ---------------------------------------------------------------- plain-torch twins
# The two forward twins also serve inside torch's transforms, so they change no view in place.
def _lstm_layer_twin(x: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, ...]:
    n_hidden = _check_layer("lstm_layer", x, w_ih, w_hh, {"bias": bias}, 4)
    from_input = x @ w_ih.t() + bias
    h = cell = x.new_zeros((x.shape[1], n_hidden))
    hidden: list[Tensor] = []
    cells: list[Tensor] = []
    gates: list[Tensor] = []
    for part in from_input:
        i, f, g, o = (torch.addmm(part, h, w_hh.t()) if hidden else part).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        cell = f * cell + i * g
        h = o * cell.tanh()
        hidden.append(h)
        if keep:
            cells.append(cell)
            gates.append(torch.cat((i, f, g, o), 1))
    empty = x.new_empty((0, x.shape[1], 4 * n_hidden)), x.new_empty((0, x.shape[1], n_hidden))
    kept = (torch.stack(gates), torch.stack(cells)) if keep else empty
    return torch.stack(hidden), h.clone(), *kept


def _lstm_layer_backward_twin(
    grad_output: Tensor | None, grad_last: Tensor | None, x: Tensor, w_ih: Tensor, w_hh: Tensor, output: Tensor,
    gates: Tensor, cells: Tensor, input_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    grads = torch.empty_like(gates)
    grad_h = torch.zeros_like(output[0]) if grad_last is None else grad_last
    grad_cell = torch.zeros_like(output[0])
    for t in range(len(x) - 1, -1, -1):
        grad_h = grad_h if grad_output is None else grad_h + grad_output[t]
        i, f, g, o = gates[t].chunk(4, 1)
        tanh_cell = cells[t].tanh()
        grad_cell = grad_cell + grad_h * o * (1 - tanh_cell**2)
        before = cells[t - 1] if t else torch.zeros_like(tanh_cell)
        parts = (
            grad_cell * g * (i - i * i),
            grad_cell * before * (f - f * f),
            grad_cell * i * (1 - g * g),
            grad_h * tanh_cell * (o - o * o),
        )
        torch.cat(parts, 1, out=grads[t])
        grad_cell = grad_cell * f
        grad_h = grads[t] @ w_hh
    return _weight_grads(grads, grads, x, w_ih, output, input_grad)[:4]


def _gru_layer_twin(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, keep: bool
) -> tuple[Tensor, ...]:
    n_hidden = _check_layer("gru_layer", x, w_ih, w_hh, {"bias_ih": b_ih, "bias_hh": b_hh}, 3)
    from_input = x @ w_ih.t() + b_ih
    h = x.new_zeros((x.shape[1], n_hidden))
    hidden, gates = [], []
    for part in from_input:
        from_hidden = torch.addmm(b_hh, h, w_hh.t())
        r, z = (part[:, : 2 * n_hidden] + from_hidden[:, : 2 * n_hidden]).sigmoid_().chunk(2, 1)
        reset = from_hidden[:, 2 * n_hidden :]
        n = (part[:, 2 * n_hidden :] + r * reset).tanh_()
        h = n + z * (h - n)
        hidden.append(h)
        if keep:
            gates.append(torch.cat((n, r, z, reset), 1))
    kept = torch.stack(gates) if keep else x.new_empty((0, x.shape[1], 4 * n_hidden))
    return torch.stack(hidden), h.clone(), kept


def _gru_layer_backward_twin(
    grad_output: Tensor | None, grad_last: Tensor | None, x: Tensor, w_ih: Tensor, w_hh: Tensor, output: Tensor,
    gates: Tensor, input_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    of_input, of_hidden = (gates.new_empty((*gates.shape[:2], w_hh.shape[0])) for _ in range(2))
    grad_h = torch.zeros_like(output[0]) if grad_last is None else grad_last
    for t in range(len(x) - 1, -1, -1):
        grad_h = grad_h if grad_output is None else grad_h + grad_output[t]
        n, r, z, reset = gates[t].chunk(4, 1)
        before = output[t - 1] if t else torch.zeros_like(n)
        grad_n = grad_h * (1 - z) * (1 - n * n)
        grad_z = grad_h * (before - n) * (z - z * z)
        grad_r = grad_n * reset * (r - r * r)
        torch.cat((grad_r, grad_z, grad_n), 1, out=of_input[t])
        torch.cat((grad_r, grad_z, grad_n * r), 1, out=of_hidden[t])
        grad_h = torch.addmm(grad_h * z, of_hidden[t], w_hh)
    return _weight_grads(of_input, of_hidden, x, w_ih, output, input_grad)


def _weight_grads(
    of_input: Tensor, of_hidden: Tensor, x: Tensor, w_ih: Tensor, output: Tensor, input_grad: bool
) -> tuple[Tensor, ...]:
    """Gradients of x, W_ih, W_hh, b_ih and b_hh from those of x W_ih^T + b_ih and h W_hh^T + b_hh."""
    return (
        of_input @ w_ih if input_grad else x.new_empty((0, *x.shape[1:])),
        of_input.flatten(0, 1).t() @ x.flatten(0, 1),
        of_hidden[1:].flatten(0, 1).t() @ output[:-1].flatten(0, 1),
        of_input.sum((0, 1)),
        of_hidden.sum((0, 1)),
    )


# ---------------------------------------------------------------- schemas and fakes
_LSTM = "Tensor x, Tensor weight_ih, Tensor weight_hh"
_GRADS = "Tensor? grad_output, Tensor? grad_last"
_SCHEMAS: dict[str, tuple[str, Callable[..., Any]]] = {
    "lstm_layer": (f"({_LSTM}, Tensor bias, bool keep) -> (Tensor, Tensor, Tensor, Tensor)", _lstm_layer_twin),
    "lstm_layer_backward": (
        f"({_GRADS}, {_LSTM}, Tensor output, Tensor gates, Tensor cells, bool input_grad) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        _lstm_layer_backward_twin,
    ),
    "gru_layer": (
        f"({_LSTM}, Tensor bias_ih, Tensor bias_hh, bool keep) -> (Tensor, Tensor, Tensor)",
        _gru_layer_twin,
    ),
    "gru_layer_backward": (
        f"({_GRADS}, {_LSTM}, Tensor output, Tensor gates, bool input_grad) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _gru_layer_backward_twin,
    ),
}
for _name, (_schema, _twin) in _SCHEMAS.items():  # the twin serves wherever no kernel is loaded
    torch.library.define(f"qfast::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"qfast::{_name}", "CompositeExplicitAutograd", _twin)


def _fake_layer(x: Tensor, n_hidden: int, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    steps, batch = x.shape[:2]
    kept = steps if keep else 0
    sizes = (steps, batch, n_hidden), (batch, n_hidden), (kept, batch, 4 * n_hidden), (kept, batch, n_hidden)
    output, last, gates, cells = (x.new_empty(size) for size in sizes)
    return output, last, gates, cells


def _fake_grads(x: Tensor, w_ih: Tensor, w_hh: Tensor, input_grad: bool) -> tuple[Tensor, ...]:
    sizes = (x.shape[0] if input_grad else 0, *x.shape[1:]), w_ih.shape, w_hh.shape, w_hh.shape[:1], w_hh.shape[:1]
    return tuple(x.new_empty(size) for size in sizes)


@torch.library.register_fake("qfast::lstm_layer")
def _(x, w_ih, w_hh, bias, keep):  # type: ignore[no-untyped-def]
    return _fake_layer(x, _check_layer("lstm_layer", x, w_ih, w_hh, {"bias": bias}, 4), keep)


@torch.library.register_fake("qfast::gru_layer")
def _(x, w_ih, w_hh, b_ih, b_hh, keep):  # type: ignore[no-untyped-def]
    n_hidden = _check_layer("gru_layer", x, w_ih, w_hh, {"bias_ih": b_ih, "bias_hh": b_hh}, 3)
    return _fake_layer(x, n_hidden, keep)[:3]


@torch.library.register_fake("qfast::lstm_layer_backward")
def _(grad_output, grad_last, x, w_ih, w_hh, output, gates, cells, input_grad):  # type: ignore[no-untyped-def]
    return _fake_grads(x, w_ih, w_hh, input_grad)[:4]


@torch.library.register_fake("qfast::gru_layer_backward")
def _(grad_output, grad_last, x, w_ih, w_hh, output, gates, input_grad):  # type: ignore[no-untyped-def]
    return _fake_grads(x, w_ih, w_hh, input_grad)


# ---------------------------------------------------------------- gradients
def _save_layer(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, w_ih, w_hh, *_, keep = inputs
    if not keep:
        raise DataError("keep: must be true where a gradient is wanted.")
    hidden, _, *kept = output
    ctx.save_for_backward(x, w_ih, w_hh, hidden, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _backward_of(operator: str, n_biases: int) -> Callable[..., Any]:
    def backward(ctx, grad_output, grad_last, *_):  # type: ignore[no-untyped-def]
        if grad_output is None and grad_last is None:
            return (None,) * (4 + n_biases)
        of_x = ctx.needs_input_grad[0]
        run = getattr(torch.ops.qfast, f"{operator}_backward")
        grad_x, *others = run(grad_output, grad_last, *ctx.saved_tensors, of_x)
        return grad_x if of_x else None, *others, None

    return backward


def _no_double_backward(operator: str) -> Callable[..., Any]:
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        layer = {"lstm_layer": "LSTM", "gru_layer": "GRU"}[operator]
        raise NotImplementedError(
            f"{operator}: double backward is not supported. Remedy: torch.nn.{layer} where gradients of gradients "
            "are wanted (the networks of qfast.nn are such a layer with QFAST_BACKEND=torch), or torch.func.grad "
            "within torch.func.grad, which these functions support."
        )

    return backward


for _name, _n_biases in (("lstm_layer", 1), ("gru_layer", 2)):
    torch.library.register_autograd(f"qfast::{_name}", _backward_of(_name, _n_biases), setup_context=_save_layer)
    torch.library.register_autograd(f"qfast::{_name}_backward", _no_double_backward(_name))


# ---------------------------------------------------------------- self-test
def self_test(name: str, device: torch.device) -> None:
    """The kernels that serve `device` against the plain-torch twins, forward and backward, in float64.

    Parameters
    ----------
    name : "lstm" or "gru"

    Raises
    ------
    ArithmeticError
        They differ.
    """
    gates = {"lstm": 4, "gru": 3}[name]
    rng = torch.Generator().manual_seed(0)
    batch, steps, features, hidden = 7, 5, 3, 19  # 19: whole vectors and a rest
    sizes = [(steps, batch, features), (gates * hidden, features), (gates * hidden, hidden)]
    sizes += [(gates * hidden,)] * {"lstm": 1, "gru": 2}[name]
    given = [torch.randn(size, generator=rng, dtype=torch.float64).to(device) for size in sizes]
    forward = _SCHEMAS[f"{name}_layer"][1](*given, True)
    output, last, *kept = forward
    back = (output, last, *given[:3], output, *kept, True)  # any tensors of these shapes will do as gradients
    pairs = [
        (getattr(torch.ops.qfast, f"{name}_layer")(*given, True), forward),
        (
            getattr(torch.ops.qfast, f"{name}_layer_backward")(*back),
            _SCHEMAS[f"{name}_layer_backward"][1](*back),
        ),
    ]
    for found, expected in pairs:
        for ours, theirs in zip(found, expected, strict=True):
            error = float((ours - theirs).norm() / theirs.norm())
            if not error < 1e-12:
                raise ArithmeticError(f"{name}: native and plain torch differ by {error:.1e} (relative norm).")
