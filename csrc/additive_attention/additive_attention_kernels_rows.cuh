// Running sums of rows of additive attention on CUDA. From the list of a day
// (additive_attention_kernels.cuh), they compute the results in forward and the gradients of the values in
// backward.
//
// A group of lanes owns a chunk of 128 items, and a lane owns one column of it. Bound by bytes: the summed
// rows are read three times, once of them from the caches, and each reading row is written once, or twice
// with its saved share. There are 10 flops per element.
#pragma once

#include "additive_attention/additive_attention_kernels.cuh"

namespace qfast {
namespace {

// Sums the rows of a chunk. `rows` [heads * N, H] is `value` in forward and the gradient of the result in
// backward. `column` may be beyond the last one.
template <bool kBackward, class T>
QFAST_DEVICE void sum_columns(const Day<T>& day, int64_t chunk, int width, int column, const T* rows) {
  if (column >= width) return;
  const int count = day.items(chunk);
  const int32_t* item = day.item + chunk * kChunk;
  const T *fore = day.fore + chunk * kChunk, *back = day.back + chunk * kChunk;
  rows += day.first * width + column;
  T front = 0, rear = 0;
  for (int p = 0; p < count; p += kAhead) {
    T x[kAhead];
    bool summed[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int32_t it = p + u < count ? item[p + u] : 0;
      summed[u] = p + u < count && (it < 0) == kBackward;
      x[u] = summed[u] ? rows[static_cast<int64_t>(kBackward ? ~it : it) * width] : T(0);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (!summed[u]) continue;
      front += fore[p + u] * x[u];
      rear += back[p + u] * x[u];
    }
  }
  day.sums[column * day.stride + chunk] = front;
  day.sums[(width + column) * day.stride + chunk] = rear;
}

// Arguments and results of forward.
template <class T>
struct Forward {
  const T* value;        // [heads * N, H]
  const T* residual;     // [heads * N, H] or null
  T* out;                // [heads * N, H]
  T* share;              // [heads * N, H], or null if nothing is saved
  T* share_weight;       // [heads * N] or null
  int32_t* orders;       // [2, heads * N] or null
  const T *query, *key;  // [heads * N]
};

// Turns the two sums that a query reads into its result.
template <class T>
struct Receiver {
  const Forward<T>& io;
  int64_t at;     // offset of column `column` of the first row of the day
  int64_t first;  // first row of the day
  int width;

  QFAST_DEVICE Receiver(const Forward<T>& job, const Day<T>& day, int columns, int column)
      : io(job), at(day.first * columns + column), first(day.first), width(columns) {}
  QFAST_DEVICE T* stored(int32_t row) const { return io.out + at + static_cast<int64_t>(row) * width; }
  QFAST_DEVICE T operand(int32_t row) const {
    return io.residual == nullptr ? T(0) : io.residual[at + static_cast<int64_t>(row) * width];
  }
  QFAST_DEVICE void receive(int32_t row, T below, T residual, T above, bool active, const Lanes&, int) const {
    if (!active) return;
    const int64_t place = at + static_cast<int64_t>(row) * width;
    const T attended = below + above;
    io.out[place] = io.residual == nullptr ? attended : residual + attended;
    if (io.share != nullptr) io.share[place] = signbit(io.share_weight[first + row]) ? -below : above;
  }
};

// Arguments and results of backward.
template <class T>
struct Backward {
  const T *grad, *value, *out;  // [heads * N, H]
  const T* residual;            // [heads * N, H] or null
  const T *share, *share_weight;
  const int32_t* orders;     // [2, heads * N]
  const T *query, *key;      // [heads * N]
  T *grad_query, *grad_key;  // [heads * N]
  T* grad_value;             // [heads * N, H]
  T slope;
  // Scratch.
  int64_t total = 0;         // heads * N
  T* delta = nullptr;        // [heads * N]: grad . (attended - center)
  T* dots = nullptr;         // [groups of columns, 2, heads * N]: grad_value's two parts . (value - center)
  double* to_key = nullptr;  // [2, heads * N]: gradient of a key, and its derivative by the shift
};

// Turns the two sums that a key reads into the gradient of its value, and into the products with the value
// for the gradient of the key.
template <class T>
struct BackwardReceiver {
  const Backward<T>& io;
  int64_t at, first;
  int width;
  T center;

  QFAST_DEVICE BackwardReceiver(const Backward<T>& job, const Day<T>& day, int columns, int column)
      : io(job),
        at(day.first * columns + column),
        first(day.first),
        width(columns),
        center(column < columns ? day.center[column] : T(0)) {}
  QFAST_DEVICE T* stored(int32_t row) const { return io.grad_value + at + static_cast<int64_t>(row) * width; }
  QFAST_DEVICE T operand(int32_t row) const {
    return io.value[at + static_cast<int64_t>(row) * width] - center;
  }
  QFAST_DEVICE void receive(int32_t row, T above, T value, T below, bool active, const Lanes& lanes,
                            int group) const {
    if (active) *stored(row) = above + below;
    const T dot = lanes.sum_two(active ? value * above : T(0), active ? value * below : T(0));
    if ((lanes.lane & (lanes.size / 2 - 1)) != 0) return;
    io.dots[(2 * group + (lanes.lane != 0)) * io.total + first + row] = dot;
  }
};

// Runs from the front. Stores the sum of the items before each reading item, plus the carry, in the row of
// this item.
template <bool kBackward, class T, class R>
QFAST_DEVICE void walk_up(const Day<T>& day, int64_t chunk, T carry, const T* rows, const R& receiver) {
  const int count = day.items(chunk), width = receiver.width;
  const int32_t* item = day.item + chunk * kChunk;
  const T *fore = day.fore + chunk * kChunk, *back = day.back + chunk * kChunk;
  T sum = 0;
  for (int p = 0; p < count; p += kAhead) {
    T x[kAhead];
    int32_t it[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      it[u] = p + u < count ? item[p + u] : 0;
      const bool summed = p + u < count && (it[u] < 0) == kBackward;
      x[u] = summed ? rows[static_cast<int64_t>(kBackward ? ~it[u] : it[u]) * width] : T(0);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (p + u >= count) break;
      if ((it[u] < 0) == kBackward) {
        sum += fore[p + u] * x[u];
      } else {
        *receiver.stored(it[u] < 0 ? ~it[u] : it[u]) = back[p + u] * (carry + sum);
      }
    }
  }
}

// Runs from the rear. Completes each row from the sum of the items after it and the value stored by walk_up.
template <bool kBackward, class T, class R>
QFAST_DEVICE void walk_down(const Day<T>& day, int64_t chunk, T carry, const T* rows, const R& receiver,
                            bool active, const Lanes& lanes, int group) {
  const int count = day.items(chunk), width = receiver.width;
  const int32_t* item = day.item + chunk * kChunk;
  const T *fore = day.fore + chunk * kChunk, *back = day.back + chunk * kChunk;
  T sum = 0;
  for (int p = (count - 1) / kAhead * kAhead; p >= 0; p -= kAhead) {
    T x[kAhead], operand[kAhead];
    int32_t it[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      it[u] = p + u < count ? item[p + u] : 0;
      const bool read = active && p + u < count, summed = (it[u] < 0) == kBackward;
      const int32_t row = it[u] < 0 ? ~it[u] : it[u];
      x[u] = !read ? T(0) : summed ? rows[static_cast<int64_t>(row) * width] : *receiver.stored(row);
      operand[u] = read && !summed ? receiver.operand(row) : T(0);
    }
#pragma unroll
    for (int u = kAhead - 1; u >= 0; --u) {
      if (p + u >= count) continue;
      if ((it[u] < 0) == kBackward) {
        sum += back[p + u] * x[u];
      } else {
        const int32_t row = it[u] < 0 ? ~it[u] : it[u];
        receiver.receive(row, x[u], operand[u], fore[p + u] * (carry + sum), active, lanes, group);
      }
    }
  }
}

// Runs over a chunk in both directions, for the columns of a group.
template <bool kBackward, class T, class R, class Io>
QFAST_DEVICE void walk_columns(const Day<T>& day, int64_t chunk, int width, int group, const Lanes& lanes,
                               const T* rows, const Io& io) {
  const int column = group * lanes.size + lanes.lane;
  const bool active = column < width;
  const int64_t at = day.first * width + column;
  const R receiver(io, day, width, column);
  if (active) walk_up<kBackward>(day, chunk, day.sums[column * day.stride + chunk], rows + at, receiver);
  const T carry = active ? day.sums[(width + column) * day.stride + chunk] : T(0);
  walk_down<kBackward>(day, chunk, carry, rows + at, receiver, active, lanes, group);
}

}  // namespace
}  // namespace qfast
