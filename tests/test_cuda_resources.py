"""tools/cuda_resources.py: reading the log of ptxas, and the differences that it reports."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

needs_demangler = pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")


@pytest.fixture(scope="module")
def tool():
    file = Path(__file__).parents[1] / "tools" / "cuda_resources.py"
    spec = importlib.util.spec_from_file_location("cuda_resources", file)
    module = sys.modules["cuda_resources"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def log_of(name: str, registers: int, stores: int = 0, arch: str = "sm_90") -> list[str]:
    return [
        f"ptxas info    : Compiling entry function '{name}' for '{arch}a'",
        f"    8 bytes stack frame, {stores} bytes spill stores, 4 bytes spill loads",
        f"ptxas info    : Used {registers} registers, used 1 barriers, 384 bytes smem",
    ]


@needs_demangler
def test_the_log_is_read(tool):
    lines = [*log_of("_ZN5qfast4copyIfEEvPT_", 40), *log_of("_ZN3cub4copyIfEEvPT_", 99), *log_of("f", 1, arch="sm_75")]
    assert tool.demangled(tool.read_log(lines)) == {("copy<float>", "sm_90"): (40, 4, 8, 384)}


@needs_demangler
def test_different_kernels_with_one_name_are_an_error(tool):
    """They would share a row of the table, and a change of one of them could remain unnoticed."""
    first, second = "_ZN5qfast12_GLOBAL__N_14copyIfEEvPT_", "_ZN5qfast4copyIfEEvPT_"
    twice = tool.read_log([*log_of(first, 40), *log_of(second, 40)])  # a header that two files include
    assert tool.demangled(twice) == {("copy<float>", "sm_90"): (40, 4, 8, 384)}
    different = tool.read_log([*log_of(first, 40), *log_of(second, 41)])
    with pytest.raises(ValueError, match=r"two kernels are called copy<float> \(sm_90\)"):
        tool.demangled(different)


def test_another_release_of_ptxas_may_use_other_registers_but_not_spill_more(tool):
    kernel = ("copy<float>", "sm_90")
    expected, measured = {kernel: (40, 4, 8, 384)}, {kernel: (42, 4, 8, 384)}
    assert tool.differences(expected, measured, same_release=False) == []
    assert tool.differences(expected, measured, same_release=True) == [
        "copy<float> (sm_90): registers 42, 40 in the table"
    ]
    spilling = {kernel: (40, 8, 8, 384)}
    assert tool.differences(expected, spilling, same_release=False) == [
        "copy<float> (sm_90): spilled 8, 4 in the table"
    ]
    assert tool.differences(expected, {}, same_release=False) == [
        "copy<float> (sm_90): in the table, but not in the build"
    ]
    assert tool.differences({}, measured, same_release=False) == ["copy<float> (sm_90): not in the table"]
