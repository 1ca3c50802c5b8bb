// Layer norms of an encoder layer on CUDA, forward and backward, with the dropout and the residual sum before
// them.
//
// A warp owns four windows at one step, and a lane owns every 32nd feature of them. A lane reads back only
// elements that it wrote itself, so no barrier is needed. Forward saves the normalised rows and their scales.
// Bound by bytes: forward reads the sums and the residual and writes the output and the normalised rows, 16
// bytes per element in float32 plus 4 per further partial sum.
#pragma once

#include "cuda_rows.cuh"

namespace qfast {
namespace {

template <class T>
struct Norm {
  Rows rows;
  int64_t width;
  Dropout dropout;
  uint32_t place;  // third dropout counter
  const T* sums;   // [parts][rows][D]: partial sums before bias, dropout and residual
  int64_t parts;
  const T* sums_bias;
  const T* residual;                       // [rows][D]
  int64_t residual_window, residual_step;  // strides of residual
  const T *weight, *bias;
  T eps;
  T* output;
  T *normalised, *scales;  // saved for backward, or null
};

template <class T>
struct NormBackward {
  Rows rows;
  int64_t width;
  Dropout dropout;
  uint32_t place;
  const T* grad;  // gradient of the result of the norm
  T* more;        // second part of this gradient, replaced by the sum of both; or null
  const T *normalised, *scales, *weight;
  T* before;    // gradient of the input of the norm
  T* dropped;   // this gradient after dropout, or null if there is no dropout
  T* weighted;  // gradient times normalised, whose sum is the gradient of the weight
  // Computes the result of the first norm again, from its saved rows, in `first`. Null if it is not needed.
  const T *first_normalised, *first_weight, *first_bias;
  T* first;
};

// Calls body(quad, lane) for all quads. A warp owns single quads.
template <class Body>
QFAST_DEVICE_INLINE void for_quads(const Rows& rows, const Body& body) {
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / kLanes);
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  for (int64_t quad = blockIdx.x * int64_t{blockDim.x / kLanes} + threadIdx.x / kLanes; quad < rows.quads();
       quad += warps)
    body(quad, lane);
}

// Four rows; a row is -1 if it does not exist.
struct QuadRows {
  int64_t row[kQuad];

  QFAST_DEVICE_INLINE QuadRows(const Rows& rows, int64_t quad) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) row[i] = rows.row(quad, i);
  }
  // Calls body(i, row, offset of its element in `column`) for the rows that exist.
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

// output = norm((sums + sums_bias) * dropout scale + residual).
template <class T>
__global__ void __launch_bounds__(kPlainThreads) norm_kernel(Norm<T> job) {
  const uint64_t seed = read_seed(job.dropout);
  const int64_t width = job.width, part = job.rows.count() * width;
  for_quads(job.rows, [&](int64_t quad, int lane) {
    const QuadRows quad_rows(job.rows, quad);
    const QuadCounter counter = job.rows.counter(quad);
    const int64_t residual =
        job.rows.window(quad) * job.residual_window + job.rows.step(quad) * job.residual_step;
    T mean[kQuad] = {}, scale[kQuad] = {};
    for (int64_t j = lane; j < width; j += kLanes) {
      const Four<T> dropout_scale = scales_of<T>(job.dropout, seed, counter, j, job.place);
      quad_rows.at(width, j, [&](int i, int64_t, int64_t at) {
        T value = job.sums[at];
        for (int64_t p = 1; p < job.parts; ++p) value += job.sums[p * part + at];
        value = (value + job.sums_bias[j]) * dropout_scale.of[i] +
                job.residual[residual + i * job.residual_window + j];
        job.output[at] = value;
        mean[i] += value;
      });
    }
    mean_of_warp(mean, width);
    for (int64_t j = lane; j < width; j += kLanes)
      quad_rows.at(width, j, [&](int i, int64_t, int64_t at) {
        const T difference = job.output[at] - mean[i];
        scale[i] += difference * difference;
      });
    mean_of_warp(scale, width);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) scale[i] = T(1) / ::sqrt(scale[i] + job.eps);
    for (int64_t j = lane; j < width; j += kLanes)
      quad_rows.at(width, j, [&](int i, int64_t row, int64_t at) {
        const T value = (job.output[at] - mean[i]) * scale[i];
        job.output[at] = value * job.weight[j] + job.bias[j];
        if (job.normalised == nullptr) return;
        job.normalised[at] = value;
        if (j == 0) job.scales[row] = scale[i];
      });
  });
}

// Gradient of the input of a norm.
template <class T>
__global__ void __launch_bounds__(kPlainThreads) norm_backward_kernel(NormBackward<T> job) {
  const uint64_t seed = read_seed(job.dropout);
  const int64_t width = job.width;
  const auto grad_at = [&](int64_t at) { return job.more != nullptr ? job.more[at] : job.grad[at]; };
  for_quads(job.rows, [&](int64_t quad, int lane) {
    const QuadRows quad_rows(job.rows, quad);
    const QuadCounter counter = job.rows.counter(quad);
    T mean[kQuad] = {}, along[kQuad] = {};
    for (int64_t j = lane; j < width; j += kLanes)
      quad_rows.at(width, j, [&](int i, int64_t, int64_t at) {
        if (job.more != nullptr) job.more[at] += job.grad[at];
        const T grad = grad_at(at), normalised = job.normalised[at];
        job.weighted[at] = grad * normalised;
        mean[i] += grad * job.weight[j];
        along[i] += grad * job.weight[j] * normalised;
        if (job.first != nullptr)
          job.first[at] = job.first_normalised[at] * job.first_weight[j] + job.first_bias[j];
      });
    mean_of_warp(mean, width);
    mean_of_warp(along, width);
    for (int64_t j = lane; j < width; j += kLanes) {
      Four<T> dropout_scale = {};
      if (job.dropped != nullptr) dropout_scale = scales_of<T>(job.dropout, seed, counter, j, job.place);
      quad_rows.at(width, j, [&](int i, int64_t row, int64_t at) {
        const T value =
            (grad_at(at) * job.weight[j] - mean[i] - job.normalised[at] * along[i]) * job.scales[row];
        job.before[at] = value;
        if (job.dropped != nullptr) job.dropped[at] = value * dropout_scale.of[i];
      });
    }
  });
}

// Adds the gradient through the residual to the gradient of x [windows][steps][D], and the gradient through
// the queries if they have a product of their own. `results`, T or 1, is the number of last steps with a
// result. A thread owns single elements.
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
