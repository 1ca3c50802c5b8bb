// Lists and running sums of additive attention on CUDA. docs/attention.md derives the passes, and
// additive_attention_launch.cuh contains their order. The code uses only threads, shared memory and shuffles.
//
// Every day of every head has one list of 2 n items: its keys in ascending order merged with its queries in
// descending order, such that a query precedes the keys with which its score is above 0. A query reads the
// sum of the keys before it, times `back`, and the sum of the keys after it, times `fore`. In backward a key
// reads the sums of the queries in the same way. An item has weight `fore` in the sums from the front and
// weight `back` in the sums from the rear.
//
// A warp owns a chunk of 128 items. The sums of a chunk are in the tensors' type, and the sums before and
// after each chunk are in float64. Every sum has a fixed order, so results are reproducible bit for bit.
//
// The gradients of the scores are those of the values minus a vector of the day, its center. The gradients of
// all keys of a day, before the slope of LeakyReLU, sum to 0 within the rounding of float64
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
constexpr int kCenterRows = 32;  // rows of a day whose mean result is the center
constexpr int kAhead = 8;        // rows that are loaded together, which hides most of the memory latency
constexpr int kThreads = 256;    // threads of a block, if days are in global memory
constexpr int kWarps = kThreads / kLanes;
constexpr int kDayThreads = 512;  // most threads of a block that owns a day
constexpr unsigned kWholeWarp = ~0u;

#define QFAST_DEVICE __device__ __forceinline__

// ---------------------------------------------------------------- days and their lists
struct Days {
  const int64_t* offsets;  // [count + 1], or null if all rows are one day
  int64_t count, rows;     // D, N
  const int32_t* broken;   // not 0 if `offsets` are invalid; all rows are then one day. May be null

  QFAST_DEVICE int64_t begin(int64_t d) const {
    const bool whole = offsets == nullptr || is_broken();
    const int64_t at = !whole ? offsets[d] : d == 0 ? 0 : rows;
    return at < 0 ? 0 : at < rows ? at : rows;
  }
  QFAST_DEVICE bool is_broken() const { return broken != nullptr && *broken != 0; }
  // Number of the first chunk of a day. A day has as many numbers as it needs, or more, so no table is
  // necessary.
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
  int64_t first;    // its first row in [heads * N]
  int64_t count;    // n
  T* scores;        // keys ascending, then queries descending; they may be infinite but not NaN
  int32_t* rows;    // rows of the scores, relative to the first row of the day
  int64_t queries;  // offset of the queries in `scores` and `rows`
  int32_t* item;    // [2 n]: row of a key, ~row of a query
  T *fore, *back;   // [2 n]
  T* sums;          // [2, H, stride]: sums of the chunks, replaced by the sums before (0) and after (1) each
  double* scalar_sums;  // [4, stride]: the same for scalars, of two kinds
  int64_t stride;
  T* center;  // [H], in backward

  QFAST_DEVICE T* sorted(int side) const { return scores + side * queries; }
  QFAST_DEVICE int32_t* sorted_rows(int side) const { return rows + side * queries; }
  QFAST_DEVICE int64_t chunks() const { return (2 * count + kChunk - 1) / kChunk; }
  QFAST_DEVICE int items(int64_t chunk) const {
    const int64_t left = 2 * count - chunk * kChunk;
    return left < kChunk ? static_cast<int>(left) : kChunk;
  }
};

// The lists of all days in global memory.
template <class T>
struct Lists {
  T* scores;            // [2, heads, N]
  int32_t* rows;        // [2, heads, N]
  int32_t* item;        // [heads, 2 N]
  T *fore, *back;       // [heads, 2 N]
  T* sums;              // [heads, 2, H, chunks]
  double* scalar_sums;  // [heads, 4, chunks]
  T* centers;           // [heads, D, H], or null in forward

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

// A group of lanes of a warp. Each lane owns a column.
struct Lanes {
  int lane, size;  // size is a power of two, up to 32
  unsigned mask;

  QFAST_DEVICE explicit Lanes(int lanes) : lane(threadIdx.x % lanes), size(lanes), mask(kWholeWarp) {
    if (lanes < kLanes) mask = ((1u << lanes) - 1) << (threadIdx.x % kLanes / lanes * lanes);
  }
  template <class T>
  QFAST_DEVICE T sum(T value) const {
    for (int step = size / 2; step > 0; step /= 2) value += __shfl_xor_sync(mask, value, step, size);
    return value;
  }
  // Returns the sum of `first` in the lower half of the lanes, and the sum of `second` in the upper half.
  // Needs at least two lanes.
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

// Replaces scores that cannot be sorted. A NaN key makes its whole day NaN, like +inf. A query that is not
// finite makes only its own row NaN: it becomes -inf, which sorts it after all others and marks it. -0
// becomes 0, so both sorting algorithms have the same ties.
template <class T>
QFAST_DEVICE T sortable(int side, T score) {
  if (side == 0) return score == score ? score + T(0) : infinity<T>();
  return score - score == 0 ? score + T(0) : -infinity<T>();
}

// Returns `top`, or NaN if the dense softmax is NaN in every row. The NaN propagates to every row.
template <class T>
QFAST_DEVICE T highest(T top, T least, T slope) {
  const bool sane = top < infinity<T>() && top > -infinity<T>() && (slope > 0 || least > -infinity<T>());
  return sane ? top : std::numeric_limits<T>::quiet_NaN();
}

template <class T>
QFAST_DEVICE T highest(const Day<T>& day, T slope) {
  return highest(day.scores[day.count - 1], day.scores[0], slope);
}

// On either side of 0, the exponential of a score is a product: the factor of the key above or below 0, times
// that of the query. `score` is sortable, `top` is the highest key.
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
  const T most = score + top;  // the highest score of the query
  const bool bent = most > 0 && slope < 1;
  const T below = bent ? exp((slope - 1) * most) : T(1);
  return {most > 0 ? T(1) : T(0), score == -infinity<T>() ? std::numeric_limits<T>::quiet_NaN() : below};
}

// ---------------------------------------------------------------- the list
// Writes the key (side 0) or query (side 1) at sorted position p to the list. A thread owns one item. `top`
// is the highest key.
template <class T>
QFAST_DEVICE void place(const Day<T>& day, int side, int64_t p, T slope, T top) {
  const T score = day.sorted(side)[p];
  const T* others = day.sorted(1 - side);
  int64_t low = 0, high = day.count;  // limits of the number of items of the other side before it
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
  const Factors<T> factors = side == 0 ? key_factors(score, slope, top) : query_factors(score, slope, top);
  day.item[at] = side == 0 ? row : ~row;
  day.fore[at] = side == 0 ? factors.below : factors.above;
  day.back[at] = side == 0 ? factors.above : factors.below;
}

// ---------------------------------------------------------------- sums of scalars
// In forward the scalars are the weights of the keys, and the queries read their sums. In backward they are
// the weights of the queries, times their mean gradients if `delta` is not null, and the keys read their
// sums. `sums` is one kind of scalar_sums. A warp owns a chunk.
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

// Sums both kinds of scalars of the backward pass.
template <class T>
QFAST_DEVICE void sum_gradients(const Day<T>& day, int64_t chunk, const T* delta) {
  sum_scalars<true>(day, chunk, delta, day.scalar_sums);
  sum_scalars<true>(day, chunk, static_cast<const T*>(nullptr), day.scalar_sums + 2 * day.stride);
}

// Sum of the values of this lane and of all lanes before it (from_front) or after it.
QFAST_DEVICE double running_sum(double value, bool from_front) {
  const int lane = threadIdx.x % kLanes;
  for (int step = 1; step < kLanes; step *= 2) {
    const double other = from_front ? __shfl_up_sync(kWholeWarp, value, step, kLanes)
                                    : __shfl_down_sync(kWholeWarp, value, step, kLanes);
    if (from_front ? lane >= step : lane + step < kLanes) value += other;
  }
  return value;
}

// Calls receive(position, row, sum before it, sum after it) for the items of a chunk that read the sums.
template <bool kBackward, class T, class Receive>
QFAST_DEVICE void read_scalars(const Day<T>& day, int64_t chunk, const T* delta, const double* sums,
                               const Receive& receive) {
  const int lane = threadIdx.x % kLanes, count = day.items(chunk);
  const int64_t first = chunk * kChunk + lane;
  double before[kRounds], carry = sums[chunk];
#pragma unroll
  for (int u = 0; u < kRounds; ++u) {
    const bool exists = u * kLanes + lane < count;
    const double value = exists ? scalar<kBackward>(day, first + u * kLanes, day.fore, delta) : 0;
    const double sum = running_sum(value, true);
    before[u] = carry + sum;
    carry += __shfl_sync(kWholeWarp, sum, kLanes - 1, kLanes);
  }
  carry = sums[day.stride + chunk];
#pragma unroll
  for (int u = kRounds - 1; u >= 0; --u) {
    const int64_t p = first + u * kLanes;
    const bool exists = u * kLanes + lane < count;
    const double value = exists ? scalar<kBackward>(day, p, day.back, delta) : 0;
    const double sum = running_sum(value, false);
    const int32_t item = exists ? day.item[p] : 0;
    if (exists && (item < 0) != kBackward) receive(p, item < 0 ? ~item : item, before[u], carry + sum);
    carry += __shfl_sync(kWholeWarp, sum, 0, kLanes);
  }
}

// The smaller of the two parts of a row, as a share of their sum. It is negative if it is the part below 0.
template <class T>
QFAST_DEVICE T smaller_share(double above, double below, double total) {
  const double part = above / total;
  return static_cast<T>(part <= 0.5 ? part : -(below / total));
}

// Divides the factors of the queries by the sums of their weights, and saves the weight of the smaller part.
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

// Replaces the sums of `chunks` chunks by the sums of all chunks before each, or after each. A warp owns one
// column.
template <class T>
QFAST_DEVICE void carry_sums(T* sums, int64_t chunks, bool from_front) {
  const int lane = threadIdx.x % kLanes;
  double carry = 0;
  for (int64_t i = lane; i - lane < chunks; i += kLanes) {
    const int64_t chunk = from_front ? i : chunks - 1 - i;
    const bool exists = i < chunks;
    const double sum = running_sum(exists ? static_cast<double>(sums[chunk]) : 0, true);
    const double before = __shfl_up_sync(kWholeWarp, sum, 1, kLanes);
    if (exists) sums[chunk] = static_cast<T>(lane == 0 ? carry : carry + before);
    carry += __shfl_sync(kWholeWarp, sum, kLanes - 1, kLanes);
  }
}

// The same for a thread block, with the same bits: the warps add the sums of up to 32 chunks each at the same
// time, and every thread then adds the totals of the warps in order. `totals` has room for the totals of two
// rounds in shared memory, so one barrier per round is enough. All threads must call this.
template <class T>
QFAST_DEVICE void carry_sums_in_block(T* sums, int64_t chunks, bool from_front, double (*totals)[kWarps]) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const auto place = [&](int64_t i) { return from_front ? i : chunks - 1 - i; };
  double carry = 0, next = threadIdx.x < chunks ? static_cast<double>(sums[place(threadIdx.x)]) : 0;
  int round = 0;
  for (int64_t i = threadIdx.x; i - threadIdx.x < chunks; i += kThreads, round ^= 1) {
    const double sum = running_sum(next, true), before = __shfl_up_sync(kWholeWarp, sum, 1, kLanes);
    next = i + kThreads < chunks ? static_cast<double>(sums[place(i + kThreads)]) : 0;
    if (lane == kLanes - 1) totals[round][warp] = sum;
    __syncthreads();
    double mine = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) mine = carry;
      carry += totals[round][w];
    }
    if (i < chunks) sums[place(i)] = static_cast<T>(lane == 0 ? mine : mine + before);
  }
  __syncthreads();
}

// Carries array `part` of scalar_sums. Arrays with an even number run from the front.
template <class T>
QFAST_DEVICE void carry_scalars(const Day<T>& day, int part) {
  carry_sums(day.scalar_sums + part * day.stride, day.chunks(), part % 2 == 0);
}

}  // namespace
}  // namespace qfast
