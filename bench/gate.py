"""The performance gate: is every operator and network still as fast, compared with torch, as when it was recorded?

    python bench/gate.py              # the table; the exit status is 1 if a line is slower
    python bench/gate.py --record     # after a change of speed: measure again and store the ratios of this CPU

A line is the ratio (time of torch) / (time of qfast). Both alternate in one process on one thread, by process CPU time.
The ratio is the median over pairs of consecutive calls, or for short calls the quotient of the lowest times. The pairs
of a line are spread over the whole run. A line that is more than TOLERANCE slower is measured once more, with twice as
many pairs, and fails if it is slower again.

gate_expected.json contains the median ratios of several runs on a machine without other work, for each kind of CPU,
instruction set and release of torch, because all three change them. Other work raises most ratios by 10 to 20%, because
torch's layers suffer more from it. A slower kernel may then pass, but an unchanged one does not fail. For any other
combination the gate prints the ratios and succeeds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gate_cases import LINES, Line, Pair

from qfast import _backend
from qfast.files import atomic_write

EXPECTED = Path(__file__).with_name("gate_expected.json")
TOLERANCE = 0.10
"""A kernel that is 20% slower lowers its ratio by 17%, more than TOLERANCE and the noise of a median together."""
PASSES, SECONDS = 5, 0.12  # over all lines, and CPU time of a line in each of them
FEWEST_PAIRS = 4
RECORDED_RUNS = 5

__all__ = ["Verdict", "judge", "main"]


@dataclass(frozen=True)
class Verdict:
    """The result of one line. `change` is relative to the expected ratio, None if none is recorded."""

    name: str
    ratio: float
    expected: float | None
    text: str

    @property
    def change(self) -> float | None:
        return None if self.expected is None else self.ratio / self.expected - 1

    @property
    def is_failure(self) -> bool:
        return self.text.startswith("FAILED")


# ---------------------------------------------------------------- measuring
def keep_freed_memory() -> None:
    """Make the C library keep freed memory.

    Otherwise each call may get fresh pages, which the system clears, or used ones. Which of the two depends on the
    order of earlier allocations and changes some ratios by half.
    """
    trim_threshold, mmap_threshold, gigabyte = -1, -3, 1 << 30
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(mmap_threshold, gigabyte)
        library.mallopt(trim_threshold, gigabyte)


def timed_pairs(pair: Pair) -> list[tuple[float, float]]:
    """Seconds of qfast and of torch, alternately qfast first and torch first, for SECONDS of CPU time."""
    times: list[tuple[float, float]] = []
    end = time.process_time() + SECONDS
    while time.process_time() < end or len(times) < FEWEST_PAIRS:
        if len(times) % 2:
            reference, ours = pair.reference(), pair.ours()
        else:
            ours, reference = pair.ours(), pair.reference()
        times.append((ours, reference))
    return times


def measure(lines: Sequence[Line], passes: int) -> dict[str, float]:
    """The ratio of each line, from `passes` passes over all lines.

    Every pass allocates the inputs anew behind a block of another size, because the speed of a short kernel depends on
    where its inputs and outputs are in memory.
    """
    times: dict[str, list[tuple[float, float]]] = {line.name: [] for line in lines}
    padding = random.Random(0)
    for _ in range(passes):
        for line in lines:
            torch.manual_seed(0)
            blocks = [torch.empty(padding.randrange(1 << 16)) for _ in range(4)]
            times[line.name] += timed_pairs(line.build())
            del blocks
    return {line.name: ratio_of(times[line.name], line.is_short) for line in lines}


def ratio_of(times: Sequence[tuple[float, float]], is_short: bool) -> float:
    """Time of torch relative to qfast: of their lowest times, or the median of all pairs."""
    if is_short:
        return min(reference for _, reference in times) / min(ours for ours, _ in times)
    return statistics.median(reference / ours for ours, reference in times)


# ---------------------------------------------------------------- expectations
def cpu_kind() -> str:
    """Vendor, family and model of the CPU, the instruction set of the kernels, and the release of torch."""
    facts: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    names = [facts[key] for key in ("vendor_id", "cpu family", "model") if key in facts]
    cpu = " ".join(names) or platform.processor() or platform.machine()
    isa = "plain torch" if _backend.native is None else _backend.native.isa()
    return f"{cpu}, {isa}, torch {'.'.join(torch.__version__.split('.')[:2])}"


def read_expected(path: Path) -> dict[str, Any]:
    """The recorded ratios of all kinds of CPU."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}  # type: ignore[no-any-return]


def record(lines: Sequence[Line], path: Path) -> None:
    """Store the median ratio of RECORDED_RUNS runs for this kind of CPU, and print how much the runs differ."""
    runs = [measure(lines, PASSES) for _ in range(RECORDED_RUNS)]
    table = {name: [run[name] for run in runs] for name in runs[0]}
    entries = read_expected(path)
    kept = entries.get(cpu_kind(), {}).get("ratios", {}) if len(lines) < len(LINES) else {}
    ratios = kept | {name: round(statistics.median(values), 3) for name, values in table.items()}
    entries[cpu_kind()] = {"recorded": datetime.date.today().isoformat(), "ratios": ratios}
    text = json.dumps(entries, indent=1) + "\n"
    atomic_write(path, lambda file: file.write_text(text, encoding="utf-8"))
    print(f"recorded for {cpu_kind()}\n\n| line | ratio | spread of {RECORDED_RUNS} runs |\n| --- | --- | --- |")
    for name, values in table.items():
        print(f"| {name} | {statistics.median(values):.2f} | {max(values) / min(values) - 1:.1%} |")


# ---------------------------------------------------------------- the verdict
def judge(lines: Sequence[Line], expected: Mapping[str, float] | None) -> list[Verdict]:
    """Measure all lines, and once more those that are slower than expected.

    Parameters
    ----------
    lines : sequence of Line
    expected : mapping, optional
        Recorded ratios by name. None if this kind of CPU has none: nothing fails.
    """
    ratios = measure(lines, PASSES)
    if expected is None:
        return [Verdict(name, ratio, None, "not recorded") for name, ratio in ratios.items()]
    slower = [line for line in lines if is_slower(ratios[line.name], expected.get(line.name))]
    again = measure(slower, 2 * PASSES) if slower else {}
    return [verdict(line.name, ratios[line.name], again.get(line.name), expected.get(line.name)) for line in lines]


def is_slower(ratio: float, expected: float | None) -> bool:
    return expected is not None and ratio < expected * (1 - TOLERANCE)


def verdict(name: str, first: float, second: float | None, expected: float | None) -> Verdict:
    """The verdict on a line with its first ratio, and its second one if it was measured again."""
    if expected is None:
        return Verdict(name, first, None, "FAILED: not recorded. Remedy: python bench/gate.py --record")
    if second is None:
        faster = first > expected / (1 - TOLERANCE)
        return Verdict(name, first, expected, "faster: --record keeps it" if faster else "ok")
    if is_slower(second, expected):
        return Verdict(name, second, expected, f"FAILED: slower twice ({first:.2f} and {second:.2f})")
    return Verdict(name, second, expected, f"ok in the repeat (first {first:.2f})")


def print_table(verdicts: Sequence[Verdict]) -> None:
    width = max(len(verdict.name) for verdict in verdicts)
    print(f"{'line':<{width}}  torch / qfast  expected  change  result")
    for row in verdicts:
        expected = "-" if row.expected is None else f"{row.expected:.2f}"
        change = "-" if row.change is None else f"{row.change:+.0%}"
        print(f"{row.name:<{width}}  {row.ratio:>13.2f}  {expected:>8}  {change:>6}  {row.text}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gate and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="store the measured ratios as the expected ones")
    parser.add_argument("--only", default="", help="lines whose name contains this text")
    options = parser.parse_args(arguments)
    lines = [line for line in LINES if options.only in line.name]
    if not lines:
        parser.error(f"--only {options.only!r} matches none of {[line.name for line in LINES]}")
    torch.set_num_threads(1)
    keep_freed_memory()
    started = time.perf_counter(), time.process_time()
    if options.record:
        record(lines, EXPECTED)
        return 0
    entry = read_expected(EXPECTED).get(cpu_kind())
    verdicts = judge(lines, None if entry is None else entry["ratios"])
    print_table(verdicts)
    wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    print(f"\n{cpu_kind()}: {wall:.0f} s, {cpu:.0f} s of CPU time")
    if entry is None:
        print("No ratios are recorded for this combination, so no line can fail. To record: bench/gate.py --record")
    failures = [row.name for row in verdicts if row.is_failure]
    if failures:
        print(
            f"\n{len(failures)} of {len(verdicts)} lines failed: {', '.join(failures)}.\nRemedy: find the "
            "change that slowed them. If it is intended, run python bench/gate.py --record and commit the file."
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
