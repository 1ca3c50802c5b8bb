// Replaces csrc/tensor_core.cuh when kernels run as host code: the same functions on the fragments of 32
// fibers.
//
// Sums are rounded as in the least accurate published model of the devices: the terms of half the depth are
// aligned to the largest one and truncated to 24 bits. An error bound that holds here therefore holds on a
// device. A background copy completes at random, either at once or when the kernel waits for it. Until then
// its destination contains NaN.
#pragma once

#include <cuda_runtime.h>

namespace qfast {
namespace {

enum class Precision : int32_t { kIeee = 0, k3xTf32 = 1, kTf32 = 2, kBf16 = 3 };

constexpr uint32_t kNan = 0x7fffffff;

inline uint32_t tf32(float value) {
  if (std::isnan(value)) return kNan;
  const uint32_t bits = __float_as_uint(value);
  return std::isinf(value) ? bits : (bits + 0x1000u) & 0xffffe000u;
}

inline uint32_t bf16(float value) {
  const uint32_t bits = __float_as_uint(value);
  return std::isnan(value) ? kNan >> 16 : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

inline uint32_t bf16_pair(float low, float high) { return bf16(low) | bf16(high) << 16; }

// ---------------------------------------------------------------- products
struct Fragments {
  const uint32_t *rows, *columns;
};

inline Fragments shown[cuda_on_host::kMostThreads];

// Rounds to float32 toward zero.
inline float truncated(double value) {
  const float near = static_cast<float>(value);
  return std::fabs(static_cast<double>(near)) > std::fabs(value) ? std::nextafterf(near, 0.0f) : near;
}

inline float sum_of(const double* terms, int count) {
  double largest = 0, sum = 0;
  for (int i = 0; i < count; ++i) {
    if (!std::isfinite(terms[i])) {
      for (int j = 0; j < count; ++j) sum += terms[j];
      return static_cast<float>(sum);
    }
    largest = std::max(largest, std::fabs(terms[i]));
  }
  int exponent = 0;
  std::frexp(largest, &exponent);
  const double unit = std::ldexp(1.0, exponent - 24);
  for (int i = 0; i < count; ++i) sum += std::trunc(terms[i] / unit);
  return truncated(sum * unit);
}

// of_row(first, row, k) and of_column(first, column, k) read an element from the fragments of the warp whose
// first thread is `first`. csrc/tensor_core.cuh describes the layouts.
template <int kDepth, class Row, class Column>
void multiply(float (&sums)[4], const uint32_t (&rows)[4], const uint32_t (&columns)[2], const Row& of_row,
              const Column& of_column) {
  const unsigned me = threadIdx.x, first = me / 32 * 32, g = me % 32 / 4, t = me % 4;
  shown[me] = {rows, columns};
  __syncwarp();
  float made[4];
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = g + i / 2 * 8, column = 2 * t + i % 2;
    made[i] = sums[i];
    for (unsigned half = 0; half < 2; ++half) {
      double terms[kDepth / 2 + 1] = {made[i]};
      for (unsigned j = 0; j < kDepth / 2; ++j) {
        const unsigned k = half * kDepth / 2 + j;
        terms[j + 1] = static_cast<double>(of_row(first, row, k)) * of_column(first, column, k);
      }
      made[i] = sum_of(terms, kDepth / 2 + 1);
    }
  }
  __syncwarp();  // all lanes have read the fragments, so they may change now
  std::copy(made, made + 4, sums);
}

inline void multiply_tf32(float (&sums)[4], const uint32_t (&rows)[4], const uint32_t (&columns)[2]) {
  const auto number = [](uint32_t word) {
    if ((word & 0x1fff) != 0 && (word & kNan) != kNan) cuda_on_host::give_up("an operand is no tf32");
    return __uint_as_float(word);
  };
  multiply<8>(
      sums, rows, columns,
      [&](unsigned first, unsigned row, unsigned k) {
        return number(shown[first + row % 8 * 4 + k % 4].rows[row / 8 + k / 4 * 2]);
      },
      [&](unsigned first, unsigned column, unsigned k) {
        return number(shown[first + column * 4 + k % 4].columns[k / 4]);
      });
}

inline void multiply_bf16(float (&sums)[4], const uint32_t (&rows)[4], const uint32_t (&columns)[2]) {
  const auto half = [](uint32_t word, unsigned k) {
    return __uint_as_float(k % 2 ? word & 0xffff0000u : word << 16);
  };
  multiply<16>(
      sums, rows, columns,
      [&](unsigned first, unsigned row, unsigned k) {
        return half(shown[first + row % 8 * 4 + k % 8 / 2].rows[row / 8 + k / 8 * 2], k);
      },
      [&](unsigned first, unsigned column, unsigned k) {
        return half(shown[first + column * 4 + k % 8 / 2].columns[k / 8], k);
      });
}

// ---------------------------------------------------------------- background copies
struct Copy {
  void* to;
  const void* from;
};

inline std::vector<Copy> on_their_way[cuda_on_host::kMostThreads];

inline void start_copy(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    cuda_on_host::give_up("a background copy that is not aligned");
  std::memset(to, 0xff, 16);
  if (cuda_on_host::random_source()() % 2) {
    std::memcpy(to, from, 16);
  } else {
    on_their_way[threadIdx.x].push_back({to, from});
  }
}

inline void wait_for_copies() {
  for (const Copy& copy : on_their_way[threadIdx.x]) std::memcpy(copy.to, copy.from, 16);
  on_their_way[threadIdx.x].clear();
}

}  // namespace
}  // namespace qfast
