// The gradients of the scores of additive attention on CUDA, device side: around a center of each day, and
// with the sum of those of all keys of a day exactly 0 before the bend's slope. docs/attention.md says why.
#pragma once

#include "additive_attention_kernels.cuh"

namespace qfast {
namespace {

// A row's weights sum to 1, so a vector taken off every value leaves the gradients of the scores as they are
// and takes off them the rounding of what the values have in common with it. That is the mean of the day's
// first rows, drawn towards the value of the highest key by the weight that it has in the middle query: where
// it has all, the others' gradients are small numbers and not differences of large ones. A thread owns a
// column.
template <class T>
QFAST_DEVICE void find_center(const Day<T>& day, const T* value, int width, int column) {
  const int rows = day.count < kCenterRows ? static_cast<int>(day.count) : kCenterRows;
  if (rows == 0) return;
  const T* of_column = value + day.first * width + column;
  const bool bent = !(day.sorted(1)[day.count / 2] + day.sorted(0)[day.count - 1] > 0);
  const double top_weight = 1 / day.scalar_sums[(bent ? 2 : 3) * day.stride];
  T sum = 0;
  for (int r = 0; r < rows; r += kAhead) {
    T x[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      x[u] = r + u < rows ? of_column[static_cast<int64_t>(r + u) * width] : T(0);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) sum += x[u];
  }
  const T top = of_column[static_cast<int64_t>(day.sorted_rows(0)[day.count - 1]) * width];
  day.center[column] = static_cast<T>(top_weight * top + (1 - top_weight) / rows * sum);
}

// delta = grad . (attended - center), and the gradient of the query: a softmax's weights sum to 1, so the
// gradients of a row's scores sum to 0, those above the bend to minus those below it, and the kept part gives
// both.
template <class T>
QFAST_DEVICE void query_gradient(const Backward<T>& io, int64_t row, int width, const Lanes& lanes,
                                 const T* center) {
  const T weight = io.share_weight[row];
  T mean = 0, part = 0;
  for (int column = lanes.lane; column < width; column += lanes.size) {
    const int64_t i = row * width + column;
    const T attended = io.residual == nullptr ? io.out[i] : io.out[i] - io.residual[i];
    mean += io.grad[i] * (attended - center[column]);
    part += io.grad[i] * (io.share[i] - weight * center[column]);
  }
  mean = lanes.sum(mean);
  part = lanes.sum(part);
  if (lanes.lane != 0) return;
  io.delta[row] = mean;
  io.grad_query[row] = (1 - io.slope) * (part - mean * weight);
}

// The gradients of all scores of a row sum to 0 before the bend's slope, and so do those of the keys of a
// day. What rounding leaves of that sum, the excess, would push all keys the same way, step after step, where
// their true gradient is 0 (as long as all scores lie on one side of the bend); so it is spread over the
// rows' mean gradients, and gone. Here: every key of the chunk, the excess, and the mass by which it is
// divided, all in float64. A warp owns a chunk, and leaves both sums in place of those that it has read.
template <class T>
QFAST_DEVICE void key_gradients(const Day<T>& day, int64_t chunk, const Backward<T>& io, int groups) {
  double excess = 0, mass = 0;
  read_scalars<true>(day, chunk, static_cast<const T*>(io.delta), day.scalar_sums,
                     [&](int64_t p, int32_t row, double before, double behind) {
                       double above = -(day.back[p] * before), below = -(day.fore[p] * behind);
                       const T* dots = io.dots + day.first + row;
                       for (int g = 0; g < groups; ++g, dots += 2 * io.total) {
                         above += dots[0];
                         below += dots[io.total];
                       }
                       excess += above + below;
                       io.to_key[day.first + row] = above + io.slope * below;
                     });
  read_scalars<true>(day, chunk, static_cast<const T*>(nullptr), day.scalar_sums + 2 * day.stride,
                     [&](int64_t p, int32_t row, double before, double behind) {
                       const double above = day.back[p] * before, below = day.fore[p] * behind;
                       mass += above + below;
                       io.to_key[io.total + day.first + row] = above + io.slope * below;
                     });
  const Lanes lanes(kLanes);
  excess = lanes.sum(excess);
  mass = lanes.sum(mass);
  if (lanes.lane != 0) return;
  day.scalar_sums[chunk] = excess;
  day.scalar_sums[day.stride + chunk] = mass;
}

// By how much every mean gradient of the day is moved, left in scalar_sums[0]. A warp owns a day.
template <class T>
QFAST_DEVICE void find_shift(const Day<T>& day) {
  const Lanes lanes(kLanes);
  double excess = 0, mass = 0;
  for (int64_t chunk = lanes.lane; chunk < day.chunks(); chunk += kLanes) {
    excess += day.scalar_sums[chunk];
    mass += day.scalar_sums[day.stride + chunk];
  }
  excess = lanes.sum(excess);
  mass = lanes.sum(mass);
  if (lanes.lane == 0 && day.count > 0) day.scalar_sums[0] = excess / mass;
}

template <class T>
QFAST_DEVICE void finish_key(const Backward<T>& io, int64_t row, double shift) {
  io.grad_key[row] = static_cast<T>(io.to_key[row] - shift * io.to_key[io.total + row]);
}

}  // namespace
}  // namespace qfast
