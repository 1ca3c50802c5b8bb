"""Random operator calls: values and gradients, dropout, function transforms, misuse."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qfast import _backend
from support.operator_case import F32, F64, results
from torture import misuse
from torture.operator_cases import Operator, build, draw_operator, make_inputs, relaid
from torture.protocol import Case, Part, choose, require

CHECKS = {
    "values": 5.0,
    "narrow": 3.0,
    "half": 1.0,
    "dropout": 2.0,
    "transforms": 1.0,
    "arguments": 4.0,
    "tampered": 4.0,
}
EXACT = 1e-9  # of float64, relative to the norm
# float32: times the error of the definition in float32, and at least a few roundings
TIMES_DEFINITION, FEW_ROUNDINGS = 10.0, 2e-5
HALF = {torch.float16: 4e-3, torch.bfloat16: 3e-2}  # the result is rounded once, sums of gradients more often
NOISE = 1e-3  # gradients below this share of the largest one are judged relative to this share
TRIES = 3  # sets of data, of which one may have a value at the bend of a ReLU
TANGENT_SEED = 1 << 20


def draw(rng: random.Random, number: int) -> Case:
    """A call of an operator, and what to check."""
    case = draw_operator(rng)
    check = choose(rng, CHECKS)
    operator, _ = build(case)
    if (check == "dropout" and operator.masked is None) or (check == "transforms" and not operator.transforms):
        check = "values"
    isas = [None] if _backend.native is None else _backend.native.available_isas()
    case |= {"check": check, "isa": rng.choice(isas), "threads": rng.choice([1, 1, 2, 3])}
    if check == "dropout":
        case["dropout"] = rng.choice([0.1, 0.5, 0.9, 1.0])
    return case


def check(case: Case, folder: Path) -> Counter[str]:
    """Run a case and compare it."""
    if case["isa"] is not None:
        _backend.native.select_isa(case["isa"])
    torch.set_num_threads(case["threads"])
    calls = RUNS[case["check"]](case)
    return Counter({"calls": calls, case["check"]: calls})


# ---------------------------------------------------------------- values
def _laid_out(case: Case, operator_case: Any, dtype: torch.dtype, seed: int) -> list[Tensor]:
    rng = random.Random(case["data"])
    return [relaid(tensor, rng) for tensor in make_inputs(operator_case, dtype, seed)]


def _share(error: Tensor, exact: Sequence[Tensor], number: int, outputs: int) -> float:
    """Norm of an error relative to the norm of the exact tensor, or to a share of the largest gradient."""
    norms = [float(part.nan_to_num(7.0).norm()) for part in exact]
    least = NOISE * max(norms[outputs:], default=0.0) if number >= outputs else 0.0
    return float(error.norm()) / max(norms[number], least, 1e-300)


def _compare(computed: Sequence[Tensor], exact: Sequence[Tensor], outputs: int, limits: Sequence[float]) -> list[str]:
    """Descriptions of the tensors whose error exceeds its limit. NaN must be at the same places."""
    problems = []
    for number, (ours, wanted, limit) in enumerate(zip(computed, exact, limits, strict=True)):
        name = f"output {number}" if number < outputs else f"gradient {number - outputs}"
        if ours.shape != wanted.shape:
            problems.append(f"{name} has shape {tuple(ours.shape)}, expected {tuple(wanted.shape)}")
            continue
        error = ours.double().nan_to_num(7.0) - wanted.nan_to_num(7.0)
        share = _share(error, exact, number, outputs) if error.numel() and bool(error.any()) else 0.0
        if not share <= limit:
            problems.append(f"{name} has a relative error of {share:.3g}, allowed are {limit:.3g}")
    return problems


def _count_outputs(computed: Sequence[Tensor], inputs: Sequence[Tensor]) -> int:
    return len(computed) - len(inputs)


def _values(case: Case) -> int:
    """float64 results and gradients, compared with the definition."""
    _, operator_case = build(case)
    exact = results(operator_case.reference, make_inputs(operator_case, F64, case["data"]))
    inputs = _laid_out(case, operator_case, F64, case["data"])
    computed = results(operator_case.operator, inputs)
    if case["operator"] == "clipped_adam_":  # in place and without gradients
        exact, computed = exact[: -len(inputs)], computed[: -len(inputs)]
        outputs = len(exact)
    else:
        outputs = _count_outputs(computed, inputs)
    problems = _compare(computed, exact, outputs, [EXACT] * len(exact))
    require(not problems, "; ".join(problems))
    return 1


def _narrow(case: Case) -> int:
    """float32 results and gradients, whose error is limited by that of the definition in float32."""
    operator, operator_case = build(case)
    problems: list[str] = []
    for attempt in range(TRIES if operator.kinks else 1):
        seed = case["data"] + attempt
        exact, theirs = (results(operator_case.reference, make_inputs(operator_case, d, seed)) for d in (F64, F32))
        inputs = _laid_out(case, operator_case, F32, seed)
        computed = results(operator_case.operator, inputs)
        outputs = _count_outputs(computed, inputs)
        if case["operator"] == "clipped_adam_":
            exact, theirs, computed = (parts[:outputs] for parts in (exact, theirs, computed))
        errors = [(a.double() - b).nan_to_num(0.0) for a, b in zip(theirs, exact, strict=True)]
        shares = [_share(error, exact, i, outputs) if error.numel() else 0.0 for i, error in enumerate(errors)]
        limits = [max(TIMES_DEFINITION * share, FEW_ROUNDINGS) for share in shares]
        problems = _compare(computed, exact, outputs, limits)
        if not problems:
            return attempt + 1
    require(False, "; ".join(problems))
    return 0


def _half(case: Case) -> int:
    """float16 or bfloat16 results, compared with float64 from the same half-precision inputs."""
    _, operator_case = build(case)
    if case["operator"] in ("clipped_adam_", "gather_windows"):  # the second copies, in any dtype
        return _values(case)
    dtype = random.Random(case["data"]).choice(list(HALF))
    inputs = _laid_out(case, operator_case, dtype, case["data"])
    with torch.no_grad():
        exact = operator_case.reference([tensor.double() for tensor in inputs])
        computed = operator_case.operator(inputs)
    exact, computed = ([parts] if isinstance(parts, Tensor) else list(parts) for parts in (exact, computed))
    require(all(part.dtype == dtype for part in computed), f"results are not {dtype}")
    problems = _compare(computed, exact, len(exact), [HALF[dtype]] * len(exact))
    require(not problems, "; ".join(problems))
    return 1


@contextmanager
def _fixed_seed(seed: int) -> Iterator[None]:
    """Let every operator use one seed for dropout."""
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("qfast.ops.") and hasattr(m, "draw_seed")]
    before = [module.draw_seed for module in modules]
    for module in modules:
        module.draw_seed = lambda device: torch.tensor([seed], device=device)
    try:
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.draw_seed = function


def _dropout(case: Case) -> int:
    """float64 results and gradients with dropout, compared with the definition and the same masks."""
    operator, operator_case = build(case)
    seed, dropout = random.Random(case["data"]).choice([0, 1, -1, 2**63 - 1, -(2**63), case["data"]]), case["dropout"]
    assert operator.masked is not None
    drawn = make_inputs(operator_case, F64, case["data"])
    if drawn[0].numel() == 0 or drawn[0].dim() == 1:  # the definitions with masks need rows
        return _values(case)
    exact = results(partial(operator.masked, operator_case, dropout=dropout, seed=seed), drawn)
    inputs = _laid_out(case, operator_case, F64, case["data"])
    with _fixed_seed(seed):
        computed = results(lambda t: operator_case.operator(t, dropout=dropout, training=True), inputs)
    problems = _compare(computed, exact, _count_outputs(computed, inputs), [EXACT] * len(exact))
    require(not problems, f"dropout {dropout}: " + "; ".join(problems))
    return 1


# ---------------------------------------------------------------- function transforms
def _scalar(parts: Any) -> Tensor:
    """A weighted sum of all results."""
    parts = [parts] if isinstance(parts, Tensor) else parts
    return sum(
        (part.nan_to_num(0.0) * torch.arange(1, part.numel() + 1).view(part.shape).cos()).sum() for part in parts
    )


def _transforms(case: Case) -> int:
    """torch.func's grad, jvp, vmap and grad of grad, compared with the same transforms of the definition."""
    operator, operator_case = build(case)
    inputs = tuple(make_inputs(operator_case, F64, case["data"]))
    tangents = tuple(make_inputs(operator_case, F64, TANGENT_SEED))
    kind = random.Random(case["data"]).choice(operator.transforms)

    def transformed(call: Any, by_loop: bool = False) -> Any:
        def total(*tensors: Tensor) -> Tensor:
            return _scalar(call(tensors))

        if kind == "grad":
            return torch.func.grad(total, argnums=tuple(range(len(inputs))))(*inputs)
        if kind == "jvp":
            return torch.func.jvp(total, inputs, tangents)
        if kind == "vmap":
            stacked = [torch.stack([a, b]) for a, b in zip(inputs, tangents, strict=True)]
            if by_loop:  # torch's layers do not support vmap
                return torch.stack([total(*inputs), total(*tangents)])
            return torch.func.vmap(total)(*stacked)
        first = torch.func.grad(lambda x: total(x, *inputs[1:]))
        return torch.func.grad(lambda x: first(x).square().sum())(inputs[0])

    try:
        exact = transformed(operator_case.reference, by_loop=True)
    except (RuntimeError, NotImplementedError):  # torch's layer has no such derivative
        return _values(case)
    computed = transformed(operator_case.operator)
    computed, exact = ([part] if isinstance(part, Tensor) else list(part) for part in (computed, exact))
    problems = _compare(computed, exact, 0, [1e-7] * len(exact))
    require(not problems, f"{kind}: " + "; ".join(problems))
    return 1


RUNS = {
    "values": _values,
    "narrow": _narrow,
    "half": _half,
    "dropout": _dropout,
    "transforms": _transforms,
    "arguments": misuse.wrong_arguments,
    "tampered": misuse.tampered_calls,
}
PART = Part(draw, check, unit="calls", seconds=120.0, share=0.2)
__all__ = ["PART", "Operator", "check", "draw"]
