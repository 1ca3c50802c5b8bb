// Self-attention over the steps of a window on CUDA, forward and backward: a block of threads takes one head
// of one window. Keys and values go to shared memory where they fit, and as many queries at a time as their
// weights leave room for (encoder_layer_launch.cuh). Projections come from outside, without their bias.
//
// A thread takes four queries and one key, or one feature: these share a counter of the dropout, and lie side
// by side in shared memory. The backward computes the weights again.
#pragma once

#include "cuda_rows.cuh"

namespace qfast {
namespace {

constexpr int kHeadThreads = 128;
constexpr uint32_t kHeadPlace = 3;  // first in the counters of the dropout

// Rows [window][step], `stride` apart, from this head's first window on; the head's columns at head * width.
template <class T>
struct HeadRows {
  T* data;
  int64_t stride;
};

template <class T>
struct Attention {
  int64_t windows, steps, results;  // T; T or 1, the last of them
  int64_t first_window;             // in the whole batch, for the dropout
  int32_t heads, width;             // of a head
  HeadRows<const T> query, key, value;
  const T* bias;  // of the three projections, [3 D]
  T scale;        // of the queries
  Dropout dropout;
  int32_t together;  // queries taken at a time, a multiple of 4
  bool keys_shared;  // and values
  T* weights;        // [blocks][weights_elements], or null: in shared memory
  T* mixed;          // [windows][results][D]
  // Backward only.
  const T* grad_mixed;
  HeadRows<T> grad_query, grad_key, grad_value;

  __host__ __device__ int64_t row_stride() const { return width | 1; }  // odd: no two lanes in one bank
  __host__ __device__ int64_t weights_elements(bool backward) const {
    return (backward ? 2 : 1) * together * steps;
  }
  __host__ __device__ int64_t shared_elements(bool backward) const {
    const int64_t rows = (keys_shared ? 2 * steps : 0) + (backward ? 2 : 1) * together;
    return (weights == nullptr ? weights_elements(backward) : 0) + rows * row_stride();
  }
};

// Rows of one head, in shared memory or where the projection left them.
template <class T>
struct Operand {
  const T* data;
  int64_t stride;
  const T* bias;  // null: added already

  QFAST_DEVICE_INLINE T at(int64_t row, int64_t column) const {
    const T value = data[row * stride + column];
    return bias == nullptr ? value : value + bias[column];
  }
};

// Of one window.
template <class T>
struct Head {
  const Attention<T>& job;
  int64_t window;
  int32_t number;
  uint64_t seed;
  T *weights, *grad_weights;  // [four queries][key][query]
  T *query, *grad;            // of the mixed values
  Operand<T> key, value;
  int64_t first, count;  // queries taken at a time

  static QFAST_DEVICE_INLINE int64_t thread() { return threadIdx.x; }
  QFAST_DEVICE_INLINE int64_t quads() const { return (count + kQuad - 1) / kQuad; }
  QFAST_DEVICE_INLINE int64_t columns() const { return int64_t{job.heads} * job.width; }
  QFAST_DEVICE_INLINE int64_t column() const { return int64_t{number} * job.width; }
  QFAST_DEVICE_INLINE int64_t result(int64_t q) const { return window * job.results + first + q; }

  // Memory: weights, then rows. `backward` has two of each but for the keys and values.
  QFAST_DEVICE_INLINE void place(T* shared, bool backward) {
    T* const all =
        job.weights == nullptr ? shared : job.weights + int64_t{blockIdx.x} * job.weights_elements(backward);
    weights = all;
    grad_weights = all + job.together * job.steps;
    T* rows = job.weights == nullptr ? shared + job.weights_elements(backward) : shared;
    query = rows;
    grad = rows + job.together * job.row_stride();
    rows += (backward ? 2 : 1) * job.together * job.row_stride();
    key = operand(job.key, 1, rows);
    value = operand(job.value, 2, rows + job.steps * job.row_stride());
  }

  QFAST_DEVICE_INLINE Operand<T> operand(const HeadRows<const T>& from, int64_t projection, T* shared) const {
    const T* const data = from.data + window * job.steps * from.stride + column();
    const T* const bias = job.bias + projection * columns() + column();
    if (!job.keys_shared) return {data, from.stride, bias};
    for (int64_t i = thread(); i < job.steps * job.width; i += kHeadThreads) {
      const int64_t row = i / job.width, at = i % job.width;
      shared[row * job.row_stride() + at] = data[row * from.stride + at] + bias[at];
    }
    return {shared, job.row_stride(), nullptr};
  }

  // Zeros beyond the last one.
  QFAST_DEVICE_INLINE void load_queries() {
    const T* const from = job.query.data + column();
    for (int64_t i = thread(); i < quads() * kQuad * job.width; i += kHeadThreads) {
      const int64_t q = i / job.width, at = i % job.width;
      T of = T(0);
      if (q < count) of = (from[result(q) * job.query.stride + at] + job.bias[column() + at]) * job.scale;
      query[q * job.row_stride() + at] = of;
    }
  }
  QFAST_DEVICE_INLINE void load_grads() {
    for (int64_t i = thread(); i < quads() * kQuad * job.width; i += kHeadThreads) {
      const int64_t q = i / job.width, at = i % job.width;
      grad[q * job.row_stride() + at] =
          q < count ? job.grad_mixed[result(q) * columns() + column() + at] : T(0);
    }
  }

  // body(four queries, key) and body(four queries, feature), by all threads.
  template <class Body>
  QFAST_DEVICE_INLINE void for_pairs(int64_t width, const Body& body) const {
    for (int64_t i = thread(); i < quads() * width; i += kHeadThreads) body(i / width, i % width);
  }
  QFAST_DEVICE_INLINE Four<T>& four_of(T* all, int64_t quad, int64_t s) const {
    return *reinterpret_cast<Four<T>*>(all + (quad * job.steps + s) * kQuad);
  }
  // Of one query: the weight of key s is [s * 4].
  QFAST_DEVICE_INLINE T* row_of(T* all, int64_t q) const {
    return all + q / kQuad * job.steps * kQuad + q % kQuad;
  }

  // Four rows of `rows` times row s of an operand.
  QFAST_DEVICE_INLINE Four<T> dots(const T* rows, int64_t quad, const Operand<T>& with, int64_t s) const {
    const T* const from = rows + quad * kQuad * job.row_stride();
    Four<T> sums = {};
    for (int64_t c = 0; c < job.width; ++c) {
      const T other = with.at(s, c);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) sums.of[i] += from[i * job.row_stride() + c] * other;
    }
    return sums;
  }

  // Rows of an operand, weighted for four queries.
  QFAST_DEVICE_INLINE Four<T> mix(T* all, int64_t quad, const Operand<T>& rows, int64_t c) const {
    Four<T> sums = {};
    for (int64_t s = 0; s < job.steps; ++s) {
      const Four<T> weight = four_of(all, quad, s);
      const T other = rows.at(s, c);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) sums.of[i] += weight.of[i] * other;
    }
    return sums;
  }

  // Results are all steps, or the last one: that is alone in its four, at its own place among them.
  QFAST_DEVICE_INLINE Four<T> scales(int64_t quad, int64_t s) const {
    const int64_t query_step = job.steps - job.results + first + quad * kQuad;
    const Four<T> kept = drawn_scales<T>(job.dropout, seed, s, job.first_window + window,
                                         kHeadPlace + static_cast<uint32_t>(number), query_step / kQuad);
    const int at = static_cast<int>(query_step % kQuad);
    const T low = at & 1 ? kept.of[1] : kept.of[0], high = at & 1 ? kept.of[3] : kept.of[2];
    return at == 0 ? kept : Four<T>{{at & 2 ? high : low, T(0), T(0), T(0)}};
  }

  QFAST_DEVICE_INLINE void drop() const {
    if (!job.dropout.active) return;
    for_pairs(job.steps, [&](int64_t quad, int64_t s) {
      const Four<T> kept = scales(quad, s);
      Four<T>& weight = four_of(weights, quad, s);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) weight.of[i] *= kept.of[i];
    });
    __syncthreads();
  }

  // body(row of weights, row of their gradients), a warp a query.
  template <class Body>
  QFAST_DEVICE_INLINE void for_queries(int64_t queries, const Body& body) const {
    for (int64_t q = thread() / kLanes; q < queries; q += kHeadThreads / kLanes)
      body(q, row_of(weights, q), row_of(grad_weights, q));
  }

  // The weights before their dropout.
  QFAST_DEVICE_INLINE void attend() {
    for_pairs(job.steps,
              [&](int64_t quad, int64_t s) { four_of(weights, quad, s) = dots(query, quad, key, s); });
    __syncthreads();
    const int lane = static_cast<int>(thread() % kLanes);
    for_queries(count, [&](int64_t, T* row, T*) {
      T most = row[0], total = T(0);
      for (int64_t s = lane; s < job.steps; s += kLanes) most = larger_or_nan(most, row[s * kQuad]);
      most = largest_of_warp(most);
      for (int64_t s = lane; s < job.steps; s += kLanes) {
        const T value = ::exp(row[s * kQuad] - most);
        row[s * kQuad] = value;
        total += value;
      }
      total = sum_of_warp(total);
      for (int64_t s = lane; s < job.steps; s += kLanes) row[s * kQuad] /= total;
    });
    __syncthreads();
  }

  // body() for some queries at a time.
  template <class Body>
  QFAST_DEVICE_INLINE void for_groups(const Body& body) {
    for (first = 0; first < job.results; first += job.together) {
      count = job.results - first < job.together ? job.results - first : job.together;
      body();
    }
  }

  QFAST_DEVICE_INLINE void write_mixed() const {
    for_pairs(job.width, [&](int64_t quad, int64_t c) {
      const Four<T> sums = mix(weights, quad, value, c);
#pragma unroll
      for (int i = 0; i < kQuad; ++i)
        if (quad * kQuad + i < count)
          job.mixed[result(quad * kQuad + i) * columns() + column() + c] = sums.of[i];
    });
  }

  QFAST_DEVICE_INLINE void forward() {
    for_groups([&] {
      load_queries();
      __syncthreads();
      attend();
      drop();
      write_mixed();
      __syncthreads();
    });
  }

  // Gradients of the products of queries and keys, in place of those of the weights. Zeros beyond the last
  // query, in the weights too.
  QFAST_DEVICE_INLINE void attend_backward() {
    for_pairs(job.steps, [&](int64_t quad, int64_t s) {
      Four<T> grads = dots(grad, quad, value, s);
      if (job.dropout.active) {
        const Four<T> kept = scales(quad, s);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) grads.of[i] *= kept.of[i];
      }
      four_of(grad_weights, quad, s) = grads;
    });
    __syncthreads();
    const int lane = static_cast<int>(thread() % kLanes);
    for_queries(quads() * kQuad, [&](int64_t q, T* row, T* grads) {
      T along = T(0);
      for (int64_t s = lane; s < job.steps && q < count; s += kLanes)
        along += row[s * kQuad] * grads[s * kQuad];
      along = sum_of_warp(along);
      for (int64_t s = lane; s < job.steps; s += kLanes) {
        grads[s * kQuad] = q < count ? row[s * kQuad] * (grads[s * kQuad] - along) : T(0);
        if (q >= count) row[s * kQuad] = T(0);
      }
    });
    __syncthreads();
  }

  // Every thread adds to what it has written itself.
  QFAST_DEVICE_INLINE void keys_backward() const {
    for (int64_t i = thread(); i < job.steps * job.width; i += kHeadThreads) {
      const int64_t s = i / job.width, c = i % job.width, row = window * job.steps + s;
      T of_key = T(0), of_value = T(0);
      for (int64_t quad = 0; quad < quads(); ++quad) {
        const Four<T> grads = four_of(grad_weights, quad, s), dropped = four_of(weights, quad, s);
        const int64_t at = quad * kQuad * job.row_stride() + c;
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          of_key += grads.of[j] * query[at + j * job.row_stride()];
          of_value += dropped.of[j] * grad[at + j * job.row_stride()];
        }
      }
      T& key_sum = job.grad_key.data[row * job.grad_key.stride + column() + c];
      T& value_sum = job.grad_value.data[row * job.grad_value.stride + column() + c];
      key_sum = first == 0 ? of_key : key_sum + of_key;
      value_sum = first == 0 ? of_value : value_sum + of_value;
    }
  }

  QFAST_DEVICE_INLINE void backward() {
    for_groups([&] {
      load_queries();
      load_grads();
      __syncthreads();
      attend();
      attend_backward();
      drop();
      write_mixed();
      for_pairs(job.width, [&](int64_t quad, int64_t c) {
        const Four<T> sums = mix(grad_weights, quad, key, c);
#pragma unroll
        for (int i = 0; i < kQuad; ++i)
          if (quad * kQuad + i < count)
            job.grad_query.data[result(quad * kQuad + i) * job.grad_query.stride + column() + c] =
                sums.of[i] * job.scale;
      });
      keys_backward();
      __syncthreads();
    });
  }
};

template <class T>
__global__ void __launch_bounds__(kHeadThreads) attention_kernel(Attention<T> job, bool backward) {
  extern __shared__ double shared_memory[];
  const uint64_t seed = read_seed(job.dropout);
  for (int64_t task = blockIdx.x; task < job.windows * job.heads; task += gridDim.x) {
    Head<T> head{
        job, task / job.heads, static_cast<int32_t>(task % job.heads), seed, {}, {}, {}, {}, {}, {}, 0, 0};
    head.place(reinterpret_cast<T*>(shared_memory), backward);
    if (backward) {
      head.backward();
    } else {
      head.forward();
    }
  }
}

}  // namespace
}  // namespace qfast
