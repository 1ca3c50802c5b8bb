// Row order, dropout and warp sums of the CUDA kernels of the feed-forward block and the encoder layer.
#pragma once

#include <cstdint>

#include "cuda_dropout.cuh"

namespace qfast {
namespace {

constexpr int kLanes = 32;
constexpr int kQuad = 4;            // windows (or queries) that share a dropout counter
constexpr int kPlainThreads = 256;  // threads of a block in kernels without tiles

template <class T>
struct alignas(16) Four {
  T of[kQuad];
};

// Part of the dropout counter that is the same for four rows and all columns.
struct QuadCounter {
  int64_t step, group;
};

// Rows of whole windows. In memory they are [window][step]. Kernels number them in quads of four windows at
// one step: first the quads of all steps of four windows, then those of the next four windows. One dropout
// counter therefore serves the four rows of a quad. Rows that do not belong to windows are windows of one
// step.
struct Rows {
  int64_t windows, steps;
  // Position in the batch, for the dropout. first_window is a multiple of 4.
  int64_t first_window, first_step;

  __host__ __device__ int64_t count() const { return windows * steps; }
  __host__ __device__ int64_t quads() const { return (windows + kQuad - 1) / kQuad * steps; }
  __host__ __device__ int64_t window(int64_t quad) const { return quad / steps * kQuad; }
  __host__ __device__ int64_t step(int64_t quad) const { return quad % steps; }
  __host__ __device__ QuadCounter counter(int64_t quad) const {
    return {first_step + step(quad), (first_window + window(quad)) / kQuad};
  }
  // Row i of a quad in memory, or -1 if it does not exist.
  __host__ __device__ int64_t row(int64_t quad, int i) const {
    const int64_t w = window(quad) + i;
    return w < windows ? w * steps + step(quad) : -1;
  }
};

// Factors of the four rows that share a dropout counter: 0 or the scale.
template <class T>
QFAST_DEVICE_INLINE Four<T> drawn_scales(const Dropout& rule, uint64_t seed, int64_t c0, int64_t c1,
                                         uint32_t place, int64_t group) {
  const T scale = static_cast<T>(rule.scale);
  const PhiloxWords words =
      philox(seed, static_cast<uint32_t>(c0), static_cast<uint32_t>(c1), place, static_cast<uint32_t>(group));
  Four<T> scales;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) scales.of[i] = words.word[i] >= rule.threshold ? scale : T(0);
  return scales;
}

// The same factors, or ones without dropout, which change no bit of a product.
template <class T>
QFAST_DEVICE_INLINE Four<T> scales_of(const Dropout& rule, uint64_t seed, const QuadCounter& quad,
                                      int64_t column, uint32_t place) {
  if (!rule.active) return {{T(1), T(1), T(1), T(1)}};
  return drawn_scales<T>(rule, seed, column, quad.step, place, quad.group);
}

QFAST_DEVICE_INLINE uint64_t read_seed(const Dropout& rule) {
  return rule.active ? static_cast<uint64_t>(*rule.seed) : 0;
}

// Sum over the lanes. All lanes have the same bits, because each step adds the two values of a pair and
// addition is commutative.
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

// Calls body(i) for all i below `count`, distributed over the threads of the grid.
template <class Body>
QFAST_DEVICE_INLINE void for_elements(int64_t count, const Body& body) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += stride) body(i);
}

// to += from. A thread owns single elements. Bound by bytes: two elements read and one written.
template <class T>
__global__ void __launch_bounds__(kPlainThreads) add_kernel(T* to, const T* from, int64_t count) {
  for_elements(count, [&](int64_t i) { to[i] += from[i]; });
}

}  // namespace
}  // namespace qfast
