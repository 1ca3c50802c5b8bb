"""Additive attention over the steps of a window: one weighted mean of the steps.

Reading order: the public function and its checks, the plain-torch twin that states the meaning, then schemas, fakes and
gradients.
The kernels are in csrc/attention_pool: attention_pool_kernels.h (behind attention_pool.cpp) and attention_pool.cu.
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
    is_half,
    needs_grad,
    refuse_double_backward,
    require,
    require_tensor,
    widened,
)
from qfast.ops.philox import draw_seed, dropout_mask

__all__ = ["attention_pool"]

# Where the recurrent operators count layers; no stack has this many, so one seed would do for both.
_COUNTER = 0x80000000


def attention_pool(
    h: Tensor, weight: Tensor, bias: Tensor, score: Tensor, *, dropout: float = 0.0, training: bool = False
) -> Tensor:
    """sum over t of a_t h_t with a = softmax over t of score . tanh(weight h_t + bias).

    Parameters
    ----------
    h : Tensor [B, T, H], float32 or float64
        Any strides, read in place where features stand side by side; T of at least 1. float16 and bfloat16 are
        computed in float32 and rounded once, at the end.
    weight : Tensor [A, H]
    bias : Tensor [A]
    score : Tensor [A]
        Or [1, A], the weight of a linear layer to one score.
    dropout : float
        Applied to weight h_t + bias, before the tanh, if `training`. Element (b, t, a) has word b % 4 of the Philox
        counter (a, t, 2**31, b // 4) under one seed a call, drawn from torch's generator of h's device.

    Returns
    -------
    Tensor [B, H]
        The same bits every time and with any number of threads. Differentiable in all four tensors.

    Raises
    ------
    ValueError
        Wrong dtype, shape or device, no step, dropout outside [0, 1].
    NotImplementedError
        A gradient of a gradient by `backward`; torch.func.grad twice gives it.

    Notes
    -----
    Of the tanh of the scores, [B, T, A], nothing is kept: the backward computes it again.

    Under torch.func's transforms (grad, jvp, vmap, ...) and in forward-mode levels the steps are torch's own
    operations: every derivative is there, at torch's speed.

    Source
    ------
    The attention of ALSTM (Qin et al. 2017, Feng et al. 2019) as pyqlib 0.9.7 has it,
    qlib/contrib/model/pytorch_alstm.py.

    Examples
    --------
    >>> h = torch.tensor([[[1.0], [3.0]]])
    >>> attention_pool(h, torch.zeros(2, 1), torch.zeros(2), torch.ones(2)).tolist()
    [[2.0]]
    """
    if is_half(h):
        parameters = widened((weight, bias, score), h.dtype)
        return attention_pool(h.float(), *parameters, dropout=dropout, training=training).to(h.dtype)
    if isinstance(score, Tensor) and score.dim() == 2 and len(score) == 1:
        score = score[0]
    _check(h, weight, bias, score)
    p = active_dropout("attention_pool", dropout, training)
    seed = draw_seed(h.device) if p else None
    if transforms.active():
        return _pool(h, weight, bias, score, p, seed)[0]
    if needs_grad(h, weight, bias, score) and not torch.compiler.is_compiling():
        return _Function.apply(h, weight, bias, score, p, seed)
    return torch.ops.qfast.attention_pool(h, weight, bias, score, p, seed)[0]


# ---------------------------------------------------------------- arguments
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


# ---------------------------------------------------------------- the meaning, in plain torch
def _activated(
    h: Tensor, weight: Tensor, bias: Tensor, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """tanh(drop(weight h + bias)) [B, T, A], and the mask that dropped."""
    projected, mask = h @ weight.t() + bias, None
    if dropout and seed is not None:
        mask = dropout_mask(projected, _COUNTER, dropout, seed)
        projected = projected * mask
    return projected.tanh(), mask


def _pool(
    h: Tensor, weight: Tensor, bias: Tensor, score: Tensor, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    attention = (_activated(h, weight, bias, dropout, seed)[0] @ score).softmax(1)
    return (attention.unsqueeze(2) * h).sum(1), attention


def _forward_twin(h: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(h.device.type, enabled=False):
        return _pool(h, *others)


def _backward_twin(
    grad: Tensor, h: Tensor, weight: Tensor, bias: Tensor, score: Tensor, dropout: float, seed: Tensor | None,
    attention: Tensor, pooled: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    activated, mask = _activated(h, weight, bias, dropout, seed)
    # What the steps have in common is taken off first: it moves no score, but its rounding would.
    along = ((h - pooled.unsqueeze(1)) @ grad.unsqueeze(2)).squeeze(2)
    of_scores = attention * (along - (attention * along).sum(1, keepdim=True))
    of_projected = of_scores.unsqueeze(2) * score * (1 - activated**2)
    if mask is not None:
        of_projected = of_projected * mask
    rows = of_projected.flatten(0, 1)
    of_h = attention.unsqueeze(2) * grad.unsqueeze(1) + of_projected @ weight
    of_score = of_scores.flatten() @ activated.flatten(0, 1)
    return of_h.contiguous(), rows.t() @ h.flatten(0, 1), rows.sum(0), of_score


# ---------------------------------------------------------------- schemas and fakes
_ARGUMENTS = "Tensor h, Tensor weight, Tensor bias, Tensor score, float dropout, Tensor? seed"
define("attention_pool", f"({_ARGUMENTS}) -> (Tensor pooled, Tensor attention)", _forward_twin)
define(
    "attention_pool_backward",
    f"(Tensor grad, {_ARGUMENTS}, Tensor attention, Tensor pooled) "
    "-> (Tensor grad_h, Tensor grad_weight, Tensor grad_bias, Tensor grad_score)",
    _backward_twin,
)


@torch.library.register_fake("qfast::attention_pool")
def _(h, weight, bias, score, dropout, seed):  # type: ignore[no-untyped-def]
    return h.new_empty((h.shape[0], h.shape[2])), h.new_empty(h.shape[:2])


@torch.library.register_fake("qfast::attention_pool_backward")
def _(grad, h, weight, bias, score, dropout, seed, attention, pooled):  # type: ignore[no-untyped-def]
    return h.new_empty(h.shape), *(part.new_empty(part.shape) for part in (weight, bias, score))


# ---------------------------------------------------------------- gradients
# Registered for the operator, where torch.compile finds it, and in a Function as well: eager calls through the
# registered one cost more than the kernel takes for a small batch.
def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    h, weight, bias, score, ctx.dropout, seed = inputs
    pooled, attention = output
    ctx.save_for_backward(h, weight, bias, score, seed, attention, pooled)
    ctx.mark_non_differentiable(attention)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, *_):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 6
    h, weight, bias, score, seed, *kept = ctx.saved_tensors
    given = h, weight, bias, score, ctx.dropout, seed
    return *torch.ops.qfast.attention_pool_backward(grad, *given, *kept), None, None


torch.library.register_autograd("qfast::attention_pool", _gradients, setup_context=_save)
refuse_double_backward("attention_pool")


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *given):  # type: ignore[no-untyped-def]
        output = torch.ops.qfast.attention_pool(*given)
        _save(ctx, given, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _gradients(ctx, grad)


# ---------------------------------------------------------------- self-test
def self_test(device: torch.device) -> None:
    """The kernels that serve `device` against plain torch, forward and backward, in float64, with dropout.

    Raises
    ------
    ArithmeticError
        They differ.
    """
    rng = torch.Generator().manual_seed(0)
    batch, steps, hidden, width = 7, 5, 19, 9  # whole vectors and a rest
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
