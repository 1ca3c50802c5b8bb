"""Clipping of every gradient element and Adam's step, for all tensors of a network in one call.

The kernels are in csrc/adam: adam_kernels.h (behind adam.cpp) and adam.cu; qfast/training/optim.py uses them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from qfast.errors import DataError
from qfast.ops._common import FLOATING, check_same, define

__all__ = ["clipped_adam_"]

_LISTS = ("parameters", "gradients", "exp_avg", "exp_avg_sq", "steps")


def clipped_adam_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    limit: float = float("inf"),
    ticket: Tensor | None = None,
) -> None:
    """Clip, then step, in place: with g the gradient, m and v the averages, p the parameter and t the step,

    g = min(max(g, -limit), limit);  t = t + 1;  d = g + weight_decay p;  m = beta1 m + (1 - beta1) d;
    v = beta2 v + (1 - beta2) d^2;  p = p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps).

    Parameters
    ----------
    parameters, gradients, exp_avg, exp_avg_sq : sequences of tensors
        One of each for a parameter, of its shape; all float32 or all float64, on one device, with any strides.
        Fastest where the four lie in memory alike and without gaps. All four are written.
    steps : sequence of float32 tensors of one number
        On the parameters' device, a tensor for each parameter; each is increased by 1. No device is waited for.
    lr, beta1, beta2, eps, weight_decay : float
        As of torch.optim.Adam.
    limit : float
        Above 0; infinity for no limit. NaN stays NaN, and infinities become the limit.
    ticket : int32 tensor of one 0, optional
        On CUDA, memory in which the blocks of a launch count themselves; 0 again afterwards. None: it is allocated.
        Calls that may overlap need tickets of their own.

    Raises
    ------
    ValueError
        Lists of different lengths, wrong dtype, shape or device, memory shared by elements, limit not above 0.

    Source
    ------
    Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015. Order of operations as torch's fused Adam of the
    same device; on a CPU with FMA the results are torch's bit for bit.

    Examples
    --------
    >>> p, g = torch.zeros(2), torch.tensor([5.0, -0.5])
    >>> state = [torch.zeros(2)], [torch.zeros(2)], [torch.tensor(0.0)]
    >>> clipped_adam_([p], [g], *state, lr=0.1, limit=3.0)
    >>> p, g, state[2]
    (tensor([-0.1000,  0.1000]), tensor([ 3.0000, -0.5000]), [tensor(1.)])
    """
    lists = [list(part) for part in (parameters, gradients, exp_avg, exp_avg_sq, steps)]
    try:
        torch.ops.qfast.clipped_adam_(*lists, ticket, lr, beta1, beta2, eps, weight_decay, limit)
    except ValueError as error:
        raise error if isinstance(error, DataError) else DataError(str(error)) from None
    except RuntimeError as error:  # the dispatcher's, before any kernel
        _require_tensors(lists)
        raise error
    # The dispatcher counts no versions for an operator of ours: autograd must see that saved tensors have changed.
    torch.autograd.graph.increment_version([tensor for part in lists for tensor in part])


def _require_tensors(lists: Iterable[Sequence[object]]) -> None:
    for name, part in zip(_LISTS, lists, strict=True):
        for i, value in enumerate(part):
            if not isinstance(value, Tensor):
                raise DataError(
                    f"clipped_adam: {name}[{i}]: expected a tensor, got {type(value).__name__}. "
                    "Remedy: leave out parameters without a gradient."
                )


# ---------------------------------------------------------------- plain-torch twin
def _check(lists: Sequence[Sequence[Tensor]], limit: float) -> None:
    parameters = lists[0]
    for name, part in zip(_LISTS, lists, strict=True):
        if len(part) != len(parameters):
            raise DataError(
                f"clipped_adam: {name}: expected {len(parameters)} tensors as in parameters, got {len(part)}."
            )
        for i, tensor in enumerate(part):
            where, step = f"clipped_adam: {name}[{i}]", name == "steps"
            if step and (tensor.dtype != torch.float32 or tensor.numel() != 1):
                raise DataError(
                    f"{where}: expected one float32 number, got shape {tuple(tensor.shape)} of {tensor.dtype}."
                )
            if not step and tensor.dtype not in FLOATING:
                raise DataError(f"clipped_adam: {name}: expected dtype float32 or float64, got {tensor.dtype}.")
            if not step and tensor.dtype != parameters[0].dtype:
                raise DataError(
                    f"{where}: expected the dtype of parameters[0], got {tensor.dtype}. "
                    "Remedy: one call for each dtype."
                )
            if tensor.device != parameters[0].device:
                raise DataError(f"clipped_adam: {name}: expected the device of parameters[0], got another.")
            if not step and tensor.shape != parameters[i].shape:
                raise DataError(
                    f"{where}: expected the shape of parameters[{i}], {tuple(parameters[i].shape)}, "
                    f"got {tuple(tensor.shape)}."
                )
            if tensor.numel() and any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
                raise DataError(f"{where}: several elements share memory. Remedy: .clone() it.")
    if not limit > 0:
        raise DataError(f"clipped_adam: limit: expected a number above 0, got {limit}. Remedy: inf for no limit.")


@torch.no_grad()
def _twin(
    parameters: list[Tensor], gradients: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor],
    steps: list[Tensor], ticket: Tensor | None, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, limit: float,
) -> None:  # fmt: skip
    _check((parameters, gradients, exp_avg, exp_avg_sq, steps), limit)
    for p, g, m, v, step in zip(parameters, gradients, exp_avg, exp_avg_sq, steps, strict=True):
        step += 1
        g.clamp_(-limit, limit)
        toward = g.add(p, alpha=weight_decay) if weight_decay else g
        m.lerp_(toward, 1 - beta1)
        v.mul_(beta2).addcmul_(toward, toward, value=1 - beta2)
        count = step.double()
        size, root = lr / (1 - beta1**count), (1 - beta2**count).sqrt()
        p.sub_(size.to(p.dtype) * m / (v.sqrt() / root.to(p.dtype) + eps))


# ---------------------------------------------------------------- schema and fake
define(
    "clipped_adam_",
    "(Tensor(a!)[] parameters, Tensor(b!)[] gradients, Tensor(c!)[] exp_avg, Tensor(d!)[] exp_avg_sq, "
    "Tensor(e!)[] steps, Tensor(f!)? ticket, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "float limit) -> ()",
    _twin,
)


@torch.library.register_fake("qfast::clipped_adam_")
def _(*arguments: object) -> None:
    """All results are written to the arguments."""


# ---------------------------------------------------------------- self-test
def self_test(device: torch.device) -> None:
    """The kernel that serves `device` against its twin, in float64, with clipped gradients and ragged sizes.

    Raises
    ------
    ArithmeticError
        They differ.
    """
    rng = torch.Generator().manual_seed(0)
    shapes = [(3, 70), (1,), (0,), (2500,)]

    def drawn() -> list[Tensor]:
        return [torch.randn(shape, generator=rng, dtype=torch.float64).to(device) for shape in shapes]

    lists = [drawn(), drawn(), drawn(), [part.square() for part in drawn()]]
    steps = [torch.tensor(float(i), device=device) for i in range(len(shapes))]
    twin: Any = _twin  # takes its lists unpacked
    ours, twins = ([[t.clone() for t in part] for part in (*lists, steps)] for _ in range(2))
    for _ in range(3):
        numbers = (1e-2, 0.9, 0.999, 1e-8, 0.1, 1.0)
        torch.ops.qfast.clipped_adam_(*ours, None, *numbers)
        twin(*twins, None, *numbers)
    for results, expected in zip(ours, twins, strict=True):
        check_same("clipped_adam_", results, expected, tolerance=1e-13)
