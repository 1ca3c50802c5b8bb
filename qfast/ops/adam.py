"""Element-wise gradient clipping and Adam's step for all parameters of a network in one call.

The kernels are in csrc/adam: adam_kernels.h (behind adam.cpp) and adam.cu. qfast/training/optim.py has the
optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from qfast.errors import DataError
from qfast.ops._common import FLOATING, check_same, define, explain_memory

__all__ = ["clipped_adam_"]

_LISTS = ("parameters", "gradients", "exp_avg", "exp_avg_sq", "steps")


@explain_memory("clipped_adam", "the same dense strides for all tensors of a parameter, which are then not copied")
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
    """Clip all gradients element by element, then apply one step of Adam, in place.

    For a parameter p with gradient g, moving averages m and v, and step count t::

        g = min(max(g, -limit), limit)
        t = t + 1
        d = g + weight_decay p
        m = beta1 m + (1 - beta1) d
        v = beta2 v + (1 - beta2) d^2
        p = p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Parameters
    ----------
    parameters, gradients, exp_avg, exp_avg_sq : sequences of tensors
        One tensor of each for every parameter, with the parameter's shape. All tensors have the same dtype, float32 or
        float64, and the same device. Strides are arbitrary, but the operator is fastest if the four tensors of a
        parameter are dense and have the same strides. All four are modified.
    steps : sequence of float32 tensors with one element
        Step counts on the device of the parameters. Each is increased by 1. The call does not synchronize with the
        device.
    lr, beta1, beta2, eps, weight_decay : float
        As in torch.optim.Adam.
    limit : float
        Bound of the absolute value of a gradient element, above 0. Infinity disables clipping. NaN stays NaN, and
        infinite gradients become the limit.
    ticket : int32 tensor with one element, optional
        Scratch memory for CUDA that contains 0 before and after the call. The blocks of a launch use it as a counter.
        If None, it is allocated. Concurrent calls need different tickets.

    Raises
    ------
    DataError
        The lists differ in length, a dtype, shape or device is wrong, several elements of a tensor share memory, or
        limit is not above 0.
    torch.OutOfMemoryError
        Insufficient memory, on any device. The message states the size.

    Source
    ------
    Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015. The order of operations is the one of torch's
    fused Adam on the same device. On a CPU with FMA instructions the results are bitwise equal to torch's.

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
    except RuntimeError:  # raised by the dispatcher before any kernel runs
        _require_tensors(lists)
        raise
    # The dispatcher does not count versions for custom operators. Without this, autograd would not notice that saved
    # tensors were modified.
    torch.autograd.graph.increment_version([tensor for part in lists for tensor in part])


# ---------------------------------------------------------------- arguments
def _require_tensors(lists: Iterable[Sequence[object]]) -> None:
    """Raise an error that names the first list element that is not a tensor."""
    for name, part in zip(_LISTS, lists, strict=True):
        for i, value in enumerate(part):
            if not isinstance(value, Tensor):
                raise DataError(
                    f"clipped_adam: {name}[{i}]: expected a tensor, got {type(value).__name__}. "
                    "Remedy: leave out parameters without gradients."
                )


def _check(lists: Sequence[Sequence[Tensor]], limit: float) -> None:
    """Raise an error that names the first tensor or number that does not fit, like the checks of the kernels."""
    parameters = lists[0]
    for name, part in zip(_LISTS, lists, strict=True):
        if len(part) != len(parameters):
            raise DataError(
                f"clipped_adam: {name}: expected {len(parameters)} tensors as in parameters, got {len(part)}."
            )
        for i, tensor in enumerate(part):
            where, step = f"clipped_adam: {name}[{i}]", name == "steps"
            if tensor.layout != torch.strided:
                raise DataError(f"{where}: expected a dense tensor, got {tensor.layout}. Remedy: .to_dense().")
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
                raise DataError(
                    f"{where}: expected the device of parameters[0], {parameters[0].device}, got {tensor.device}."
                )
            if not step and tensor.shape != parameters[i].shape:
                raise DataError(
                    f"{where}: expected the shape of parameters[{i}], {tuple(parameters[i].shape)}, "
                    f"got {tuple(tensor.shape)}."
                )
            if tensor.numel() and any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
                raise DataError(f"{where}: several elements share memory. Remedy: .clone() it.")
    if not limit > 0:
        raise DataError(f"clipped_adam: limit: expected a number above 0, got {limit}. Remedy: inf for no limit.")


# ---------------------------------------------------------------- plain-torch twin
@torch.no_grad()
def _twin(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: list[Tensor],
    ticket: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    limit: float,
) -> None:
    _check((parameters, gradients, exp_avg, exp_avg_sq, steps), limit)
    for p, g, m, v, step in zip(parameters, gradients, exp_avg, exp_avg_sq, steps, strict=True):
        step += 1
        g.clamp_(-limit, limit)
        d = g.add(p, alpha=weight_decay) if weight_decay else g
        m.lerp_(d, 1 - beta1)
        v.mul_(beta2).addcmul_(d, d, value=1 - beta2)
        t = step.double()
        step_size, correction = lr / (1 - beta1**t), (1 - beta2**t).sqrt()
        p.sub_(step_size.to(p.dtype) * m / (v.sqrt() / correction.to(p.dtype) + eps))


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
    """The results are written to the arguments."""


# ---------------------------------------------------------------- self-test
def self_test(device: torch.device) -> None:
    """Compare the operator on `device` with its plain-torch twin, in float64, with clipping and tensors of many sizes.

    Raises
    ------
    ArithmeticError
        The results differ.
    """
    rng = torch.Generator().manual_seed(0)
    shapes = [(3, 70), (1,), (0,), (2500,)]

    def random_tensors() -> list[Tensor]:
        return [torch.randn(shape, generator=rng, dtype=torch.float64).to(device) for shape in shapes]

    lists = [random_tensors(), random_tensors(), random_tensors(), [part.square() for part in random_tensors()]]
    steps = [torch.tensor(float(i), device=device) for i in range(len(shapes))]
    ours, twins = ([[tensor.clone() for tensor in part] for part in (*lists, steps)] for _ in range(2))
    twin: Any = _twin  # mypy cannot count unpacked arguments
    settings = (1e-2, 0.9, 0.999, 1e-8, 0.1, 1.0)
    for _ in range(3):
        torch.ops.qfast.clipped_adam_(*ours, None, *settings)
        twin(*twins, None, *settings)
    for results, expected in zip(ours, twins, strict=True):
        check_same("clipped_adam_", results, expected, tolerance=1e-13)
