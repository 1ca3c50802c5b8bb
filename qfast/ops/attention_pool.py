"""Additive attention over the steps of a window: a weighted mean of the steps.

The kernels are in csrc/attention_pool: attention_pool_kernels.h, called by attention_pool.cpp, and attention_pool.cu.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    require,
    require_tensor,
    skip_autograd,
    widened,
)
from qfast.ops.philox import draw_seed, dropout_mask
from qfast.precision import product, products_for

__all__ = ["attention_pool"]

# Third word of the Philox counters. The recurrent operators use the number of a layer here, which is always smaller, so
# their masks differ even under the same seed.
_PHILOX_PLACE = 0x80000000


@explain_memory("attention_pool")
def attention_pool(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    score: Tensor,
    *,
    dropout: float = 0.0,
    training: bool = False,
    precision: str = "float32",
) -> Tensor:
    """Compute the sum over t of a_t h_t, where a is the softmax over t of score . tanh(weight h_t + bias).

    Parameters
    ----------
    h : Tensor [B, T, H], float32 or float64
        T is at least 1. Strides are arbitrary; h is copied only if features are not adjacent in memory. float16 and
        bfloat16 are computed in float32; the result is rounded once.
    weight : Tensor [A, H]
    bias : Tensor [A]
    score : Tensor [A] or [1, A]
        The weight of a linear layer with one output has shape [1, A].
    dropout : float
        Probability that an element of weight h_t + bias is dropped before the tanh, if `training`. Each call draws one
        seed from torch's generator of h's device. Element (b, t, a) uses word b % 4 of the Philox counter
        (a, t, 2**31, b // 4).
    precision : {"float32", "bf16", "bf16-if-available"}
        On a CPU, "bf16" rounds the operands of products with `weight` to bfloat16 and sums in float32
        (docs/precision.md). It needs float32 tensors. "bf16-if-available" computes in float32, with a warning, where
        the CPU lacks the instructions.

    Returns
    -------
    Tensor [B, H]
        The bits do not depend on the number of threads. Differentiable in all four tensors.

    Raises
    ------
    DataError
        Wrong type, dtype, shape or device, or T is 0.
    ConfigError
        dropout is not in [0, 1], or precision is unknown.
    BackendError
        precision is "bf16" and the CPU lacks the instructions. The message names them.
    NotImplementedError
        Double backward. Use torch.func.grad twice.
    torch.OutOfMemoryError
        Insufficient memory, on any device. The message states the size.

    Notes
    -----
    The tanh values [B, T, A] are not saved. The backward pass computes them again.

    torch.func transforms and forward mode compute with torch's operations, which support every derivative.

    Source
    ------
    The attention of ALSTM (Qin et al. 2017, Feng et al. 2019) as in pyqlib 0.9.7,
    qlib/contrib/model/pytorch_alstm.py.

    Examples
    --------
    >>> h = torch.tensor([[[1.0], [3.0]]])
    >>> attention_pool(h, torch.zeros(2, 1), torch.zeros(2), torch.ones(2)).tolist()
    [[2.0]]
    """
    if is_half(h):
        parameters = widened((weight, bias, score), h.dtype)
        return attention_pool(h.float(), *parameters, dropout=dropout, training=training, precision=precision).to(
            h.dtype
        )
    if isinstance(score, Tensor) and score.dim() == 2 and len(score) == 1:
        score = score[0]
    _check(h, weight, bias, score)
    p = active_dropout("attention_pool", dropout, training)
    products = products_for("attention_pool", precision, h)
    seed = draw_seed(h.device) if p else None
    if transforms.active():
        return _pool(h, weight, bias, score, p, seed)[0]
    if needs_grad(h, weight, bias, score) and not torch.compiler.is_compiling():
        return _Function.apply(h, weight, bias, score, p, seed, products)
    with skip_autograd():
        return torch.ops.qfast.attention_pool(h, weight, bias, score, p, seed, products)[0]


# ---------------------------------------------------------------- argument checks
def _check(h: Tensor, weight: Tensor, bias: Tensor, score: Tensor) -> None:
    op, like = "attention_pool", ("h", h)
    check_floating(op, "h", h)
    fits = h.dim() == 3 and h.shape[1] > 0 and h.shape[2] > 0
    require(fits, op, f"h: expected shape [B, T, H] with T and H of at least 1, got {tuple(h.shape)}.")
    width = h.shape[2]
    require_tensor(op, "weight", weight)
    fits = weight.dim() == 2 and weight.shape[1] == width
    require(fits, op, f"weight: expected shape [A, {width}], got {tuple(weight.shape)}.")
    check_alike(op, "weight", weight, like, tuple(weight.shape))
    check_alike(op, "bias", bias, like, (len(weight),))
    check_alike(op, "score", score, like, (len(weight),))


# ---------------------------------------------------------------- plain-torch twin
def _hidden(
    h: Tensor, weight: Tensor, bias: Tensor, dropout: float, seed: Tensor | None, precision: int
) -> tuple[Tensor, Tensor | None]:
    """Return tanh(drop(weight h + bias)) [B, T, A] and the factors of dropout."""
    projected, mask = product(h, weight.t(), precision) + bias, None
    if dropout and seed is not None:
        mask = dropout_mask(projected, _PHILOX_PLACE, dropout, seed)
        projected = projected * mask
    return projected.tanh(), mask


def _pool(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    score: Tensor,
    dropout: float,
    seed: Tensor | None,
    precision: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the result [B, H] and the attention weights [B, T]."""
    attention = (_hidden(h, weight, bias, dropout, seed, precision)[0] @ score).softmax(1)
    return (attention.unsqueeze(2) * h).sum(1), attention


def _forward_twin(h: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(h.device.type, enabled=False):
        return _pool(h, *others)


def _backward_twin(
    grad: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    score: Tensor,
    dropout: float,
    seed: Tensor | None,
    attention: Tensor,
    pooled: Tensor,
    precision: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, mask = _hidden(h, weight, bias, dropout, seed, precision)
    # Subtracting the mean does not change the gradient of the scores, but it removes the rounding error of the part
    # that all steps share.
    grad_attention = ((h - pooled.unsqueeze(1)) @ grad.unsqueeze(2)).squeeze(2)
    grad_scores = attention * (grad_attention - (attention * grad_attention).sum(1, keepdim=True))
    grad_projected = grad_scores.unsqueeze(2) * score * (1 - hidden**2)
    if mask is not None:
        grad_projected = grad_projected * mask
    rows = grad_projected.flatten(0, 1)
    grad_h = attention.unsqueeze(2) * grad.unsqueeze(1) + product(grad_projected, weight, precision)
    grad_score = grad_scores.flatten() @ hidden.flatten(0, 1)
    return grad_h.contiguous(), product(rows.t(), h.flatten(0, 1), precision), rows.sum(0), grad_score


# ---------------------------------------------------------------- schemas and fakes
_ARGUMENTS = "Tensor h, Tensor weight, Tensor bias, Tensor score, float dropout, Tensor? seed"
define("attention_pool", f"({_ARGUMENTS}, int precision=0) -> (Tensor pooled, Tensor attention)", _forward_twin)
define(
    "attention_pool_backward",
    f"(Tensor grad, {_ARGUMENTS}, Tensor attention, Tensor pooled, int precision=0) "
    "-> (Tensor grad_h, Tensor grad_weight, Tensor grad_bias, Tensor grad_score)",
    _backward_twin,
)


@torch.library.register_fake("qfast::attention_pool")
def _(h, weight, bias, score, dropout, seed, precision=0):  # type: ignore[no-untyped-def]
    return h.new_empty((h.shape[0], h.shape[2])), h.new_empty(h.shape[:2])


@torch.library.register_fake("qfast::attention_pool_backward")
def _(grad, h, weight, bias, score, dropout, seed, attention, pooled, precision=0):  # type: ignore[no-untyped-def]
    return h.new_empty(h.shape), *(part.new_empty(part.shape) for part in (weight, bias, score))


# ---------------------------------------------------------------- gradients
def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    h, weight, bias, score, ctx.dropout, seed, ctx.precision = inputs
    pooled, attention = output
    ctx.save_for_backward(h, weight, bias, score, seed, attention, pooled)
    ctx.mark_non_differentiable(attention)
    ctx.set_materialize_grads(False)


@explain_memory("attention_pool")
def _gradients(ctx, grad, *_):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 7
    h, weight, bias, score, seed, attention, pooled = ctx.saved_tensors
    inputs = h, weight, bias, score, ctx.dropout, seed
    gradients = torch.ops.qfast.attention_pool_backward(grad, *inputs, attention, pooled, ctx.precision)
    return *gradients, None, None, None


torch.library.register_autograd("qfast::attention_pool", _gradients, setup_context=_save)
refuse_double_backward("attention_pool")


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        with skip_autograd():
            output = torch.ops.qfast.attention_pool(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        with skip_autograd():
            return _gradients(ctx, grad)


# ---------------------------------------------------------------- self-test
def self_test(device: torch.device) -> None:
    """Compare the operator on `device` with plain torch, forward and backward, in float64, with dropout.

    Raises
    ------
    ArithmeticError
        The results differ.
    """
    rng = torch.Generator().manual_seed(0)
    batch, steps, hidden, width = 7, 5, 19, 9  # neither multiples nor divisors of a vector's lanes
    shapes = (batch, steps, hidden), (width, hidden), (width,), (width,), (batch, hidden)
    h, weight, bias, score, grad = (
        torch.randn(shape, generator=rng, dtype=torch.float64).to(device) for shape in shapes
    )
    arguments = (h, weight, bias, score, 0.25, torch.tensor([3], device=device))
    pooled, attention = results = torch.ops.qfast.attention_pool(*arguments)
    expected_pooled, expected_attention = expected = _pool(*arguments)
    check_same("attention_pool", results, expected)
    gradients = torch.ops.qfast.attention_pool_backward(grad, *arguments, attention, pooled)
    check_same("attention_pool", gradients, _backward_twin(grad, *arguments, expected_attention, expected_pooled))
