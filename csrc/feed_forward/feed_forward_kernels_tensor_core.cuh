// The feed-forward block of float32 on tensor cores, device side. Has never run on a GPU: checked by
// emulation on the host, unmeasured.
//
// A block of 4 warps has a tile of 128 rows and takes 32 hidden units after the other, as in
// feed_forward_kernels.cuh; each warp has 32 of the rows, all 32 units and all results. Its hidden never
// leaves the registers: the sums of a product of tensor cores become the rows of the next one, lane by lane,
// because the depth of a product may be counted in any order. Weights of a slice lie in one piece in memory
// (pack_slices_kernel) and are copied in the background while the slice before them is computed; one barrier
// a slice.
//
// Operands, everywhere: [chunk of the depth][row or column][64 bytes]. A chunk is 16 words of tf32 or 32 of
// bf16, two steps of a product; lane (g, t) reads its 16 bytes, number t of row g, in one load, for both
// steps. A warp so reads 512 bytes that follow each other: no bank conflicts, whatever the sizes, and no
// padding. Columns stand in such an order that a lane's sums of two products side by side are four neighbours
// (column_at): one load of the bias, one store of 16 bytes. Rows stand in such an order (row_at) that a
// lane's four are windows of one quad, so that it draws each word of the dropout once.
//
// A product of tensor cores adds with truncation. 3xtf32 therefore adds the three products of a chunk, the
// small ones first, to zero, and the chunk to the sums by FADD; tf32 and bf16 add to the sums themselves.
// 3xtf32 keeps operands in float32 and splits them in registers. A NaN stays NaN; a row of x with an infinity
// gives no finite result, but may give NaN where float32 would give an infinity.
//
// What bounds it, at 64 -> 2048 -> 64 without dropout, per slice and warp: 128 products of depth 8 (64 of
// depth 16 in bf16; 384 of depth 8 in 3xtf32) and 48 loads of 512 bytes (24 in bf16), 4 cycles of the SM's
// shared memory each. At 2 cycles of an SM for a product the products take 256 cycles and the loads 192. In
// 3xtf32 the splits count as well: three other instructions a product. Dropout adds 8 calls of Philox a lane
// and slice, about 70 integer instructions each. Weights are read from L2, 1 MB (0.5 in bf16) for 128 rows
// and their 67 MFLOP. Shared memory: the rows of x and two slices, 66 KB (33 in bf16); backward 98 KB (50).
// Registers on sm_90, up to 64 results: bf16 168, tf32 161, 3xtf32 235; up to 128: 243 to 255; backward 123,
// 3xtf32 163. Nothing is spilled but in 3xtf32 with more than 64 results on sm_100, outside the loops of
// products.
#pragma once

#include "feed_forward/feed_forward_kernels.cuh"
#include "tensor_core.cuh"

namespace qfast {
namespace {

constexpr int kWords = 16;                       // of a row in a chunk
constexpr int kTensorRows = Tile<float>::kRows;  // of a tile
constexpr int kWarpRows = 32;
constexpr int kWarpQuads = kWarpRows / kQuad;
constexpr int kFragmentRows = 16;
constexpr int kRowFragments = kWarpRows / kFragmentRows;
constexpr int kTileFragments = kTensorRows / kFragmentRows;
constexpr int kColumns = 8;  // of a product
constexpr int kUnitFragments = kUnits / kColumns;
static_assert(kTensorRows == kTileThreads / kLanes * kWarpRows);

// Elements of a row in a chunk.
__host__ __device__ constexpr int chunk_elements(Precision precision) {
  return precision == Precision::kBf16 ? 32 : 16;
}
__host__ __device__ constexpr int chunks_of(Precision precision, int depth) {
  return (depth + chunk_elements(precision) - 1) / chunk_elements(precision);
}

// Which one stands in place `place` of the columns: lane t has 4t .. 4t + 3 of 16.
__host__ __device__ constexpr int column_at(int place) {
  return place / 16 * 16 + place % 8 / 2 * 4 + place / 8 % 2 * 2 + place % 2;
}
// Which element of a chunk is in place `word` of a row; the first of two in bf16. Neighbours in a lane's 4
// words are neighbours of the sums that become rows (units_of_chunk).
template <Precision kPrecision>
__host__ __device__ constexpr int element_at(int word) {
  if constexpr (kPrecision != Precision::kBf16) return word;
  return word % 4 / 2 * 16 + word / 4 * 4 + word % 2 * 2;
}

struct TensorJob {
  FeedForwardData<float> net;  // without packed weights
  const uint32_t* packed;      // [slices][slice_words]
  int32_t slice_words;
  int32_t input_chunks, output_chunks;  // of D; of O, backward only
};

// Words of a slice: W1, then W2, then 32 of b1.
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
  int32_t slices, padded;  // results to a multiple of 64: forward only
  int32_t entering_words, leaving_words, slice_words;
  bool backward;
};

template <Precision kPrecision, class Read>
QFAST_DEVICE_INLINE uint32_t word_of(const Read& read) {
  if constexpr (kPrecision == Precision::kBf16) return bf16_pair(read(0), read(1));
  if constexpr (kPrecision == Precision::kTf32) return tf32(read(0));
  return __float_as_uint(read(0));
}

template <Precision kPrecision>
__global__ void __launch_bounds__(kPlainThreads) pack_slices_kernel(SlicePacking job) {
  constexpr int kElements = chunk_elements(kPrecision);
  for_elements(int64_t{job.slices} * job.slice_words, [&](int64_t i) {
    const int64_t first_unit = i / job.slice_words * kUnits;
    int place = static_cast<int>(i % job.slice_words);
    const bool of_bias = place >= job.entering_words + job.leaving_words;
    if (of_bias) {
      const int64_t unit = first_unit + place - job.entering_words - job.leaving_words;
      job.to[i] = __float_as_uint(unit < job.hidden ? job.bias[unit] : 0.0f);
      return;
    }
    const bool enters = place < job.entering_words;
    if (!enters) place -= job.entering_words;
    const int columns = enters || job.backward ? kUnits : job.padded;
    const int64_t column = column_at(place / kWords % columns);
    const int64_t depth = place / kWords / columns * kElements + element_at<kPrecision>(place % kWords);
    job.to[i] = word_of<kPrecision>([&](int next) {
      if (enters) {  // columns are units, the depth inputs
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
struct Lane {
  int group = static_cast<int>(threadIdx.x % kLanes / 4);
  int place = static_cast<int>(threadIdx.x % 4);
  int warp = static_cast<int>(threadIdx.x / kLanes);
};

// Lane's 16 bytes of row or column `row`.
QFAST_DEVICE_INLINE Words words_at(const uint32_t* operand, int row) {
  return *reinterpret_cast<const Words*>(operand + row * kWords + Lane().place * 4);
}

// A chunk of the warp's 32 rows, as words of the products: of each 16 rows, at both steps.
struct RowWords {
  uint32_t of[kRowFragments][2][4];
};

// Of the tile in shared memory.
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

// Of the hidden, as the first product left it: of the units that come first.
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

// A float32 as the sum of two tf32, but for one unit of its last place at worst. The rest of what is not
// finite, or too large for tf32, is not finite either.
struct Split {
  uint32_t high, rest;

  QFAST_DEVICE_INLINE explicit Split(uint32_t value) {
    constexpr uint32_t kHalf = 1u << 12, kKept = ~0u << 13;
    high = (value + kHalf) & kKept;  // to the nearest: fewer instructions than cvt, which minds NaN
    rest = __float_as_uint(__uint_as_float(value) - __uint_as_float(high)) & kKept;
  }
};

// A chunk of rows as the products take it, and in 3xtf32 what that leaves.
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

// sums[..][at] += the chunk of rows times a chunk of 8 columns.
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

// sums += rows in shared memory times 32 columns there.
template <Precision kPrecision>
QFAST_DEVICE_INLINE void add_rows(const uint32_t* rows, const uint32_t* columns, int chunks,
                                  float (&sums)[kRowFragments][kUnitFragments][4]) {
  const Lane me;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const RowChunk<kPrecision> of_rows(rows_of_chunk(rows, chunk));
#pragma unroll
    for (int c = 0; c < kUnitFragments; ++c)
      add_chunk<kPrecision>(sums, c, of_rows, words_at(columns, c * kColumns + me.group));
    columns += kUnits * kWords;
  }
}

// The tile's rows as words of the products, [chunk][step][16 rows][lane][4]; zeros where there is none.
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

QFAST_DEVICE_INLINE void start_slice(uint32_t* to, const TensorJob& job, int slice) {
  const uint32_t* const from = job.packed + int64_t{slice} * job.slice_words;
  for (int i = static_cast<int>(threadIdx.x) * 4; i < job.slice_words; i += kTileThreads * 4)
    start_copy(to + i, from + i);
}

// body(slice, its weights in shared memory), in order. The first slice has been started into the first of two
// places.
template <class Body>
QFAST_DEVICE_INLINE void for_slices(uint32_t* places, const TensorJob& job, int begin, int end,
                                    const Body& body) {
  int now = 0;
#pragma unroll 1
  for (int slice = begin; slice < end; ++slice) {
    wait_for_copies();
    __syncthreads();  // this slice is there for all, and all have read the one before
    if (slice + 1 < end) start_slice(places + (now ^ 1) * job.slice_words, job, slice + 1);
    body(slice, places + now * job.slice_words);
    now ^= 1;
  }
}

// ---------------------------------------------------------------- forward
constexpr int blocks_at_once(Precision precision, int wide) {  // on an SM: what registers are given for
  return wide == 1 && precision != Precision::k3xTf32 ? 3 : 2;
}

// Sums of W2 drop(relu(W1 x + b1)). kWide: 64s of results.
template <Precision kPrecision, int kWide>
__global__ void __launch_bounds__(kTileThreads, blocks_at_once(kPrecision, kWide))
    feed_forward_tensor_kernel(TensorJob job) {
  constexpr int kOutFragments = kWide * kTallRows / kColumns;
  constexpr int kOut = kWide * kTallRows;
  constexpr int kChunks = chunks_of(kPrecision, kUnits), kPairs = kUnits / 16 / kChunks;
  extern __shared__ double shared_memory[];
  int64_t* const row_of = reinterpret_cast<int64_t*>(shared_memory);
  uint32_t* const x = reinterpret_cast<uint32_t*>(row_of + kTensorRows);
  uint32_t* const places = x + job.input_chunks * kTensorRows * kWords;
  const FeedForwardData<float>& net = job.net;
  const Lane me;
  const uint64_t seed = read_seed(net.dropout);
  for_tiles(net, [&](int64_t first_quad, int begin, int end, int64_t split) {
    __syncthreads();
    start_slice(places, job, begin);
    find_rows<float>(row_of, net.rows, first_quad);
    const QuadCounter counter = net.rows.counter(first_quad + me.warp * kWarpQuads + me.group);
    __syncthreads();
    put_rows<kPrecision>(x, net.x, row_of, net.inputs, job.input_chunks);
    float sums[kRowFragments][kOutFragments][4] = {};
    for_slices(places, job, begin, end, [&](int slice, const uint32_t* entering) {
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
        if constexpr (kChunks >
                      1) {  // a loop that is not unrolled keeps registers: the next units come first
#pragma unroll
          for (int i = 0; i < kRowFragments * 2 * 4; ++i)
            units[i / 8][i / 4 % 2][i % 4] = units[i / 8][2 + i / 4 % 2][i % 4];
        }
      }
    });
#pragma unroll
    for (int r = 0; r < kQuad; ++r) {
      const int64_t row = row_of[me.warp * kWarpRows + me.group * kQuad + r];
      if (row < 0) continue;
      float* const to = net.sums + (split * net.rows.count() + row) * net.outputs;
#pragma unroll
      for (int pair = 0; pair < kOutFragments / 2; ++pair) {
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
  });
}

// ---------------------------------------------------------------- backward
// The hidden after its dropout, and the gradient of the sums before its relu.
template <Precision kPrecision>
__global__ void __launch_bounds__(kTileThreads) feed_forward_hidden_tensor_kernel(TensorJob job) {
  extern __shared__ double shared_memory[];
  int64_t* const row_of = reinterpret_cast<int64_t*>(shared_memory);
  uint32_t* const x = reinterpret_cast<uint32_t*>(row_of + kTensorRows);
  uint32_t* const grad = x + job.input_chunks * kTensorRows * kWords;
  uint32_t* const places = grad + job.output_chunks * kTensorRows * kWords;
  const FeedForwardData<float>& net = job.net;
  const Lane me;
  const uint64_t seed = read_seed(net.dropout);
  for_tiles(net, [&](int64_t first_quad, int begin, int end, int64_t) {
    __syncthreads();
    start_slice(places, job, begin);
    find_rows<float>(row_of, net.rows, first_quad);
    const QuadCounter counter = net.rows.counter(first_quad + me.warp * kWarpQuads + me.group);
    __syncthreads();
    put_rows<kPrecision>(x, net.x, row_of, net.inputs, job.input_chunks);
    put_rows<kPrecision>(grad, net.grad, row_of, net.outputs, job.output_chunks);
    for_slices(places, job, begin, end, [&](int slice, const uint32_t* entering) {
      const uint32_t* const leaving = entering + job.input_chunks * kUnits * kWords;
      const uint32_t* const bias = entering + job.slice_words - kUnits;
      float units[kRowFragments][kUnitFragments][4] = {}, grads[kRowFragments][kUnitFragments][4] = {};
      add_rows<kPrecision>(x, entering, job.input_chunks, units);
      add_rows<kPrecision>(grad, leaving, job.output_chunks, grads);
#pragma unroll
      for (int pair = 0; pair < kUnitFragments / 2; ++pair) {
        const Words biases = words_at(bias + pair * kWords, 0);
        const int64_t first_unit = int64_t{slice} * kUnits + pair * 16 + me.place * 4;
        Four<float> of_units[kQuad], of_grads[kQuad];  // a lane's rows, four units each
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          const Four<float> scales =
              scales_of<float>(net.dropout, seed, counter, first_unit + i, kHiddenPlace);
#pragma unroll
          for (int r = 0; r < kQuad; ++r) {
            const int c = pair * 2 + i / 2, at = r % 2 * 2 + i % 2;
            const float value = activated(units[r / 2][c][at] + __uint_as_float(biases.of[i]), scales.of[r]);
            of_units[r].of[i] = value;
            of_grads[r].of[i] = passed_back(value, grads[r / 2][c][at], scales.of[r]);
          }
        }
        if (first_unit >= net.hidden) continue;
#pragma unroll
        for (int r = 0; r < kQuad; ++r) {
          const int64_t row = row_of[me.warp * kWarpRows + me.group * kQuad + r];
          if (row < 0) continue;
          const int64_t at = row * net.hidden + first_unit;
          if (net.hidden % kQuad == 0) {
            put_four(net.units + at, of_units[r]);
            put_four(net.grad_units + at, of_grads[r]);
            continue;
          }
#pragma unroll
          for (int i = 0; i < kQuad; ++i) {
            if (first_unit + i >= net.hidden) continue;
            net.units[at + i] = of_units[r].of[i];
            net.grad_units[at + i] = of_grads[r].of[i];
          }
        }
      }
    });
  });
}

}  // namespace
}  // namespace qfast
