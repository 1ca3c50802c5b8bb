"""What the inner loops of CUDA kernels are made of, out of their machine code. Needs no GPU.

    QFAST_CUDA=1 pip install .                                            # builds qfast/_cuda*.so
    python tools/cuda_hot_loops.py PATH/_cuda*.so --arch sm_90 [--kernel recurrent_forward] [--all]

Disassembled by cuobjdump (of the CUDA toolkit, on the PATH). A loop is what lies between a backward branch and its
target and has no other loop within. For each kernel its loops with multiply-adds, longest first (`--all`: those
without as well): instructions; multiply-adds on the FMA or tensor pipe, their share of all, and how many for a load;
loads from shared memory by width; loads and stores of global memory (or of what may be either) by width; stores to
shared memory; local memory (spills); shuffles; special functions; barriers. A loop that is unrolled as a whole does not
show: `straight` counts what is outside of all loops.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

FUNCTION = re.compile(r"Function : (\S+)")
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
MULTIPLY_ADDS = ("FFMA", "DFMA", "HMMA", "DMMA", "HFMA2")

__all__ = ["Instruction", "Loop", "inner_loops", "read_code"]


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with its suffixes: LDS.128
    target: int | None = None  # of a branch


@dataclass(frozen=True)
class Loop:
    first: int
    last: int
    body: tuple[Instruction, ...]

    def count(self, *names: str) -> int:
        return sum(one.name.split(".")[0] in names for one in self.body)

    def widths(self, *names: str) -> str:
        """As 4x128 + 2x32, in bits."""
        found = Counter(width_of(one.name) for one in self.body if one.name.split(".")[0] in names)
        return " + ".join(f"{count}x{width}" for width, count in sorted(found.items(), reverse=True)) or "-"


def width_of(name: str) -> int:
    """Bits that a load or store moves for each thread."""
    for part in name.split(".")[1:]:
        if part in ("64", "128"):
            return int(part)
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:])
    return 32


def read_code(text: str) -> dict[str, list[Instruction]]:
    """Instructions of every function in cuobjdump's listing."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if function := FUNCTION.search(line):
            current = found.setdefault(function[1], [])
        elif instruction := LINE.search(line):
            name, rest = instruction[2], instruction[3]
            jump = TARGET.search(rest.strip().rstrip("`()")) if name.startswith("BRA") else None
            current.append(Instruction(int(instruction[1], 16), name, int(jump[1], 16) if jump else None))
    return found


def inner_loops(code: list[Instruction]) -> list[Loop]:
    """Loops that have no other within, the longest first."""
    spans = sorted({(i.target, i.address) for i in code if i.target is not None and i.target < i.address})
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    loops = [Loop(a, b, tuple(i for i in code if a <= i.address <= b)) for a, b in inner]
    return sorted(loops, key=lambda loop: len(loop.body), reverse=True)


def described(loop: Loop, label: str) -> str:
    fma, size, loads = loop.count(*MULTIPLY_ADDS), len(loop.body), loop.count("LDS", "LDSM", "LDG", "LD")
    cells = [
        label, size, fma, f"{fma / size:.0%}", f"{fma / loads:.1f}" if loads else "-", loop.widths("LDS", "LDSM"),
        loop.widths("LDG", "LD"), loop.widths("STG", "ST"), loop.count("STS"), loop.count("LDL", "STL"),
        loop.count("SHFL"), loop.count("MUFU"), loop.count("BAR"),
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a library, object or .cubin")
    parser.add_argument("--arch", default="sm_90", help="of several in the file")
    parser.add_argument("--kernel", default="", help="only those whose name has this")
    parser.add_argument("--all", action="store_true", help="loops without multiply-adds too")
    given = parser.parse_args()
    for tool in ("cuobjdump", "c++filt"):
        if shutil.which(tool) is None:
            print(f"{tool} is not on the PATH. Remedy: the CUDA toolkit's bin, and binutils.", file=sys.stderr)
            return 2
    listing = subprocess.run(
        ["cuobjdump", "-sass", "-arch", given.arch, str(given.file)], capture_output=True, text=True, check=True
    )
    code = read_code(listing.stdout)
    plain = subprocess.run(["c++filt"], input="\n".join(code), capture_output=True, text=True, check=True)
    print(
        "| kernel, loop | instructions | FMA | share | FMA/load | LDS | LDG | STG | STS | local | SHFL | MUFU | BAR |"
    )
    print("| --- " * 13 + "|")
    for name, instructions in zip(plain.stdout.splitlines(), code.values(), strict=True):
        short = re.sub(r"\(anonymous namespace\)::|qfast::|^void |\(.*$", "", name)
        if given.kernel not in short or "cub::" in name:
            continue
        loops = inner_loops(instructions)
        covered = {one.address for loop in loops for one in loop.body}
        rest = tuple(one for one in instructions if one.address not in covered)
        print(described(Loop(0, 0, rest), f"{short}, straight"))
        for loop in loops:
            if given.all or loop.count(*MULTIPLY_ADDS):
                print(described(loop, f"{short}, {loop.first:#x}"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
