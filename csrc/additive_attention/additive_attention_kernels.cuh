// Additive attention on CUDA, device side; additive_attention.cu says how the passes follow each other and
// docs/attention.md derives them. Nothing here needs more of CUDA than threads, shared memory and shuffles.
//
// Of every day and head there is one list of 2 n items, its keys ascending and its queries descending merged
// so that a query stands before the keys with which its score is above 0. A query then reads the sum of the
// keys before it, times `back`, and of those behind it, times `fore`; a key reads the sums of the queries in
// the backward in the same way. An item counts with weight `fore` in the sums that run from the front, with
// `back` in those from the rear. Chunks of 128 items are summed by themselves in the tensors' type; what lies
// before and behind each is added up in float64. Every order is fixed, so results repeat bit for bit.
//
// The gradients of the scores are those of values less a vector of the day, its center, and those of all keys
// of a day sum to 0 before the bend's slope to the rounding of float64
// (additive_attention_kernels_gradients.cuh).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace qfast {
namespace {

constexpr int kChunk = 128;
constexpr int kLanes = 32;
constexpr int kRounds = kChunk / kLanes;
constexpr int kCenterRows = 32;   // of a day, whose mean result is the center
constexpr int kAhead = 8;         // rows asked for at once: enough to hide most of the way to memory
constexpr int kThreads = 256;     // of a block, where days are in memory
constexpr int kDayThreads = 512;  // of a block that owns a day, at most
constexpr unsigned kWholeWarp = ~0u;

#define QFAST_DEVICE __device__ __forceinline__

// ---------------------------------------------------------------- days and their lists
struct Days {
  const int64_t* offsets;  // [count + 1]; null: all rows are one day
  int64_t count, rows;     // D, N
  const int32_t* broken;   // not 0: `offsets` are no such thing, all rows are one day; may be null

  QFAST_DEVICE int64_t begin(int64_t d) const {
    const bool whole = offsets == nullptr || is_broken();
    const int64_t at = !whole ? offsets[d] : d == 0 ? 0 : rows;
    return at < 0 ? 0 : at < rows ? at : rows;
  }
  QFAST_DEVICE bool is_broken() const { return broken != nullptr && *broken != 0; }
  // The chunks of a day are numbered from here: as many as it needs or more, without a table of them.
  QFAST_DEVICE int64_t first_chunk(int64_t d) const { return 2 * begin(d) / kChunk + d; }
  __host__ __device__ int64_t chunks() const { return 2 * rows / kChunk + count; }

  QFAST_DEVICE int64_t day_of_row(int64_t row) const {
    return last_day([&](int64_t d) { return begin(d) <= row; });
  }
  QFAST_DEVICE int64_t day_of_chunk(int64_t chunk) const {
    return last_day([&](int64_t d) { return first_chunk(d) <= chunk; });
  }

 private:
  template <class Starts>
  QFAST_DEVICE int64_t last_day(const Starts& starts) const {
    int64_t low = 0, high = count - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (starts(middle)) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

struct Shape {
  Days days;
  int64_t heads;
  int width;  // H
};

// One day of one head.
template <class T>
struct Day {
  int64_t first;  // its first row in [heads * N]
  int64_t count;  // n
  T* scores;      // keys ascending, then, `queries` on, queries descending; infinities but no NaN
  int32_t* rows;  // their rows, from the first of the day
  int64_t queries;
  int32_t* item;        // [2 n]: row of a key, ~row of a query
  T *fore, *back;       // [2 n]
  T* sums;              // [2, H, stride]: of chunks; then of all before (0), of all behind (1) each
  double* scalar_sums;  // [4, stride]: the same of scalars, two kinds of them
  int64_t stride;
  T* center;  // [H], in the backward

  QFAST_DEVICE T* sorted(int side) const { return scores + side * queries; }
  QFAST_DEVICE int32_t* sorted_rows(int side) const { return rows + side * queries; }
  QFAST_DEVICE int64_t chunks() const { return (2 * count + kChunk - 1) / kChunk; }
  QFAST_DEVICE int items(int64_t chunk) const {
    const int64_t left = 2 * count - chunk * kChunk;
    return left < kChunk ? static_cast<int>(left) : kChunk;
  }
};

// The same of all days, in memory.
template <class T>
struct Lists {
  T* scores;            // [2, heads, N]
  int32_t* rows;        // [2, heads, N]
  int32_t* item;        // [heads, 2 N]
  T *fore, *back;       // [heads, 2 N]
  T* sums;              // [heads, 2, H, chunks]
  double* scalar_sums;  // [heads, 4, chunks]
  T* centers;           // [heads, D, H]; null in the forward

  QFAST_DEVICE Day<T> day(const Shape& shape, int64_t head, int64_t d) const {
    const int64_t begin = shape.days.begin(d), first = head * shape.days.rows + begin;
    const int64_t chunks = shape.days.chunks(), chunk = shape.days.first_chunk(d);
    const int64_t count = shape.days.begin(d + 1) - begin;
    return {first,
            count < 0 ? 0 : count,
            scores + first,
            rows + first,
            shape.heads * shape.days.rows,
            item + 2 * first,
            fore + 2 * first,
            back + 2 * first,
            sums + head * 2 * shape.width * chunks + chunk,
            scalar_sums + head * 4 * chunks + chunk,
            chunks,
            centers + (head * shape.days.count + d) * shape.width};
  }
};

// Lanes of a warp that work together: one column each.
struct Lanes {
  int lane, size;  // size: a power of two up to 32
  unsigned mask;

  QFAST_DEVICE explicit Lanes(int lanes) : lane(threadIdx.x % lanes), size(lanes), mask(kWholeWarp) {
    if (lanes < kLanes) mask = ((1u << lanes) - 1) << (threadIdx.x % kLanes / lanes * lanes);
  }
  template <class T>
  QFAST_DEVICE T sum(T value) const {
    for (int step = size / 2; step > 0; step /= 2) value += __shfl_xor_sync(mask, value, step, size);
    return value;
  }
  // Of two lanes or more: the sum of `first` in the lower half of them, of `second` in the upper.
  template <class T>
  QFAST_DEVICE T sum_two(T first, T second) const {
    const bool upper = lane >= size / 2;
    T value = upper ? second : first;
    value += __shfl_xor_sync(mask, upper ? first : second, size / 2, size);
    for (int step = size / 4; step > 0; step /= 2) value += __shfl_xor_sync(mask, value, step, size);
    return value;
  }
};

template <class T>
QFAST_DEVICE T infinity() {
  return std::numeric_limits<T>::infinity();
}

// A score that is not a number has no place in an order. A NaN key spoils its day as +inf does; a query that
// is not finite spoils its own row only: last of all it disturbs no other, and -inf marks it. -0 becomes 0,
// so that the two ways of sorting see the same ties.
template <class T>
QFAST_DEVICE T sortable(int side, T score) {
  if (side == 0) return score == score ? score + T(0) : infinity<T>();
  return score - score == 0 ? score + T(0) : -infinity<T>();
}

// `top`, or NaN, which spreads to every row, where the dense softmax is NaN in every row.
template <class T>
QFAST_DEVICE T highest(T top, T least, T slope) {
  const bool sane = top < infinity<T>() && top > -infinity<T>() && (slope > 0 || least > -infinity<T>());
  return sane ? top : std::numeric_limits<T>::quiet_NaN();
}

template <class T>
QFAST_DEVICE T highest(const Day<T>& day, T slope) {
  return highest(day.scores[day.count - 1], day.scores[0], slope);
}

// The exponential of a score is a product on either side of the bend: a key's factor above or below it, times
// that of the query. `score` is sortable, `top` the highest key.
template <class T>
struct Factors {
  T above, below;
};

template <class T>
QFAST_DEVICE Factors<T> key_factors(T score, T slope, T top) {
  return {exp(score - top), slope == 0 && top == top ? T(1) : exp(slope * (score - top))};
}

template <class T>
QFAST_DEVICE Factors<T> query_factors(T score, T slope, T top) {
  const T most = score + top;  // its highest score
  const bool bent = most > 0 && slope < 1;
  const T below = bent ? exp((slope - 1) * most) : T(1);
  return {most > 0 ? T(1) : T(0), score == -infinity<T>() ? std::numeric_limits<T>::quiet_NaN() : below};
}

// ---------------------------------------------------------------- the list
// Puts the key (side 0) or query (1) at sorted position p into the list. A thread owns one. `top` is the
// highest key.
template <class T>
QFAST_DEVICE void place(const Day<T>& day, int side, int64_t p, T slope, T top) {
  const T score = day.sorted(side)[p];
  const T* others = day.sorted(1 - side);
  int64_t low = 0, high = day.count;  // how many of the others stand before it
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const bool above = side == 0 ? score > -others[middle] : others[middle] > -score;
    if (above == (side == 0)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const int64_t at = p + low;
  const int32_t row = day.sorted_rows(side)[p];
  const Factors<T> of = side == 0 ? key_factors(score, slope, top) : query_factors(score, slope, top);
  day.item[at] = side == 0 ? row : ~row;
  day.fore[at] = side == 0 ? of.below : of.above;
  day.back[at] = side == 0 ? of.above : of.below;
}

// ---------------------------------------------------------------- sums of scalars
// Forward: weights of the keys, which the queries read. Backward: weights of the queries, times their mean
// gradients if `delta` is not null, which the keys read. `sums` is a kind of scalar_sums. A warp owns a
// chunk.
template <bool kBackward, class T>
QFAST_DEVICE double scalar(const Day<T>& day, int64_t p, const T* weights, const T* delta) {
  const int32_t item = day.item[p];
  if ((item < 0) != kBackward) return 0;
  return delta != nullptr ? static_cast<double>(weights[p]) * delta[day.first + ~item] : weights[p];
}

template <bool kBackward, class T>
QFAST_DEVICE void sum_scalars(const Day<T>& day, int64_t chunk, const T* delta, double* sums) {
  const int lane = threadIdx.x % kLanes, count = day.items(chunk);
  double fore = 0, back = 0;
  for (int i = lane; i < count; i += kLanes) {
    fore += scalar<kBackward>(day, chunk * kChunk + i, day.fore, delta);
    back += scalar<kBackward>(day, chunk * kChunk + i, day.back, delta);
  }
  const Lanes lanes(kLanes);
  fore = lanes.sum(fore);
  back = lanes.sum(back);
  if (lane != 0) return;
  sums[chunk] = fore;
  sums[day.stride + chunk] = back;
}

// Both kinds that the backward needs.
template <class T>
QFAST_DEVICE void sum_gradients(const Day<T>& day, int64_t chunk, const T* delta) {
  sum_scalars<true>(day, chunk, delta, day.scalar_sums);
  sum_scalars<true>(day, chunk, static_cast<const T*>(nullptr), day.scalar_sums + 2 * day.stride);
}

// Sum of this lane's value and those of the lanes before it (or behind it).
QFAST_DEVICE double running_sum(double value, bool from_front) {
  const int lane = threadIdx.x % kLanes;
  for (int step = 1; step < kLanes; step *= 2) {
    const double other = from_front ? __shfl_up_sync(kWholeWarp, value, step, kLanes)
                                    : __shfl_down_sync(kWholeWarp, value, step, kLanes);
    if (from_front ? lane >= step : lane + step < kLanes) value += other;
  }
  return value;
}

// Calls receive(position, row, sum before it, sum behind it) for the items of a chunk that read the sums.
template <bool kBackward, class T, class Receive>
QFAST_DEVICE void read_scalars(const Day<T>& day, int64_t chunk, const T* delta, const double* sums,
                               const Receive& receive) {
  const int lane = threadIdx.x % kLanes, count = day.items(chunk);
  const int64_t first = chunk * kChunk + lane;
  double before[kRounds], carry = sums[chunk];
#pragma unroll
  for (int u = 0; u < kRounds; ++u) {
    const bool inside = u * kLanes + lane < count;
    const double value = inside ? scalar<kBackward>(day, first + u * kLanes, day.fore, delta) : 0;
    const double sum = running_sum(value, true);
    before[u] = carry + sum;
    carry += __shfl_sync(kWholeWarp, sum, kLanes - 1, kLanes);
  }
  carry = sums[day.stride + chunk];
#pragma unroll
  for (int u = kRounds - 1; u >= 0; --u) {
    const int64_t p = first + u * kLanes;
    const bool inside = u * kLanes + lane < count;
    const double value = inside ? scalar<kBackward>(day, p, day.back, delta) : 0;
    const double sum = running_sum(value, false);
    const int32_t item = inside ? day.item[p] : 0;
    if (inside && (item < 0) != kBackward) receive(p, item < 0 ? ~item : item, before[u], carry + sum);
    carry += __shfl_sync(kWholeWarp, sum, 0, kLanes);
  }
}

// The smaller of a row's two parts, as a share of their sum; the part from below the bend is marked by its
// sign.
template <class T>
QFAST_DEVICE T smaller_share(double above, double below, double total) {
  const double part = above / total;
  return static_cast<T>(part <= 0.5 ? part : -(below / total));
}

// Divides the factors of the queries by their sums of weights and keeps the weight of the smaller part.
template <class T>
QFAST_DEVICE void normalise(const Day<T>& day, int64_t chunk, T* share_weight) {
  read_scalars<false>(day, chunk, static_cast<const T*>(nullptr), day.scalar_sums,
                      [&](int64_t p, int32_t row, double before, double behind) {
                        const double above = day.fore[p] * behind, below = day.back[p] * before;
                        const double total = above + below;
                        day.fore[p] = static_cast<T>(day.fore[p] / total);
                        day.back[p] = static_cast<T>(day.back[p] / total);
                        if (share_weight == nullptr) return;
                        share_weight[day.first + row] = smaller_share<T>(above, below, total);
                      });
}

// Turns sums of `chunks` chunks into the sums of all before each or behind each. A warp owns one column.
template <class T>
QFAST_DEVICE void carry_sums(T* sums, int64_t chunks, bool from_front) {
  const int lane = threadIdx.x % kLanes;
  double carry = 0;
  for (int64_t i = lane; i - lane < chunks; i += kLanes) {
    const int64_t chunk = from_front ? i : chunks - 1 - i;
    const bool inside = i < chunks;
    const double sum = running_sum(inside ? static_cast<double>(sums[chunk]) : 0, true);
    const double before = __shfl_up_sync(kWholeWarp, sum, 1, kLanes);
    if (inside) sums[chunk] = static_cast<T>(lane == 0 ? carry : carry + before);
    carry += __shfl_sync(kWholeWarp, sum, kLanes - 1, kLanes);
  }
}

// Array `part` of scalar_sums: even ones run from the front.
template <class T>
QFAST_DEVICE void carry_scalars(const Day<T>& day, int part) {
  carry_sums(day.scalar_sums + part * day.stride, day.chunks(), part % 2 == 0);
}

}  // namespace
}  // namespace qfast
