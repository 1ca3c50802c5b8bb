// Additive attention over few short days on CUDA, pair by pair: N^2 H products instead of N log N passes.
//
// A block that owns a whole day sorts it and walks over it on one multiprocessor while the others wait. With
// few days in a call it is better to share a day: here a block owns 8 rows and 64 columns of a day and sums
// over all of its rows, each counted in one of two sums by the side of the bend on which the pair lies. The
// exponentials are products (key_factors, query_factors), so a pair costs a comparison and two selections for
// all columns, and a column two multiply-adds. Forward, queries read values; backward, keys read gradients.
//
// A warp takes eight rows at a time, its lanes 4 x 4 elements of both sums: 32 multiply-adds for two loads of
// 16 bytes from shared memory and one from L2. Bound by multiply-adds, 4 N^2 H flops forward and
// as many backward (163 MFLOP for 800 x 64), and by L2, which is read N / 8 times over (20 MB). Saved for the
// backward: what the other ways save, but no orders, which are 0. Sums of a warp are in the tensors' type, of
// at most a sixteenth of a day; those of all warps and those of scalars are in float64. Every order is fixed,
// so bits repeat.
#pragma once

#include "additive_attention/additive_attention_kernels_gradients.cuh"

namespace qfast {
namespace {

constexpr int kReaders = 8;                    // rows of a block that read the sums
constexpr int kDenseColumns = 64;              // of a block
constexpr int kTile = 4;                       // a lane owns kTile rows and as many columns
constexpr int kTiles = kDenseColumns / kTile;  // lanes side by side
constexpr int kPartRow = kDenseColumns + 4;    // the halves of a warp write beside each other
constexpr int kSums = 4;                       // scalars of a reader: two kinds on either side of the bend

template <class T>
constexpr int kDenseWarps = sizeof(T) == sizeof(float) ? 16 : 8;
template <class T>
constexpr int kDenseThreads = kDenseWarps<T> * kLanes;

struct DensePlan {
  int longest, tiles;    // rows; tiles of kReaders rows, of the longest day
  int groups;            // of kDenseColumns columns
  uint32_t lists, days;  // days of all heads, of one
  size_t bytes;          // of shared memory

  __host__ __device__ uint32_t tasks() const { return lists * tiles * groups; }
  QFAST_DEVICE int room() const { return tiles * kReaders; }
};

template <class T>
DensePlan plan_dense(const Shape& shape, int64_t longest, int groups) {
  const int64_t days = shape.days.count, tiles = (longest + kReaders - 1) / kReaders;
  DensePlan plan{static_cast<int>(longest),
                 static_cast<int>(tiles),
                 groups,
                 static_cast<uint32_t>(shape.heads * days),
                 static_cast<uint32_t>(days),
                 0};
  const int64_t of_a_warp = 2 * kReaders * (kAhead + kPartRow);
  const int64_t numbers = kDenseWarps<T> * of_a_warp + 4 * tiles * kReaders + 4 * kReaders;
  plan.bytes = kReaders * kSums * sizeof(double) + static_cast<size_t>(numbers) * sizeof(T);
  return plan;
}

// What the backward finds on the way, besides what Backward has room for.
template <class T>
struct DenseScratch {
  T *above, *below;  // [heads * N]: factors of the queries, normalised
  T* centers;        // [lists, H]
  T* tops;           // [lists]: highest keys
  double* scalars;   // [kSums, heads * N]: of a key, gradient above and below the bend, then masses
};

// Four neighbours in shared memory, loaded as one.
template <class T>
struct alignas(kTile * sizeof(T)) Tile {
  T of[kTile];
};

// ---------------------------------------------------------------- the part of a day that a block owns
template <class T>
struct Part {
  int64_t list, first;               // which day of which head; its first row in [heads * N]
  int count;                         // its rows
  int row, column;                   // the first ones of the block, row from the first of the day
  double* sums;                      // [kReaders, kSums]
  T* weights;                        // [warps, 2, kAhead, kReaders]
  T* parts;                          // [warps, 2, kReaders, kPartRow]; before that of whoever needs it
  T *score, *above, *below, *delta;  // [room]: of the rows that are summed
  T* reader;                         // [kReaders]: scores
  T *share_above, *share_below;      // [kReaders]: what a reader's sums are multiplied by
  T* share_weight;                   // [kReaders]: smaller_share

  QFAST_DEVICE bool is_empty() const { return row >= count; }
  QFAST_DEVICE bool has_row(int r) const { return row + r < count; }
};

template <class T>
QFAST_DEVICE Part<T> part_of(const Shape& shape, const DensePlan& plan, uint32_t task) {
  extern __shared__ double shared_memory[];
  Part<T> part;
  const uint32_t tile = task / plan.groups, list = tile / plan.tiles, head = list / plan.days;
  const int64_t d = list - head * plan.days, begin = shape.days.begin(d);
  const int64_t rows = shape.days.begin(d + 1) - begin;
  part.list = list;
  part.first = head * shape.days.rows + begin;
  part.count = static_cast<int>(rows < 0 ? 0 : rows < plan.longest ? rows : plan.longest);
  part.row = static_cast<int>(tile - list * plan.tiles) * kReaders;
  part.column = static_cast<int>(task - tile * plan.groups) * kDenseColumns;
  part.sums = shared_memory;
  part.weights = reinterpret_cast<T*>(part.sums + kReaders * kSums);
  part.parts = part.weights + kDenseWarps<T> * 2 * kAhead * kReaders;
  part.score = part.parts + kDenseWarps<T> * 2 * kReaders * kPartRow;
  part.above = part.score + plan.room();
  part.below = part.above + plan.room();
  part.delta = part.below + plan.room();
  part.reader = part.delta + plan.room();
  part.share_above = part.reader + kReaders;
  part.share_below = part.share_above + kReaders;
  part.share_weight = part.share_below + kReaders;
  return part;
}

// The keys of the day as what is summed; returns the highest. All threads call it.
template <class T>
QFAST_DEVICE T load_keys(const Part<T>& part, const T* key, T slope) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  T top = -infinity<T>(), least = infinity<T>();
  for (int j = threadIdx.x; j < part.count; j += blockDim.x) {
    const T score = sortable(0, key[part.first + j]);
    part.score[j] = score;
    top = score > top ? score : top;
    least = score < least ? score : least;
  }
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const T higher = __shfl_xor_sync(kWholeWarp, top, step, kLanes);
    const T lower = __shfl_xor_sync(kWholeWarp, least, step, kLanes);
    top = higher > top ? higher : top;
    least = lower < least ? lower : least;
  }
  if (lane == 0) {
    part.parts[warp] = top;
    part.parts[warps + warp] = least;
  }
  __syncthreads();
  for (int w = 0; w < warps; ++w) {
    const T higher = part.parts[w], lower = part.parts[warps + w];
    top = higher > top ? higher : top;
    least = lower < least ? lower : least;
  }
  top = highest(top, least, slope);
  for (int j = threadIdx.x; j < part.count; j += blockDim.x) {
    const Factors<T> of = key_factors(part.score[j], slope, top);
    part.above[j] = of.above;
    part.below[j] = of.below;
  }
  return top;
}

template <class T>
QFAST_DEVICE void load_readers(const Part<T>& part, int side, const T* scores) {
  const int r = threadIdx.x;
  if (r >= kReaders) return;
  part.reader[r] = part.has_row(r) ? sortable(side, scores[part.first + part.row + r]) : -infinity<T>();
}

// ---------------------------------------------------------------- sums over all rows
// Of the factors, and in the backward of the factors times delta. A warp owns a reader.
template <bool kBackward, class T>
QFAST_DEVICE void sum_scalar_pairs(const Part<T>& part) {
  constexpr int kFew = 4;  // factors of a lane that are added up in their own type
  const Lanes lanes(kLanes);
  for (int r = threadIdx.x / kLanes; r < kReaders; r += blockDim.x / kLanes) {
    const T reader = part.reader[r];
    double above = 0, below = 0, delta_above = 0, delta_below = 0;
    for (int first = lanes.lane; first < part.count; first += kFew * kLanes) {
      T few_above = 0, few_below = 0;
#pragma unroll
      for (int u = 0; u < kFew; ++u) {
        const int j = first + u * kLanes;
        if (j >= part.count) break;
        const bool is_above = reader > -part.score[j];
        const T of_above = part.above[j], of_below = part.below[j];
        few_above += is_above ? of_above : T(0);
        few_below += is_above ? T(0) : of_below;
        if (!kBackward) continue;
        const double of_delta = static_cast<double>(is_above ? of_above : of_below) * part.delta[j];
        delta_above += is_above ? of_delta : 0;
        delta_below += is_above ? 0 : of_delta;
      }
      above += few_above;
      below += few_below;
    }
    above = lanes.sum(above);
    below = lanes.sum(below);
    if (kBackward) {
      delta_above = lanes.sum(delta_above);
      delta_below = lanes.sum(delta_below);
    }
    if (lanes.lane != 0) continue;
    double* const sums = part.sums + r * kSums;
    sums[0] = above;
    sums[1] = below;
    sums[2] = delta_above;
    sums[3] = delta_below;
  }
}

// Of rows [heads * N, H] times the factors. A warp owns every so-many-th kAhead rows; its sums are left in
// part.parts.
template <class T>
QFAST_DEVICE void sum_pairs(const Part<T>& part, const T* rows, int width) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int column = part.column + lane % kTiles * kTile, first_reader = lane / kTiles * kTile;
  const bool aligned = width % kTile == 0 && reinterpret_cast<uintptr_t>(rows) % sizeof(Tile<T>) == 0;
  const bool whole = aligned && part.column + kDenseColumns <= width;
  T* const weights = part.weights + warp * 2 * kAhead * kReaders;
  const int summed = lane % kAhead, pair = lane / kAhead * 2;  // a lane weighs one row for two readers
  const T readers[2] = {part.reader[pair], part.reader[pair + 1]};
  const T* row = rows + (part.first + warp * kAhead) * width + column;
  Tile<T> above[kTile] = {}, below[kTile] = {};
  for (int j = warp * kAhead; j < part.count; j += kDenseWarps<T> * kAhead) {
    Tile<T> x[kAhead];
    if (whole && j + kAhead <= part.count) {
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        x[u] = *reinterpret_cast<const Tile<T>*>(row + static_cast<int64_t>(u) * width);
      }
    } else {
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
#pragma unroll
        for (int c = 0; c < kTile; ++c) {
          const bool inside = j + u < part.count && column + c < width;
          x[u].of[c] = inside ? row[static_cast<int64_t>(u) * width + c] : T(0);
        }
      }
    }
    row += static_cast<int64_t>(kDenseWarps<T> * kAhead) * width;
    const bool inside = j + summed < part.count;
    const T score = inside ? part.score[j + summed] : T(0);
    const T of_above = inside ? part.above[j + summed] : T(0);
    const T of_below = inside ? part.below[j + summed] : T(0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool is_above = readers[i] > -score;
      T* const weight = weights + summed * kReaders + pair + i;
      weight[0] = is_above ? of_above : T(0);
      weight[kAhead * kReaders] = is_above ? T(0) : of_below;
    }
    __syncwarp();
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const T* const weight = weights + u * kReaders + first_reader;
      const Tile<T> upper = *reinterpret_cast<const Tile<T>*>(weight);
      const Tile<T> lower = *reinterpret_cast<const Tile<T>*>(weight + kAhead * kReaders);
#pragma unroll
      for (int r = 0; r < kTile; ++r) {
#pragma unroll
        for (int c = 0; c < kTile; ++c) {
          above[r].of[c] += upper.of[r] * x[u].of[c];
          below[r].of[c] += lower.of[r] * x[u].of[c];
        }
      }
    }
    __syncwarp();  // all have read the weights, which now change
  }
  T* const mine = part.parts + (warp * 2 * kReaders + first_reader) * kPartRow + column - part.column;
#pragma unroll
  for (int r = 0; r < kTile; ++r) {
    *reinterpret_cast<Tile<T>*>(mine + r * kPartRow) = above[r];
    *reinterpret_cast<Tile<T>*>(mine + (kReaders + r) * kPartRow) = below[r];
  }
}

// A factor of 0 times infinity is NaN, and a row on the other side of the bend does not count: one sum again,
// without those. Slow, and only where a number is not finite.
template <class T>
QFAST_DEVICE T sum_again(const Part<T>& part, int r, bool wants_above, const T* rows, int width, int column) {
  double sum = 0;
  for (int j = 0; j < part.count; ++j) {
    if ((part.reader[r] > -part.score[j]) != wants_above) continue;
    const T x = rows[(part.first + j) * width + column];
    sum += static_cast<double>(wants_above ? part.above[j] : part.below[j]) * x;
  }
  return static_cast<T>(sum);
}

// Calls receive(r, column, whether there is such an element, sum above, sum below) for every element of the
// block, by whole warps: 32 columns of a row.
template <class T, class Receive>
QFAST_DEVICE void each_sum(const Part<T>& part, const T* rows, int width, const Receive& receive) {
  for (int i = threadIdx.x; i < kReaders * kDenseColumns; i += blockDim.x) {
    const int r = i / kDenseColumns, column = part.column + i % kDenseColumns;
    const bool active = part.has_row(r) && column < width;
    double above = 0, below = 0;
#pragma unroll 4
    for (int warp = 0; warp < kDenseWarps<T>; ++warp) {
      const T* const parts = part.parts + (warp * 2 * kReaders + r) * kPartRow + i % kDenseColumns;
      above += parts[0];
      below += parts[kReaders * kPartRow];
    }
    T sums[2] = {static_cast<T>(above), static_cast<T>(below)};
    if (active && !(sums[0] - sums[0] == 0 && sums[1] - sums[1] == 0)) {
      sums[0] = sum_again(part, r, true, rows, width, column);
      sums[1] = sum_again(part, r, false, rows, width, column);
    }
    receive(r, column, active, sums[0], sums[1]);
  }
}

// ---------------------------------------------------------------- the kernels
template <class T>
__global__ void __launch_bounds__(kDenseThreads<T>, 1)
    attend_dense_kernel(const Shape shape, const DensePlan plan, const Forward<T> io, const T slope) {
  const int64_t total = shape.heads * shape.days.rows;
  const int width = shape.width;
  for (uint32_t task = blockIdx.x; task < plan.tasks(); task += gridDim.x) {
    const Part<T> part = part_of<T>(shape, plan, task);
    if (part.is_empty()) continue;
    __syncthreads();  // the task before is done with the shared memory
    load_readers(part, 1, io.query);
    const T top = load_keys(part, io.key, slope);
    __syncthreads();
    sum_scalar_pairs<false>(part);
    sum_pairs(part, io.value, width);
    __syncthreads();
    if (threadIdx.x < kReaders) {
      const int r = threadIdx.x;
      const int64_t row = part.first + part.row + r;
      const Factors<T> of = query_factors(part.reader[r], slope, top);
      const double above = of.above * part.sums[r * kSums], below = of.below * part.sums[r * kSums + 1];
      const double sum = above + below;
      part.share_above[r] = static_cast<T>(of.above / sum);
      part.share_below[r] = static_cast<T>(of.below / sum);
      const T smaller = smaller_share<T>(above, below, sum);
      part.share_weight[r] = smaller;
      if (io.share != nullptr && part.has_row(r) && part.column == 0) {
        io.share_weight[row] = smaller;
        io.orders[row] = io.orders[total + row] = 0;
      }
    }
    __syncthreads();
    each_sum(part, io.value, width, [&](int r, int column, bool active, T sum_above, T sum_below) {
      if (!active) return;
      const int64_t at = (part.first + part.row + r) * width + column;
      const T above = part.share_above[r] * sum_above, below = part.share_below[r] * sum_below;
      const T attended = below + above;
      io.out[at] = io.residual == nullptr ? attended : io.residual[at] + attended;
      if (io.share != nullptr) io.share[at] = signbit(part.share_weight[r]) ? -below : above;
    });
  }
}

// First of the backward: what keys will read of the queries, and the gradients of the queries. A block owns
// kReaders queries of a day, all columns; the first of a day leaves its center and highest key to the others.
template <class T>
__global__ void __launch_bounds__(kThreads)
    dense_queries_kernel(const Shape shape, const DensePlan plan, const Backward<T> io,
                         const DenseScratch<T> scratch) {
  const int width = shape.width;
  const Lanes lanes(kLanes);
  for (uint32_t task = blockIdx.x; task < plan.tasks(); task += gridDim.x) {
    const Part<T> part = part_of<T>(shape, plan, task);
    if (part.is_empty()) continue;
    __syncthreads();  // the task before is done with the shared memory
    load_readers(part, 1, io.query);
    const T top = load_keys(part, io.key, io.slope);
    __syncthreads();
    T* const center = part.parts;
    for (int c = threadIdx.x; c < width; c += blockDim.x) {
      center[c] = center_of(io, part.first, part.count, width, c, [&](int64_t row) -> int64_t {
        return sortable(1, io.query[part.first + row]) > -infinity<T>() ? row : -1;
      });
      if (part.row == 0) scratch.centers[part.list * width + c] = center[c];
    }
    if (part.row == 0 && threadIdx.x == 0) scratch.tops[part.list] = top;
    sum_scalar_pairs<false>(part);
    __syncthreads();
    for (int r = threadIdx.x / kLanes; r < kReaders && part.has_row(r); r += blockDim.x / kLanes) {
      const int64_t row = part.first + part.row + r;
      query_gradient(io, row, width, lanes, center);
      if (lanes.lane != 0) continue;
      const Factors<T> of = query_factors(part.reader[r], io.slope, top);
      const double sum = of.above * part.sums[r * kSums] + of.below * part.sums[r * kSums + 1];
      scratch.above[row] = static_cast<T>(of.above / sum);
      scratch.below[row] = static_cast<T>(of.below / sum);
    }
  }
}

// Second: keys read the gradients of the results. Bounds and saved numbers: at the head.
template <class T>
__global__ void __launch_bounds__(kDenseThreads<T>, 1)
    dense_keys_kernel(const Shape shape, const DensePlan plan, const Backward<T> io,
                      const DenseScratch<T> scratch) {
  const int width = shape.width;
  const Lanes lanes(kLanes);
  for (uint32_t task = blockIdx.x; task < plan.tasks(); task += gridDim.x) {
    const Part<T> part = part_of<T>(shape, plan, task);
    if (part.is_empty()) continue;
    __syncthreads();  // the task before is done with the shared memory
    load_readers(part, 0, io.key);
    for (int j = threadIdx.x; j < part.count; j += blockDim.x) {
      part.score[j] = sortable(1, io.query[part.first + j]);
      part.above[j] = scratch.above[part.first + j];
      part.below[j] = scratch.below[part.first + j];
      part.delta[j] = io.delta[part.first + j];
    }
    __syncthreads();
    sum_scalar_pairs<true>(part);
    sum_pairs(part, io.grad, width);
    __syncthreads();
    const T top = scratch.tops[part.list];
    if (threadIdx.x < kReaders && part.has_row(threadIdx.x)) {
      const Factors<T> of = key_factors(part.reader[threadIdx.x], io.slope, top);
      const double* const sums = part.sums + threadIdx.x * kSums;
      part.share_above[threadIdx.x] = of.above;
      part.share_below[threadIdx.x] = of.below;
      double* const to = scratch.scalars + part.first + part.row + threadIdx.x;
      if (part.column == 0) {
        to[0] = -(of.above * sums[2]);
        to[io.total] = -(of.below * sums[3]);
        to[2 * io.total] = of.above * sums[0];
        to[3 * io.total] = of.below * sums[1];
      }
    }
    __syncthreads();
    each_sum(part, io.grad, width, [&](int r, int column, bool active, T sum_above, T sum_below) {
      const int64_t row = part.first + part.row + r, at = row * width + column;
      T above = 0, below = 0, value = 0;
      if (active) {
        above = part.share_above[r] * sum_above;
        below = part.share_below[r] * sum_below;
        io.grad_value[at] = above + below;
        value = io.value[at] - scratch.centers[part.list * width + column];
      }
      const T dot = lanes.sum_two(value * above, value * below);
      const bool writes = lanes.lane % 16 == 0 && part.has_row(r) && column - lanes.lane < width;
      if (writes) io.dots[(column / kLanes * 2 + (lanes.lane != 0)) * io.total + row] = dot;
    });
  }
}

// Last: the gradients of the keys, which before the bend's slope sum to 0 (key_gradients and find_shift say
// why). A block owns a day.
template <class T>
__global__ void __launch_bounds__(kThreads)
    dense_finish_kernel(const Shape shape, const DensePlan plan, const Backward<T> io,
                        const DenseScratch<T> scratch, int groups) {
  __shared__ double sums[2][kThreads / kLanes];
  const Lanes lanes(kLanes);
  const int warp = threadIdx.x / kLanes;
  for (uint32_t list = blockIdx.x; list < plan.lists; list += gridDim.x) {
    const Part<T> part = part_of<T>(shape, plan, list * plan.tiles * plan.groups);
    double excess = 0, mass = 0;
    for (int j = threadIdx.x; j < part.count; j += blockDim.x) {
      const int64_t row = part.first + j;
      double of[kSums];
#pragma unroll
      for (int i = 0; i < kSums; ++i) of[i] = scratch.scalars[i * io.total + row];
      for (int g = 0; g < groups; ++g) {
        of[0] += io.dots[2 * g * io.total + row];
        of[1] += io.dots[(2 * g + 1) * io.total + row];
      }
      excess += of[0] + of[1];
      mass += of[2] + of[3];
      io.to_key[row] = of[0] + io.slope * of[1];
      io.to_key[io.total + row] = of[2] + io.slope * of[3];
    }
    excess = lanes.sum(excess);
    mass = lanes.sum(mass);
    __syncthreads();  // the day before is done with the sums
    if (lanes.lane == 0) {
      sums[0][warp] = excess;
      sums[1][warp] = mass;
    }
    __syncthreads();
    excess = mass = 0;
    for (int w = 0; w < kThreads / kLanes; ++w) {
      excess += sums[0][w];
      mass += sums[1][w];
    }
    for (int j = threadIdx.x; j < part.count; j += blockDim.x) {
      finish_key(io, part.first + j, excess / mass);
    }
  }
}

}  // namespace
}  // namespace qfast
