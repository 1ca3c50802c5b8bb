"""Registers, spills and shared memory of every CUDA kernel, held against a committed table. Needs no GPU.

    PIP_LOG=build.log NVCC_APPEND_FLAGS=-Xptxas=-v pip install .    # ptxas says what each kernel takes
    python tools/cuda_resources.py build.log                        # exit status 1 if the table says otherwise
    python tools/cuda_resources.py build.log --write                # after a change that was meant

pip appends to its log, so each build needs a new one. A kernel takes what the toolkit's ptxas gives it, so counts are
compared for the release that wrote the table; under any other one only spills count. Spilled bytes are those of stores
and loads together.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

TABLE = Path(__file__).resolve().with_name("cuda_resources.csv")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
ENTRY = re.compile(r"Compiling entry function '([^']+)' for '(sm_\d+)\w*'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
COLUMNS = ("registers", "spilled", "stack", "shared")

Kernel = tuple[str, str]  # (name, architecture)
Counts = tuple[int, int, int, int]  # of COLUMNS


def read_log(lines: Iterable[str]) -> dict[Kernel, Counts]:
    """What ptxas -v says in the log of a build."""
    found: dict[Kernel, Counts] = {}
    kernel: Kernel | None = None
    frame = spilled = 0
    for line in lines:
        if entry := ENTRY.search(line):
            kernel, frame, spilled = (entry[1], entry[2]), 0, 0
        elif kernel and (spills := SPILLS.search(line)):
            frame, spilled = int(spills[1]), int(spills[2]) + int(spills[3])
        elif kernel and (used := USED.search(line)):
            shared = SHARED.search(line)
            found[kernel] = int(used[1]), spilled, frame, int(shared[1]) if shared else 0
            kernel = None
    return found


def demangled(found: dict[Kernel, Counts]) -> dict[Kernel, Counts]:
    names = [name for name, _ in found]
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return {
        (_short(name), arch): counts
        for name, ((_, arch), counts) in zip(plain.splitlines(), found.items(), strict=True)
        if arch in ARCHITECTURES and not name.startswith("void cub::")  # the toolkit's own
    }


def _short(name: str) -> str:
    """Without return type, arguments and our own namespaces: kernel<template arguments>."""
    name = re.sub(r"\(anonymous namespace\)::|qfast::", "", name).removeprefix("void ")
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and not depth:
            return name[:place]
    return name


def read_table() -> tuple[str, dict[Kernel, Counts]]:
    """(release of the toolkit, table)"""
    with TABLE.open(newline="") as file:
        release = next(file).removeprefix("# ptxas ").strip()
        table: dict[Kernel, Counts] = {}
        for row in csv.DictReader(file):
            registers, spilled, stack, shared = (int(row[column]) for column in COLUMNS)
            table[row["kernel"], row["architecture"]] = registers, spilled, stack, shared
        return release, table


def write_table(release: str, found: dict[Kernel, Counts]) -> None:
    with TABLE.open("w", newline="") as file:
        file.write(f"# ptxas {release}\n")
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["kernel", "architecture", *COLUMNS])
        rows.writerows([*kernel, *counts] for kernel, counts in sorted(found.items(), key=_order))


def _order(item: tuple[Kernel, Counts]) -> tuple[str, int]:
    name, arch = item[0]
    return name, ARCHITECTURES.index(arch)


def toolkit() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", text)
    return release[1] if release else "unknown"


def differences(expected: dict[Kernel, Counts], found: dict[Kernel, Counts], same_release: bool) -> list[str]:
    lines = []
    for kernel in sorted({*expected, *found}):
        name = f"{kernel[0]} ({kernel[1]})"
        if kernel not in found:
            lines.append(f"{name}: in the table, but not in the build")
        elif kernel not in expected:
            lines.append(f"{name}: not in the table")
        else:
            for column, before, now in zip(COLUMNS, expected[kernel], found[kernel], strict=True):
                if before != now and (same_release or (column == "spilled" and now > before)):
                    lines.append(f"{name}: {column} {now}, in the table {before}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="log of a build with -Xptxas=-v")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name} anew")
    given = parser.parse_args()
    with given.log.open(errors="replace") as file:
        found = demangled(read_log(file))
    if not found:
        print(f"{given.log} says nothing of kernels for {', '.join(ARCHITECTURES)}.", file=sys.stderr)
        return 1
    release = toolkit()
    if given.write:
        write_table(release, found)
        print(f"{len(found)} rows: {TABLE}")
        return 0
    known, expected = read_table()
    lines = differences(expected, found, same_release=known == release)
    print("\n".join(lines) or f"{len(found)} rows of {TABLE.name} hold (ptxas {release}; table of {known})")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
