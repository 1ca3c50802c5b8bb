"""Measures the processor's peak of fused multiply-adds, of which other benchmarks report shares.

    python bench/fma_peak.py    # GFLOP/s of one thread in float32

A loop over registers, compiled for this processor on first use (torch.utils.cpp_extension).
"""

from __future__ import annotations

from functools import cache
from typing import Any

SOURCE = """
#include <chrono>
#ifdef __AVX512F__
constexpr int kBytes = 64, kSums = 24;
#else
constexpr int kBytes = 32, kSums = 12;
#endif
typedef float lanes __attribute__((vector_size(kBytes)));
// Sums that do not wait for each other, as many as a register tile has; 2 flops a lane.
double flops_a_second(int64_t rounds) {
  lanes sums[kSums] = {}, factor = {}, term = {};
  for (int i = 0; i < kBytes / 4; ++i) factor[i] = 0.999f + 1e-5f * i, term[i] = 1e-3f * i;
  const auto start = std::chrono::steady_clock::now();
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * factor + term;
    asm volatile("" : "+v"(factor), "+v"(term));
  }
  const auto end = std::chrono::steady_clock::now();
  lanes total = {};
  for (int i = 0; i < kSums; ++i) total += sums[i];
  volatile float used = total[0];
  (void)used;
  return rounds * kSums * kBytes / 2. / std::chrono::duration<double>(end - start).count();
}
"""


@cache
def _compiled() -> Any:
    from torch.utils.cpp_extension import load_inline

    flags = ["-O3", "-march=native", "-mprefer-vector-width=512"]
    return load_inline("qfast_fma_peak", SOURCE, functions=["flops_a_second"], extra_cflags=flags)


def fma_peak(repeats: int = 20, rounds: int = 400_000) -> float:
    """GFLOP/s of one thread in float32, the best of `repeats`."""
    return max(_compiled().flops_a_second(rounds) for _ in range(repeats)) / 1e9  # type: ignore[no-any-return]


if __name__ == "__main__":
    print(f"{fma_peak():.1f} GFLOP/s")
