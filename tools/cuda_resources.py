"""Compare registers, spills and shared memory of every CUDA kernel with a committed table. Needs no GPU.

    PIP_LOG=build.log NVCC_APPEND_FLAGS=-Xptxas=-v pip install .    # ptxas logs the resources of each kernel
    python tools/cuda_resources.py build.log                        # exit status 1 if they differ from the table
    python tools/cuda_resources.py build.log --write                # writes the table, after an intended change

pip appends to its log, so use a new log for each build. The counts depend on the release of ptxas. Under the release
that wrote the table all counts must be equal. Under any other release only an increase of the spilled bytes is a
difference. Spilled bytes are the sum of spill stores and spill loads.
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
Counts = tuple[int, int, int, int]  # in the order of COLUMNS


def read_log(lines: Iterable[str]) -> dict[Kernel, Counts]:
    """The counts that `ptxas -v` wrote into the log of a build, by mangled name and architecture."""
    measured: dict[Kernel, Counts] = {}
    kernel: Kernel | None = None
    frame = spilled = 0
    for line in lines:
        if entry := ENTRY.search(line):
            kernel, frame, spilled = (entry[1], entry[2]), 0, 0
        elif kernel and (spills := SPILLS.search(line)):
            frame, spilled = int(spills[1]), int(spills[2]) + int(spills[3])
        elif kernel and (used := USED.search(line)):
            shared = SHARED.search(line)
            measured[kernel] = int(used[1]), spilled, frame, int(shared[1]) if shared else 0
            kernel = None
    return measured


def demangled(measured: dict[Kernel, Counts]) -> dict[Kernel, Counts]:
    """The counts of qfast's kernels by demangled name, without the kernels of CUB and of other architectures.

    A kernel in a header that two files include is compiled twice and has one row.

    Raises
    ------
    ValueError
        Two kernels have the same short name but different counts, so one of them would hide the other.
    """
    names = [name for name, _ in measured]
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    counts: dict[Kernel, Counts] = {}
    for name, ((_, arch), of_kernel) in zip(plain.splitlines(), measured.items(), strict=True):
        kernel = _short(name), arch
        if arch not in ARCHITECTURES or name.startswith("void cub::"):
            continue
        if counts.get(kernel, of_kernel) != of_kernel:
            raise ValueError(
                f"two kernels are called {kernel[0]} ({arch}), with {counts[kernel]} and {of_kernel} "
                f"{', '.join(COLUMNS)}. Remedy: rename one of them."
            )
        counts[kernel] = of_kernel
    return counts


def _short(name: str) -> str:
    """A kernel's name as kernel<template arguments>, without return type, arguments and qfast's namespaces."""
    name = re.sub(r"\(anonymous namespace\)::|qfast::", "", name).removeprefix("void ")
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and not depth:
            return name[:place]
    return name


def read_table() -> tuple[str, dict[Kernel, Counts]]:
    """The toolkit release that wrote the committed table, and the table."""
    with TABLE.open(newline="") as file:
        release = next(file).removeprefix("# ptxas ").strip()
        table: dict[Kernel, Counts] = {}
        for row in csv.DictReader(file):
            registers, spilled, stack, shared = (int(row[column]) for column in COLUMNS)
            table[row["kernel"], row["architecture"]] = registers, spilled, stack, shared
        return release, table


def write_table(release: str, measured: dict[Kernel, Counts]) -> None:
    """Replace the committed table."""
    with TABLE.open("w", newline="") as file:
        file.write(f"# ptxas {release}\n")
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["kernel", "architecture", *COLUMNS])
        rows.writerows([*kernel, *counts] for kernel, counts in sorted(measured.items(), key=_order))


def _order(item: tuple[Kernel, Counts]) -> tuple[str, int]:
    """Sort key of a row: name, then architecture from oldest to newest."""
    name, arch = item[0]
    return name, ARCHITECTURES.index(arch)


def toolkit() -> str:
    """Release of the CUDA toolkit on the PATH, for example "13.0"."""
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", text)
    return release[1] if release else "unknown"


def differences(expected: dict[Kernel, Counts], measured: dict[Kernel, Counts], same_release: bool) -> list[str]:
    """One line for each difference between the table and the build."""
    lines = []
    for kernel in sorted({*expected, *measured}):
        name = f"{kernel[0]} ({kernel[1]})"
        if kernel not in measured:
            lines.append(f"{name}: in the table, but not in the build")
        elif kernel not in expected:
            lines.append(f"{name}: not in the table")
        else:
            for column, before, now in zip(COLUMNS, expected[kernel], measured[kernel], strict=True):
                if before != now and (same_release or (column == "spilled" and now > before)):
                    lines.append(f"{name}: {column} {now}, {before} in the table")
    return lines


def main() -> int:
    """Compare or write the table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="log of a build with -Xptxas=-v")
    parser.add_argument("--write", action="store_true", help=f"replace {TABLE.name}")
    options = parser.parse_args()
    with options.log.open(errors="replace") as file:
        log = read_log(file)
    try:
        measured = demangled(log)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if not measured:
        architectures = ", ".join(ARCHITECTURES)
        print(f"{options.log} has no kernels for {architectures}. Remedy: build with -Xptxas=-v.", file=sys.stderr)
        return 1
    release = toolkit()
    if options.write:
        write_table(release, measured)
        print(f"wrote {len(measured)} rows to {TABLE}")
        return 0
    release_of_table, expected = read_table()
    lines = differences(expected, measured, same_release=release_of_table == release)
    print(
        "\n".join(lines)
        or f"{len(measured)} kernels agree with {TABLE.name} (ptxas {release}; table of {release_of_table})"
    )
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
