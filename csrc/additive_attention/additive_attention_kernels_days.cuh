// Kernels of additive attention on CUDA for long days, or for many of them.
//
// There are two ways through the same passes. If every day fits in shared memory, a thread block owns a day,
// sorts it and runs all passes in one launch. Otherwise all days are sorted together in global memory, and
// each pass is a launch over the chunks of all days, in the order of additive_attention_launch.cuh. Saved for
// backward: the sort orders, the smaller part of each row's sum, and its weight.
#pragma once

#include "additive_attention/additive_attention_kernels_gradients.cuh"

namespace qfast {
namespace {

// Most rows of a day that a thread block owns, because the time of its sort grows with n log^2 n.
constexpr int64_t kDayRows = 2048;

// Sizes for one thread block per day. Bound by latency: a day of 300 x 64 floats has 77 KB to read and as
// much to write, but each pass waits for the one before. Hundreds of days fill the device, which is then
// bound by bytes.
struct DayPlan {
  int64_t longest;
  int threads, lanes, groups;  // threads of a block; lanes of a group; groups of columns
  size_t bytes;                // shared memory

  QFAST_DEVICE int64_t chunks() const { return (2 * longest + kChunk - 1) / kChunk; }
};

// Number of lanes that share a chunk: a warp, or fewer if there are fewer columns. At least 2, for
// Lanes::sum_two.
inline int lanes_for(int width) {
  int lanes = 2;
  while (lanes < width && lanes < kLanes) lanes *= 2;
  return lanes;
}

template <class T>
DayPlan plan_day(int64_t longest, int width) {
  DayPlan plan{longest, kDayThreads, lanes_for(width), 0, 0};
  plan.groups = (width + plan.lanes - 1) / plan.lanes;
  const int64_t chunks = (2 * longest + kChunk - 1) / kChunk;
  const int64_t useful = chunks * plan.groups * plan.lanes;
  while (plan.threads > 64 && plan.threads / 2 >= useful && plan.threads / 2 >= longest) plan.threads /= 2;
  plan.bytes = 4 * chunks * sizeof(double) + (2 * chunks + 1) * width * sizeof(T) + 6 * longest * sizeof(T) +
               4 * longest * sizeof(int32_t);
  return plan;
}

// The lists of a day in shared memory.
template <class T>
QFAST_DEVICE Day<T> shared_day(const Shape& shape, const DayPlan& plan, int64_t head, int64_t d) {
  extern __shared__ double shared_memory[];
  const int64_t begin = shape.days.begin(d), n = plan.longest, chunks = plan.chunks();
  int64_t count = shape.days.begin(d + 1) - begin;
  count = count < 0 ? 0 : count < n ? count : n;
  double* scalars = shared_memory;
  T* sums = reinterpret_cast<T*>(scalars + 4 * chunks);
  T* center = sums + 2 * chunks * shape.width;
  T* scores = center + shape.width;
  T* weights = scores + 2 * n;
  int32_t* rows = reinterpret_cast<int32_t*>(weights + 4 * n);
  return {head * shape.days.rows + begin,
          count,
          scores,
          rows,
          n,
          rows + 2 * n,
          weights,
          weights + 2 * n,
          sums,
          scalars,
          chunks,
          center};
}

// Sorts keys and queries in place, with ties in the order of their rows. Every comparison of this bitonic
// network moves the smaller element to the front, so no padding is needed beyond the last row: it would never
// move.
template <class T>
QFAST_DEVICE void sort_day(const Day<T>& day) {
  const int count = static_cast<int>(day.count);
  for (int size = 2; size / 2 < count; size *= 2) {
    for (int step = size / 2; step > 0; step /= 2) {
      int half = 1;  // pairs of one side, whose number of rows is rounded up to a power of two
      while (2 * half < count) half *= 2;
      for (int i = threadIdx.x; i < 2 * half; i += blockDim.x) {
        const int side = i >= half, pair = i & (half - 1), within = pair & (step - 1);
        const int base = 2 * (pair - within);
        const int a = base + within, b = step == size / 2 ? base + size - 1 - within : a + step;
        if (b >= count) continue;
        T *scores = day.sorted(side), first = scores[a], second = scores[b];
        int32_t* rows = day.sorted_rows(side);
        const int32_t row = rows[a], other = rows[b];
        if (side == 0 ? first < second : first > second) continue;
        if (first == second && row < other) continue;
        scores[a] = second;
        scores[b] = first;
        rows[a] = other;
        rows[b] = row;
      }
      __syncthreads();
    }
  }
}

// Builds the list from the sorted scores and normalises its queries.
template <class T>
QFAST_DEVICE void list_day(const Day<T>& day, T slope, T* share_weight) {
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  const T* none = nullptr;
  for (int64_t i = threadIdx.x; i < 2 * day.count; i += blockDim.x) {
    place(day, i >= day.count, i >= day.count ? i - day.count : i, slope, highest(day, slope));
  }
  __syncthreads();
  for (int64_t chunk = warp; chunk < day.chunks(); chunk += warps) {
    sum_scalars<false>(day, chunk, none, day.scalar_sums);
  }
  __syncthreads();
  for (int part = warp; part < 2; part += warps) carry_scalars(day, part);
  __syncthreads();
  for (int64_t chunk = warp; chunk < day.chunks(); chunk += warps) normalise(day, chunk, share_weight);
  __syncthreads();
}

// Sums the rows of the chunks and computes the results, or the gradients of the values in backward.
template <bool kBackward, class T, class R, class Io>
QFAST_DEVICE void attend_day(const Day<T>& day, const DayPlan& plan, int width, const T* rows, const Io& io) {
  const Lanes lanes(plan.lanes);
  const int64_t tasks = day.chunks() * plan.groups, teams = blockDim.x / plan.lanes;
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  for (int64_t i = threadIdx.x / plan.lanes; i < tasks; i += teams) {
    const int column = static_cast<int>(i % plan.groups) * plan.lanes + lanes.lane;
    sum_columns<kBackward>(day, i / plan.groups, width, column, rows);
  }
  __syncthreads();
  for (int column = warp; column < 2 * width; column += warps) {
    carry_sums(day.sums + column * day.stride, day.chunks(), column < width);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x / plan.lanes; i < tasks; i += teams) {
    const int group = static_cast<int>(i % plan.groups);
    walk_columns<kBackward, T, R>(day, i / plan.groups, width, group, lanes, rows, io);
  }
}

// Forward. A thread block owns single days of single heads.
template <class T>
__global__ void __launch_bounds__(kDayThreads, 1)
    attend_day_kernel(const Shape shape, const DayPlan plan, const Forward<T> io, const T slope) {
  const int64_t total = shape.heads * shape.days.rows;
  for (int64_t i = blockIdx.x; i < shape.heads * shape.days.count; i += gridDim.x) {
    const Day<T> day = shared_day<T>(shape, plan, i / shape.days.count, i % shape.days.count);
    __syncthreads();  // the shared memory of the previous day is no longer read
    for (int64_t p = threadIdx.x; p < 2 * day.count; p += blockDim.x) {
      const int side = p >= day.count;
      const int64_t row = side ? p - day.count : p;
      day.sorted(side)[row] = sortable(side, (side ? io.query : io.key)[day.first + row]);
      day.sorted_rows(side)[row] = static_cast<int32_t>(row);
    }
    __syncthreads();
    sort_day(day);
    for (int64_t p = threadIdx.x; p < 2 * day.count && io.orders != nullptr; p += blockDim.x) {
      const int side = p >= day.count;
      const int64_t at = side ? p - day.count : p;
      io.orders[side * total + day.first + at] = day.sorted_rows(side)[at];
    }
    list_day(day, slope, io.share_weight);
    attend_day<false, T, Receiver<T>>(day, plan, shape.width, io.value, io);
  }
}

// Backward. A thread block owns single days of single heads.
template <class T>
__global__ void __launch_bounds__(kDayThreads, 1)
    attend_day_backward_kernel(const Shape shape, const DayPlan plan, const Backward<T> io) {
  const Lanes lanes(plan.lanes);
  const int warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  for (int64_t i = blockIdx.x; i < shape.heads * shape.days.count; i += gridDim.x) {
    const Day<T> day = shared_day<T>(shape, plan, i / shape.days.count, i % shape.days.count);
    __syncthreads();  // the shared memory of the previous day is no longer read
    for (int64_t p = threadIdx.x; p < 2 * day.count; p += blockDim.x) {
      const int side = p >= day.count;
      const int64_t at = side ? p - day.count : p;
      const int32_t row = io.orders[side * io.total + day.first + at];
      day.sorted(side)[at] = sortable(side, (side ? io.query : io.key)[day.first + row]);
      day.sorted_rows(side)[at] = row;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < shape.width; c += blockDim.x) find_center(day, io, shape.width, c);
    list_day(day, io.slope, static_cast<T*>(nullptr));
    for (int64_t row = threadIdx.x / plan.lanes; row < day.count; row += blockDim.x / plan.lanes) {
      query_gradient(io, day.first + row, shape.width, lanes, day.center);
    }
    __syncthreads();
    for (int64_t c = warp; c < day.chunks(); c += warps) sum_gradients(day, c, io.delta);
    __syncthreads();
    for (int part = warp; part < 4; part += warps) carry_scalars(day, part);
    __syncthreads();
    attend_day<true, T, BackwardReceiver<T>>(day, plan, shape.width, io.grad, io);
    __syncthreads();
    for (int64_t c = warp; c < day.chunks(); c += warps) key_gradients(day, c, io, plan.groups);
    __syncthreads();
    if (warp == 0) find_shift(day);
    __syncthreads();
    for (int64_t row = threadIdx.x; row < day.count; row += blockDim.x) {
      finish_key(io, day.first + row, day.scalar_sums[0]);
    }
  }
}

// ---------------------------------------------------------------- days in global memory, one launch per pass
QFAST_DEVICE int64_t thread_number() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
QFAST_DEVICE int64_t thread_count() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

template <class T>
struct SortBits;
template <>
struct SortBits<float> {
  using Word = uint32_t;
};
template <>
struct SortBits<double> {
  using Word = uint64_t;
};

// Sets *broken to 1 unless `offsets` ascend from 0 to N. The host has not checked them, and invalid offsets
// must not cause an access beyond the rows. One thread block.
__global__ void check_offsets_kernel(const Days days, int32_t* broken) {
  __shared__ int32_t any;
  if (threadIdx.x == 0) any = days.offsets[0] != 0 || days.offsets[days.count] != days.rows;
  __syncthreads();
  for (int64_t d = threadIdx.x; d < days.count; d += blockDim.x) {
    if (days.offsets[d] > days.offsets[d + 1]) any = 1;
  }
  __syncthreads();
  if (threadIdx.x == 0) *broken = any;
}

// Converts scores to unsigned numbers in the same order, for a radix sort. Those of the queries are inverted,
// because queries are sorted in descending order. There are 2 x heads x N numbers, and a thread owns single
// ones.
template <class T>
__global__ void sort_bits_kernel(const Shape shape, const T* key, const T* query,
                                 typename SortBits<T>::Word* bits, uint32_t* number) {
  using Word = typename SortBits<T>::Word;
  constexpr Word kSign = Word(1) << (8 * sizeof(Word) - 1);
  const int64_t total = shape.heads * shape.days.rows;
  for (int64_t i = thread_number(); i < 2 * total; i += thread_count()) {
    const int side = i >= total;
    const T score = sortable(side, side ? query[i - total] : key[i]);
    Word word;
    memcpy(&word, &score, sizeof(word));
    word ^= word & kSign ? ~Word(0) : kSign;
    bits[i] = side ? ~word : word;
    number[i] = static_cast<uint32_t>(i);
  }
}

// Computes the side, head and day of each row in the order of the first sort. A stable sort by these
// completes the order.
__global__ void sort_days_kernel(const Shape shape, const uint32_t* number, uint32_t* day) {
  const int64_t rows = shape.days.rows, count = 2 * shape.heads * rows;
  for (int64_t i = thread_number(); i < count; i += thread_count()) {
    const int64_t at = number[i];
    day[i] = static_cast<uint32_t>(at / rows * shape.days.count + shape.days.day_of_row(at % rows));
  }
}

// Writes heads [head, head + shape.heads) of orders [2, heads, N].
__global__ void orders_kernel(const Shape shape, const uint32_t* number, int32_t* orders, int64_t head,
                              int64_t heads) {
  const int64_t rows = shape.days.rows, total = shape.heads * rows;
  for (int64_t i = thread_number(); i < 2 * total; i += thread_count()) {
    const int64_t row = number[i] % rows, begin = shape.days.begin(shape.days.day_of_row(row));
    const int64_t side = i / total;
    orders[(side * heads + head) * rows + i - side * total] = static_cast<int32_t>(row - begin);
  }
}

// Copies the scores in sorted order.
template <class T>
__global__ void sorted_scores_kernel(const Shape shape, const Lists<T> lists, const T* key, const T* query) {
  const int64_t rows = shape.days.rows, total = shape.heads * rows;
  for (int64_t i = thread_number(); i < 2 * total; i += thread_count()) {
    const int side = i >= total;
    const int64_t at = side ? i - total : i, within = at % rows;
    const int64_t first = at - within + shape.days.begin(shape.days.day_of_row(within));
    lists.scores[i] = sortable(side, (side ? query : key)[first + lists.rows[i]]);
  }
}

// Builds the lists, with a binary search per key and per query. Adjacent threads search in almost the same
// places, so the reads are served by the caches.
template <class T>
__global__ void place_kernel(const Shape shape, const Lists<T> lists, const T slope) {
  const int64_t rows = shape.days.rows, total = shape.heads * rows;
  for (int64_t i = thread_number(); i < 2 * total; i += thread_count()) {
    const int side = i >= total;
    const int64_t at = side ? i - total : i;
    const Day<T> day = lists.day(shape, at / rows, shape.days.day_of_row(at % rows));
    const T top = shape.days.is_broken() ? std::numeric_limits<T>::quiet_NaN() : highest(day, slope);
    place(day, side, at - day.first, slope, top);
  }
}

// Calls body(day, chunk, group of columns) for all chunks and groups of columns. A group of `lanes` threads
// owns single chunks. Chunk numbers that no day uses are skipped.
template <class T, class Body>
QFAST_DEVICE void each_chunk(const Shape& shape, const Lists<T>& lists, int lanes, int groups,
                             const Body& body) {
  const int64_t chunks = shape.days.chunks(), count = shape.heads * chunks * groups;
  for (int64_t i = thread_number() / lanes; i < count; i += thread_count() / lanes) {
    const int64_t number = i / groups % chunks, d = shape.days.day_of_chunk(number);
    const Day<T> day = lists.day(shape, i / groups / chunks, d);
    const int64_t chunk = number - shape.days.first_chunk(d);
    if (chunk < day.chunks()) body(day, chunk, static_cast<int>(i % groups));
  }
}

template <bool kBackward, class T>
__global__ void __launch_bounds__(kThreads)
    sum_scalars_kernel(const Shape shape, const Lists<T> lists, const T* delta) {
  each_chunk(shape, lists, kLanes, 1, [&](const Day<T>& day, int64_t chunk, int) {
    if (kBackward) {
      sum_gradients(day, chunk, delta);
    } else {
      sum_scalars<false>(day, chunk, delta, day.scalar_sums);
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    normalise_kernel(const Shape shape, const Lists<T> lists, T* share_weight) {
  each_chunk(shape, lists, kLanes, 1,
             [&](const Day<T>& day, int64_t chunk, int) { normalise(day, chunk, share_weight); });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    key_gradients_kernel(const Shape shape, const Lists<T> lists, const Backward<T> io, int groups) {
  each_chunk(shape, lists, kLanes, 1,
             [&](const Day<T>& day, int64_t chunk, int) { key_gradients(day, chunk, io, groups); });
}

// A warp owns one array of scalars of one day.
template <bool kBackward, class T>
__global__ void __launch_bounds__(kThreads) carry_scalars_kernel(const Shape shape, const Lists<T> lists) {
  constexpr int kParts = kBackward ? 4 : 2;
  const int64_t count = shape.heads * shape.days.count * kParts;
  for (int64_t i = thread_number() / kLanes; i < count; i += thread_count() / kLanes) {
    const int64_t d = i / kParts % shape.days.count;
    const Day<T> day = lists.day(shape, i / kParts / shape.days.count, d);
    carry_scalars(day, static_cast<int>(i % kParts));
  }
}

// A warp owns one column of one day.
template <class T>
__global__ void __launch_bounds__(kThreads) carry_columns_kernel(const Shape shape, const Lists<T> lists) {
  const int64_t columns = 2 * static_cast<int64_t>(shape.width);
  const int64_t count = shape.heads * shape.days.count * columns;
  for (int64_t i = thread_number() / kLanes; i < count; i += thread_count() / kLanes) {
    const int64_t column = i % columns, d = i / columns % shape.days.count;
    const Day<T> day = lists.day(shape, i / columns / shape.days.count, d);
    carry_sums(day.sums + column * day.stride, day.chunks(), column < shape.width);
  }
}

// The same as carry_scalars_kernel, but a thread block owns one array.
template <bool kBackward, class T>
__global__ void __launch_bounds__(kThreads)
    carry_long_scalars_kernel(const Shape shape, const Lists<T> lists) {
  __shared__ double totals[2][kWarps];
  constexpr int kParts = kBackward ? 4 : 2;
  const int64_t count = shape.heads * shape.days.count * kParts;
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const int64_t d = i / kParts % shape.days.count, part = i % kParts;
    const Day<T> day = lists.day(shape, i / kParts / shape.days.count, d);
    carry_sums_in_block(day.scalar_sums + part * day.stride, day.chunks(), part % 2 == 0, totals);
  }
}

// The same as carry_columns_kernel, but a thread block owns one column.
template <class T>
__global__ void __launch_bounds__(kThreads)
    carry_long_columns_kernel(const Shape shape, const Lists<T> lists) {
  __shared__ double totals[2][kWarps];
  const int64_t columns = 2 * static_cast<int64_t>(shape.width);
  const int64_t count = shape.heads * shape.days.count * columns;
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const int64_t column = i % columns, d = i / columns % shape.days.count;
    const Day<T> day = lists.day(shape, i / columns / shape.days.count, d);
    carry_sums_in_block(day.sums + column * day.stride, day.chunks(), column < shape.width, totals);
  }
}

// A thread owns one column of one day.
template <class T>
__global__ void __launch_bounds__(kThreads)
    center_kernel(const Shape shape, const Lists<T> lists, const Backward<T> io) {
  const int64_t width = shape.width, count = shape.heads * shape.days.count * width;
  for (int64_t i = thread_number(); i < count; i += thread_count()) {
    const int64_t d = i / width % shape.days.count;
    const Day<T> day = lists.day(shape, i / width / shape.days.count, d);
    find_center(day, io, shape.width, static_cast<int>(i % width));
  }
}

// A warp owns a day.
template <class T>
__global__ void __launch_bounds__(kThreads) shift_kernel(const Shape shape, const Lists<T> lists) {
  const int64_t count = shape.heads * shape.days.count;
  for (int64_t i = thread_number() / kLanes; i < count; i += thread_count() / kLanes) {
    find_shift(lists.day(shape, i / shape.days.count, i % shape.days.count));
  }
}

// Sums the rows of each chunk. Bound by bytes: every summed row is read here and twice in walk_kernel (once
// of them from the caches), and every reading row is written once, twice with its share. There are 4 flops
// per element.
template <bool kBackward, class T>
__global__ void __launch_bounds__(kThreads)
    sum_columns_kernel(const Shape shape, const Lists<T> lists, int lanes, int groups, const T* rows) {
  each_chunk(shape, lists, lanes, groups, [&](const Day<T>& day, int64_t chunk, int group) {
    const int column = group * lanes + static_cast<int>(threadIdx.x) % lanes;
    sum_columns<kBackward>(day, chunk, shape.width, column, rows);
  });
}

// Computes the results, or the gradients of the values, from the carried sums.
template <bool kBackward, class T, class R, class Io>
__global__ void __launch_bounds__(kThreads, 2)
    walk_kernel(const Shape shape, const Lists<T> lists, int lanes, int groups, const T* rows, const Io io) {
  each_chunk(shape, lists, lanes, groups, [&](const Day<T>& day, int64_t chunk, int group) {
    walk_columns<kBackward, T, R>(day, chunk, shape.width, group, Lanes(lanes), rows, io);
  });
}

template <class T>
QFAST_DEVICE Day<T> day_of(const Shape& shape, const Lists<T>& lists, int64_t row) {
  const int64_t within = row % shape.days.rows;
  return lists.day(shape, row / shape.days.rows, shape.days.day_of_row(within));
}

// Computes the gradients of the queries. A group of lanes owns a row. Bound by bytes: the gradient, the
// result and the share are read once.
template <class T>
__global__ void __launch_bounds__(kThreads)
    query_gradient_kernel(const Shape shape, const Lists<T> lists, const Backward<T> io, int lanes) {
  const Lanes team(lanes);
  for (int64_t row = thread_number() / lanes; row < io.total; row += thread_count() / lanes) {
    const T* center = day_of(shape, lists, row).center;
    query_gradient(io, row, shape.width, team, center);
  }
}

template <class T>
__global__ void finish_key_kernel(const Shape shape, const Lists<T> lists, const Backward<T> io) {
  for (int64_t row = thread_number(); row < io.total; row += thread_count()) {
    finish_key(io, row, day_of(shape, lists, row).scalar_sums[0]);
  }
}

}  // namespace
}  // namespace qfast
