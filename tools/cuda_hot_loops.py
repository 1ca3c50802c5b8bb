"""Count the instructions in the inner loops of CUDA kernels. Needs no GPU.

    QFAST_CUDA=1 pip install .                                            # builds qfast/_cuda*.so
    python tools/cuda_hot_loops.py PATH/_cuda*.so --arch sm_90 [--kernel recurrent_forward] [--all]

cuobjdump and c++filt must be on the PATH; cuobjdump, which disassembles the library, is part of the CUDA toolkit. An
inner loop is the code from the target of a backward branch to the branch, if it contains no other loop. The program
prints one row for each inner loop that has multiply-adds, the longest loop of each kernel first. `--all` adds the loops
without multiply-adds. The row `straight` counts the instructions outside all inner loops, including fully unrolled
loops. The columns are:

    instructions    all instructions of the loop
    FMA             multiply-adds of the FMA pipe and the tensor cores
    share           share of the multiply-adds among the instructions
    FMA/load        multiply-adds per load from shared or global memory
    LDS             loads from shared memory, as count x width in bits
    LDG, STG        loads from and stores to global memory (or generic addresses), as count x width in bits
    STS             stores to shared memory
    local           loads from and stores to local memory (spills)
    SHFL            shuffles
    MUFU            special functions, such as exp2 and reciprocals
    BAR             barriers
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
    """One machine instruction."""

    address: int
    name: str  # with suffixes, for example LDS.128
    target: int | None = None  # address that a branch jumps to; None for all other instructions


@dataclass(frozen=True)
class Loop:
    """The instructions from the target of a backward branch to the branch."""

    first: int  # address of the first instruction
    last: int  # address of the branch
    body: tuple[Instruction, ...]

    def count(self, *names: str) -> int:
        """Number of instructions with one of the names, whatever their suffixes."""
        return sum(instruction.name.split(".")[0] in names for instruction in self.body)

    def widths(self, *names: str) -> str:
        """Number of these instructions by width in bits, for example "4x128 + 2x32"."""
        counts = Counter(width_of(each.name) for each in self.body if each.name.split(".")[0] in names)
        return " + ".join(f"{count}x{width}" for width, count in sorted(counts.items(), reverse=True)) or "-"


def width_of(name: str) -> int:
    """Bits that a load or store moves per thread."""
    for part in name.split(".")[1:]:
        if part in ("64", "128"):
            return int(part)
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:])
    return 32


def read_code(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every function in a listing of `cuobjdump -sass`, by mangled name."""
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if function := FUNCTION.search(line):
            current = functions.setdefault(function[1], [])
        elif instruction := LINE.search(line):
            name, operands = instruction[2], instruction[3]
            jump = TARGET.search(operands.strip().rstrip("`()")) if name.startswith("BRA") else None
            current.append(Instruction(int(instruction[1], 16), name, int(jump[1], 16) if jump else None))
    return functions


def inner_loops(code: list[Instruction]) -> list[Loop]:
    """The loops that contain no other loop, longest first."""
    spans = sorted({(i.target, i.address) for i in code if i.target is not None and i.target < i.address})
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    loops = [Loop(a, b, tuple(i for i in code if a <= i.address <= b)) for a, b in inner]
    return sorted(loops, key=lambda loop: len(loop.body), reverse=True)


def table_row(loop: Loop, label: str) -> str:
    """The row of a Markdown table that describes a loop."""
    fma = loop.count(*MULTIPLY_ADDS)
    size = len(loop.body)
    loads = loop.count("LDS", "LDSM", "LDG", "LD")
    cells = [
        label,
        size,
        fma,
        f"{fma / size:.0%}",
        f"{fma / loads:.1f}" if loads else "-",
        loop.widths("LDS", "LDSM"),
        loop.widths("LDG", "LD"),
        loop.widths("STG", "ST"),
        loop.count("STS"),
        loop.count("LDL", "STL"),
        loop.count("SHFL"),
        loop.count("MUFU"),
        loop.count("BAR"),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> int:
    """Print the table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="library, object file or .cubin")
    parser.add_argument("--arch", default="sm_90", help="architecture to read (default: %(default)s)")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this text")
    parser.add_argument("--all", action="store_true", help="also print loops without multiply-adds")
    options = parser.parse_args()
    for tool in ("cuobjdump", "c++filt"):
        if shutil.which(tool) is None:
            print(f"{tool} is not on the PATH. cuobjdump is in the CUDA toolkit, c++filt in binutils.", file=sys.stderr)
            return 2
    listing = subprocess.run(
        ["cuobjdump", "-sass", "-arch", options.arch, str(options.file)], capture_output=True, text=True, check=True
    )
    code = read_code(listing.stdout)
    plain = subprocess.run(["c++filt"], input="\n".join(code), capture_output=True, text=True, check=True)
    print(
        "| kernel, loop | instructions | FMA | share | FMA/load | LDS | LDG | STG | STS | local | SHFL | MUFU | BAR |"
    )
    print("| --- " * 13 + "|")
    for name, instructions in zip(plain.stdout.splitlines(), code.values(), strict=True):
        short = re.sub(r"\(anonymous namespace\)::|qfast::|^void |\(.*$", "", name)
        if options.kernel not in short or "cub::" in name:
            continue
        loops = inner_loops(instructions)
        in_loops = {instruction.address for loop in loops for instruction in loop.body}
        straight = tuple(instruction for instruction in instructions if instruction.address not in in_loops)
        print(table_row(Loop(0, 0, straight), f"{short}, straight"))
        for loop in loops:
            if options.all or loop.count(*MULTIPLY_ADDS):
                print(table_row(loop, f"{short}, {loop.first:#x}"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
