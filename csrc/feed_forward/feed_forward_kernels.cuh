// Kernels of the feed-forward block on CUDA: two products through shared memory, with the hidden activations
// between them.
//
// A thread block owns a tile of 128 rows (64 in float64) and computes slices of 32 hidden units, one after
// the other. Inputs and hidden activations are [feature][row] in shared memory, so a thread reads four rows
// or four columns in one load. A thread owns 8 rows and 4 units of a slice, then 8 rows and 8 results (or 16)
// whose sums stay in registers. Weights are packed once per call (pack_kernel). If there are few tiles,
// several thread blocks share a tile. Each computes some of the slices, and their sums are added in order.
//
// Forward saves nothing; the first kernel of backward writes the hidden activations and their gradients.
// Bound by multiply-adds: 2 M (D + O) flops per row, forward and in the first kernel of backward. A slice of
// the weights is read from L2 once per tile.
#pragma once

#include "cuda_rows.cuh"

namespace qfast {
namespace {

constexpr int kTileThreads = 128;
constexpr int kColumnLanes = 8;                          // adjacent threads along the columns
constexpr int kTallRows = 64;                            // rows of all threads, a quad each
constexpr int kUnits = kColumnLanes * kQuad;             // hidden units of a slice
constexpr int kTileQuads = kTileThreads / kColumnLanes;  // quads of rows of all threads
static_assert(kTileQuads * kQuad == kTallRows);

template <class T>
struct Tile {
  static constexpr int kQuads = sizeof(T) == 4 ? 2 : 1;  // per thread
  static constexpr int kRows = kTallRows * kQuads;
  static constexpr int kStride = kRows + kQuad;  // adjacent features start in different banks
};

template <class T>
struct FeedForwardData {
  Rows rows;
  int32_t inputs, hidden, outputs;  // D, M, O
  int32_t slices;                   // slices of 32 hidden units
  int32_t splits;                   // thread blocks that share a tile, each with some of the slices
  int32_t padded;                   // results, padded to a multiple of 64; forward only
  const T *x, *grad;                // [rows][D] and, in backward, [rows][O]
  // Packed W1 [D][slices][32] and W2 [slices * 32][padded], in backward [O][slices][32].
  const T *entering, *leaving;
  const T* bias;          // [M]
  T* sums;                // [splits][rows][O]
  T *units, *grad_units;  // [rows][M]; grad_units may be null
  Dropout dropout;
};

constexpr uint32_t kHiddenPlace = 1;  // the third dropout counter

// Copies a matrix [rows, columns] of any strides to [padded_rows][padded_columns], padded with zeros.
template <class T>
struct Packing {
  const T* from;
  T* to;
  int64_t rows, columns, row_stride, column_stride;
  int64_t padded_rows, padded_columns;
  // Each 32 columns are the first column of the 8 threads, then their second column, and so on. A thread then
  // reads its four columns in one load.
  bool spread;
};

template <class T>
__global__ void __launch_bounds__(kPlainThreads) pack_kernel(Packing<T> job) {
  for_elements(job.padded_rows * job.padded_columns, [&](int64_t i) {
    const int64_t row = i / job.padded_columns, place = i % job.padded_columns, in_slice = place % kUnits;
    const int64_t spread = place - in_slice + in_slice / kQuad + in_slice % kQuad * kColumnLanes;
    const int64_t column = job.spread ? spread : place;
    const bool exists = row < job.rows && column < job.columns;
    job.to[i] = exists ? job.from[row * job.row_stride + column * job.column_stride] : T(0);
  });
}

// ---------------------------------------------------------------- pieces
template <class T>
QFAST_DEVICE_INLINE Four<T> four(const T* from) {
  return *reinterpret_cast<const Four<T>*>(from);
}

template <class T>
QFAST_DEVICE_INLINE void put_four(T* to, const Four<T>& values) {
  *reinterpret_cast<Four<T>*>(to) = values;
}

// Position of the calling thread among the columns and the quads of rows of a tile.
struct Thread {
  int column = static_cast<int>(threadIdx.x % kColumnLanes);
  int quad = static_cast<int>(threadIdx.x / kColumnLanes);
};

// sums[row][column] += rows[k][row] * columns[k][column] for the rows and columns of the calling thread.
template <int kRowQuads, int kColumnQuads, class T>
QFAST_DEVICE_INLINE void add_products(const T* rows, const T* columns, int column_stride, int depth,
                                      T (&sums)[kRowQuads * kQuad][kColumnQuads * kQuad]) {
  const Thread me;
  rows += me.quad * kQuad;
  columns += me.column * kQuad;
#pragma unroll 2
  for (int k = 0; k < depth; ++k) {
    Four<T> row[kRowQuads], column[kColumnQuads];
#pragma unroll
    for (int q = 0; q < kRowQuads; ++q) row[q] = four(rows + q * kTallRows);
#pragma unroll
    for (int c = 0; c < kColumnQuads; ++c) column[c] = four(columns + c * kUnits);
#pragma unroll
    for (int r = 0; r < kRowQuads * kQuad; ++r)
#pragma unroll
      for (int c = 0; c < kColumnQuads * kQuad; ++c)
        sums[r][c] += row[r / kQuad].of[r % kQuad] * column[c / kQuad].of[c % kQuad];
    rows += Tile<T>::kStride;
    columns += column_stride;
  }
}

// Computes the row in memory of each row of the tile, or -1 beyond the last one.
template <class T>
QFAST_DEVICE_INLINE void find_rows(int64_t* row_of, const Rows& rows, int64_t first_quad) {
  for (int p = static_cast<int>(threadIdx.x); p < Tile<T>::kRows; p += kTileThreads) {
    const int64_t quad = first_quad + p / kQuad;
    row_of[p] = quad < rows.quads() ? rows.row(quad, p % kQuad) : -1;
  }
}

// Copies the rows of the tile to shared memory, transposed to [feature][row], with zeros beyond the last row.
template <class T>
QFAST_DEVICE_INLINE void turn_rows(T* to, const T* from, const int64_t* row_of, int width) {
  for (int i = static_cast<int>(threadIdx.x); i < Tile<T>::kRows * width; i += kTileThreads) {
    const int p = i / width, feature = i % width;
    const int64_t row = row_of[p];
    to[feature * Tile<T>::kStride + p] = row < 0 ? T(0) : from[row * width + feature];
  }
}

// Copies `count` rows of `width` elements with row stride `stride`. The width is a multiple of 4.
template <class T>
QFAST_DEVICE_INLINE void copy_rows(T* to, const T* from, int count, int width, int64_t stride) {
  const int fours = width / kQuad;
  for (int i = static_cast<int>(threadIdx.x); i < count * fours; i += kTileThreads)
    put_four(to + i * kQuad, four(from + i / fours * stride + i % fours * kQuad));
}

// ReLU with NaN passed through, like torch's, then dropout.
template <class T>
QFAST_DEVICE_INLINE T activated(T value, T scale) {
  return (value <= T(0) ? T(0) : value) * scale;
}

// Gradient of the sum before ReLU and dropout. `unit` is the value after them.
template <class T>
QFAST_DEVICE_INLINE T passed_back(T unit, T grad, T scale) {
  return unit <= T(0) ? T(0) : grad * scale;
}

// Computes the dropout counters of the rows of the calling thread.
template <class T>
QFAST_DEVICE_INLINE void thread_counters(QuadCounter (&counters)[Tile<T>::kQuads], const Rows& rows,
                                         int64_t first_quad) {
#pragma unroll
  for (int q = 0; q < Tile<T>::kQuads; ++q)
    counters[q] = rows.counter(first_quad + q * kTileQuads + Thread().quad);
}

// Calls body(first quad of the tile, first slice, last slice + 1, number of the split) for each tile of the
// thread block.
template <class T, class Body>
QFAST_DEVICE_INLINE void for_tiles(const FeedForwardData<T>& job, const Body& body) {
  constexpr int kQuads = Tile<T>::kRows / kQuad;
  const int64_t tiles = (job.rows.quads() + kQuads - 1) / kQuads;
  for (int64_t task = blockIdx.x; task < tiles * job.splits; task += gridDim.x) {
    const int64_t split = task % job.splits;
    const auto slice = [&](int64_t s) { return static_cast<int>(job.slices * s / job.splits); };
    body(task / job.splits * kQuads, slice(split), slice(split + 1), split);
  }
}

// ---------------------------------------------------------------- forward
// Computes the sums W2 drop(relu(W1 x + b1)) of the slices of a split. There are at most 64 * kWide results.
template <class T, int kWide>
__global__ void __launch_bounds__(kTileThreads) feed_forward_kernel(FeedForwardData<T> job) {
  using At = Tile<T>;
  constexpr int kQuads = At::kQuads;
  extern __shared__ double shared_memory[];
  int64_t* const row_of = reinterpret_cast<int64_t*>(shared_memory);
  T* const x = reinterpret_cast<T*>(row_of + At::kRows);
  T* const hidden = x + job.inputs * At::kStride;
  T* const entering = hidden + kUnits * At::kStride;
  T* const leaving = entering + job.inputs * kUnits;
  const Thread me;
  const uint64_t seed = read_seed(job.dropout);
  for_tiles(job, [&](int64_t first_quad, int begin, int end, int64_t split) {
    __syncthreads();
    find_rows<T>(row_of, job.rows, first_quad);
    QuadCounter counters[kQuads];
    thread_counters<T>(counters, job.rows, first_quad);
    __syncthreads();
    turn_rows(x, job.x, row_of, job.inputs);
    T sums[kQuads * kQuad][kWide * 2 * kQuad] = {};
    for (int slice = begin; slice < end; ++slice) {
      __syncthreads();
      const int64_t first_unit = int64_t{slice} * kUnits;
      copy_rows(entering, job.entering + first_unit, job.inputs, kUnits, int64_t{job.slices} * kUnits);
      copy_rows(leaving, job.leaving + first_unit * job.padded, kUnits, job.padded, job.padded);
      __syncthreads();
      T units[kQuads * kQuad][kQuad] = {};
      add_products<kQuads, 1>(x, entering, kUnits, job.inputs, units);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        const int in_slice = me.column + j * kColumnLanes;
        const int64_t unit = first_unit + in_slice;
        const bool exists = unit < job.hidden;
        const T bias = exists ? job.bias[unit] : T(0);
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          const Four<T> scales = scales_of<T>(job.dropout, seed, counters[q], unit, kHiddenPlace);
          Four<T> values;
#pragma unroll
          for (int i = 0; i < kQuad; ++i)
            values.of[i] = exists ? activated(units[q * kQuad + i][j] + bias, scales.of[i]) : T(0);
          put_four(hidden + in_slice * At::kStride + q * kTallRows + me.quad * kQuad, values);
        }
      }
      __syncthreads();
      add_products<kQuads, kWide * 2>(hidden, leaving, job.padded, kUnits, sums);
    }
#pragma unroll
    for (int r = 0; r < kQuads * kQuad; ++r) {
      const int64_t row = row_of[r / kQuad * kTallRows + me.quad * kQuad + r % kQuad];
      if (row < 0) continue;
      T* const to = job.sums + (split * job.rows.count() + row) * job.outputs;
#pragma unroll
      for (int c = 0; c < kWide * 2 * kQuad; ++c) {
        const int column = c / kQuad * kUnits + me.column * kQuad + c % kQuad;
        if (column < job.outputs) to[column] = sums[r][c];
      }
    }
  });
}

// ---------------------------------------------------------------- backward
// Computes the hidden activations after dropout, and the gradients of the sums before ReLU.
template <class T>
__global__ void __launch_bounds__(kTileThreads) feed_forward_hidden_kernel(FeedForwardData<T> job) {
  using At = Tile<T>;
  constexpr int kQuads = At::kQuads;
  extern __shared__ double shared_memory[];
  int64_t* const row_of = reinterpret_cast<int64_t*>(shared_memory);
  T* const x = reinterpret_cast<T*>(row_of + At::kRows);
  T* const grad = x + job.inputs * At::kStride;
  T* const entering = grad + job.outputs * At::kStride;
  T* const leaving = entering + job.inputs * kUnits;
  const int64_t padded = int64_t{job.slices} * kUnits;
  const Thread me;
  const uint64_t seed = read_seed(job.dropout);
  for_tiles(job, [&](int64_t first_quad, int begin, int end, int64_t) {
    __syncthreads();
    find_rows<T>(row_of, job.rows, first_quad);
    QuadCounter counters[kQuads];
    thread_counters<T>(counters, job.rows, first_quad);
    __syncthreads();
    turn_rows(x, job.x, row_of, job.inputs);
    turn_rows(grad, job.grad, row_of, job.outputs);
    for (int slice = begin; slice < end; ++slice) {
      __syncthreads();
      copy_rows(entering, job.entering + int64_t{slice} * kUnits, job.inputs, kUnits, padded);
      copy_rows(leaving, job.leaving + int64_t{slice} * kUnits, job.outputs, kUnits, padded);
      __syncthreads();
      T units[kQuads * kQuad][kQuad] = {}, grads[kQuads * kQuad][kQuad] = {};
      add_products<kQuads, 1>(x, entering, kUnits, job.inputs, units);
      add_products<kQuads, 1>(grad, leaving, kUnits, job.outputs, grads);
      const int64_t first_unit = int64_t{slice} * kUnits + me.column * kQuad;
#pragma unroll
      for (int q = 0; q < kQuads; ++q)
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          const int64_t unit = first_unit + j;
          if (unit >= job.hidden) continue;
          const Four<T> scales = scales_of<T>(job.dropout, seed, counters[q], unit, kHiddenPlace);
#pragma unroll
          for (int i = 0; i < kQuad; ++i) {
            T &value = units[q * kQuad + i][j], &grad_value = grads[q * kQuad + i][j];
            value = activated(value + job.bias[unit], scales.of[i]);
            grad_value = passed_back(value, grad_value, scales.of[i]);
          }
        }
#pragma unroll
      for (int r = 0; r < kQuads * kQuad; ++r) {
        const int64_t row = row_of[r / kQuad * kTallRows + me.quad * kQuad + r % kQuad];
        if (row < 0) continue;
        const int64_t at = row * job.hidden + first_unit;
        if (job.hidden % kQuad == 0) {
          if (first_unit >= job.hidden) continue;
          put_four(job.units + at, {{units[r][0], units[r][1], units[r][2], units[r][3]}});
          put_four(job.grad_units + at, {{grads[r][0], grads[r][1], grads[r][2], grads[r][3]}});
          continue;
        }
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          if (first_unit + j >= job.hidden) continue;
          job.units[at + j] = units[r][j];
          job.grad_units[at + j] = grads[r][j];
        }
      }
    }
  });
}

// ---------------------------------------------------------------- blocks too wide for shared memory
// Applies bias, ReLU and dropout to products from cuBLAS: `units` is W1 x, `grad_units` is W2^T times the
// gradient. A thread owns a hidden unit of four rows.
template <class T>
__global__ void __launch_bounds__(kPlainThreads) feed_forward_activate_kernel(FeedForwardData<T> job) {
  const uint64_t seed = read_seed(job.dropout);
  for_elements(job.rows.quads() * job.hidden, [&](int64_t task) {
    const int64_t quad = task / job.hidden, unit = task % job.hidden;
    const Four<T> scales = scales_of<T>(job.dropout, seed, job.rows.counter(quad), unit, kHiddenPlace);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const int64_t row = job.rows.row(quad, i);
      if (row < 0) continue;
      T& value = job.units[row * job.hidden + unit];
      value = activated(value + job.bias[unit], scales.of[i]);
      if (job.grad_units == nullptr) continue;
      T& grad = job.grad_units[row * job.hidden + unit];
      grad = passed_back(value, grad, scales.of[i]);
    }
  });
}

// Adds the partial sums, in order, and the bias. A thread owns single elements of the result.
template <class T>
__global__ void __launch_bounds__(kPlainThreads)
    feed_forward_join_kernel(T* to, const T* sums, int64_t parts, const T* bias, int64_t rows,
                             int64_t width) {
  for_elements(rows * width, [&](int64_t i) {
    T value = sums[i];
    for (int64_t part = 1; part < parts; ++part) value += sums[part * rows * width + i];
    to[i] = value + bias[i % width];
  });
}

}  // namespace
}  // namespace qfast
