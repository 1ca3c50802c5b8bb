"""Thread counts, concurrent threads, forked and spawned processes, and interrupts: always the same bits."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.operator_case import F32, results
from torture.operator_cases import build, draw_operator, make_inputs
from torture.protocol import Case, Part, choose, require
from torture.victims import Victim

KINDS = {"counts": 4.0, "concurrent": 3.0, "interrupts": 2.0, "fork": 1.0, "loader": 0.2}
THREADS = 8
SECONDS = 120.0


def draw(rng: random.Random, number: int) -> Case:
    """A call of an operator, and what happens around it."""
    return draw_operator(rng) | {"kind": choose(rng, KINDS), "threads": rng.choice([2, 3, 4, 8])}


def check(case: Case, folder: Path) -> Counter[str]:
    """Compare the results with those of one thread in one process."""
    torch.set_num_threads(1)
    if case["kind"] == "loader":
        calls = _loader(case, folder)
    else:
        calls = KIND_CHECKS[case["kind"]](case, folder, _call_of(case))
    return Counter({"calls": calls, case["kind"]: 1})


def _call_of(case: Case) -> Callable[[], list[Tensor]]:
    """A function that computes values and gradients of the case from new copies of its inputs."""
    _, operator_case = build(case)
    inputs = make_inputs(operator_case, F32, case["data"])
    return lambda: results(operator_case.operator, inputs)


def _require_same(computed: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    same = all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(computed, expected, strict=True))
    require(same, f"{what}: other bits than with one thread")


def _counts(case: Case, folder: Path, call: Callable[[], list[Tensor]]) -> int:
    """Another number of threads within an operator."""
    expected = call()
    torch.set_num_threads(case["threads"])
    _require_same(call(), expected, f"{case['threads']} threads")
    return 2


def _concurrent(case: Case, folder: Path, call: Callable[[], list[Tensor]]) -> int:
    """Eight threads call the operator at the same time, each with threads of its own."""
    expected = call()
    torch.set_num_threads(case["threads"])
    with ThreadPoolExecutor(THREADS) as pool:
        for computed in pool.map(lambda _: call(), range(THREADS)):
            _require_same(computed, expected, f"{THREADS} concurrent calls")
    return 1 + THREADS


def _interrupts(case: Case, folder: Path, call: Callable[[], list[Tensor]]) -> int:
    """SIGINT during calls; later calls are not affected."""
    expected, rng = call(), random.Random(case["data"])
    torch.set_num_threads(case["threads"])
    begin = time.perf_counter()
    call()
    duration = time.perf_counter() - begin
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for _ in range(4):
            timer = threading.Timer(rng.uniform(0.0, 2 * duration), lambda: os.kill(os.getpid(), signal.SIGINT))
            try:
                timer.start()
                for _ in range(3):
                    call()
                timer.join()
                time.sleep(0)  # the handler runs
            except KeyboardInterrupt:
                timer.join()
            _require_same(call(), expected, "after an interrupt")
    finally:
        signal.signal(signal.SIGINT, before)
    return 18


def _fork(case: Case, folder: Path, call: Callable[[], list[Tensor]]) -> int:
    """Children forked from a process that has used only one thread."""
    expected = call()

    def compare() -> int:
        _require_same(call(), expected, "in a forked process")
        return 0

    def forks() -> int:
        call()
        logs = [folder / f"child-{number}.txt" for number in range(3)]
        return max(child.wait(SECONDS) for child in [Victim(compare, log) for log in logs])

    log = folder / "parent.txt"
    status = Victim(forks, log).wait(SECONDS)
    texts = "\n".join(file.read_text() for file in folder.glob("*.txt"))
    require(status == 0, f"a forked process ended with {status}:\n{texts}")
    return 5


class _Windows(torch.utils.data.Dataset[Any]):
    """A dataset whose workers call an operator."""

    def __init__(self, case: Case) -> None:
        self._case = case

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> Tensor:
        torch.set_num_threads(1)
        return torch.cat([part.flatten() for part in _call_of(self._case)()])


def _loader(case: Case, folder: Path) -> int:
    """A DataLoader with spawned workers."""
    expected = _Windows(case)[0]
    loader = torch.utils.data.DataLoader(_Windows(case), batch_size=2, num_workers=2, multiprocessing_context="spawn")
    for batch in loader:
        for row in batch:
            _require_same([row], [expected], "in a spawned worker of a DataLoader")
    return 5


KIND_CHECKS = {"counts": _counts, "concurrent": _concurrent, "interrupts": _interrupts, "fork": _fork}
PART = Part(draw, check, unit="calls", seconds=2 * SECONDS, share=0.15)
__all__ = ["PART", "check", "draw"]
