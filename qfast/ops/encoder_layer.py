"""A post-norm Transformer encoder layer in one operator, at all steps or at the last step only.

encoder_layer_twin.py states in plain torch what it computes. The kernels are in csrc/encoder_layer:
encoder_layer_kernels.h, called by encoder_layer.cpp, and encoder_layer.cu.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from qfast import _backend
from qfast.errors import ConfigError, DataError
from qfast.machine import may_keep
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
    refuse_double_backward,
    require_saved,
    skip_autograd,
    widened,
)
from qfast.ops.encoder_layer_twin import WEIGHTS, backward_twin, forward_twin
from qfast.ops.philox import draw_seed
from qfast.precision import products_for

__all__ = ["encoder_layer"]


@explain_memory("encoder_layer")
def encoder_layer(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    heads: int,
    eps: float = 1e-5,
    dropout: float = 0.0,
    training: bool = False,
    last_step: bool = False,
    precision: str = "float32",
) -> Tensor:
    """Apply self-attention, residual, norm, feed-forward block (ReLU), residual and norm to each window.

    There is no attention mask: every step attends to all steps of its window.

    Parameters
    ----------
    x : Tensor [B, T, D], float32 or float64
        T and D are at least 1. Strides are arbitrary. float16 and bfloat16 are computed in float32; the result is
        rounded once.
    weights : sequence of 12 tensors
        The parameters of torch.nn.TransformerEncoderLayer in its order: in_proj_weight [3D, D], in_proj_bias [3D],
        out_proj.weight [D, D], out_proj.bias [D], linear1.weight [M, D], linear1.bias [M], linear2.weight [D, M],
        linear2.bias [D], norm1.weight [D], norm1.bias [D], norm2.weight [D], norm2.bias [D].
    heads : int
        A divisor of D.
    eps : float
        Added to the variance in both norms, at least 0.
    dropout : float
        Probability of dropout at the four places of torch's layer, if `training`: attention weights, attention output,
        hidden values and feed-forward output. Each call draws one seed from torch's generator of x's device. Element
        (b, t, j) of the attention output, hidden values and feed-forward output uses word b % 4 of the Philox counter
        (j, t, place, b // 4) with place 0, 1 and 2. The attention weight of key s for query t in head h uses word t % 4
        of (s, b, 3 + h, t // 4).
    last_step : bool
        Return the result of the last step only. It equals the last step of the full result, dropout included, but
        queries, attention rows and the feed-forward block are computed for one step per window instead of T.
    precision : {"float32", "bf16", "bf16-if-available"}
        On a CPU, "bf16" rounds the operands of products to bfloat16 and sums in float32 (docs/precision.md). It needs
        float32 tensors. "bf16-if-available" computes in float32, with a warning, where the CPU lacks the instructions.

    Returns
    -------
    Tensor [B, T, D], or [B, D] if last_step
        The bits do not depend on the number of threads. Differentiable in x and all weights. On a GPU,
        `qfast.precision` determines how the feed-forward block multiplies float32.

    Raises
    ------
    DataError
        Wrong type, number, dtype, shape or device of a tensor, or a window without steps.
    ConfigError
        heads does not divide D, eps is below 0, dropout is not in [0, 1], or precision is unknown.
    BackendError
        precision is "bf16" and the CPU lacks the instructions. The message names them.
    NotImplementedError
        Double backward. Use torch.func.grad twice.
    torch.OutOfMemoryError
        Insufficient memory, on any device. The message states the size.

    Notes
    -----
    The forward pass saves x and 2 D + 2 numbers per step that has a result. Attention weights are computed again in the
    backward pass, and so are the M hidden values, unless there is memory to keep them (docs/encoder.md).

    torch.func transforms and forward mode compute with torch's operations, which support every derivative.

    Source
    ------
    Vaswani et al. 2017. Values and gradients equal those of torch.nn.TransformerEncoderLayer(batch_first=True).

    Examples
    --------
    >>> layer = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> encoder_layer(torch.zeros(3, 20, 8), list(layer.parameters()), heads=2, last_step=True).shape
    torch.Size([3, 8])
    """
    if is_half(x) and isinstance(weights, (list, tuple)):
        wide = widened(weights, x.dtype)
        options: Any = {"dropout": dropout, "training": training, "last_step": last_step, "precision": precision}
        return encoder_layer(x.float(), wide, heads=heads, eps=eps, **options).to(x.dtype)
    _check(x, weights, heads, eps)
    p = active_dropout("encoder_layer", dropout, training)
    products = products_for("encoder_layer", precision, x)
    seed = draw_seed(x.device) if p else None
    settings = int(heads), float(eps), p, seed, bool(last_step)
    if transforms.active():
        return forward_twin(x, weights, *settings)[0]
    keep = needs_grad(x, *weights)
    if keep and not torch.compiler.is_compiling():
        return _Function.apply(*settings, products, _keeps_hidden(x, weights, p, last_step, products), x, *weights)
    with skip_autograd():
        return torch.ops.qfast.encoder_layer(x, list(weights), *settings, keep, products)[0]


# ---------------------------------------------------------------- hidden values that are kept for the backward pass
SLICE_COLUMNS = 256  # kSliceColumns in csrc/feed_forward/feed_forward_pack.h


# The narrowest layers that gain from kept values. Narrower ones recompute a value faster than they could load it.
NARROWEST, NARROWEST_WITH_DROPOUT = 32, 16


def _keeps_hidden(x: Tensor, weights: Sequence[Tensor], dropout: float, last_step: bool, precision: int) -> bool:
    """Return whether the forward pass keeps the hidden values, which does not change the results.

    Only the float32 and float64 kernels of the CPU gain from it. Products in bf16 take less time than memory.
    """
    hidden, width = weights[WEIGHTS.index("linear1.weight")].shape
    if _backend.native is None or x.device.type != "cpu" or precision or hidden % SLICE_COLUMNS:
        return False
    if width < (NARROWEST_WITH_DROPOUT if dropout else NARROWEST):
        return False
    rows = x.shape[0] * (1 if last_step else x.shape[1])
    reusable = _backend.native.memory_cache_facts()["idle_bytes"]
    return may_keep(rows * hidden * x.element_size(), torch.get_num_threads(), reusable)


# ---------------------------------------------------------------- argument checks
def _check(x: Any, weights: Any, heads: Any, eps: Any) -> None:
    op = "encoder_layer"
    check_floating(op, "x", x)
    if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] == 0:
        raise DataError(f"{op}: x: expected shape [B, T, D] with T and D of at least 1, got {tuple(x.shape)}.")
    width = x.shape[2]
    if isinstance(heads, bool) or not isinstance(heads, Integral) or heads < 1 or width % int(heads):
        raise ConfigError(f"{op}: heads: expected a divisor of D = {width}, got {heads!r}.")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps >= 0:
        raise ConfigError(f"{op}: eps must be a number of at least 0, got {eps!r}.")
    if not isinstance(weights, (list, tuple)) or len(weights) != len(WEIGHTS):
        got = len(weights) if isinstance(weights, (list, tuple)) else type(weights).__name__
        raise DataError(
            f"{op}: weights: expected 12 tensors in the order of torch.nn.TransformerEncoderLayer.parameters(), "
            f"got {got}. Remedy: list(layer.parameters()) of a layer with bias=True."
        )
    first = weights[WEIGHTS.index("linear1.weight")]
    hidden = len(first) if isinstance(first, Tensor) and first.dim() == 2 else 1
    if hidden == 0:
        raise DataError(f"{op}: linear1.weight: expected at least one row, got {tuple(first.shape)}.")
    shapes = {
        "in_proj_weight": (3 * width, width),
        "in_proj_bias": (3 * width,),
        "out_proj.weight": (width, width),
        "linear1.weight": (hidden, width),
        "linear1.bias": (hidden,),
        "linear2.weight": (width, hidden),
    }  # the other parameters have shape (width,)
    for name, tensor in zip(WEIGHTS, weights, strict=True):
        check_alike(op, name, tensor, ("x", x), shapes.get(name, (width,)))


# ---------------------------------------------------------------- plain-torch twin, with the arguments of the operator
def _forward_twin(
    x: Tensor,
    weights: list[Tensor],
    heads: int,
    eps: float,
    dropout: float,
    seed: Tensor | None,
    last_step: bool,
    keep: bool,
    precision: int = 0,
    keep_hidden: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        output, normalised, scales = forward_twin(x, weights, heads, eps, dropout, seed, last_step, precision)
    if not keep:
        normalised, scales = normalised[:, :0].clone(), scales[:, :0].clone()
    # The hidden values have a layout of their own, which the kernels choose. backward_twin computes them again.
    hidden = x.new_zeros((len(x) if keep_hidden else 0, scales.shape[2], len(weights[WEIGHTS.index("linear1.weight")])))
    return output.contiguous(), normalised, scales, hidden  # with strided x, output may be strided


def _backward_twin(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    heads: int,
    dropout: float,
    seed: Tensor | None,
    last_step: bool,
    normalised: Tensor,
    scales: Tensor,
    hidden: Tensor,
    input_grad: bool,
    precision: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    with torch.autocast(x.device.type, enabled=False):
        grad_x, grad_weights = backward_twin(
            grad, x, weights, heads, dropout, seed, last_step, normalised, scales, precision
        )
    return (grad_x if input_grad else grad_x[:0].clone()), grad_weights


# ---------------------------------------------------------------- schemas and fakes
_INPUTS = "Tensor x, Tensor[] weights, int heads"
_DROPOUT = "float dropout, Tensor? seed, bool last_step"
define(
    "encoder_layer",
    f"({_INPUTS}, float eps, {_DROPOUT}, bool keep, int precision=0, bool keep_hidden=False) "
    "-> (Tensor output, Tensor normalised, Tensor scales, Tensor hidden)",
    _forward_twin,
)
define(
    "encoder_layer_backward",
    f"(Tensor grad, {_INPUTS}, {_DROPOUT}, Tensor normalised, Tensor scales, Tensor hidden, bool input_grad, "
    "int precision=0) -> (Tensor grad_x, Tensor[] grad_weights)",
    _backward_twin,
)


@torch.library.register_fake("qfast::encoder_layer")
def _(  # type: ignore[no-untyped-def]
    x, weights, heads, eps, dropout, seed, last_step, keep, precision=0, keep_hidden=False
):
    batch, steps, width = x.shape
    results, saved_rows = 1 if last_step else steps, batch if keep else 0
    output = x.new_empty((batch, width) if last_step else (batch, steps, width))
    hidden = x.new_empty((batch if keep_hidden else 0, results, len(weights[WEIGHTS.index("linear1.weight")])))
    return output, x.new_empty((2, saved_rows, results, width)), x.new_empty((2, saved_rows, results)), hidden


@torch.library.register_fake("qfast::encoder_layer_backward")
def _(  # type: ignore[no-untyped-def]
    grad, x, weights, heads, dropout, seed, last_step, normalised, scales, hidden, input_grad, precision=0
):
    grad_x = x.new_empty((x.shape[0] if input_grad else 0, *x.shape[1:]))
    return grad_x, [part.new_empty(part.shape) for part in weights]


# ---------------------------------------------------------------- gradients
def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weights, ctx.heads, _, ctx.dropout, seed, ctx.last_step, keep, ctx.precision, _ = inputs
    require_saved("encoder_layer", keep)
    ctx.save_for_backward(x, seed, *output[1:], *weights)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@explain_memory("encoder_layer")
def _input_gradients(ctx, grad, input_grad):  # type: ignore[no-untyped-def]
    """Return the gradients of x (None unless `input_grad`) and of the weights."""
    x, seed, normalised, scales, hidden, *weights = ctx.saved_tensors
    settings = ctx.heads, ctx.dropout, seed, ctx.last_step
    grad_x, grad_weights = torch.ops.qfast.encoder_layer_backward(
        grad, x, weights, *settings, normalised, scales, hidden, input_grad, ctx.precision
    )
    return grad_x if input_grad else None, grad_weights


def _gradients(ctx, grad, *_):  # type: ignore[no-untyped-def]
    others = (None,) * (len(ctx.needs_input_grad) - 2)  # torch does not pass arguments that equal their defaults
    if grad is None:
        return None, [None] * len(WEIGHTS), *others
    return *_input_gradients(ctx, grad, ctx.needs_input_grad[0]), *others


torch.library.register_autograd("qfast::encoder_layer", _gradients, setup_context=_save)
refuse_double_backward("encoder_layer")


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, heads, eps, dropout, seed, last_step, precision, keep_hidden, x, *weights
    ):
        inputs = (x, list(weights), heads, eps, dropout, seed, last_step, True, precision, keep_hidden)
        with skip_autograd():
            output = torch.ops.qfast.encoder_layer(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        with skip_autograd():
            grad_x, grad_weights = _input_gradients(ctx, grad, ctx.needs_input_grad[7])
        return *(None,) * 7, grad_x, *grad_weights


# ---------------------------------------------------------------- self-test
def self_test(device: torch.device) -> None:
    """Compare the operator on `device` with plain torch, forward and backward, in float64, with dropout.

    Raises
    ------
    ArithmeticError
        The results differ.
    """
    rng = torch.Generator().manual_seed(0)
    batch, steps, width, hidden, heads = 5, 7, 12, 83, 2

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(device)

    matrices = [(3 * width, width), (width, width), (hidden, width), (width, hidden)]
    weights = [part for shape in matrices for part in (0.3 * random(*shape), random(shape[0]))]
    weights += [random(width) for _ in range(4)]
    x, seed = random(batch, steps, width), torch.tensor([3], device=device)
    for last_step in (False, True):
        dropout = (0.25, seed, last_step)
        *results, hidden = torch.ops.qfast.encoder_layer(x, weights, heads, 1e-5, *dropout, True)
        expected = forward_twin(x, weights, heads, 1e-5, *dropout)
        check_same("encoder_layer", results, expected)
        grad_x, grad_weights = torch.ops.qfast.encoder_layer_backward(
            results[0], x, weights, heads, *dropout, *results[1:], hidden, True
        )
        twin_x, twin_weights = backward_twin(expected[0], x, weights, heads, *dropout, *expected[1:])
        check_same("encoder_layer", [grad_x, *grad_weights], [twin_x, *twin_weights])
