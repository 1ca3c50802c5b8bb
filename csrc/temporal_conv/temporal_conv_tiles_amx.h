// Operands and products of the temporal convolution kernels with bfloat16 operands. This file is included
// inside the namespace of the instruction set "amx".
//
// Left operands are matrices [slot][row][channel] with channels padded to whole tiles by zeros. Weights are
// tiles. The sums of 32 rows and 32 channels are stored in a buffer in the first-level cache.
#pragma once

#include "amx_tiles.h"
#include "temporal_conv/temporal_conv_kernels.h"

namespace {

constexpr int64_t kSumsSide = 2 * kTileSide;  // rows and columns of the sums that are computed together

// Sums of products, before they are completed.
struct alignas(64) TileBuffer {
  float sums[kSumsSide * kSumsSide];
};

// Left operands of the rows of a batch tile.
struct Operands {
  bf16_bits* data;
  int64_t slot_stride, row_stride, columns;

  Operands(float* memory, int64_t rows, int64_t channels)
      : data(reinterpret_cast<bf16_bits*>(memory)),
        slot_stride(rows * tiles_for(channels, kTileDepth) * kTileDepth),
        row_stride(tiles_for(channels, kTileDepth) * kTileDepth),
        columns(channels) {}

  bf16_bits* at(int64_t slot, int64_t row) const { return data + slot * slot_stride + row * row_stride; }
};

// A packed weight: [panel][tap][column tile][depth tile].
struct TileWeight {
  bf16_bits* data;
  const Panels& panels;
  int64_t taps, rows, depth_tiles, tap_stride;

  TileWeight(float* memory, const Panels& weight_panels, int64_t tap_count, int64_t row_count)
      : data(reinterpret_cast<bf16_bits*>(memory)),
        panels(weight_panels),
        taps(tap_count),
        rows(row_count),
        depth_tiles(tiles_for(row_count, kTileDepth)),
        tap_stride(panels.width / kTileSide * depth_tiles * kTileValues) {}

  // Packs a weight [panel][tap][row][width]. Null is not packed.
  void pack(const float* from) const {
    for (int64_t i = 0; from != nullptr && i < panels.count * taps; ++i)
      pack_right(from + i * rows * panels.width, panels.width, rows, panels.width, data + i * tap_stride);
  }

  // The tiles of the first tap for a column of a panel.
  const bf16_bits* at(int64_t panel, int64_t column) const {
    return data + panel * taps * tap_stride + column / kTileSide * depth_tiles * kTileValues;
  }
};

// Products of the taps of a slot, for the first row of the operands and a column of the weight.
struct TapProducts {
  const Tap *taps, *end;
  const Operands& left;
  const bf16_bits* right;
  int64_t tap_stride, depth_tiles;
};

// Adds the products to the sums in tile registers 0 to 3. The left tiles are in 4 and 5, the right tiles in
// 6 and 7.
template <int Rows, int Columns>
QFAST_ALWAYS_INLINE void add_taps(const TapProducts& products) {
  const int64_t row_bytes = products.left.row_stride * 2, next_rows = kTileSide * products.left.row_stride;
  const int64_t next_column = products.depth_tiles * kTileValues;
  for (const Tap* tap = products.taps; tap != products.end; ++tap) {
    const bf16_bits* left = products.left.at(tap->slot, 0);
    const bf16_bits* right = products.right + tap->tap * products.tap_stride;
    for (int64_t k = 0; k < products.depth_tiles; ++k, left += kTileDepth, right += kTileValues) {
      _tile_loadd(4, left, row_bytes);
      _tile_loadd(6, right, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (Columns > 1) {
        _tile_loadd(7, right + next_column, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (Rows > 1) {
        _tile_loadd(5, left + next_rows, row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (Columns > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
}

// Stores the sums of all products, which start from `bias` (null for zeros), one for each column.
template <int Rows, int Columns>
QFAST_ALWAYS_INLINE void sum_products(const TapProducts& products, const TapProducts* more, const float* bias,
                                      float* to) {
  __asm__ volatile("" ::: "memory");  // the compiler does not know that loads of tiles read memory
  constexpr int64_t kStride = kSumsSide * 4;
  if (bias == nullptr) {
    _tile_zero(0);
    if constexpr (Columns > 1) _tile_zero(1);
    if constexpr (Rows > 1) _tile_zero(2);
    if constexpr (Rows > 1 && Columns > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, bias, 0);
    if constexpr (Columns > 1) _tile_loadd(1, bias + kTileSide, 0);
    if constexpr (Rows > 1) _tile_loadd(2, bias, 0);
    if constexpr (Rows > 1 && Columns > 1) _tile_loadd(3, bias + kTileSide, 0);
  }
  add_taps<Rows, Columns>(products);
  if (more != nullptr) add_taps<Rows, Columns>(*more);
  _tile_stored(0, to, kStride);
  if constexpr (Columns > 1) _tile_stored(1, to + kTileSide, kStride);
  if constexpr (Rows > 1) _tile_stored(2, to + kTileSide * kSumsSide, kStride);
  if constexpr (Rows > 1 && Columns > 1) _tile_stored(3, to + kTileSide * kSumsSide + kTileSide, kStride);
}

QFAST_ONE_COPY static void sum_products(int64_t rows, bool two_columns, const TapProducts& products,
                                        const TapProducts* more, const float* bias, TileBuffer& to) {
  const bool two_rows = rows > kTileSide;
  if (two_rows && two_columns) {
    sum_products<2, 2>(products, more, bias, to.sums);
  } else if (two_rows) {
    sum_products<2, 1>(products, more, bias, to.sums);
  } else if (two_columns) {
    sum_products<1, 2>(products, more, bias, to.sums);
  } else {
    sum_products<1, 1>(products, more, bias, to.sums);
  }
}

// Calls body(panel, column in the panel, whether there are two column tiles) for all columns.
template <class Body>
QFAST_ALWAYS_INLINE void for_column_tiles(const Panels& panels, const Body& body) {
  for (int64_t p = 0; p < panels.count; ++p)
    for (int64_t j = 0; j < panels.width && p * panels.width + j < panels.columns; j += kSumsSide)
      body(p, j, panels.width - j > kTileSide && p * panels.width + j + kTileSide < panels.columns);
}

// The first lanes of a vector, and zeros: columns beyond the last one must not reach an operand. They are 0
// unless the row is infinite or NaN.
QFAST_ALWAYS_INLINE Vector<float> first_lanes(Vector<float> values, int64_t count) {
  if (count >= kTileSide) return values;
  const auto mask = static_cast<__mmask16>(count <= 0 ? 0u : (1u << count) - 1);
  return (Vector<float>)_mm512_maskz_mov_ps(mask, (__m512)values);
}

// Stores 16 values of an operand, the next 16 unless they are beyond the padded row, and after the last
// column zeros up to the end of the padded row.
QFAST_ALWAYS_INLINE void store_operand(const Operands& operands, int64_t slot, int64_t row, int64_t column,
                                       Vector<float> values, Vector<float> next) {
  bf16_bits* const to = operands.at(slot, row) + column;
  if (column + kTileSide < operands.row_stride) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)next, (__m512)values));
    const int64_t end = column + 2 * kTileSide;
    if (end >= operands.columns && end < operands.row_stride)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * kTileSide), _mm256_setzero_si256());
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)values));
  }
}

// Packs the rows of a slot of an activation.
[[maybe_unused]] QFAST_ONE_COPY static void pack_slot(const Activation<const float>& from, int64_t slot,
                                                      int64_t rows, int64_t channels, const Operands& to) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* const values = at(from, slot, row);
    for (int64_t k = 0; k < channels; k += kTileDepth) {
      const int64_t count = channels - k;
      if (from.channel_stride == 1) {
        store_operand(to, slot, row, k, (Vector<float>)first_floats(values + k, count),
                      (Vector<float>)first_floats(values + k + kTileSide, count - kTileSide));
        continue;
      }
      float gathered[kTileDepth] = {};
      for (int64_t j = 0; j < smaller(kTileDepth, count); ++j)
        gathered[j] = values[(k + j) * from.channel_stride];
      store_operand(to, slot, row, k, load<float>(gathered, AllLanes{}),
                    load<float>(gathered + kTileSide, AllLanes{}));
    }
  }
}

// Returns whether the block reads this slot of its input. The first block also has slots that nothing reads.
QFAST_ALWAYS_INLINE bool is_read(const BlockJob<float>& block, int64_t slot) {
  return block.first_read_by.begin[slot] < block.first_read_by.begin[slot + 1] ||
         block.residual_of[slot] >= 0;
}

}  // namespace
