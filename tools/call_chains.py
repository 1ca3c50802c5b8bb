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
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qfast"
SOURCES = ROOT / "csrc"

WRAPPERS = {"with_explanation", "call_over_ranks"}  # made by decorators

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
    """The functions of qfast on the call stack, outermost first.

    Comprehensions and lambdas are part of their function, and wrappers of decorators part of the decorated one.
    """
    hops = []
    frame = sys._getframe()
    while frame is not None:
        file, function = Path(frame.f_code.co_filename), frame.f_code.co_name
        if PACKAGE in file.parents and not function.startswith("<") and function not in WRAPPERS:
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
    """A C++ function on the host side of an operator.

    Attributes
    ----------
    file : str
        Relative to the project's root.
    calls : frozenset of str
        Identifiers that its body calls.
    kernels : tuple of str
        Kernels that its body fetches from the table.
    only_chooses : bool
        It returns one of those kernels and is not on the way that the data takes.
    """

    file: str
    calls: frozenset[str]
    kernels: tuple[str, ...]
    only_chooses: bool


DEFINITION = re.compile(
    r"^(?:template <[^;{]*>\n)?(?:inline |static |auto )*[\w:<>,&* \n]*?\b(\w+)\((?:[^;{}()]|\([^()]*\)|\{\})*\)"
    r"(?: const)?(?: noexcept)?(?: ->[^;{]+)? \{",
    re.MULTILINE,
)
REGISTRATION = re.compile(r"m\.impl\(\s*\"(\w+)\",\s*TORCH_BOX\(&?(\w+)")
KERNEL = re.compile(
    r"(?:cpu|product)_kernels(?:<\w+(?:\(\w*\))?>)?\([^()]*\)\.(?!vector_bytes|isa)(\w+)|\bkernels\.(\w+)"
)
KERNEL_DEFINITION = re.compile(r"^(?:inline |static )*void (\w+)\(", re.MULTILINE)
CHOICE = re.compile(r"return [^;]*(?:cpu|product)_kernels")


def enclosed(text: str, opening: int) -> str:
    """The text from an opening brace or parenthesis to the one that closes it."""
    depths = {text[opening]: 1, {"{": "}", "(": ")"}[text[opening]]: -1}
    depth = 0
    for at in range(opening, len(text)):
        depth += depths.get(text[at], 0)
        if depth == 0:
            return text[opening : at + 1]
    return text[opening:]


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


@cache
def host_functions(folder: Path) -> dict[str, Function]:
    """The functions in an operator's folder that are not kernels, by name."""
    functions = {}
    for path in sorted([*folder.glob("*.cpp"), *folder.glob("*.h")]):
        if "kernels" in path.stem:
            continue
        text = without_comments(path.read_text())
        for match in DEFINITION.finditer(text):
            body = enclosed(text, match.end() - 1)
            function = Function(
                file=str(path.relative_to(ROOT)),
                calls=frozenset(re.findall(r"(\w+)(?:<[\w:, ()]*>)?[({]", body)),
                kernels=tuple(first or second for first, second in KERNEL.findall(body)),
                only_chooses=CHOICE.search(body) is not None,
            )
            functions.setdefault(match[1], function)  # if two have the same name, the one in the .cpp
    return functions


def registration(operator: str) -> tuple[str, Path]:
    """The C++ function that is registered for an operator on the CPU, and its file."""
    for path in sorted(SOURCES.rglob("*.cpp")):
        for name, function in REGISTRATION.findall(path.read_text()):
            if name == operator:
                return function, path
    raise LookupError(f"csrc registers no CPU function for the operator {operator!r}")


def kernel_hop(kernels: tuple[str, ...], operator: str, folder: Path) -> Hop:
    """The kernel that implements an operator, for functions that choose among several, and its file."""
    kernel = next((name for name in kernels if name.startswith(operator)), kernels[0])
    for path in sorted(folder.glob("*.h")):
        if kernel in KERNEL_DEFINITION.findall(path.read_text()):
            return Hop(kernel, str(path.relative_to(ROOT)))
    raise LookupError(f"no header in {folder.relative_to(ROOT)} defines {kernel!r}")


def native_chain(operator: str) -> list[Hop]:
    """Hops from the dispatcher to the kernel of an operator: the shortest path of calls."""
    entry, file = registration(operator)
    functions = host_functions(file.parent)
    paths = deque([[entry]])
    visited = {entry}
    while paths:
        path = paths.popleft()
        function = functions[path[-1]]
        if function.kernels:
            hops = [Hop(name, functions[name].file) for name in path if not functions[name].only_chooses]
            return [*hops, kernel_hop(function.kernels, operator, file.parent)]
        for name in sorted(function.calls & functions.keys() - visited):
            visited.add(name)
            paths.append([*path, name])
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


def operator_calls() -> dict[str, Callable[[], object]]:
    """A call of each operator that has a CPU kernel, forward only."""
    from qfast import nn, ops

    windows, rows = torch.randn(8, 5, 4), torch.randn(8)
    index = ops.build_window_index([0] * 40, list(range(40)))
    layers = [(torch.randn(12, 4), torch.randn(12, 3), torch.randn(12), torch.randn(12))]
    gates = [(torch.randn(9, 4), torch.randn(9, 3), torch.randn(9), torch.randn(9))]
    return {
        "gather_windows": lambda: ops.gather_windows(torch.randn(40, 4), index, torch.tensor([9, 20]), 5),
        "additive_attention": lambda: ops.additive_attention(rows, rows, torch.randn(8, 4)),
        "lstm": lambda: ops.lstm(windows, layers),
        "gru": lambda: ops.gru(windows, gates),
        "attention_pool": lambda: nn.ALSTMModel(d_feat=4)(windows),
        "temporal_conv_net": lambda: nn.TCNModel(4, 1, [8] * 2, 3, 0.0)(windows.transpose(1, 2)),
        "encoder_layer": lambda: nn.Transformer(d_feat=4)(windows),
        "window_conv": lambda: nn.Localformer(d_feat=4)(windows),
        "linear_tanh": lambda: nn.ALSTMModel(d_feat=4)(windows),
        "tanh": lambda: ops.tanh(windows),
    }


def is_operator(operator: str, name: str) -> bool:
    """Whether the dispatched name belongs to the operator: some have names for variants of the same work."""
    return name.startswith(operator.split("_")[0])


def operator_chains() -> dict[str, list[Hop]]:
    """From the public function of each operator to its CPU kernel, under the operator's name."""
    chains = {}
    for operator, call in operator_calls().items():
        hops = traced_chain(call, partial(is_operator, operator))
        public = next(i for i, hop in enumerate(hops) if hop.file.startswith("qfast/ops/"))
        chains[operator] = hops[public:]
    return chains


def main() -> None:
    for name, hops in {"fit": fit_chain(), **operator_chains()}.items():
        files = len({hop.file for hop in hops})
        print(f"{name}: {len(hops) - 1} hops, {files} files")
        for hop in hops:
            print(f"    {hop.function:32} {hop.file}")


if __name__ == "__main__":
    main()
