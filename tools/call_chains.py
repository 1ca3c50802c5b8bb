"""Trace the calls that lead from Python to a CPU kernel.

The Python half of a chain is recorded while the code runs: a dispatch mode looks at the call stack at the moment an
operator of qfast reaches torch's dispatcher. The C++ half is read from the sources: the shortest path of calls from
the function that is registered for the CPU to one that fetches a kernel from the table `cpu_kernels()`.

    python tools/call_chains.py            # the chain of `fit` and of every operator, one call per line

A hop is one hand-written function entered on the way. The caller's own function does not count, and neither does
torch's dispatcher.
"""

from __future__ import annotations

import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qfast"
SOURCES = ROOT / "csrc"

__all__ = ["Hop", "fit_chain", "operator_chains", "traced_chain"]


class Hop(NamedTuple):
    """One function on the way to a kernel.

    Attributes
    ----------
    function : str
        Its name without namespace or template arguments.
    file : str
        Its file, relative to the project's root.
    """

    function: str
    file: str


class StackRecorder(TorchDispatchMode):
    """Records the functions of qfast that are active when a given operator is dispatched for the first time."""

    def __init__(self, wanted: Callable[[str], bool]) -> None:
        super().__init__()
        self.wanted = wanted
        self.operator: str | None = None
        self.stack: list[Hop] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if self.operator is None and namespace == "qfast" and self.wanted(name):
            self.operator = name
            self.stack = active_functions()
        return func(*args, **(kwargs or {}))


def active_functions() -> list[Hop]:
    """The functions of qfast on the call stack, outermost first; comprehensions and lambdas are part of theirs."""
    hops = []
    frame = sys._getframe()
    while frame is not None:
        file, function = Path(frame.f_code.co_filename), frame.f_code.co_name
        if PACKAGE in file.parents and not function.startswith("<"):
            hops.append(Hop(function, str(file.relative_to(ROOT))))
        frame = frame.f_back
    return hops[::-1]


def traced_chain(call: Callable[[], object], wanted: Callable[[str], bool] = lambda name: True) -> list[Hop]:
    """Hops from `call` to the CPU kernel of the first operator it dispatches whose name is `wanted`.

    Parameters
    ----------
    call : callable
        Runs the operator, directly or from far above, as `fit` does.
    wanted : callable, optional
        Chooses among the names of operators; default: the first one.

    Returns
    -------
    list of Hop
        Outermost function first, kernel last.

    Raises
    ------
    LookupError
        No such operator was dispatched, or its C++ sources do not reach a kernel.
    """
    recorder = StackRecorder(wanted)
    with recorder:
        call()
    if recorder.operator is None:
        raise LookupError("no operator of qfast was dispatched")
    return recorder.stack + native_chain(recorder.operator)


# ---------------------------------------------------------------- C++
class Function(NamedTuple):
    """A C++ function: where it is, the identifiers that it calls, the kernels that it fetches from the table."""

    file: str
    calls: frozenset[str]
    kernels: tuple[str, ...]


DEFINITION = re.compile(
    r"^(?:template <[^;{]*>\n)?(?:inline |static |auto )*[\w:<>,&* \n]*?\b(\w+)\((?:[^;{}()]|\([^()]*\)|\{\})*\)"
    r"(?: const)?(?: noexcept)?(?: ->[^;{]+)? \{",
    re.MULTILINE,
)
REGISTRATION = re.compile(r"m\.impl\(\s*\"(\w+)\",\s*TORCH_BOX\(&?(\w+)")
KERNEL = re.compile(r"cpu_kernels(?:<[\w()]+>)?\(\)\.(\w+)|\bkernels\.(\w+)\(|&CpuKernels::(\w+)")


def enclosed(text: str, opening: int) -> str:
    """The text from an opening brace or parenthesis to the one that closes it."""
    brackets = {text[opening]: 1, {"{": "}", "(": ")"}[text[opening]]: -1}
    depth = 0
    for at in range(opening, len(text)):
        depth += brackets.get(text[at], 0)
        if depth == 0:
            return text[opening : at + 1]
    return text[opening:]


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


@cache
def functions() -> dict[str, list[Function]]:
    """Every function that the host side of the CPU library defines, by name."""
    found: dict[str, list[Function]] = {}
    for path in sorted([*SOURCES.rglob("*.cpp"), *SOURCES.rglob("*.h")]):
        if "kernels" in path.stem:
            continue
        text = without_comments(path.read_text())
        for match in DEFINITION.finditer(text):
            body = enclosed(text, match.end() - 1)
            kernels = tuple(next(filter(None, groups)) for groups in KERNEL.findall(body))
            calls = frozenset(re.findall(r"(\w+)(?:<[\w:, ()]*>)?[({]", body))
            found.setdefault(match[1], []).append(Function(str(path.relative_to(ROOT)), calls, kernels))
    return found


@cache
def registered() -> dict[str, Hop]:
    """The C++ function behind each operator on the CPU."""
    return {
        operator: Hop(function, str(path.relative_to(ROOT)))
        for path in sorted(SOURCES.rglob("*.cpp"))
        for operator, function in REGISTRATION.findall(path.read_text())
    }


@cache
def kernel_files() -> dict[str, str]:
    """The header that defines each kernel."""
    files = {}
    for path in sorted(SOURCES.rglob("*.h")):
        for name in re.findall(r"^(?:inline |static )*void (\w+)\(", path.read_text(), re.MULTILINE):
            files.setdefault(name, str(path.relative_to(ROOT)))
    return files


def native_chain(operator: str) -> list[Hop]:
    """Hops from the dispatcher to the kernel of an operator."""
    if operator not in registered():
        raise LookupError(f"csrc registers no CPU function for the operator {operator!r}")
    start = registered()[operator]
    queue: deque[list[Hop]] = deque([[start]])
    visited = {start.function}
    while queue:
        path = queue.popleft()
        for function in functions().get(path[-1].function, []):
            if function.file.split("/")[:2] != start.file.split("/")[:2] and function.file != path[-1].file:
                continue  # a function of that name of another operator
            if function.kernels:
                kernel = function.kernels[0]
                return [*path, Hop(kernel, kernel_files().get(kernel, "csrc"))]
            for name in sorted(function.calls & functions().keys() - visited):
                visited.add(name)
                queue.append([*path, Hop(name, functions()[name][0].file)])
    raise LookupError(f"the sources of {operator!r} do not reach a kernel of cpu_kernels()")


# ---------------------------------------------------------------- the chains that we report
def fit_chain() -> list[Hop]:
    """From `fit` of a time-series LSTM to the kernel that gathers a training batch."""
    import numpy as np
    import pandas as pd

    from qfast.data import TSDatasetH
    from qfast.models import ts

    dates = pd.date_range("2020-01-01", periods=30)
    index = pd.MultiIndex.from_product([dates, ["A", "B"]], names=["datetime", "instrument"])
    columns = pd.MultiIndex.from_tuples([("feature", "F0"), ("feature", "F1"), ("label", "LABEL0")])
    frame = pd.DataFrame(np.random.default_rng(0).standard_normal((60, 3)), index=index, columns=columns)
    dataset = TSDatasetH(handler=frame, segments={"train": (dates[0], dates[-1])}, step_len=3)
    model = ts.LSTM(d_feat=2, hidden_size=4, n_epochs=1, batch_size=16, seed=0)
    return traced_chain(lambda: model.fit(dataset), lambda name: name.startswith("gather"))


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """A call of every operator that has a kernel of its own."""
    from qfast import nn, ops
    from qfast.training.optim import ClippedAdam

    x = torch.randn(8, 5, 4)
    panel, scores = torch.randn(40, 4), torch.randn(8)
    index = ops.build_window_index([0] * 40, list(range(40)))
    weight = torch.nn.Parameter(torch.randn(3))
    weight.grad = torch.randn(3)
    yield "gather_windows", lambda: ops.gather_windows(panel, index, torch.tensor([9, 20]), 5)
    yield "additive_attention", lambda: ops.additive_attention(scores, scores, torch.randn(8, 4))
    yield "lstm", lambda: nn.LSTMModel(d_feat=4).rnn(x)
    yield "gru", lambda: nn.GRUModel(d_feat=4).rnn(x)
    yield "attention_pool", lambda: nn.ALSTMModel(d_feat=4)(x)
    yield "temporal_conv_net", lambda: nn.TCNModel(4, 1, [8] * 2, 3, 0.0)(x.transpose(1, 2))
    yield "encoder_layer", lambda: nn.Transformer(d_feat=4)(x)
    yield "window_conv", lambda: nn.Localformer(d_feat=4)(x)
    yield "tanh", lambda: ops.tanh(x)
    yield "clipped_adam", lambda: ClippedAdam([weight]).step()


def operator_chains() -> dict[str, list[Hop]]:
    """From the public function of each operator, the first in qfast/ops, to its CPU kernel."""
    chains = {}
    for operator, call in calls():
        hops = traced_chain(call, lambda name, operator=operator: operator.split("_")[0] in name)
        first = next(i for i, hop in enumerate(hops) if hop.file.startswith(("qfast/ops", "csrc")))
        chains[operator] = hops[first:]
    return chains


def main() -> None:
    for name, hops in {"fit": fit_chain(), **operator_chains()}.items():
        files = len({hop.file for hop in hops})
        print(f"{name}: {len(hops) - 1} hops, {files} files")
        for hop in hops:
            print(f"    {hop.function:32} {hop.file}")


if __name__ == "__main__":
    main()
