// Device code of temporal convolution stacks on CUDA. temporal_conv.cu describes the sequence of launches,
// docs/tcn.md the computation. The code needs nothing but threads and shared memory.
//
// A stack is a list of stages, each of which computes one tensor [slot][row][channel]. A slot is a time
// position of the cone. Forward stages compute the outputs of both convolutions of a block, backward stages
// the gradients of their inputs. A thread owns 4 rows x 8 channels of one slot in registers and loops over
// the taps and the channels of the source, so every sum has a fixed order. 4 rows share one dropout counter
// and 8 channels one byte of signs, so no two threads write the same byte.
//
// For 4 channels of the source a thread loads 4 activations and 8 weights of 16 bytes each for 128
// multiply-adds (float32). Activations are in shared memory or in L1, weights are read through L1. A warp
// owns 8 groups of channels x 4 groups of rows, so it loads each weight once and each activation once.
#pragma once

#include <cstdint>

#include "temporal_conv/temporal_conv_kernels_types.cuh"

namespace qfast {
namespace {

// ---------------------------------------------------------------- memory
template <class T>
struct alignas(16) Quad {
  T of[4];
};

// Loads four elements, with zeros from element `count`. `packed` elements are adjacent and aligned to 16
// bytes.
template <class T>
QFAST_DEVICE_INLINE Quad<T> load_quad(const T* from, int64_t stride, int count, bool packed) {
  if (packed && count >= 4) return *reinterpret_cast<const Quad<T>*>(from);
  Quad<T> quad;
#pragma unroll
  for (int j = 0; j < 4; ++j) quad.of[j] = j < count ? from[j * stride] : T(0);
  return quad;
}

// Stores the first `count` of 8 channels.
template <class T>
QFAST_DEVICE_INLINE void store_columns(T* to, const Place<T>& place, int count, const T (&values)[kColumns]) {
#pragma unroll
  for (int half = 0; half < kColumns; half += 4) {
    if (place.packed && count >= half + 4) {
      Quad<T> quad;
#pragma unroll
      for (int j = 0; j < 4; ++j) quad.of[j] = values[half + j];
      *reinterpret_cast<Quad<T>*>(to + half) = quad;
      continue;
    }
#pragma unroll
    for (int j = half; j < half + 4; ++j)
      if (j < count) to[j * place.channel_stride] = values[j];
  }
}

// The rows of a thread block and its shared memory.
template <class T>
struct Tile {
  T* shared;
  int64_t first_row, end_row;  // of the batch

  // Returns the address of element (slot, row, 0).
  QFAST_DEVICE_INLINE T* at(const Place<T>& place, int64_t slot, int64_t row) const {
    if (place.shared_at >= 0)
      return shared + place.shared_at + slot * place.slot_stride + (row - first_row) * place.row_stride;
    return place.data + slot * place.slot_stride + row * place.row_stride;
  }
};

// ---------------------------------------------------------------- one thread's part of a stage
// 4 rows x 8 channels of one slot.
template <class T>
struct Part {
  const Stage<T>& stage;
  const Dropout& dropout;
  Tile<T> tile;
  int64_t batch;
  int slot, position, column, count;  // the first `count` of its channels exist
  int64_t row;                        // first row, a multiple of 4
  int rows;                           // number of rows that exist
  T sum[kRows][kColumns];

  // Rows beyond the last one read the last row again, and their results are not stored.
  QFAST_DEVICE_INLINE int64_t row_or_last(int i) const { return row + (i < rows ? i : rows - 1); }

  QFAST_DEVICE_INLINE void add_product(const Product<T>& product) {
    for (int tap = 0; tap < product.taps; ++tap) {
      const int64_t back = (product.taps - 1 - tap) * product.dilation;
      const int64_t at = product.turned ? position + back : position - back;
      if (at < 0 || at >= product.steps) continue;
      const int from = product.slots[at];
      if (from < 0) continue;
      const T* source[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) source[i] = tile.at(product.source, from, row_or_last(i));
      if (product.weight == nullptr) {
        add_source(product, source);
      } else {
        add_tap(product, source,
                product.weight + static_cast<int64_t>(tap) * product.channels * product.width);
      }
    }
  }

  // sum[i][j] += source[i][column + j]
  QFAST_DEVICE_INLINE void add_source(const Product<T>& product, const T* const (&source)[kRows]) {
    const int64_t stride = product.source.channel_stride;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        if (j < count) sum[i][j] += source[i][(column + j) * stride];
  }

  // sum[i][j] += source[i][c] * weight[c][column + j], over c
  QFAST_DEVICE_INLINE void add_tap(const Product<T>& product, const T* const (&source)[kRows],
                                   const T* weight) {
    const int64_t stride = product.source.channel_stride;
    weight += column;
    int c = 0;
    if (product.source.packed) {
      for (; c + 4 <= product.channels; c += 4) {
        Quad<T> values[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) values[i] = *reinterpret_cast<const Quad<T>*>(source[i] + c);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const T column_of[kRows] = {values[0].of[k], values[1].of[k], values[2].of[k], values[3].of[k]};
          add_channel(column_of, weight);
          weight += product.width;
        }
      }
    }
    for (; c < product.channels; ++c) {
      T column_of[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) column_of[i] = source[i][c * stride];
      add_channel(column_of, weight);
      weight += product.width;
    }
  }

  QFAST_DEVICE_INLINE void add_channel(const T (&values)[kRows], const T* weight) {
    const Quad<T> w[2] = {*reinterpret_cast<const Quad<T>*>(weight),
                          *reinterpret_cast<const Quad<T>*>(weight + 4)};
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[i][j] += values[i] * w[j / 4].of[j % 4];
  }

  QFAST_DEVICE_INLINE void add_bias(const T* bias) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int i = 0; i < kRows; ++i) sum[i][j] += j < count ? bias[column + j] : T(0);
  }

  // Applies ReLU. NaN stays NaN, as in torch.
  QFAST_DEVICE_INLINE void rectify() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[i][j] = sum[i][j] <= T(0) ? T(0) : sum[i][j];
  }

  // Applies dropout. Element (b, c, t) uses word b % 4 of the counter (c, t, convolution, b / 4).
  QFAST_DEVICE_INLINE void drop() {
    const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
    const T scale = static_cast<T>(dropout.scale);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const PhiloxWords words =
          philox(seed, static_cast<uint32_t>(column + j), static_cast<uint32_t>(position),
                 static_cast<uint32_t>(stage.convolution), static_cast<uint32_t>(row / kRows));
#pragma unroll
      for (int i = 0; i < kRows; ++i) sum[i][j] *= words.word[i] >= dropout.threshold ? scale : T(0);
    }
  }

  QFAST_DEVICE_INLINE unsigned char* signs_of(int i) const {
    const int64_t bytes = (stage.columns + kColumns - 1) / kColumns;
    return stage.signs + (slot * batch + row + i) * bytes + column / kColumns;
  }

  // Stores one bit per element, which is set if the gradient passes: above 0, or NaN.
  QFAST_DEVICE_INLINE void store_signs() const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      unsigned bits = 0;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) bits |= (sum[i][j] <= T(0) ? 0u : 1u) << j;
      if (i < rows) *signs_of(i) = static_cast<unsigned char>(bits);
    }
  }

  // Turns the gradient of the output of a ReLU, which was saved, into the gradient of its input.
  QFAST_DEVICE_INLINE void pass(T scale) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const T* const saved = tile.at(stage.saved, slot, row_or_last(i)) + column;
#pragma unroll
      for (int half = 0; half < kColumns; half += 4) {
        const Quad<T> value =
            load_quad(saved + half, stage.saved.channel_stride, count - half, stage.saved.packed);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][half + j] = value.of[j] <= T(0) ? T(0) : sum[i][half + j] * scale;
      }
    }
  }

  // Does the same for the dropout and ReLU of the second convolution, whose signs were saved.
  QFAST_DEVICE_INLINE void pass_signs(T scale) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const unsigned bits = *signs_of(i < rows ? i : rows - 1);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[i][j] = bits >> j & 1u ? sum[i][j] * scale : T(0);
    }
  }

  QFAST_DEVICE_INLINE void store(const Place<T>& place) const {
    if (!place.wanted()) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (i < rows)
        store_columns(tile.at(place, slot, row + i) + column * place.channel_stride, place, count, sum[i]);
  }

  QFAST_DEVICE_INLINE void run() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[i][j] = T(0);
    const T scale = static_cast<T>(dropout.scale);
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {  // a loop, so both products share one copy of the code
      add_product(phase == 0 ? stage.product : stage.residual);
      const T* const bias = phase == 0 ? stage.bias : stage.residual_bias;
      if (bias != nullptr) add_bias(bias);
      if (phase > 0 || bias == nullptr) continue;
      rectify();
      if (dropout.active) drop();
      if (stage.signs != nullptr) store_signs();
    }
    if (stage.kind == Kind::kOutput) rectify();
    if (stage.kind == Kind::kBetweenGradient) pass(scale);
    if (stage.kind == Kind::kOutputGradient) pass(T(1));
    store(stage.near);
    store(stage.far);
    if (stage.kind == Kind::kOutputGradient) {
      pass_signs(scale);
      store(stage.second_near);
      store(stage.second_far);
    }
  }
};

// A thread block owns one of `parts` parts of a tile of rows. If a launch has several stages, the block owns
// the whole tile and computes the stages in order. Its shared memory contains the results that the next stage
// reads.
template <class T>
__global__ void __launch_bounds__(kThreads) stages_kernel(Stages<T> run) {
  extern __shared__ double shared_memory[];
  for (int64_t task = blockIdx.x; task < run.tiles * run.parts; task += gridDim.x) {
    const int64_t first_row = task / run.parts * run.tile_rows;
    const int64_t left = run.batch - first_row;
    const int64_t rows = left < run.tile_rows ? left : run.tile_rows;
    const Tile<T> tile{reinterpret_cast<T*>(shared_memory), first_row, first_row + rows};
    for (int s = 0; s < run.count; ++s) {
      const Stage<T>& stage = run.stages[s];
      const int groups = (stage.columns + kColumns - 1) / kColumns;
      const int panel = groups < kPanel ? groups : kPanel, panels = (groups + panel - 1) / panel;
      const int64_t row_groups = (rows + kRows - 1) / kRows;
      const int64_t items = stage.slots * panels * row_groups * panel;
      for (int64_t item = task % run.parts * blockDim.x + threadIdx.x; item < items;
           item += run.parts * blockDim.x) {
        const int group = static_cast<int>(item / panel / row_groups % panels * panel + item % panel);
        if (group >= groups) continue;
        const int slot = static_cast<int>(item / panel / row_groups / panels);
        const int column = group * kColumns;
        const int64_t row = first_row + item / panel % row_groups * kRows, remaining = tile.end_row - row;
        Part<T> part{stage,  run.dropout,
                     tile,   run.batch,
                     slot,   stage.positions[slot],
                     column, stage.columns - column < kColumns ? stage.columns - column : kColumns,
                     row,    remaining < kRows ? static_cast<int>(remaining) : kRows,
                     {}};
        part.run();
      }
      __syncthreads();
    }
  }
}

}  // namespace
}  // namespace qfast
