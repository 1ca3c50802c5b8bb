"""csrc/cuda_shared_memory.cuh with a CUDA runtime that counts calls: the limit of a kernel, and errors."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

RUNTIME = """
#pragma once
#include <atomic>
#include <cstddef>
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes { size_t sharedSizeBytes; };
inline std::atomic<int> calls{0}, limit{0};
inline bool fails = false;
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->sharedSizeBytes = 24;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  ++calls, limit = bytes;
  return fails ? last_error = cudaErrorInvalidValue : cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
"""
PROGRAM = """
#include "cuda_shared_memory.cuh"
#include <cstdio>
#include <thread>
#include <vector>
#define REQUIRE(condition) do { if (!(condition)) { std::puts(#condition); return 1; } } while (false)
int main() {
  using qfast::allow_shared_memory;
  const int kLimit = 227 << 10;
  const char first = 1, second = 2;
  fails = true;
  REQUIRE(allow_shared_memory(&first, 0, kLimit) == cudaErrorInvalidValue);
  REQUIRE(last_error == cudaSuccess);  // the check after the next launch must not report it
  fails = false;
  REQUIRE(allow_shared_memory(&first, 0, kLimit) == cudaSuccess);  // a failure is not remembered
  REQUIRE(calls == 2 && limit == kLimit - 24);  // the device's limit includes static shared memory
  std::vector<std::thread> threads;
  for (int i = 0; i < 16; ++i)
    threads.emplace_back([&, i] { allow_shared_memory(i % 2 ? &first : &second, i % 4 / 2, kLimit); });
  for (std::thread& thread : threads) thread.join();
  REQUIRE(calls == 5);  // once for each kernel on each device
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_limit_is_set_once_for_each_kernel_and_device(tmp_path):
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)
    (tmp_path / "program.cpp").write_text(PROGRAM)
    program = tmp_path / "program"
    flags = ["-std=c++20", "-O1", "-pthread", "-Wall", "-Wextra", "-Werror", f"-I{tmp_path}", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, str(tmp_path / "program.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_error_of_the_runtime_is_cleared():
    """STD_CUDA_CHECK raises an error but leaves it in the runtime, unless it is that of `cudaGetLastError`."""
    for path in (ROOT / "csrc").rglob("*.cu*"):
        for line in path.read_text().split("STD_CUDA_CHECK(")[1:]:
            call = line.split("(")[0].strip()
            assert call in ("cleared", "allow_shared_memory"), f"{path.name}: STD_CUDA_CHECK({call}"
