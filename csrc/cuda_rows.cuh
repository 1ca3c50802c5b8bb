// What the CUDA kernels of the feed-forward block and of the encoder layer share: in which order they take
// rows, and their dropout.
#pragma once

#include <cstdint>

#include "cuda_dropout.cuh"

namespace qfast {
namespace {

constexpr int kLanes = 32;
constexpr int kQuad = 4;            // windows (or queries) that share a counter of the dropout
constexpr int kPlainThreads = 256;  // of a block, in kernels without tiles

template <class T>
struct alignas(16) Four {
  T of[kQuad];
};

// What four rows have in common in the counters of the dropout.
struct QuadCounter {
  int64_t step, group;
};

// Rows of whole windows as they stand in memory, [window][step], and how kernels count them: four windows at
// a step, the next step, the next four windows. So one counter of the dropout serves four neighbours. Rows
// that are no part of a window are windows of a single step.
struct Rows {
  int64_t windows, steps;
  int64_t first_window, first_step;  // in the whole batch, for the dropout; the first divides by 4

  __host__ __device__ int64_t count() const { return windows * steps; }
  __host__ __device__ int64_t quads() const { return (windows + kQuad - 1) / kQuad * steps; }
  __host__ __device__ int64_t window(int64_t quad) const { return quad / steps * kQuad; }
  __host__ __device__ int64_t step(int64_t quad) const { return quad % steps; }
  __host__ __device__ QuadCounter counter(int64_t quad) const {
    return {first_step + step(quad), (first_window + window(quad)) / kQuad};
  }
  // Where it stands, or -1: no such row.
  __host__ __device__ int64_t row(int64_t quad, int i) const {
    const int64_t w = window(quad) + i;
    return w < windows ? w * steps + step(quad) : -1;
  }
};

// 0 or the scale for the four that share a counter.
template <class T>
QFAST_DEVICE_INLINE Four<T> kept_scales(const Dropout& rule, uint64_t seed, int64_t c0, int64_t c1,
                                        uint32_t place, int64_t group) {
  const T scale = static_cast<T>(rule.scale);
  const PhiloxWords words =
      philox(seed, static_cast<uint32_t>(c0), static_cast<uint32_t>(c1), place, static_cast<uint32_t>(group));
  Four<T> scales;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) scales.of[i] = words.word[i] >= rule.threshold ? scale : T(0);
  return scales;
}

// Without dropout all ones, which change no bit.
template <class T>
QFAST_DEVICE_INLINE Four<T> scales_of(const Dropout& rule, uint64_t seed, const QuadCounter& quad,
                                      int64_t column, uint32_t place) {
  if (!rule.active) return {{T(1), T(1), T(1), T(1)}};
  return kept_scales<T>(rule, seed, column, quad.step, place, quad.group);
}

QFAST_DEVICE_INLINE uint64_t read_seed(const Dropout& rule) {
  return rule.active ? static_cast<uint64_t>(*rule.seed) : 0;
}

// The same bits in all lanes: each adds the two halves of a pair, in whichever order.
template <class T>
QFAST_DEVICE_INLINE T sum_of_warp(T value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step, kLanes);
  return value;
}

template <class T>
QFAST_DEVICE_INLINE T larger_or_nan(T a, T b) {
  return b > a || b != b ? b : a;
}

template <class T>
QFAST_DEVICE_INLINE T largest_of_warp(T value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    value = larger_or_nan(value, __shfl_xor_sync(~0u, value, step, kLanes));
  return value;
}

// body(i) for every i below `count`, by all threads of the grid.
template <class Body>
QFAST_DEVICE_INLINE void for_elements(int64_t count, const Body& body) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += stride) body(i);
}

template <class T>
__global__ void __launch_bounds__(kPlainThreads) add_kernel(T* to, const T* from, int64_t count) {
  for_elements(count, [&](int64_t i) { to[i] += from[i]; });
}

}  // namespace
}  // namespace qfast
