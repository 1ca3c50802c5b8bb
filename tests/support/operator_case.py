"""The protocol that all tables of operator cases follow, and the computations shared by their tests.

A case fixes the sizes, the layout in memory and the settings of one call of an operator. The operator and its
definition in plain torch accept the same list of tensors and return the same results, so one function,
`results`, computes the values and gradients of both. `exact_results` computes the expected ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["F32", "F64", "OperatorCase", "errors_above", "exact_results", "relative_error", "results"]

F32, F64 = torch.float32, torch.float64
Outputs = Tensor | Sequence[Tensor]


class OperatorCase(Protocol):
    """One row of an operator's table of cases. Cases are hashable: `exact_results` caches by case."""

    @property
    def name(self) -> str:
        """The test id: sizes with the axis letters of the project, then the settings that are not defaults."""
        ...

    def inputs(self, dtype: torch.dtype = F64) -> Sequence[Tensor]:
        """Seeded tensors whose gradients the operator computes. float64 inputs hold float32 numbers."""
        ...

    def reference(self, tensors: Sequence[Tensor]) -> Outputs:
        """The definition in plain torch, in the dtype of its inputs."""
        ...

    def operator(self, tensors: Sequence[Tensor]) -> Outputs:
        """The public function of qfast.ops with the settings of this case."""
        ...


def results(
    call: Callable[[Sequence[Tensor]], Outputs],
    tensors: Sequence[Tensor],
    *,
    grad: Tensor | None = None,
    used: Sequence[bool] | None = None,
) -> list[Tensor]:
    """Outputs of `call(tensors)`, then the gradients of the tensors. The strides of the tensors are preserved.

    `grad` is the gradient of a single output; by default each output has a seeded random one. `used` selects the
    outputs that get a gradient, by default all. Tensors without influence have a gradient of zeros.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.enable_grad():
        outputs = call(leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    rng = torch.Generator().manual_seed(9)
    grads = [torch.randn(part.shape, generator=rng).to(part) for part in outputs] if grad is None else [grad]
    selected = [
        (part, grad)
        for part, grad, take in zip(outputs, grads, used or [True] * len(outputs), strict=True)
        if take and part.requires_grad
    ]
    gradients: Sequence[Tensor] = [torch.zeros_like(leaf) for leaf in leaves]
    if selected:
        gradients = torch.autograd.grad(
            [part for part, _ in selected],
            leaves,
            [grad for _, grad in selected],
            allow_unused=True,
            materialize_grads=True,
        )
    return [*(part.detach() for part in outputs), *gradients]


@cache
def exact_results(case: OperatorCase) -> tuple[list[Tensor], list[float]]:
    """float64 results and gradients of the definition, and the relative errors of the definition in float32."""
    exact, narrow = (results(case.reference, case.inputs(dtype)) for dtype in (F64, F32))
    return exact, [relative_error(a, b) for a, b in zip(narrow, exact, strict=True)]


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of `exact`; 0 where both are exactly 0."""
    assert result.shape == exact.shape, (result.shape, exact.shape)
    error = float((result.double() - exact.double()).norm())
    return error / max(float(exact.double().norm()), 1e-300) if error else 0.0


def errors_above(results: Sequence[Tensor], exact: Sequence[Tensor], limit: float) -> list[tuple[int, float]]:
    """Index and relative error of every result that is further than `limit` from the exact one."""
    errors = [relative_error(a, b) for a, b in zip(results, exact, strict=True)]
    return [(i, error) for i, error in enumerate(errors) if not error <= limit]
