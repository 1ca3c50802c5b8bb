"""tools/cuda_on_host.py: its translation of CUDA sources, and the errors that it detects."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() not in ("x86_64", "AMD64"), reason="no g++ for x86-64"
)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("cuda_on_host", TOOLS / "cuda_on_host.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_launches_and_shared_memory_become_cpp(tool):
    arguments = """
    extern __shared__ double shared_memory[];
    __shared__ int32_t any;
    if (x) sum_kernel<Word, true><<<grid_for(n, 4), kBlock, bytes, scope.stream()>>>(job, pair(a, b));
    dispatch([&](auto zero) {
      scatter<decltype(zero)>
          <<<1, 32>>>(to);
    });
    STABLE_TORCH_LIBRARY_IMPL(qfast, CUDA, m) {}
    """
    result = tool.as_host_code(arguments)
    assert "double* const shared_memory = cuda_on_host::shared_memory<double>();" in result
    assert "static int32_t any;" in result
    launch = "cuda_on_host::launch(grid_for(n, 4), kBlock, bytes, [&] { sum_kernel<Word, true>(job, pair(a, b)); });"
    assert "if (x) " in result
    assert launch in result
    assert "cuda_on_host::launch(1, 32, 0, [&] { scatter<decltype(zero)>(to); });" in result
    assert "(qfast, CPU, m)" in result


def test_only_runs_the_test_files_whose_kernels_are_built(tool):
    files, flags = tool.divide(["-x"], {"encoder_layer", "feed_forward"})
    assert [Path(file).name for file in files] == ["test_ops_encoder_cuda.py", "test_ops_encoder_precision_cuda.py"]
    assert flags == ["-x"]
    assert len(tool.divide([], set())[0]) == len(tool.TESTS)
    assert all((Path(__file__).parent / name).exists() for name in tool.TESTS)
    kernels = {path.stem for path in (TOOLS.parent / "csrc").rglob("*.cu")}
    assert {name for needed in tool.TESTS.values() for name in needed} == kernels


def test_values_of_options_are_not_test_files(tool):
    arguments = ["--deselect", "tests/a.py::test_b", "tests/c.py", "tests/d.py::test_e[1]", "-q"]
    files, flags = tool.divide(arguments, set())
    assert files == ["tests/c.py", "tests/d.py::test_e[1]"]
    assert flags == ["--deselect", "tests/a.py::test_b", "-q"]


PROGRAM = """
#include <cuda_runtime.h>
%s
int main() {
  constexpr unsigned kThreads = 96;
  std::vector<float> in(kThreads), out(kThreads, -1);
  for (unsigned i = 0; i < kThreads; ++i) in[i] = float(i);
  for (int repeat = 0; repeat < 50; ++repeat)
    cuda_on_host::launch(2, kThreads, kThreads * sizeof(float), [&] { kernel(in.data(), out.data()); });
  for (unsigned i = 0; i < kThreads; ++i)
    if (out[i] != in[kThreads - 1 - i] + 16 * 31) return 3;
}
"""
KERNEL = """
__global__ void kernel(const float* in, float* out) {
  float* const held = cuda_on_host::shared_memory<float>();
  float all = threadIdx.x % 32;
  for (int step = 16; step > 0; step /= 2) all += __shfl_xor_sync(~0u, all, step);
  held[threadIdx.x] = in[threadIdx.x];
  BARRIER
  out[threadIdx.x] = held[blockDim.x - 1 - threadIdx.x] + all;
}
"""


@needs_compiler
@pytest.mark.parametrize(
    ("barrier", "status", "message"),
    [
        ("__syncthreads();", 0, ""),
        ("", 3, ""),
        ("if (threadIdx.x < 40) __syncthreads();", -6, "a thread has left before a barrier that others wait at"),
        ("if (threadIdx.x < 40) __syncwarp();", -6, "lanes wait for others that do not come"),
        ("__shfl_sync(1u << threadIdx.x % 32, all, threadIdx.x % 2);", -6, "a shuffle from a lane that takes no part"),
    ],
    ids=["right", "none", "not all threads", "not all lanes", "lane alone"],
)
def test_errors_are_detected(tool, tmp_path, barrier, status, message):
    source = tmp_path / "program.cpp"
    source.write_text(PROGRAM % KERNEL.replace("BARRIER", barrier))
    program = tmp_path / "program"
    switch = TOOLS / "cuda_on_host" / "switch.cpp"
    command = ["g++", "-std=c++20", "-O1", f"-I{switch.parent}", str(source), str(switch), "-o", str(program)]
    subprocess.run([*command, f"-I{sysconfig.get_paths()['include']}"], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == status
    assert message in done.stderr


@pytest.mark.parametrize(("outcome", "status"), [("assert True", 0), ("assert 'a.py' not in __file__", 1)])
def test_files_run_at_the_same_time(tool, tmp_path, monkeypatch, capfd, outcome, status):
    """Each of two files waits for the other."""
    meet = "    while len(list(place.glob('*.begun'))) < 2:\n        time.sleep(0.01)\n"
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(
            f"import pathlib, time\ndef test_one():\n    place = pathlib.Path({str(tmp_path)!r})\n"
            f"    (place / '{name}.begun').touch()\n{meet}    {outcome}\n"
        )
    monkeypatch.setattr(tool, "build", lambda sanitize, only: tmp_path / "kernels.so")
    arguments = ["--jobs", "2", "-p", "no:cacheprovider", str(tmp_path / "a.py"), str(tmp_path / "b.py")]
    monkeypatch.setattr(tool.sys, "argv", ["cuda_on_host.py", *arguments])
    assert tool.main() == status
    assert capfd.readouterr().out.count("1 passed") == 2 - status
