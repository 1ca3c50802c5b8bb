// `multiply` with bfloat16 operands (see panel_kernels.h for its definition). Both operands are float32 in
// memory and are packed for every call.
//
// Bound by packing, by the stores of the sums and by the tile products: 16 x 16 sums of 32 products take 16
// cycles.
#pragma once

#include "amx_tiles.h"
#include "panel_kernels.h"

namespace {

constexpr int64_t kBlockRows = 256;   // rows of the left operand that are packed together
constexpr int64_t kBlockDepth = 512;  // products of a sum whose operands are packed together
constexpr int64_t kBlockColumns = kPanelVectors * kTileSide;

// Packed operands of a block, and sums that are not in the target yet.
struct alignas(64) Block {
  bf16_bits left[kBlockRows * kBlockDepth], right[kBlockColumns * kBlockDepth];
  float sums[kBlockRows * kBlockColumns];
};

// Completes sums [rows][columns] and writes them to the target at this row and column.
QFAST_ALWAYS_INLINE void finish_tiles(Finish kind, const Target<float>& target, const float* sums,
                                      int64_t sums_stride, int64_t row, int64_t rows, int64_t column,
                                      int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    for_vectors<float>(columns, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
      const int64_t place = (row + i) * target.stride + column + j;
      Vector<float> sum = load<float>(sums + i * sums_stride + j, kLanes<float>);
      if (kind == Finish::kAdd) {
        sum += load<float>(target.to + place, lanes);
      } else if (kind == Finish::kGate) {
        sum = load<float>(target.gate + place, lanes) <= 0.0f ? Vector<float>{} : sum * target.scale;
      } else if (kind == Finish::kRelu) {
        sum = sum < 0.0f ? Vector<float>{} : sum;  // keeps NaN
      }
      store<float>(target.to + place, sum, lanes);
    });
}

// Multiplies the packed operands of a block into the target or, if more products follow, into block.sums.
QFAST_ONE_COPY static void multiply_block(Finish kind, Block& block, bool first, bool last, int64_t row,
                                          int64_t rows, int64_t depth, int64_t column, int64_t columns,
                                          const Target<float>& target) {
  const int64_t depth_tiles = tiles_for(depth, kTileDepth), side = 2 * kTileSide;
  const bool direct = first && last && (kind == Finish::kPut || kind == Finish::kAdd);
  for (int64_t i = 0; i < rows; i += side)
    for (int64_t j = 0; j < columns; j += side) {
      const TileProduct product{block.left + i * depth_tiles * kTileDepth,
                                block.right + j * depth_tiles * kTileDepth, depth_tiles};
      const bool two_rows = rows - i > kTileSide, two_columns = columns - j > kTileSide;
      const int64_t tile_rows = two_rows ? side : kTileSide, tile_columns = two_columns ? side : kTileSide;
      float* const sums = block.sums + i * kBlockColumns + j;
      TileSums place{sums, kBlockColumns, sums, kBlockColumns};
      if (first) place.start = nullptr;
      if (first && kind != Finish::kAdd && target.bias != nullptr) {
        place.start = target.bias + column + j;
        place.start_stride = 0;
      }
      if (direct && rows - i >= tile_rows && columns - j >= tile_columns) {
        place.to = target.to + (row + i) * target.stride + column + j;
        place.stride = target.stride;
        if (kind == Finish::kAdd) {
          place.start = place.to;
          place.start_stride = target.stride;
        }
        add_tiles(product, place, two_rows, two_columns);
        continue;
      }
      add_tiles(product, place, two_rows, two_columns);
      if (last)
        finish_tiles(kind, target, sums, kBlockColumns, row + i, smaller(tile_rows, rows - i), column + j,
                     smaller(tile_columns, columns - j));
    }
}

// The body of `multiply`.
static void multiply_blocks(Finish kind, const PanelMatrix<float>& right, const float* left, int64_t left_row,
                            int64_t left_step, int64_t rows, const Target<float>& target) {
  Block block;
  const int64_t depth = right.rows, width = right.transposed ? kBlockColumns : right.width;
  for (int64_t row = 0; row < rows; row += kBlockRows) {
    const int64_t block_rows = smaller(kBlockRows, rows - row);
    const auto pack = [&](int64_t k) __attribute__((always_inline)) {
      pack_left(left + row * left_row + k * left_step, left_row, left_step, block_rows,
                smaller(kBlockDepth, depth - k), block.left);
    };
    if (depth <= kBlockDepth) pack(0);
    for (int64_t column = 0; column < right.columns; column += width) {
      const int64_t columns = smaller(width, right.columns - column);
      int64_t k = 0;
      do {  // runs once without products, too
        const int64_t block_depth = smaller(kBlockDepth, depth - k);
        if (depth > kBlockDepth) pack(k);
        if (right.transposed) {
          pack_right_transposed(right.data + column * right.step + k, right.step, block_depth, columns,
                                block.right);
        } else {
          pack_right(right.data + column / width * right.panel_stride + k * right.step, right.step,
                     block_depth, columns, block.right);
        }
        multiply_block(kind, block, k == 0, k + kBlockDepth >= depth, row, block_rows, block_depth, column,
                       columns, target);
        k += kBlockDepth;
      } while (k < depth);
    }
  }
}

}  // namespace

template <Finish Kind, class Element>
void multiply(const PanelMatrix<Element>& right, const Element* left, int64_t left_row, int64_t left_step,
              int64_t rows, const Target<Element>& target) {
  multiply_blocks(Kind, right, left, left_row, left_step, rows, target);
}
