// Self-attention over the steps of a window on CUDA, forward and backward. The caller computes the
// projections, without their bias.
//
// A thread block owns one head of one window. It copies keys and values to shared memory if they fit, and
// computes as many queries together as the remaining shared memory allows (encoder_layer_launch.cuh). A
// thread owns four queries and one key, or four queries and one feature. Four queries share a dropout
// counter, and their weights are adjacent in shared memory. Nothing is saved: backward computes the attention
// weights again.
//
// Bound by shared memory, which is read once per multiply-add. There are 4 T D flops per row with a result in
// forward and 12 T D in backward; at 20 steps that is 1% of the products of a layer.
#pragma once

#include "cuda_rows.cuh"

namespace qfast {
namespace {

constexpr int kHeadThreads = 128;
constexpr uint32_t kHeadPlace = 3;  // third dropout counter of the first head; the next head has 4, and so on

// Rows [window][step] with row stride `stride`. The columns of a head start at head * width.
template <class T>
struct HeadRows {
  T* data;
  int64_t stride;
};

template <class T>
struct Attention {
  int64_t windows, steps, results;  // steps: T; results: T, or 1 for the last step
  int64_t first_window;             // in the batch, for the dropout
  int32_t heads, width;             // width of a head
  HeadRows<const T> query, key, value;
  const T* bias;  // bias of the three projections, [3 D]
  T scale;        // factor of the queries
  Dropout dropout;
  int32_t together;  // queries that are computed together, a multiple of 4
  bool keys_shared;  // keys and values are in shared memory
  T* weights;        // attention weights, [blocks][weights_elements], or null for shared memory
  T* mixed;          // [windows][results][D]
  // Backward only.
  const T* grad_mixed;
  HeadRows<T> grad_query, grad_key, grad_value;

  // Odd, so no two lanes read the same bank.
  __host__ __device__ int64_t row_stride() const { return width | 1; }
  __host__ __device__ int64_t weights_elements(bool backward) const {
    return (backward ? 2 : 1) * together * steps;
  }
  __host__ __device__ int64_t shared_elements(bool backward) const {
    const int64_t rows = (keys_shared ? 2 * steps : 0) + (backward ? 2 : 1) * together;
    return (weights == nullptr ? weights_elements(backward) : 0) + rows * row_stride();
  }
};

// Keys or values of one head, in shared memory or in global memory.
template <class T>
struct Operand {
  const T* data;
  int64_t stride;
  const T* bias;  // null if the bias is already added

  QFAST_DEVICE_INLINE T at(int64_t row, int64_t column) const {
    const T value = data[row * stride + column];
    return bias == nullptr ? value : value + bias[column];
  }
};

// One head of one window.
template <class T>
struct Head {
  const Attention<T>& job;
  int64_t window;
  int32_t number;
  uint64_t seed;
  T *weights, *grad_weights;  // [four queries][key][query]
  T *query, *grad;            // queries, and gradients of the results of the head
  Operand<T> key, value;
  int64_t first, count;  // queries that are computed together

  static QFAST_DEVICE_INLINE int64_t thread() { return threadIdx.x; }
  QFAST_DEVICE_INLINE int64_t quads() const { return (count + kQuad - 1) / kQuad; }
  QFAST_DEVICE_INLINE int64_t columns() const { return int64_t{job.heads} * job.width; }
  QFAST_DEVICE_INLINE int64_t column() const { return int64_t{number} * job.width; }
  QFAST_DEVICE_INLINE int64_t result(int64_t q) const { return window * job.results + first + q; }

  // Divides the memory into weights and rows. In backward there are two of each, except for keys and values.
  QFAST_DEVICE_INLINE void place(T* shared, bool backward) {
    T* const base =
        job.weights == nullptr ? shared : job.weights + int64_t{blockIdx.x} * job.weights_elements(backward);
    weights = base;
    grad_weights = base + job.together * job.steps;
    T* rows = job.weights == nullptr ? shared + job.weights_elements(backward) : shared;
    query = rows;
    grad = rows + job.together * job.row_stride();
    rows += (backward ? 2 : 1) * job.together * job.row_stride();
    key = operand(job.key, 1, rows);
    value = operand(job.value, 2, rows + job.steps * job.row_stride());
  }

  // Returns keys or values, copied to shared memory if they fit.
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

  // Loads the queries, scaled and with their bias, and zeros beyond the last one.
  QFAST_DEVICE_INLINE void load_queries() {
    const T* const from = job.query.data + column();
    for (int64_t i = thread(); i < quads() * kQuad * job.width; i += kHeadThreads) {
      const int64_t q = i / job.width, at = i % job.width;
      T scaled = T(0);
      if (q < count) scaled = (from[result(q) * job.query.stride + at] + job.bias[column() + at]) * job.scale;
      query[q * job.row_stride() + at] = scaled;
    }
  }
  QFAST_DEVICE_INLINE void load_grads() {
    for (int64_t i = thread(); i < quads() * kQuad * job.width; i += kHeadThreads) {
      const int64_t q = i / job.width, at = i % job.width;
      grad[q * job.row_stride() + at] =
          q < count ? job.grad_mixed[result(q) * columns() + column() + at] : T(0);
    }
  }

  // Calls body(four queries, key) or body(four queries, feature) for all pairs. A thread owns single pairs.
  template <class Body>
  QFAST_DEVICE_INLINE void for_pairs(int64_t width, const Body& body) const {
    for (int64_t i = thread(); i < quads() * width; i += kHeadThreads) body(i / width, i % width);
  }
  // The elements of four queries and key s of `matrix`, which is `weights` or `grad_weights`.
  QFAST_DEVICE_INLINE Four<T>& four_of(T* matrix, int64_t quad, int64_t s) const {
    return *reinterpret_cast<Four<T>*>(matrix + (quad * job.steps + s) * kQuad);
  }
  // The row of a query of `matrix`. The element of key s is [s * 4].
  QFAST_DEVICE_INLINE T* row_of(T* matrix, int64_t q) const {
    return matrix + q / kQuad * job.steps * kQuad + q % kQuad;
  }

  // Products of four rows of `rows` with row s of an operand.
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

  // Sums of the rows of an operand, weighted by `matrix` for four queries, in column c.
  QFAST_DEVICE_INLINE Four<T> mix(T* matrix, int64_t quad, const Operand<T>& rows, int64_t c) const {
    Four<T> sums = {};
    for (int64_t s = 0; s < job.steps; ++s) {
      const Four<T> weight = four_of(matrix, quad, s);
      const T other = rows.at(s, c);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) sums.of[i] += weight.of[i] * other;
    }
    return sums;
  }

  // Dropout scales of four queries and key s. If only the last step has a result, its random word is the one
  // of its position in the group of four steps, and the other three scales are 0.
  QFAST_DEVICE_INLINE Four<T> scales(int64_t quad, int64_t s) const {
    const int64_t query_step = job.steps - job.results + first + quad * kQuad;
    const Four<T> scale = drawn_scales<T>(job.dropout, seed, s, job.first_window + window,
                                          kHeadPlace + static_cast<uint32_t>(number), query_step / kQuad);
    const int at = static_cast<int>(query_step % kQuad);
    const T low = at & 1 ? scale.of[1] : scale.of[0], high = at & 1 ? scale.of[3] : scale.of[2];
    return at == 0 ? scale : Four<T>{{at & 2 ? high : low, T(0), T(0), T(0)}};
  }

  // Applies dropout to the weights.
  QFAST_DEVICE_INLINE void drop() const {
    if (!job.dropout.active) return;
    for_pairs(job.steps, [&](int64_t quad, int64_t s) {
      const Four<T> scale = scales(quad, s);
      Four<T>& weight = four_of(weights, quad, s);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) weight.of[i] *= scale.of[i];
    });
    __syncthreads();
  }

  // Calls body(query, row of weights, row of their gradients). A warp owns single queries.
  template <class Body>
  QFAST_DEVICE_INLINE void for_queries(int64_t queries, const Body& body) const {
    for (int64_t q = thread() / kLanes; q < queries; q += kHeadThreads / kLanes)
      body(q, row_of(weights, q), row_of(grad_weights, q));
  }

  // Computes the attention weights before dropout.
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

  // Calls body() for each group of queries that are computed together.
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

  // Computes the gradients of the products of queries and keys, in grad_weights. Beyond the last query, both
  // these gradients and the weights are set to 0.
  QFAST_DEVICE_INLINE void attend_backward() {
    for_pairs(job.steps, [&](int64_t quad, int64_t s) {
      Four<T> grads = dots(grad, quad, value, s);
      if (job.dropout.active) {
        const Four<T> scale = scales(quad, s);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) grads.of[i] *= scale.of[i];
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

  // Adds the gradients of keys and values. A thread owns single elements, so no two threads write the same
  // one.
  QFAST_DEVICE_INLINE void keys_backward() const {
    for (int64_t i = thread(); i < job.steps * job.width; i += kHeadThreads) {
      const int64_t s = i / job.width, c = i % job.width, row = window * job.steps + s;
      T key_part = T(0), value_part = T(0);
      for (int64_t quad = 0; quad < quads(); ++quad) {
        const Four<T> grads = four_of(grad_weights, quad, s), dropped = four_of(weights, quad, s);
        const int64_t at = quad * kQuad * job.row_stride() + c;
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          key_part += grads.of[j] * query[at + j * job.row_stride()];
          value_part += dropped.of[j] * grad[at + j * job.row_stride()];
        }
      }
      T& key_sum = job.grad_key.data[row * job.grad_key.stride + column() + c];
      T& value_sum = job.grad_value.data[row * job.grad_value.stride + column() + c];
      key_sum = first == 0 ? key_part : key_sum + key_part;
      value_sum = first == 0 ? value_part : value_sum + value_part;
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

// Attention forward, or its gradients. A thread block owns single heads of single windows.
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
