// The products of the recurrent forward pass with bfloat16 operands (amx_tiles.h). The loop over steps and
// the cells are in recurrent_kernels.h, which includes this file.
//
// Every thread packs the weights of all layers once per call. The inputs and h of a step are packed when they
// are known, once for the layer itself and for the layer above. The sums of a block of units are stored in a
// buffer that stays in the first-level cache, from which the cells are computed.
#pragma once

#include "amx_tiles.h"

namespace {

constexpr int64_t kRowTiles = 3;   // row tiles that are multiplied together
constexpr int64_t kUnitSums = 64;  // sums of a block of 16 units

// Adds the products of `Rows` row tiles with one column tile, for the input and for h of the previous step.
// Sums are in tile registers 0 to 2, the left tiles in 4 to 6, the right tile in 7.
template <int Rows>
QFAST_ALWAYS_INLINE void add_tile_column(const TileProduct& input, const TileProduct& hidden,
                                         const TileSums& sums) {
  __asm__ volatile("" ::: "memory");  // the compiler does not know that loads of tiles read memory
  const int64_t start_bytes = sums.start_stride * 4, stride_bytes = sums.stride * 4;
  _tile_loadd(0, sums.start, start_bytes);
  if constexpr (Rows > 1) _tile_loadd(1, sums.start + kTileSide * sums.start_stride, start_bytes);
  if constexpr (Rows > 2) _tile_loadd(2, sums.start + 2 * kTileSide * sums.start_stride, start_bytes);
  const auto add = [](const TileProduct& product) __attribute__((always_inline)) {
    const int64_t next = product.depth_tiles * kTileValues;
    for (int64_t k = 0; k < next; k += kTileValues) {
      _tile_loadd(7, product.right + k, 64);
      _tile_loadd(4, product.left + k, 64);
      _tile_dpbf16ps(0, 4, 7);
      if constexpr (Rows > 1) {
        _tile_loadd(5, product.left + next + k, 64);
        _tile_dpbf16ps(1, 5, 7);
      }
      if constexpr (Rows > 2) {
        _tile_loadd(6, product.left + 2 * next + k, 64);
        _tile_dpbf16ps(2, 6, 7);
      }
    }
  };
  add(input);
  add(hidden);
  _tile_stored(0, sums.to, stride_bytes);
  if constexpr (Rows > 1) _tile_stored(1, sums.to + kTileSide * sums.stride, stride_bytes);
  if constexpr (Rows > 2) _tile_stored(2, sums.to + 2 * kTileSide * sums.stride, stride_bytes);
}

[[maybe_unused]] QFAST_ONE_COPY static void add_tile_column(int64_t row_tiles, const TileProduct& input,
                                                            const TileProduct& hidden, const TileSums& sums) {
  if (row_tiles == 1) {
    add_tile_column<1>(input, hidden, sums);
  } else if (row_tiles == 2) {
    add_tile_column<2>(input, hidden, sums);
  } else {
    add_tile_column<3>(input, hidden, sums);
  }
}

// The products of a tile of at most 48 rows.
template <class Cell>
class TileProducts {
 public:
  TileProducts(const RecurrentJob<float>& job, float* scratch)
      : job_(job), tiles_(RecurrentTiles<float>::carve(job, Cell::kGates, scratch)) {
    for (int64_t l = 0; l < job.layer_count; ++l) {
      const RecurrentLayer<float>& layer = job.layers[l];
      pack_weight(layer.input_weight, layer.features, tiles_.input_weight(l));
      if (layer.hidden_weight != nullptr)
        pack_weight(layer.hidden_weight, job.hidden, tiles_.hidden_weight(l));
    }
  }

  // Packs the initial h of a layer.
  void begin(int64_t l, const float* h, int64_t rows) const {
    pack_left_rows(h, job_.stride, rows, job_.hidden, left(tiles_.h, l));
  }

  // Computes the start of the sums from the products of inputs, [row][block][4][lane].
  void project(int64_t l, const float* input, int64_t row_stride, int64_t feature_stride, int64_t rows,
               float* out) const {
    const RecurrentLayer<float>& layer = job_.layers[l];
    for (int64_t first = 0; first < rows; first += kRowTiles * kTileSide) {
      const int64_t count = smaller(kRowTiles * kTileSide, rows - first);
      pack_left(input + first * row_stride, row_stride, feature_stride, count, layer.features,
                values(tiles_.input));
      LayerStep<float> step{};
      step.features = layer.features;
      step.start = layer.bias;
      for (int64_t block = 0; block < job_.blocks; ++block)
        add_block(step, values(tiles_.input), l, block, count,
                  out + (first * job_.blocks + block) * kUnitSums, job_.blocks * kUnitSums);
    }
  }

  // Computes a step of layer l.
  void step(const LayerStep<float>& step, int64_t l, int64_t rows) const {
    if (step.features > 0 && reads_input(l))
      pack_left(step.input, step.input_row, step.input_feature, rows, step.features, values(tiles_.input));
    for (int64_t block = 0; block < job_.blocks; ++block) {
      const bf16_bits* const input = reads_input(l) ? values(tiles_.input) : left(tiles_.h, l - 1);
      add_block(step, input, l, block, rows, tiles_.sums, kUnitSums);
      const int64_t unit = block * kTileSide, count = smaller(kTileSide, job_.hidden - unit);
      for_row_tiles<2>(rows, [&]<int Rows>(int64_t row) __attribute__((always_inline)) {
        Sums<float, Rows, 4> sums;
#pragma GCC unroll 2
        for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
          for (int g = 0; g < 4; ++g)
            sums.at[i][g] = load<float>(tiles_.sums + (row + i) * kUnitSums + g * kTileSide, kTileSide);
        finish_cells<Cell>(step, sums, unit, row, count);
      });
    }
    begin(l, step.h, rows);
  }

 private:
  static bf16_bits* values(float* tiles) { return reinterpret_cast<bf16_bits*>(tiles); }
  bf16_bits* left(float* tiles, int64_t l) const { return values(tiles + l * tiles_.h_elements); }

  // Without dropout, the input of an upper layer is h of the layer below, which is packed already.
  bool reads_input(int64_t l) const { return l == 0 || job_.dropout.active; }

  void pack_weight(const float* weight, int64_t features, float* to) const {
    constexpr int64_t width = Cell::kGates * kTileSide;
    const int64_t panel = Cell::kGates * tiles_for(features, kTileDepth) * kTileValues;
    for (int64_t block = 0; block < job_.blocks; ++block)
      pack_right(weight + block * features * width, width, features, width, values(to) + block * panel);
  }

  // Computes the four sums of a block of units for all rows, [row][sum][lane] with this row stride.
  void add_block(const LayerStep<float>& step, const bf16_bits* input, int64_t l, int64_t block, int64_t rows,
                 float* to, int64_t stride) const {
    for (int64_t sum = 0; sum < 4; ++sum) {
      const int64_t hidden_gate = sum - (4 - Cell::kGates);
      const bool has_input = sum < Cell::kGates && step.features > 0;
      const bool has_hidden = hidden_gate >= 0 && step.h_before != nullptr;
      const int64_t input_depth = tiles_for(step.features, kTileDepth);
      const int64_t hidden_depth = tiles_for(job_.hidden, kTileDepth);
      const TileProduct input_product{
          input, values(tiles_.input_weight(l)) + (block * Cell::kGates + sum) * input_depth * kTileValues,
          has_input ? input_depth : 0};
      const TileProduct hidden_product{
          left(tiles_.h, l),
          values(tiles_.hidden_weight(l)) + (block * Cell::kGates + hidden_gate) * hidden_depth * kTileValues,
          has_hidden ? hidden_depth : 0};
      const int64_t column = sum * kTileSide;
      add_tile_column(tiles_for(rows, kTileSide), input_product, hidden_product,
                      {step.start + block * kUnitSums + column, step.start_row, to + column, stride});
    }
  }

  const RecurrentJob<float>& job_;
  const RecurrentTiles<float> tiles_;
};

}  // namespace
