// Tensor cores (mma.sync, sm_80 and newer) and asynchronous copies to shared memory. Each function is one PTX
// instruction. No other file contains PTX.
//
// Lane l of a warp has g = l / 4 and t = l % 4. A product multiplies 16 rows by 8 columns over a depth of 8
// (tf32) or 16 (bf16) and adds the result to 16 x 8 sums. A lane has
//   sums     of rows g, g, g + 8, g + 8 and columns 2t, 2t + 1, 2t, 2t + 1;
//   rows     words of rows g, g + 8, g, g + 8 at depths t, t, t + 4, t + 4;
//   columns  words of column g at depths t, t + 4.
// A word of bf16 contains two elements adjacent in depth, the first one in its low half. The depth may be
// numbered in any order that is the same for rows and columns.
#pragma once

#include <cstdint>

// On older devices the functions compile to nothing. The host does not launch kernels that use them there.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define QFAST_TENSOR_CORES 1
#else
#define QFAST_TENSOR_CORES 0
#endif

namespace qfast {
namespace {

// How float32 is multiplied. The numbers are the same as in qfast/precision.py.
enum class Precision : int32_t { kIeee = 0, k3xTf32 = 1, kTf32 = 2, kBf16 = 3 };

// Rounds to tf32, which has 10 bits of mantissa: to nearest, ties away from zero. NaN stays NaN.
__device__ __forceinline__ uint32_t tf32(float value) {
  uint32_t rounded = __float_as_uint(value);
#if QFAST_TENSOR_CORES
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
#endif
  return rounded;
}

// Rounds two values to bf16: to nearest, ties to even. NaN stays NaN.
__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  uint32_t pair = __float_as_uint(low + high);
#if QFAST_TENSOR_CORES
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
  return pair;
}

// sums += rows * columns
__device__ __forceinline__ void multiply_tf32(float (&sums)[4], const uint32_t (&rows)[4],
                                              const uint32_t (&columns)[2]) {
#if QFAST_TENSOR_CORES
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(columns[0]), "r"(columns[1]));
#endif
}

__device__ __forceinline__ void multiply_bf16(float (&sums)[4], const uint32_t (&rows)[4],
                                              const uint32_t (&columns)[2]) {
#if QFAST_TENSOR_CORES
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(columns[0]), "r"(columns[1]));
#endif
}

// Starts a copy of 16 bytes to shared memory. Both addresses are aligned to 16 bytes. The calling thread may
// read the bytes after wait_for_copies, other threads after a barrier that follows it.
__device__ __forceinline__ void start_copy(void* shared, const void* from) {
#if QFAST_TENSOR_CORES
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#if QFAST_TENSOR_CORES
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace
}  // namespace qfast
