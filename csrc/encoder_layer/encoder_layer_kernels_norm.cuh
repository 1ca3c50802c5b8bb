// Layer norms of an encoder layer on CUDA: with the dropout and the sum that go before, and backward. A warp
// takes four windows at one step, a lane every 32nd feature; what it reads again it has written itself.
#pragma once

#include "cuda_rows.cuh"

namespace qfast {
namespace {

template <class T>
struct Norm {
  Rows rows;
  int64_t width;
  Dropout dropout;
  uint32_t place;  // in its counters
  const T* sums;   // [parts][rows][D]: what the residual is added to, before bias and dropout
  int64_t parts;
  const T* sums_bias;
  const T* residual;  // [rows][D], its own strides
  int64_t residual_window, residual_step;
  const T *weight, *bias;
  T eps;
  T* output;
  T *normalised, *scales;  // null: not kept
};

template <class T>
struct NormBackward {
  Rows rows;
  int64_t width;
  Dropout dropout;
  uint32_t place;
  const T* grad;  // of the norm's result
  T* more;        // added to it, and becomes the sum; or null
  const T *normalised, *scales, *weight;
  T* before;    // gradient of what the norm was given
  T* dropped;   // that, after the dropout; null: the same
  T* weighted;  // gradient times normalised, which is summed for that of the weight
  // What the first norm gave, from what is kept of it; or null.
  const T *first_normalised, *first_weight, *first_bias;
  T* first;
};

// body(quad, lane), a warp each.
template <class Body>
QFAST_DEVICE_INLINE void for_quads(const Rows& rows, const Body& body) {
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / kLanes);
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  for (int64_t quad = blockIdx.x * int64_t{blockDim.x / kLanes} + threadIdx.x / kLanes; quad < rows.quads();
       quad += warps)
    body(quad, lane);
}

// Four rows, -1 where there is none.
struct QuadRows {
  int64_t row[kQuad];

  QFAST_DEVICE_INLINE QuadRows(const Rows& rows, int64_t quad) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) row[i] = rows.row(quad, i);
  }
  // body(i, row, its element) for those that there are.
  template <class Body>
  QFAST_DEVICE_INLINE void at(int64_t width, int64_t column, const Body& body) const {
#pragma unroll
    for (int i = 0; i < kQuad; ++i)
      if (row[i] >= 0) body(i, row[i], row[i] * width + column);
  }
};

template <class T>
QFAST_DEVICE_INLINE void mean_of_warp(T (&sums)[kQuad], int64_t width) {
#pragma unroll
  for (int i = 0; i < kQuad; ++i) sums[i] = sum_of_warp(sums[i]) / static_cast<T>(width);
}

template <class T>
__global__ void __launch_bounds__(kPlainThreads) norm_kernel(Norm<T> job) {
  const uint64_t seed = read_seed(job.dropout);
  const int64_t width = job.width, part = job.rows.count() * width;
  for_quads(job.rows, [&](int64_t quad, int lane) {
    const QuadRows mine(job.rows, quad);
    const QuadCounter counter = job.rows.counter(quad);
    const int64_t residual =
        job.rows.window(quad) * job.residual_window + job.rows.step(quad) * job.residual_step;
    T mean[kQuad] = {}, scale[kQuad] = {};
    for (int64_t j = lane; j < width; j += kLanes) {
      const Four<T> kept = scales_of<T>(job.dropout, seed, counter, j, job.place);
      mine.at(width, j, [&](int i, int64_t, int64_t at) {
        T value = job.sums[at];
        for (int64_t p = 1; p < job.parts; ++p) value += job.sums[p * part + at];
        value =
            (value + job.sums_bias[j]) * kept.of[i] + job.residual[residual + i * job.residual_window + j];
        job.output[at] = value;
        mean[i] += value;
      });
    }
    mean_of_warp(mean, width);
    for (int64_t j = lane; j < width; j += kLanes)
      mine.at(width, j, [&](int i, int64_t, int64_t at) {
        const T away = job.output[at] - mean[i];
        scale[i] += away * away;
      });
    mean_of_warp(scale, width);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) scale[i] = T(1) / ::sqrt(scale[i] + job.eps);
    for (int64_t j = lane; j < width; j += kLanes)
      mine.at(width, j, [&](int i, int64_t row, int64_t at) {
        const T value = (job.output[at] - mean[i]) * scale[i];
        job.output[at] = value * job.weight[j] + job.bias[j];
        if (job.normalised == nullptr) return;
        job.normalised[at] = value;
        if (j == 0) job.scales[row] = scale[i];
      });
  });
}

template <class T>
__global__ void __launch_bounds__(kPlainThreads) norm_backward_kernel(NormBackward<T> job) {
  const uint64_t seed = read_seed(job.dropout);
  const int64_t width = job.width;
  const auto entering = [&](int64_t at) { return job.more != nullptr ? job.more[at] : job.grad[at]; };
  for_quads(job.rows, [&](int64_t quad, int lane) {
    const QuadRows mine(job.rows, quad);
    const QuadCounter counter = job.rows.counter(quad);
    T mean[kQuad] = {}, along[kQuad] = {};
    for (int64_t j = lane; j < width; j += kLanes)
      mine.at(width, j, [&](int i, int64_t, int64_t at) {
        if (job.more != nullptr) job.more[at] += job.grad[at];
        const T grad = entering(at), normalised = job.normalised[at];
        job.weighted[at] = grad * normalised;
        mean[i] += grad * job.weight[j];
        along[i] += grad * job.weight[j] * normalised;
        if (job.first != nullptr)
          job.first[at] = job.first_normalised[at] * job.first_weight[j] + job.first_bias[j];
      });
    mean_of_warp(mean, width);
    mean_of_warp(along, width);
    for (int64_t j = lane; j < width; j += kLanes) {
      Four<T> kept = {};
      if (job.dropped != nullptr) kept = scales_of<T>(job.dropout, seed, counter, j, job.place);
      mine.at(width, j, [&](int i, int64_t row, int64_t at) {
        const T value =
            (entering(at) * job.weight[j] - mean[i] - job.normalised[at] * along[i]) * job.scales[row];
        job.before[at] = value;
        if (job.dropped != nullptr) job.dropped[at] = value * kept.of[i];
      });
    }
  });
}

// What came through the residual, and through the query where that has its own product, is added to the
// gradient of x [windows][steps][D]; `results`, T or 1, are the last steps.
template <class T>
__global__ void __launch_bounds__(kPlainThreads)
    encoder_input_kernel(T* grad_x, const T* residual, const T* query, int64_t windows, int64_t steps,
                         int64_t results, int64_t width) {
  for_elements(windows * results * width, [&](int64_t i) {
    const int64_t row = i / width, window = row / results, step = steps - results + row % results;
    T& grad = grad_x[(window * steps + step) * width + i % width];
    grad += query != nullptr ? residual[i] + query[i] : residual[i];
  });
}

}  // namespace
}  // namespace qfast
