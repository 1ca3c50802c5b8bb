"""tools/cuda_hot_loops.py: the loops that it finds in a listing of machine code."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

LISTING = """
\t\tFunction : _Z6kernelv
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
        /*0010*/                   LDS.128 R4, [R2] ;            /* 0x0 */
                                                                 /* 0x0 */
        /*0020*/                   FFMA R8, R4, R5, R8 ;
        /*0030*/                   FFMA R9, R4, R6, R9 ;
        /*0040*/              @!P1 LDG.E.64 R6, desc[UR4][R2.64] ;
        /*0050*/               @P0 BRA 0x10 ;
        /*0060*/                   LDL R3, [R1] ;
        /*0070*/               @P2 BRA 0x0 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
"""


def test_inner_loops_and_their_instructions():
    file = Path(__file__).parents[1] / "tools" / "cuda_hot_loops.py"
    spec = importlib.util.spec_from_file_location("cuda_hot_loops", file)
    tool = sys.modules["cuda_hot_loops"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    code = tool.read_code(LISTING)
    assert list(code) == ["_Z6kernelv"]
    assert len(code["_Z6kernelv"]) == 10
    (loop,) = tool.inner_loops(code["_Z6kernelv"])  # neither the outer loop nor the branch to itself
    assert (loop.first, loop.last, len(loop.body)) == (0x10, 0x50, 5)
    assert loop.count("FFMA") == 2
    assert (loop.widths("LDS"), loop.widths("LDG"), loop.widths("STG")) == ("1x128", "1x64", "-")
    assert tool.table_row(loop, "kernel").startswith("| kernel | 5 | 2 | 40% | 1.0 | 1x128 | 1x64 | - |")
