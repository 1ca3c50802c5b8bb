// Gradients of the scores of additive attention on CUDA. They are computed relative to a center of each day,
// and the sum of the gradients of all keys of a day, before the slope of LeakyReLU, is exactly 0.
// docs/attention.md explains why.
//
// A thread owns a column of a center, a group of lanes owns a query, and a warp owns a chunk of keys. Bound
// by bytes: the gradient, the result and the share of a row are read once.
#pragma once

#include "additive_attention/additive_attention_kernels_rows.cuh"

namespace qfast {
namespace {

// Returns the center of a day in one column. The weights of a row sum to 1, so subtracting one vector from
// all values does not change the gradients of the scores, but removes the rounding of the part that the
// values share with this vector. The center is the mean result of rows at even distances among the sorted
// queries. It is near the mean value if attention is spread, and near the value that all rows attend to if it
// is not. Rows without a result (row_at returns -1) are not used.
template <class T, class RowAt>
QFAST_DEVICE T center_of(const Backward<T>& io, int64_t first, int64_t count, int width, int column,
                         const RowAt& row_at) {
  const int samples = count < kCenterRows ? static_cast<int>(count) : kCenterRows;
  if (samples == 0) return 0;
  double sum = 0;
  int rows = 0;
  for (int r = 0; r < samples; r += kAhead) {
    T x[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t row = r + u < samples ? row_at((r + u) * count / samples) : -1;
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

// Computes delta = grad . (attended - center) and the gradient of the query. The weights of a softmax sum to
// 1, so the gradients of the scores of a row sum to 0: the sum above 0 is minus the sum below 0, and the
// saved part gives both.
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

// Computes the gradients of the keys of a chunk before their correction, and the sums for it, in float64.
//
// The gradients of all scores of a row sum to 0 before the slope of LeakyReLU, and so do those of the keys of
// a day. Rounding leaves a sum that is not 0, the excess. If all scores have the same sign, the exact
// gradient of a shift of all keys is 0, and the excess would move all keys in one direction at every step of
// training. It is therefore subtracted from the mean gradients of the rows in proportion to their mass. A
// warp owns a chunk, and writes the excess and the mass in place of the sums that it has read.
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

// Computes the shift of all mean gradients of the day, excess / mass, in scalar_sums[0]. A warp owns a day.
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

// Computes the corrected gradient of a key.
template <class T>
QFAST_DEVICE void finish_key(const Backward<T>& io, int64_t row, double shift) {
  io.grad_key[row] = static_cast<T>(io.to_key[row] - shift * io.to_key[io.total + row]);
}

}  // namespace
}  // namespace qfast
