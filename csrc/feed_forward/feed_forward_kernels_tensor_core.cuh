// Kernels of the feed-forward block in float32 on tensor cores. They have not run on a GPU and are not
// measured; they are tested by emulation on the host.
//
// A thread block of 4 warps owns a tile of 128 rows and computes slices of 32 hidden units, one after the
// other, like feed_forward_kernels.cuh. A warp owns 32 of the rows, with all 32 units and all results. Its
// hidden activations stay in registers: the sums of one product are the row operand of the next, lane by
// lane, because the depth of a product may be numbered in any order. The weights of a slice are contiguous in
// memory (pack_slices_kernel) and are copied in the background while the previous slice is computed, with one
// barrier per slice.
//
// All operands are [chunk of the depth][row or column][64 bytes]. A chunk is 16 words of tf32 or 32 of bf16,
// which is two steps of a product. Lane (g, t) reads 16 bytes, number t of row g, in one load for both steps.
// A warp therefore reads 512 contiguous bytes: there are no bank conflicts for any size, and no padding.
// Columns are ordered such that a lane's sums of two adjacent products are four adjacent columns (column_at),
// so it needs one load of the bias and one store of 16 bytes. Rows are ordered (put_rows) such that a lane's
// four rows are windows of one quad, so it computes each random word of the dropout once.
//
// Tensor cores truncate when they add. 3xtf32 therefore adds the three products of a chunk, smallest first,
// to zero, and adds the chunk to the sums by FADD. tf32 and bf16 add directly to the sums. 3xtf32 has
// operands in float32 and splits them in registers. NaN is passed through. A row of x with an infinity has no
// finite result, but may have NaN where float32 has an infinity.
//
// Costs of 64 -> 2048 -> 64 without dropout, per slice and warp: 128 products of depth 8 (64 of depth 16 in
// bf16; 384 of depth 8 in 3xtf32) and 48 loads of 512 bytes (24 in bf16), each 4 cycles of the SM's shared
// memory. At 2 cycles of an SM per product, the products need 256 cycles and the loads 192. 3xtf32 also has
// three other instructions per product for the splits. Dropout adds 8 calls of Philox per lane and slice,
// about 70 integer instructions each. Weights are read from L2, 1 MB (0.5 in bf16) per 128 rows and their 67
// MFLOP. Shared memory contains the rows of x and two slices, 66 KB (33 in bf16); in backward 98 KB (50).
// Registers on sm_90 for up to 64 results: bf16 168, tf32 161, 3xtf32 235; for up to 128 results: 243 to 255;
// in backward 123, 3xtf32 163. Only 3xtf32 with more than 64 results on sm_100 spills registers, outside the
// loops of products.
#pragma once

#include "feed_forward/feed_forward_kernels.cuh"
#include "tensor_core.cuh"

namespace qfast {
namespace {

constexpr int kWords = 16;                       // words of a row in a chunk
constexpr int kTensorRows = Tile<float>::kRows;  // rows of a tile
constexpr int kWarpRows = 32;
constexpr int kWarpQuads = kWarpRows / kQuad;
constexpr int kFragmentRows = 16;
constexpr int kRowFragments = kWarpRows / kFragmentRows;
constexpr int kTileFragments = kTensorRows / kFragmentRows;
constexpr int kColumns = 8;  // columns of a product
constexpr int kUnitFragments = kUnits / kColumns;
static_assert(kTensorRows == kTileThreads / kLanes * kWarpRows);

// Number of elements of a row in a chunk.
__host__ __device__ constexpr int chunk_elements(Precision precision) {
  return precision == Precision::kBf16 ? 32 : 16;
}
__host__ __device__ constexpr int chunks_of(Precision precision, int depth) {
  return (depth + chunk_elements(precision) - 1) / chunk_elements(precision);
}

// Column at position `place` of an operand: lane t has columns 4t to 4t + 3 of 16.
__host__ __device__ constexpr int column_at(int place) {
  return place / 16 * 16 + place % 8 / 2 * 4 + place / 8 % 2 * 2 + place % 2;
}
// Element of a chunk at position `word` of a row, and the first of two in bf16. Adjacent words of a lane's
// four are adjacent sums of the product before, which become rows (units_of_chunk).
template <Precision kPrecision>
__host__ __device__ constexpr int element_at(int word) {
  if constexpr (kPrecision != Precision::kBf16) return word;
  return word % 4 / 2 * 16 + word / 4 * 4 + word % 2 * 2;
}

struct TensorJob {
  FeedForwardData<float> net;  // its entering and leaving are not set
  const uint32_t* packed;      // [slices][slice_words]
  int32_t slice_words;
  int32_t input_chunks, output_chunks;  // chunks of D and, in backward only, of O
};

// Numbers of words of a slice: W1, then W2, then 32 words of b1.
struct SliceParts {
  int32_t entering, leaving, words;
};

struct alignas(16) Words {
  uint32_t of[4];
};

// ---------------------------------------------------------------- weights
struct SlicePacking {
  const float *entering, *bias, *leaving;  // [M][D], [M], [O][M]
  uint32_t* to;
  int64_t inputs, hidden, outputs;
  int32_t slices, padded;  // padded: results, to a multiple of 64; forward only
  int32_t entering_words, leaving_words, slice_words;
  bool backward;
};

// A word of an operand. read(0) and, in bf16, read(1) return its elements.
template <Precision kPrecision, class Read>
QFAST_DEVICE_INLINE uint32_t word_of(const Read& read) {
  if constexpr (kPrecision == Precision::kBf16) return bf16_pair(read(0), read(1));
  if constexpr (kPrecision == Precision::kTf32) return tf32(read(0));
  return __float_as_uint(read(0));
}

// Packs W1, W2 and b1 of every slice. A thread owns single words.
template <Precision kPrecision>
__global__ void __launch_bounds__(kPlainThreads) pack_slices_kernel(SlicePacking job) {
  constexpr int kElements = chunk_elements(kPrecision);
  for_elements(int64_t{job.slices} * job.slice_words, [&](int64_t i) {
    const int64_t first_unit = i / job.slice_words * kUnits;
    int place = static_cast<int>(i % job.slice_words);
    const bool is_bias = place >= job.entering_words + job.leaving_words;
    if (is_bias) {
      const int64_t unit = first_unit + place - job.entering_words - job.leaving_words;
      job.to[i] = __float_as_uint(unit < job.hidden ? job.bias[unit] : 0.0f);
      return;
    }
    const bool is_entering = place < job.entering_words;
    if (!is_entering) place -= job.entering_words;
    const int columns = is_entering || job.backward ? kUnits : job.padded;
    const int64_t column = column_at(place / kWords % columns);
    const int64_t depth = place / kWords / columns * kElements + element_at<kPrecision>(place % kWords);
    job.to[i] = word_of<kPrecision>([&](int next) {
      if (is_entering) {  // the columns are units, the depth is the inputs
        const int64_t unit = first_unit + column, input = depth + next;
        return unit < job.hidden && input < job.inputs ? job.entering[unit * job.inputs + input] : 0.0f;
      }
      const int64_t unit = first_unit + (job.backward ? column : depth + next);
      const int64_t output = job.backward ? depth + next : column;
      return unit < job.hidden && output < job.outputs ? job.leaving[output * job.hidden + unit] : 0.0f;
    });
  });
}

// ---------------------------------------------------------------- pieces
// Position of the calling thread: its warp, and g and t of its lane.
struct Lane {
  int group = static_cast<int>(threadIdx.x % kLanes / 4);
  int place = static_cast<int>(threadIdx.x % 4);
  int warp = static_cast<int>(threadIdx.x / kLanes);
};

// Reads the lane's 16 bytes of row or column `row`.
QFAST_DEVICE_INLINE Words words_at(const uint32_t* operand, int row) {
  return *reinterpret_cast<const Words*>(operand + row * kWords + Lane().place * 4);
}

// A chunk of the warp's 32 rows as operands of the products, [16 rows][step][word].
struct RowWords {
  uint32_t of[kRowFragments][2][4];
};

// Reads a chunk of the tile from shared memory.
QFAST_DEVICE_INLINE RowWords rows_of_chunk(const uint32_t* tile, int chunk) {
  const int first = static_cast<int>(threadIdx.x) / kLanes * kRowFragments;
  RowWords rows;
#pragma unroll
  for (int step = 0; step < 2; ++step)
#pragma unroll
    for (int f = 0; f < kRowFragments; ++f) {
      const int fragment = (chunk * 2 + step) * kTileFragments + first + f;
      const Words words =
          *reinterpret_cast<const Words*>(tile + (fragment * kLanes + threadIdx.x % kLanes) * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) rows.of[f][step][i] = words.of[i];
    }
  return rows;
}

// Converts the first hidden units, which are sums of the first product, to row operands of the second.
template <Precision kPrecision>
QFAST_DEVICE_INLINE RowWords units_of_chunk(const float (&units)[kRowFragments][kUnitFragments][4]) {
  RowWords rows;
#pragma unroll
  for (int f = 0; f < kRowFragments; ++f)
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i % 2 * 2, next = i / 2;
        if constexpr (kPrecision == Precision::kBf16) {
          const float (&two)[4] = units[f][step * 2 + next];
          rows.of[f][step][i] = bf16_pair(two[half], two[half + 1]);
        } else {
          const float value = units[f][step][half + next];
          rows.of[f][step][i] = kPrecision == Precision::kTf32 ? tf32(value) : __float_as_uint(value);
        }
      }
  return rows;
}

// A float32 as the sum of two tf32, with an error of at most one unit in the last place. If the value is not
// finite, or too large for tf32, `rest` is not finite either.
struct Split {
  uint32_t high, rest;

  QFAST_DEVICE_INLINE explicit Split(uint32_t value) {
    constexpr uint32_t kHalf = 1u << 12, kTf32Bits = ~0u << 13;
    // Rounds to nearest, in fewer instructions than cvt, which handles NaN.
    high = (value + kHalf) & kTf32Bits;
    rest = __float_as_uint(__uint_as_float(value) - __uint_as_float(high)) & kTf32Bits;
  }
};

// A chunk of rows as tf32 or bf16 operands, and in 3xtf32 the remainders.
template <Precision kPrecision>
struct RowChunk {
  RowWords high, rest;

  QFAST_DEVICE_INLINE explicit RowChunk(const RowWords& rows) : high(rows) {
    if constexpr (kPrecision == Precision::k3xTf32) {
#pragma unroll
      for (int i = 0; i < kRowFragments * 2 * 4; ++i) {
        const Split split(rows.of[i / 8][i / 4 % 2][i % 4]);
        high.of[i / 8][i / 4 % 2][i % 4] = split.high;
        rest.of[i / 8][i / 4 % 2][i % 4] = split.rest;
      }
    }
  }
};

// sums[..][at] += a chunk of rows times a chunk of 8 columns.
template <Precision kPrecision, int kCount>
QFAST_DEVICE_INLINE void add_chunk(float (&sums)[kRowFragments][kCount][4], int at,
                                   const RowChunk<kPrecision>& rows, const Words& columns) {
  if constexpr (kPrecision == Precision::k3xTf32) {
    uint32_t high[2][2], rest[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Split split(columns.of[i]);
      high[i / 2][i % 2] = split.high;
      rest[i / 2][i % 2] = split.rest;
    }
    float chunk[kRowFragments][4] = {};
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int f = 0; f < kRowFragments; ++f) multiply_tf32(chunk[f], rows.rest.of[f][step], high[step]);
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int f = 0; f < kRowFragments; ++f) multiply_tf32(chunk[f], rows.high.of[f][step], rest[step]);
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int f = 0; f < kRowFragments; ++f) multiply_tf32(chunk[f], rows.high.of[f][step], high[step]);
#pragma unroll
    for (int f = 0; f < kRowFragments; ++f)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[f][at][i] += chunk[f][i];
  } else {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint32_t column[2] = {columns.of[2 * step], columns.of[2 * step + 1]};
#pragma unroll
      for (int f = 0; f < kRowFragments; ++f) {
        if constexpr (kPrecision == Precision::kBf16) {
          multiply_bf16(sums[f][at], rows.high.of[f][step], column);
        } else {
          multiply_tf32(sums[f][at], rows.high.of[f][step], column);
        }
      }
    }
  }
}

// sums += rows times 32 columns, both in shared memory.
template <Precision kPrecision>
QFAST_DEVICE_INLINE void add_rows(const uint32_t* rows, const uint32_t* columns, int chunks,
                                  float (&sums)[kRowFragments][kUnitFragments][4]) {
  const Lane me;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const RowChunk<kPrecision> row_chunk(rows_of_chunk(rows, chunk));
#pragma unroll
    for (int c = 0; c < kUnitFragments; ++c)
      add_chunk<kPrecision>(sums, c, row_chunk, words_at(columns, c * kColumns + me.group));
    columns += kUnits * kWords;
  }
}

// Copies the rows of the tile to shared memory as operands, [chunk][step][16 rows][lane][4], with zeros
// beyond the last row.
template <Precision kPrecision>
QFAST_DEVICE_INLINE void put_rows(uint32_t* to, const float* from, const int64_t* row_of, int width,
                                  int chunks) {
  for (int i = static_cast<int>(threadIdx.x); i < chunks * 2 * kTileFragments * kLanes; i += kTileThreads) {
    const int lane = i % kLanes, fragment = i / kLanes % kTileFragments, step = i / kLanes / kTileFragments;
    const int first_row = (fragment / 2 * kWarpRows) + lane / 4 * kQuad + fragment % 2 * 2;
    Words words;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int64_t row = row_of[first_row + w % 2];
      const int first =
          step / 2 * chunk_elements(kPrecision) + element_at<kPrecision>(lane % 4 * 4 + step % 2 * 2 + w / 2);
      words.of[w] = word_of<kPrecision>([&](int next) {
        const int feature = first + next;
        return row >= 0 && feature < width ? from[row * width + feature] : 0.0f;
      });
    }
    *reinterpret_cast<Words*>(to + i * 4) = words;
  }
}

// Starts the copy of a slice of the weights to shared memory.
QFAST_DEVICE_INLINE void start_slice(uint32_t* to, const TensorJob& job, int slice) {
  const uint32_t* const from = job.packed + int64_t{slice} * job.slice_words;
  for (int i = static_cast<int>(threadIdx.x) * 4; i < job.slice_words; i += kTileThreads * 4)
    start_copy(to + i, from + i);
}

// Calls body(slice, its weights in shared memory) for each slice, in order. There are two buffers. The caller
// has started the copy of the first slice to the first one.
template <class Body>
QFAST_DEVICE_INLINE void for_slices(uint32_t* buffers, const TensorJob& job, int begin, int end,
                                    const Body& body) {
  int now = 0;
#pragma unroll 1
  for (int slice = begin; slice < end; ++slice) {
    wait_for_copies();
    __syncthreads();  // all threads have copied this slice and finished the previous one
    if (slice + 1 < end) start_slice(buffers + (now ^ 1) * job.slice_words, job, slice + 1);
    body(slice, buffers + now * job.slice_words);
    now ^= 1;
  }
}

// ---------------------------------------------------------------- forward
// Thread blocks per SM for which the compiler limits the registers.
constexpr int blocks_at_once(Precision precision, int wide) {
  return wide == 1 && precision != Precision::k3xTf32 ? 3 : 2;
}

// Stores the lane's sums of four rows.
template <int kCount>
QFAST_DEVICE_INLINE void store_sums(const float (&sums)[kRowFragments][kCount][4],
                                    const FeedForwardData<float>& net, const int64_t* row_of, int64_t split,
                                    const Lane& me) {
#pragma unroll
  for (int r = 0; r < kQuad; ++r) {
    const int64_t row = row_of[me.warp * kWarpRows + me.group * kQuad + r];
    if (row < 0) continue;
    float* const to = net.sums + (split * net.rows.count() + row) * net.outputs;
#pragma unroll
    for (int pair = 0; pair < kCount / 2; ++pair) {
      const int first = pair * 16 + me.place * 4;
      if (first >= net.outputs) continue;
      const float (&left)[4] = sums[r / 2][pair * 2];
      const float (&right)[4] = sums[r / 2][pair * 2 + 1];
      const Four<float> values{
          {left[r % 2 * 2], left[r % 2 * 2 + 1], right[r % 2 * 2], right[r % 2 * 2 + 1]}};
      if (net.outputs % kQuad == 0) {
        put_four(to + first, values);
        continue;
      }
#pragma unroll
      for (int i = 0; i < kQuad; ++i)
        if (first + i < net.outputs) to[first + i] = values.of[i];
    }
  }
}

// Computes the sums W2 drop(relu(W1 x + b1)) of the slices of a split. There are at most 64 * kWide results.
template <Precision kPrecision, int kWide>
__global__ void __launch_bounds__(kTileThreads, blocks_at_once(kPrecision, kWide))
    feed_forward_tensor_kernel(TensorJob job) {
  constexpr int kOutFragments = kWide * kTallRows / kColumns;
  constexpr int kOut = kWide * kTallRows;
  constexpr int kChunks = chunks_of(kPrecision, kUnits), kPairs = kUnits / 16 / kChunks;
  extern __shared__ double shared_memory[];
  int64_t* const row_of = reinterpret_cast<int64_t*>(shared_memory);
  uint32_t* const x = reinterpret_cast<uint32_t*>(row_of + kTensorRows);
  uint32_t* const buffers = x + job.input_chunks * kTensorRows * kWords;
  const FeedForwardData<float>& net = job.net;
  const Lane me;
  const uint64_t seed = read_seed(net.dropout);
  for_tiles(net, [&](int64_t first_quad, int begin, int end, int64_t split) {
    __syncthreads();
    start_slice(buffers, job, begin);
    find_rows<float>(row_of, net.rows, first_quad);
    const QuadCounter counter = net.rows.counter(first_quad + me.warp * kWarpQuads + me.group);
    __syncthreads();
    put_rows<kPrecision>(x, net.x, row_of, net.inputs, job.input_chunks);
    float sums[kRowFragments][kOutFragments][4] = {};
    for_slices(buffers, job, begin, end, [&](int slice, const uint32_t* entering) {
      const uint32_t* leaving = entering + job.input_chunks * kUnits * kWords;
      const uint32_t* const bias = entering + job.slice_words - kUnits;
      float units[kRowFragments][kUnitFragments][4] = {};
      add_rows<kPrecision>(x, entering, job.input_chunks, units);
#pragma unroll 1
      for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          const int first = (chunk * kPairs + pair) * 16;
          const Words biases = words_at(bias + first, 0);
#pragma unroll
          for (int i = 0; i < kQuad; ++i) {
            const int64_t unit = int64_t{slice} * kUnits + first + me.place * 4 + i;
            const Four<float> scales = scales_of<float>(net.dropout, seed, counter, unit, kHiddenPlace);
#pragma unroll
            for (int r = 0; r < kQuad; ++r) {
              float& value = units[r / 2][pair * 2 + i / 2][r % 2 * 2 + i % 2];
              value = activated(value + __uint_as_float(biases.of[i]), scales.of[r]);
            }
          }
        }
        const RowChunk<kPrecision> rows(units_of_chunk<kPrecision>(units));
#pragma unroll
        for (int c = 0; c < kOutFragments; ++c)
          add_chunk<kPrecision>(sums, c, rows, words_at(leaving, c * kColumns + me.group));
        leaving += kOut * kWords;
        // The loop is not unrolled, so register indices are constant: the next units move to the front.
        if constexpr (kChunks > 1) {
#pragma unroll
          for (int i = 0; i < kRowFragments * 2 * 4; ++i)
            units[i / 8][i / 4 % 2][i % 4] = units[i / 8][2 + i / 4 % 2][i % 4];
        }
      }
    });
    store_sums(sums, net, row_of, split, me);
  });
}

// ---------------------------------------------------------------- backward
// Computes the hidden activations after dropout, and the gradients of the sums before ReLU.
template <Precision kPrecision>
__global__ void __launch_bounds__(kTileThreads) feed_forward_hidden_tensor_kernel(TensorJob job) {
  extern __shared__ double shared_memory[];
  int64_t* const row_of = reinterpret_cast<int64_t*>(shared_memory);
  uint32_t* const x = reinterpret_cast<uint32_t*>(row_of + kTensorRows);
  uint32_t* const grad = x + job.input_chunks * kTensorRows * kWords;
  uint32_t* const buffers = grad + job.output_chunks * kTensorRows * kWords;
  const FeedForwardData<float>& net = job.net;
  const Lane me;
  const uint64_t seed = read_seed(net.dropout);
  for_tiles(net, [&](int64_t first_quad, int begin, int end, int64_t) {
    __syncthreads();
    start_slice(buffers, job, begin);
    find_rows<float>(row_of, net.rows, first_quad);
    const QuadCounter counter = net.rows.counter(first_quad + me.warp * kWarpQuads + me.group);
    __syncthreads();
    put_rows<kPrecision>(x, net.x, row_of, net.inputs, job.input_chunks);
    put_rows<kPrecision>(grad, net.grad, row_of, net.outputs, job.output_chunks);
    for_slices(buffers, job, begin, end, [&](int slice, const uint32_t* entering) {
      const uint32_t* const leaving = entering + job.input_chunks * kUnits * kWords;
      const uint32_t* const bias = entering + job.slice_words - kUnits;
      float units[kRowFragments][kUnitFragments][4] = {}, grads[kRowFragments][kUnitFragments][4] = {};
      add_rows<kPrecision>(x, entering, job.input_chunks, units);
      add_rows<kPrecision>(grad, leaving, job.output_chunks, grads);
#pragma unroll
      for (int pair = 0; pair < kUnitFragments / 2; ++pair) {
        const Words biases = words_at(bias + pair * kWords, 0);
        const int64_t first_unit = int64_t{slice} * kUnits + pair * 16 + me.place * 4;
        Four<float> row_units[kQuad], row_grads[kQuad];  // the lane's four rows, with four units each
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          const Four<float> scales =
              scales_of<float>(net.dropout, seed, counter, first_unit + i, kHiddenPlace);
#pragma unroll
          for (int r = 0; r < kQuad; ++r) {
            const int c = pair * 2 + i / 2, at = r % 2 * 2 + i % 2;
            const float value = activated(units[r / 2][c][at] + __uint_as_float(biases.of[i]), scales.of[r]);
            row_units[r].of[i] = value;
            row_grads[r].of[i] = passed_back(value, grads[r / 2][c][at], scales.of[r]);
          }
        }
        if (first_unit >= net.hidden) continue;
#pragma unroll
        for (int r = 0; r < kQuad; ++r) {
          const int64_t row = row_of[me.warp * kWarpRows + me.group * kQuad + r];
          if (row < 0) continue;
          const int64_t at = row * net.hidden + first_unit;
          if (net.hidden % kQuad == 0) {
            put_four(net.units + at, row_units[r]);
            put_four(net.grad_units + at, row_grads[r]);
            continue;
          }
#pragma unroll
          for (int i = 0; i < kQuad; ++i) {
            if (first_unit + i >= net.hidden) continue;
            net.units[at + i] = row_units[r].of[i];
            net.grad_units[at + i] = row_grads[r].of[i];
          }
        }
      }
    });
  });
}

}  // namespace
}  // namespace qfast
