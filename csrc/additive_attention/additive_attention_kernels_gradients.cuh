// The gradients of the scores of additive attention on CUDA, device side: around a center of each day, and
// with the sum of those of all keys of a day exactly 0 before the bend's slope. docs/attention.md says why.
#pragma once

#include "additive_attention/additive_attention_kernels_rows.cuh"

namespace qfast {
namespace {

// A row's weights sum to 1, so a vector taken off every value leaves the gradients of the scores as they are,
// and takes off them the rounding of what the values have in common with it. That is the mean result of rows
// taken evenly from the sorted queries: about the mean value where attention is spread, and the value that
// all look at where it is not. Rows without a result (row_at: -1) are left out. A thread owns a column.
template <class T, class RowAt>
QFAST_DEVICE T center_of(const Backward<T>& io, int64_t first, int64_t count, int width, int column,
                         const RowAt& row_at) {
  const int taken = count < kCenterRows ? static_cast<int>(count) : kCenterRows;
  if (taken == 0) return 0;
  double sum = 0;
  int rows = 0;
  for (int r = 0; r < taken; r += kAhead) {
    T x[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t row = r + u < taken ? row_at((r + u) * count / taken) : -1;
      const int64_t at = row >= 0 ? (first + row) * width + column : 0;
      x[u] = row < 0 ? T(0) : io.residual == nullptr ? io.out[at] : io.out[at] - io.residual[at];
      rows += row >= 0;
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) sum += x[u];
  }
  return static_cast<T>(rows > 0 ? sum / rows : 0);
}

template <class T>
QFAST_DEVICE void find_center(const Day<T>& day, const Backward<T>& io, int width, int column) {
  day.center[column] = center_of(io, day.first, day.count, width, column, [&](int64_t p) -> int64_t {
    return day.sorted(1)[p] > -infinity<T>() ? day.sorted_rows(1)[p] : -1;
  });
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
