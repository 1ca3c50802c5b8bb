"""Calls with wrong arguments: through the public functions, which must explain them, and through the registered
operators of torch.ops.qfast, which must not crash."""

from __future__ import annotations

import random
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qfast.errors import QfastError
from support.operator_case import F32, F64
from torture import ROOT
from torture.operator_cases import build, make_inputs
from torture.protocol import Case, Fault

ALLOWED = (QfastError, TypeError, NotImplementedError, torch.OutOfMemoryError)
EXPLAINED = re.compile(r"\w+: ")  # the checks in C++ raise ValueError with the name of the operator
PACKAGE = ROOT / "qfast"
MUTATIONS = 40  # of one drawn case
NUMBERS = [-1, 0, 1, 2, 7, 2**31 - 1, 2**31, 2**33, 2**40, 2**62, 2**63 - 1, -(2**63)]
SETTINGS: dict[str, list[Any]] = {
    "dropout": [-0.1, 1.1, float("nan"), float("inf"), "a", None, [0.1]],
    "heads": [0, -1, 3, 2.5, 10**30, None, "a"],
    "eps": [-1.0, float("nan"), "a", None],
    "all_steps": [None, 2],
    "last_step": [None, 2],
}
SETTINGS_OF = {
    "lstm": ["dropout", "all_steps"],
    "gru": ["dropout", "all_steps"],
    "temporal_conv_net": ["dropout"],
    "encoder_layer": ["dropout", "heads", "eps", "last_step"],
    "feed_forward": ["dropout"],
    "attention_pool": ["dropout"],
}


# ---------------------------------------------------------------- tensors
def _another_dtype(x: Tensor, rng: random.Random) -> Any:
    kinds = [torch.int32, torch.bool, torch.complex64, torch.float16, torch.bfloat16, F32, F64, torch.float8_e5m2]
    return x.to(rng.choice(kinds))


def _resized(x: Tensor, rng: random.Random) -> Any:
    if x.dim() == 0:
        return x[None]
    axis = rng.randrange(x.dim())
    shape = list(x.shape)
    shape[axis] = max(0, shape[axis] + rng.choice([-1, 1, 2, -shape[axis]]))
    return torch.zeros(shape, dtype=x.dtype)


def _reshaped(x: Tensor, rng: random.Random) -> Any:
    return rng.choice(
        [lambda: x[None], lambda: x.flatten(), lambda: x[..., None], lambda: x.sum(), lambda: x[None, None]]
    )()


def _elsewhere(x: Tensor, rng: random.Random) -> Any:
    return rng.choice([lambda: x.to("meta"), lambda: x.to_sparse(), lambda: x.numpy(), lambda: x.tolist()])()


def _not_a_tensor(x: Tensor, rng: random.Random) -> Any:
    return rng.choice([None, 3, "x", [], {}, float("nan"), np.ones(3), x.tolist, [x], Path("x")])


def _special_values(x: Tensor, rng: random.Random) -> Any:
    x = x.clone(memory_format=torch.contiguous_format)
    if x.numel():
        x.view(-1)[rng.randrange(x.numel())] = rng.choice([torch.nan, torch.inf, -torch.inf, 1e300, 1e-300])
    return x


TENSORS: list[Callable[[Tensor, random.Random], Any]] = [
    _another_dtype,
    _resized,
    _reshaped,
    _elsewhere,
    _not_a_tensor,
    _special_values,
]


# ---------------------------------------------------------------- public functions
def wrong_arguments(case: Case) -> int:
    """Public functions with wrong arguments: a result, or an error that qfast raises on purpose."""
    rng = random.Random(case["data"])
    _, operator_case = build(case)
    for _ in range(MUTATIONS):
        tensors: list[Any] = make_inputs(operator_case, rng.choice([F32, F64]), case["data"])
        settings, done = {}, ""
        names = SETTINGS_OF.get(case["operator"], [])
        if names and rng.random() < 0.3:
            name = rng.choice(names)
            settings[name] = rng.choice(SETTINGS[name])
            if name == "dropout":
                settings["training"] = True
        else:
            place, mutation = rng.randrange(len(tensors)), rng.choice(TENSORS)
            try:
                tensors[place] = mutation(tensors[place].contiguous(), rng)
            except (RuntimeError, IndexError, TypeError):  # torch has no such tensor
                continue
            done = f"{mutation.__name__} of tensor {place}"
        if rng.random() < 0.5:
            tensors = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in tensors]
        try:
            out = operator_case.operator(tensors, **settings)
            for part in [out] if isinstance(out, Tensor) else out:
                if part.requires_grad:
                    part.sum().backward(retain_graph=True)
        except ALLOWED:
            pass
        except ValueError as error:
            if not EXPLAINED.match(str(error)):
                raise
        except Exception as error:
            if _raised_by_qfast(error):
                raise Fault(
                    f"{done or settings}: {type(error).__name__} instead of an error of qfast: {error}"
                ) from error
    return MUTATIONS


def _raised_by_qfast(error: BaseException) -> bool:
    """Whether qfast passed the arguments on. Helpers of the tests may fail before that."""
    return any(Path(frame.filename).is_relative_to(PACKAGE) for frame in traceback.extract_tb(error.__traceback__))


# ---------------------------------------------------------------- registered operators
class _Recorder(TorchDispatchMode):
    """Records the calls of torch.ops.qfast with their arguments, among them the saved tensors of backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "qfast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def tampered_calls(case: Case) -> int:
    """Registered operators with tampered arguments: any result or error, but no crash."""
    rng = random.Random(case["data"])
    _, operator_case = build(case)
    tensors = make_inputs(operator_case, rng.choice([F32, F64]), case["data"])
    settings = (
        {"dropout": 0.5, "training": True}
        if "dropout" in SETTINGS_OF.get(case["operator"], []) and rng.random() < 0.5
        else {}
    )
    with _Recorder() as recorder:
        out = operator_case.operator([x.requires_grad_() for x in tensors], **settings)
        out = [out] if isinstance(out, Tensor) else list(out)
        total = sum(part.sum() for part in out)
        if isinstance(total, Tensor) and total.requires_grad:
            total.backward()
    for _ in range(MUTATIONS if recorder.calls else 0):
        func, args = rng.choice(recorder.calls)
        changed = _copied(args)
        for _ in range(rng.choice([1, 1, 2])):
            _tamper(changed, rng)
        try:
            with torch.no_grad():
                func(*changed)
        except Exception:
            pass
    return MUTATIONS


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [_copied(part) for part in value] if isinstance(value, list | tuple) else value


def _tamper(values: list[Any], rng: random.Random) -> None:
    """Change one value of a nested list in place."""
    place = rng.randrange(len(values))
    value = values[place]
    if isinstance(value, list) and value:
        if rng.random() < 0.2:
            value.pop(rng.randrange(len(value)))
        else:
            _tamper(value, rng)
    elif isinstance(value, Tensor):
        values[place] = _tampered_tensor(value, rng)
    elif isinstance(value, bool):
        values[place] = not value
    elif isinstance(value, int):
        values[place] = rng.choice([*NUMBERS, value - 1, value + 1])
    elif isinstance(value, float):
        values[place] = rng.choice([0.0, -1.0, 1e300, float("nan"), float("inf"), 1.0])


def _tampered_tensor(x: Tensor, rng: random.Random) -> Any:
    if x.dtype in (torch.int32, torch.int64, torch.uint8) and x.numel() and rng.random() < 0.7:
        x = x.clone(memory_format=torch.contiguous_format)
        limits = torch.iinfo(x.dtype)
        number = rng.choice([*NUMBERS, rng.randrange(-3, 3 * x.numel() + 3)])
        x.view(-1)[rng.randrange(x.numel())] = min(max(number, limits.min), limits.max)
        return x
    kind = rng.choice([_another_dtype, _resized, _reshaped, _special_values, None])
    if kind is None:
        return x.transpose(0, -1) if x.dim() > 1 else x.expand(3, *x.shape)
    try:
        return kind(x, rng)
    except (RuntimeError, IndexError, TypeError):
        return x


__all__: Sequence[str] = ["tampered_calls", "wrong_arguments"]
