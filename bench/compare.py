"""Fair ratios on a shared machine: both sides alternate in one process, on one thread, by process CPU time.

Wall-clock times on a busy machine vary by a factor of three. Here a repeat alternates A, B, A, B, ... and keeps each
side's minimum; the reported ratio is the lowest of three repeats. A copy-bandwidth probe runs before and after, and
`moved` is its relative change: do not trust figures with more than 10 %. With more than one thread the clock is wall
time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Comparison", "compare", "copy_bandwidth", "cpu_seconds", "memory_mb", "reset_peak"]


@dataclass(frozen=True)
class Comparison:
    """Seconds per call, and the lowest ratio of reference to ours among the repeats."""

    ours: float
    reference: float
    ratio: float
    moved: float

    def __str__(self) -> str:
        return (
            f"ours {self.ours * 1e3:.3f} ms, reference {self.reference * 1e3:.3f} ms, ratio {self.ratio:.1f} "
            f"(copy probe moved {self.moved:.0%})"
        )


def cpu_seconds(call: Callable[[], object], calls: int = 1, clock: Callable[[], float] = time.process_time) -> float:
    """Seconds per call, averaged over `calls` consecutive calls; process CPU time by default."""
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


def copy_bandwidth(megabytes: int = 10, calls: int = 12) -> float:
    """GB/s at which torch copies cold memory into a buffer of this size."""
    count = megabytes << 18
    source, target = torch.ones(64 << 20), torch.empty(count).zero_()
    places = [i * count % (source.numel() - count + 1) for i in range(calls)]
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        for place in places:
            target.copy_(source[place : place + count])
        best = min(best, (time.process_time() - start) / calls)
    return count * 4 / best / 1e9


def compare(
    ours: Callable[[], object],
    reference: Callable[[], object],
    *,
    repeats: int = 3,
    rounds: int = 5,
    calls: tuple[int, int] = (1, 1),
    threads: int = 1,
) -> Comparison:
    """Time `ours` and `reference` alternately, with `calls` consecutive runs of each per round."""
    before_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    try:
        before = copy_bandwidth()
        ours(), reference()
        results = []
        for _ in range(repeats):
            pairs = [
                (cpu_seconds(ours, calls[0], clock), cpu_seconds(reference, calls[1], clock)) for _ in range(rounds)
            ]
            results.append((min(a for a, _ in pairs), min(b for _, b in pairs)))
        after = copy_bandwidth()
    finally:
        torch.set_num_threads(before_threads)
    worst = min(results, key=lambda pair: pair[1] / pair[0])
    return Comparison(*worst, ratio=worst[1] / worst[0], moved=abs(after / before - 1))


def memory_mb(what: str) -> float:
    """Resident memory now ("VmRSS") or its peak since the last reset ("VmHWM"); Linux only."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(what))


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
