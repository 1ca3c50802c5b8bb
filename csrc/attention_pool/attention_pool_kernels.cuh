// Kernels of attention over time on CUDA: tanh, scores, softmax over the steps, weighted mean, and the
// gradients. cuBLAS computes the products of all steps with the weight (attention_pool.cu).
//
// A warp owns a window, and a lane owns every 32nd unit, feature or step of it. Saved for backward: the
// attention weights and the weighted mean. Bound by bytes: the products and h are read once in forward;
// backward also writes the gradients of the products, and the activations times the gradients of the scores.
#pragma once

#include <cstdint>

#include "cuda_dropout.cuh"

namespace qfast {
namespace {

constexpr int kLanes = 32;
constexpr int kThreads = 256;
constexpr int kWindows = kThreads / kLanes;  // windows of a thread block

template <class T>
struct PoolData {
  int64_t batch, steps, hidden, width;  // B, T, H, A
  const T* h;                           // [B, T, H]
  T* products;                          // [B, T, A]; backward replaces them by their gradients
  const T *bias, *score;
  T *attention, *pooled;  // [B, T], [B, H]; results of forward, arguments of backward
  Dropout dropout;
  // Backward only.
  const T* grad;        // [B, H]
  T *along, *weighted;  // [B, T] scratch; [B, T, A] whose sum over B and T is the gradient of score
  T* grad_h;
};

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

// One window of the batch.
template <class T>
struct PoolWindow {
  const PoolData<T>& job;
  int64_t row;
  int lane;
  uint64_t seed;

  QFAST_DEVICE_INLINE int64_t place(int64_t t) const { return row * job.steps + t; }

  // Returns 0 or the dropout scale. Dropout is between the linear layer and the tanh.
  QFAST_DEVICE_INLINE T scale(int64_t t, int64_t unit) const {
    if (!job.dropout.active) return T(1);
    constexpr uint32_t kCounter = 0x80000000u;  // no recurrent layer has this number
    const PhiloxWords words = philox(seed, static_cast<uint32_t>(unit), static_cast<uint32_t>(t), kCounter,
                                     static_cast<uint32_t>(row / 4));
    const uint32_t low = row & 1 ? words.word[1] : words.word[0];
    const uint32_t high = row & 1 ? words.word[3] : words.word[2];
    return (row & 2 ? high : low) >= job.dropout.threshold ? static_cast<T>(job.dropout.scale) : T(0);
  }

  QFAST_DEVICE_INLINE T activated(int64_t t, int64_t unit, T scale) const {
    return ::tanh((job.products[place(t) * job.width + unit] + job.bias[unit]) * scale);
  }

  // Calls body(step, value) for the steps from t0. Lane l has the value of step t0 + l.
  template <class Body>
  QFAST_DEVICE_INLINE void for_steps(int64_t t0, T value, const Body& body) const {
    const int count = static_cast<int>(job.steps - t0 < kLanes ? job.steps - t0 : kLanes);
    for (int i = 0; i < count; ++i) body(t0 + i, __shfl_sync(~0u, value, i, kLanes));
  }

  // Computes the attention weights.
  QFAST_DEVICE_INLINE void attend() const {
    T most = T(0);
    for (int64_t t = 0; t < job.steps; ++t) {
      T sum = T(0);
      for (int64_t unit = lane; unit < job.width; unit += kLanes)
        sum += activated(t, unit, scale(t, unit)) * job.score[unit];
      sum = sum_of_warp(sum);
      most = t == 0 ? sum : larger_or_nan(most, sum);
      if (t % kLanes == lane) job.attention[place(t)] = sum;  // only this lane reads it back
    }
    T total = T(0);
    for (int64_t t = lane; t < job.steps; t += kLanes) {
      const T value = ::exp(job.attention[place(t)] - most);
      job.attention[place(t)] = value;
      total += value;
    }
    total = sum_of_warp(total);
    for (int64_t t = lane; t < job.steps; t += kLanes) job.attention[place(t)] /= total;
  }

  QFAST_DEVICE_INLINE T attention_or_zero(int64_t t) const {
    return t < job.steps ? job.attention[place(t)] : T(0);
  }

  // Computes the mean of h under the attention weights.
  QFAST_DEVICE_INLINE void pool() const {
    for (int64_t first = 0; first < job.hidden; first += kLanes) {
      const int64_t feature = first + lane;
      T sum = T(0);
      for (int64_t t0 = 0; t0 < job.steps; t0 += kLanes)
        for_steps(t0, attention_or_zero(t0 + lane), [&](int64_t t, T share) {
          if (feature < job.hidden) sum += share * job.h[place(t) * job.hidden + feature];
        });
      if (feature < job.hidden) job.pooled[row * job.hidden + feature] = sum;
    }
  }

  // Computes the gradients of the products, and the activations times the gradients of the scores. It
  // subtracts the mean of h first: a part that all steps share does not change the gradients of the scores,
  // but its rounding would.
  QFAST_DEVICE_INLINE void backward() const {
    T total = T(0);
    for (int64_t t = 0; t < job.steps; ++t) {
      T sum = T(0);
      for (int64_t j = lane; j < job.hidden; j += kLanes)
        sum += (job.h[place(t) * job.hidden + j] - job.pooled[row * job.hidden + j]) *
               job.grad[row * job.hidden + j];
      sum = sum_of_warp(sum);
      total += job.attention[place(t)] * sum;
      if (t % kLanes == lane) job.along[place(t)] = sum;
    }
    for (int64_t t0 = 0; t0 < job.steps; t0 += kLanes) {
      const int64_t step = t0 + lane;
      const T score_grad =
          step < job.steps ? attention_or_zero(step) * (job.along[place(step)] - total) : T(0);
      for_steps(t0, score_grad, [&](int64_t t, T grad) {
        for (int64_t unit = lane; unit < job.width; unit += kLanes) {
          const T dropout_scale = scale(t, unit), value = activated(t, unit, dropout_scale);
          const int64_t at = place(t) * job.width + unit;
          job.weighted[at] = grad * value;
          job.products[at] = grad * job.score[unit] * (1 - value * value) * dropout_scale;
        }
      });
    }
  }
};

// Calls body(window) for all windows. A warp owns single windows, so the body contains no barrier of the
// thread block.
template <class T, class Body>
QFAST_DEVICE_INLINE void for_windows(const PoolData<T>& job, const Body& body) {
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const uint64_t seed = job.dropout.active ? static_cast<uint64_t>(*job.dropout.seed) : 0;
  for (int64_t row = blockIdx.x * int64_t{kWindows} + threadIdx.x / kLanes; row < job.batch;
       row += int64_t{gridDim.x} * kWindows)
    body(PoolWindow<T>{job, row, lane, seed});
}

// Forward: attention weights and weighted mean.
template <class T>
__global__ void __launch_bounds__(kThreads) attention_pool_kernel(PoolData<T> job) {
  for_windows(job, [](const PoolWindow<T>& window) {
    window.attend();
    window.pool();
  });
}

// Backward: gradients of the products.
template <class T>
__global__ void __launch_bounds__(kThreads) attention_pool_backward_kernel(PoolData<T> job) {
  for_windows(job, [](const PoolWindow<T>& window) { window.backward(); });
}

// Adds the gradient through the weighted mean to grad_h, which contains the gradient through the scores. A
// thread owns single elements.
template <class T>
__global__ void __launch_bounds__(kThreads) attention_pool_mean_backward_kernel(PoolData<T> job) {
  const int64_t count = job.batch * job.steps * job.hidden, stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; at < count; at += stride) {
    const int64_t place = at / job.hidden, row = place / job.steps;
    job.grad_h[at] += job.attention[place] * job.grad[row * job.hidden + at % job.hidden];
  }
}

}  // namespace
}  // namespace qfast
