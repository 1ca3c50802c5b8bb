// Kernels whose matrix products have bfloat16 operands and float32 sums.
//
// They are the kernels of QFAST_PRODUCT_KERNELS, compiled again for an instruction set of their own: AVX-512
// and the tile registers of AMX. Everything is stored in float32. Only `multiply` and the products of the
// recurrent layers differ: they round both operands to bfloat16 when they pack them. The vector instruction
// of AVX512-BF16 is not used for products: on Intel's CPUs it multiplies more slowly than float32.
//
// Host only.
#pragma once

#include <string>

#include "cpu_dispatch.h"
#include "message.h"

namespace qfast {

constexpr int64_t kBf16 = 3;  // code of the precision, as in qfast/precision.py

// Returns the reason why the kernels cannot be used, or an empty string.
const std::string& bf16_obstacle();

const ProductKernels<float>& bf16_kernels();

// Returns the kernels that multiply, for one element type and precision.
template <class Real>
const ProductKernels<Real>& product_kernels(const char* op, int64_t precision) {
  if (precision != kBf16) return cpu_kernels<Real>().products;
  if constexpr (std::is_same_v<Real, float>) {
    const std::string& obstacle = bf16_obstacle();
    QFAST_CHECK(obstacle.empty(), op, ": bf16 is not available: ", obstacle, ".");
    return bf16_kernels();
  } else {
    throw std::invalid_argument(message(op, ": bf16 needs float32 tensors, got float64."));
  }
}

}  // namespace qfast
