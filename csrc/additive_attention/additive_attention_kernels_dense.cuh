// Kernels of additive attention on CUDA for a few short days. They compute all pairs, N^2 H products instead
// of N log N passes.
//
// A thread block that owns a whole day uses one multiprocessor while the others idle. With few days in a call
// it is faster to share a day. Here a thread block owns 8 rows and 64 columns of a day and sums over all rows
// of the day. Each row is added to one of two sums, depending on the sign of the score of the pair. The
// exponentials are products (key_factors, query_factors), so a pair costs one comparison and two selections
// for all columns, and two multiply-adds per column. In forward the queries read values, in backward the keys
// read gradients.
//
// A warp processes eight rows together, and a lane owns 4 x 4 elements of both sums: 32 multiply-adds for two
// loads of 16 bytes from shared memory and one from L2. Bound by multiply-adds, 4 N^2 H flops in forward and
// the same in backward (163 MFLOP for 800 x 64), and by L2, from which the rows are read N / 8 times (20 MB).
//
// Saved for backward: the same as in the other ways, except that the orders are not used and set to 0. The
// sums of a warp cover at most a sixteenth of a day and are in the tensors' type. The sums over the warps and
// those of scalars are in float64. Every sum has a fixed order, so results are reproducible bit for bit.
#pragma once

#include "additive_attention/additive_attention_kernels_gradients.cuh"

namespace qfast {
namespace {

constexpr int kReaders = 8;                    // rows of a thread block, which read the sums
constexpr int kDenseColumns = 64;              // columns of a thread block
constexpr int kTile = 4;                       // a lane owns kTile rows and kTile columns
constexpr int kTiles = kDenseColumns / kTile;  // lanes along the columns
constexpr int kPartRow = kDenseColumns + 4;    // padded: the two halves of a warp write to different banks
constexpr int kSums = 4;                       // scalars of a reader: two kinds, above and below 0

template <class T>
constexpr int kDenseWarps = sizeof(T) == sizeof(float) ? 16 : 8;
template <class T>
constexpr int kDenseThreads = kDenseWarps<T> * kLanes;

struct DensePlan {
  int longest, tiles;    // rows of the longest day, and its tiles of kReaders rows
  int groups;            // groups of kDenseColumns columns
  uint32_t lists, days;  // days of all heads, and of one head
  size_t bytes;          // shared memory

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
  const int64_t warp_numbers = 2 * kReaders * (kAhead + kPartRow);
  const int64_t numbers = kDenseWarps<T> * warp_numbers + 4 * tiles * kReaders + 4 * kReaders;
  plan.bytes = kReaders * kSums * sizeof(double) + static_cast<size_t>(numbers) * sizeof(T);
  return plan;
}

// Scratch of the backward pass, in addition to the scratch of `Backward`.
template <class T>
struct DenseScratch {
  T *above, *below;  // [heads * N]: factors of the queries, normalised
  T* centers;        // [lists, H]
  T* tops;           // [lists]: highest keys
  double* scalars;   // [kSums, heads * N]: gradients of a key above and below 0, then its masses
};

// Four adjacent elements, loaded together.
template <class T>
struct alignas(kTile * sizeof(T)) Tile {
  T of[kTile];
};

// ---------------------------------------------------------------- the part of a day of a thread block
template <class T>
struct Part {
  int64_t list, first;               // number of the day and head; first row of the day in [heads * N]
  int count;                         // rows of the day
  int row, column;                   // first row, relative to the day, and first column of the thread block
  double* sums;                      // [kReaders, kSums]
  T* weights;                        // [warps, 2, kAhead, kReaders]
  T* parts;                          // [warps, 2, kReaders, kPartRow]; scratch before sum_pairs writes it
  T *score, *above, *below, *delta;  // [room]: scores, factors and mean gradients of the summed rows
  T* reader;                         // [kReaders]: scores of the readers
  T *share_above, *share_below;      // [kReaders]: factors of the sums of a reader
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

// Loads the keys of the day as the summed rows, and returns the highest key. All threads must call it.
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
    const Factors<T> factors = key_factors(part.score[j], slope, top);
    part.above[j] = factors.above;
    part.below[j] = factors.below;
  }
  return top;
}

// Loads the scores of the readers.
template <class T>
QFAST_DEVICE void load_readers(const Part<T>& part, int side, const T* scores) {
  const int r = threadIdx.x;
  if (r >= kReaders) return;
  part.reader[r] = part.has_row(r) ? sortable(side, scores[part.first + part.row + r]) : -infinity<T>();
}

// ---------------------------------------------------------------- sums over all rows
// Sums the factors and, in backward, the factors times delta. A warp owns a reader.
template <bool kBackward, class T>
QFAST_DEVICE void sum_scalar_pairs(const Part<T>& part) {
  constexpr int kFew = 4;  // factors that a lane adds in their own type before it adds to float64
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
        const T factor_above = part.above[j], factor_below = part.below[j];
        few_above += is_above ? factor_above : T(0);
        few_below += is_above ? T(0) : factor_below;
        if (!kBackward) continue;
        const double product = static_cast<double>(is_above ? factor_above : factor_below) * part.delta[j];
        delta_above += is_above ? product : 0;
        delta_below += is_above ? 0 : product;
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

// Loads kAhead rows of a tile's columns, with zeros where there are fewer than kAhead `rows` or kTile
// `columns`. `whole` means that all columns exist and that every row is aligned.
template <class T>
QFAST_DEVICE void load_ahead(const T* row, int width, int rows, int columns, bool whole,
                             Tile<T> (&x)[kAhead]) {
  if (whole && rows >= kAhead) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      x[u] = *reinterpret_cast<const Tile<T>*>(row + static_cast<int64_t>(u) * width);
    }
  } else {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
#pragma unroll
      for (int c = 0; c < kTile; ++c) {
        x[u].of[c] = u < rows && c < columns ? row[static_cast<int64_t>(u) * width + c] : T(0);
      }
    }
  }
}

// Adds kAhead rows, times the factors that the warp has written to `weights`, to the sums of kTile readers.
template <class T>
QFAST_DEVICE void add_ahead(const T* weights, const Tile<T> (&x)[kAhead], Tile<T> (&above)[kTile],
                            Tile<T> (&below)[kTile]) {
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    const T* const weight = weights + u * kReaders;
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
}

// Sums rows [heads * N, H] times the factors. The warps take turns with groups of kAhead rows, and each warp
// writes its sums to part.parts.
template <class T>
QFAST_DEVICE void sum_pairs(const Part<T>& part, const T* rows, int width) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int column = part.column + lane % kTiles * kTile, first_reader = lane / kTiles * kTile;
  const bool aligned = width % kTile == 0 && reinterpret_cast<uintptr_t>(rows) % sizeof(Tile<T>) == 0;
  const bool whole = aligned && part.column + kDenseColumns <= width;
  T* const weights = part.weights + warp * 2 * kAhead * kReaders;
  // A lane computes the weights of one row for two readers.
  const int summed = lane % kAhead, pair = lane / kAhead * 2;
  const T readers[2] = {part.reader[pair], part.reader[pair + 1]};
  const T* row = rows + (part.first + warp * kAhead) * width + column;
  Tile<T> above[kTile] = {}, below[kTile] = {};
  for (int j = warp * kAhead; j < part.count; j += kDenseWarps<T> * kAhead) {
    Tile<T> x[kAhead];
    load_ahead(row, width, part.count - j, width - column, whole, x);
    row += static_cast<int64_t>(kDenseWarps<T> * kAhead) * width;
    const bool inside = j + summed < part.count;
    const T score = inside ? part.score[j + summed] : T(0);
    const T factor_above = inside ? part.above[j + summed] : T(0);
    const T factor_below = inside ? part.below[j + summed] : T(0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool is_above = readers[i] > -score;
      T* const weight = weights + summed * kReaders + pair + i;
      weight[0] = is_above ? factor_above : T(0);
      weight[kAhead * kReaders] = is_above ? T(0) : factor_below;
    }
    __syncwarp();
    add_ahead(weights + first_reader, x, above, below);
    __syncwarp();  // all lanes have read the weights
  }
  T* const warp_parts = part.parts + (warp * 2 * kReaders + first_reader) * kPartRow + column - part.column;
#pragma unroll
  for (int r = 0; r < kTile; ++r) {
    *reinterpret_cast<Tile<T>*>(warp_parts + r * kPartRow) = above[r];
    *reinterpret_cast<Tile<T>*>(warp_parts + (kReaders + r) * kPartRow) = below[r];
  }
}

// Computes one sum again, without the rows on the other side of 0. In sum_pairs these have a factor of 0, and
// 0 times infinity is NaN. This is slow, but only needed if a sum is not finite.
template <class T>
QFAST_DEVICE T sum_again(const Part<T>& part, int r, bool sums_above, const T* rows, int width, int column) {
  double sum = 0;
  for (int j = 0; j < part.count; ++j) {
    if ((part.reader[r] > -part.score[j]) != sums_above) continue;
    const T x = rows[(part.first + j) * width + column];
    sum += static_cast<double>(sums_above ? part.above[j] : part.below[j]) * x;
  }
  return static_cast<T>(sum);
}

// Calls receive(r, column, whether the element exists, sum above, sum below) for all elements of the thread
// block. A warp owns 32 columns of a row.
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
// Forward. A thread block owns kReaders queries of a day and kDenseColumns columns.
template <class T>
__global__ void __launch_bounds__(kDenseThreads<T>, 1)
    attend_dense_kernel(const Shape shape, const DensePlan plan, const Forward<T> io, const T slope) {
  const int64_t total = shape.heads * shape.days.rows;
  const int width = shape.width;
  for (uint32_t task = blockIdx.x; task < plan.tasks(); task += gridDim.x) {
    const Part<T> part = part_of<T>(shape, plan, task);
    if (part.is_empty()) continue;
    __syncthreads();  // the shared memory of the previous task is no longer read
    load_readers(part, 1, io.query);
    const T top = load_keys(part, io.key, slope);
    __syncthreads();
    sum_scalar_pairs<false>(part);
    sum_pairs(part, io.value, width);
    __syncthreads();
    if (threadIdx.x < kReaders) {
      const int r = threadIdx.x;
      const int64_t row = part.first + part.row + r;
      const Factors<T> factors = query_factors(part.reader[r], slope, top);
      const double above = factors.above * part.sums[r * kSums],
                   below = factors.below * part.sums[r * kSums + 1];
      const double sum = above + below;
      part.share_above[r] = static_cast<T>(factors.above / sum);
      part.share_below[r] = static_cast<T>(factors.below / sum);
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

// First kernel of backward. Computes the normalised factors of the queries, which the keys read later, and
// the gradients of the queries. A thread block owns kReaders queries of a day and all columns. The first
// thread block of a day writes its center and highest key for the next kernels.
template <class T>
__global__ void __launch_bounds__(kThreads)
    dense_queries_kernel(const Shape shape, const DensePlan plan, const Backward<T> io,
                         const DenseScratch<T> scratch) {
  const int width = shape.width;
  const Lanes lanes(kLanes);
  for (uint32_t task = blockIdx.x; task < plan.tasks(); task += gridDim.x) {
    const Part<T> part = part_of<T>(shape, plan, task);
    if (part.is_empty()) continue;
    __syncthreads();  // the shared memory of the previous task is no longer read
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
      const Factors<T> factors = query_factors(part.reader[r], io.slope, top);
      const double sum = factors.above * part.sums[r * kSums] + factors.below * part.sums[r * kSums + 1];
      scratch.above[row] = static_cast<T>(factors.above / sum);
      scratch.below[row] = static_cast<T>(factors.below / sum);
    }
  }
}

// Second kernel of backward. The keys read the gradients of the results. A thread block owns kReaders keys of
// a day and kDenseColumns columns.
template <class T>
__global__ void __launch_bounds__(kDenseThreads<T>, 1)
    dense_keys_kernel(const Shape shape, const DensePlan plan, const Backward<T> io,
                      const DenseScratch<T> scratch) {
  const int width = shape.width;
  const Lanes lanes(kLanes);
  for (uint32_t task = blockIdx.x; task < plan.tasks(); task += gridDim.x) {
    const Part<T> part = part_of<T>(shape, plan, task);
    if (part.is_empty()) continue;
    __syncthreads();  // the shared memory of the previous task is no longer read
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
      const Factors<T> factors = key_factors(part.reader[threadIdx.x], io.slope, top);
      const double* const sums = part.sums + threadIdx.x * kSums;
      part.share_above[threadIdx.x] = factors.above;
      part.share_below[threadIdx.x] = factors.below;
      double* const to = scratch.scalars + part.first + part.row + threadIdx.x;
      if (part.column == 0) {
        to[0] = -(factors.above * sums[2]);
        to[io.total] = -(factors.below * sums[3]);
        to[2 * io.total] = factors.above * sums[0];
        to[3 * io.total] = factors.below * sums[1];
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

// Last kernel of backward. Computes the gradients of the keys, whose sum before the slope of LeakyReLU is 0
// (key_gradients and find_shift explain why). A thread block owns a day.
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
      double scalars[kSums];
#pragma unroll
      for (int i = 0; i < kSums; ++i) scalars[i] = scratch.scalars[i * io.total + row];
      for (int g = 0; g < groups; ++g) {
        scalars[0] += io.dots[2 * g * io.total + row];
        scalars[1] += io.dots[(2 * g + 1) * io.total + row];
      }
      excess += scalars[0] + scalars[1];
      mass += scalars[2] + scalars[3];
      io.to_key[row] = scalars[0] + io.slope * scalars[1];
      io.to_key[io.total + row] = scalars[2] + io.slope * scalars[3];
    }
    excess = lanes.sum(excess);
    mass = lanes.sum(mass);
    __syncthreads();  // the sums of the previous day are no longer read
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
