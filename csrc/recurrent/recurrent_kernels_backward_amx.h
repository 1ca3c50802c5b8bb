// The products of the recurrent backward pass with bfloat16 operands (amx_tiles.h). The loop over steps and
// the gradients of the cells are in recurrent_kernels_backward.h, which includes this file.
//
// The gradients of the sums of a step are packed once as a left operand, for the gradients of h and of the
// input. The gradients of a chunk of steps are packed once as a right operand, for the gradients of both
// weights. Both contain all four sums of every unit; a weight that does not contribute to a sum has zeros in
// its place.
#pragma once

#include "amx_tiles.h"

namespace {

// out[rows][columns] = or, if `adds`, += product. Tiles that are not whole are computed in `edge`.
static void store_product(const TileProduct& product, int64_t rows, int64_t columns, bool adds, float* out,
                          int64_t stride, float* edge) {
  constexpr int64_t side = 2 * kTileSide;
  for (int64_t j = 0; j < columns; j += side)
    for (int64_t i = 0; i < rows; i += side) {
      const int64_t tile = product.depth_tiles * kTileDepth;
      const TileProduct part{product.left + i * tile, product.right + j * tile, product.depth_tiles};
      const bool two_rows = rows - i > kTileSide, two_columns = columns - j > kTileSide;
      float* const to = out + i * stride + j;
      const int64_t tile_rows = two_rows ? side : kTileSide, tile_columns = two_columns ? side : kTileSide;
      if (rows - i >= tile_rows && columns - j >= tile_columns) {
        add_tiles(part, {adds ? to : nullptr, stride, to, stride}, two_rows, two_columns);
        continue;
      }
      add_tiles(part, {nullptr, 0, edge, side}, two_rows, two_columns);
      for (int64_t row = 0; row < smaller(tile_rows, rows - i); ++row)
        for_vectors<float>(smaller(tile_columns, columns - j),
                           [&](int64_t k, int64_t lanes) __attribute__((always_inline)) {
                             float* const place = to + row * stride + k;
                             const Vector<float> sum = load<float>(edge + row * side + k, lanes);
                             store<float>(place, adds ? sum + load<float>(place, lanes) : sum, lanes);
                           });
    }
}

template <class Cell>
class TileGradients {
 public:
  TileGradients(const RecurrentJob<float>& job, float* scratch)
      : job_(job), tiles_(RecurrentGradientTiles<float>::carve(job, scratch)) {
    for (int64_t l = 0; l < job.layer_count; ++l) {
      const RecurrentLayer<float>& layer = job.layers[l];
      if (layer.hidden_turned != nullptr)
        pack_turned(layer.hidden_turned, kFirstHidden<Cell>, job.hidden_width, job.hidden, turned(l, true));
      if (layer.input_turned != nullptr)
        pack_turned(layer.input_turned, 0, layer.input_width, layer.features, turned(l, false));
    }
  }

  void to_hidden(const BackwardTile<float>& tile, int64_t l, int64_t t) const {
    multiply_turned(tile.sums(l, t), tile.sum_stride, tile.rows, turned(l, true), job_.hidden,
                    tile.layers[l].grad_h, job_.stride);
  }

  void to_input(int64_t l, const float* sums, int64_t sum_stride, int64_t rows, float* out,
                int64_t stride) const {
    multiply_turned(sums, sum_stride, rows, turned(l, false), job_.layers[l].features, out, stride);
  }

  // Adds or, if `sets`, stores the gradients of both weights of a layer over the steps [begin, end). The
  // gradient of the hidden weight is not computed if hidden_sum is null.
  void add_weights(const BackwardTile<float>& tile, int64_t l, int64_t begin, int64_t end, bool sets,
                   float* input_sum, float* hidden_sum) const {
    const int64_t step_tiles = tiles_for(tile.rows, kTileDepth), depth_tiles = (end - begin) * step_tiles;
    for (int64_t t = begin; t < end; ++t)
      for (int64_t column = 0; column < job_.blocks * 4; ++column)
        pack_right(
            tile.sums(l, t) + column * kTileSide, tile.sum_stride, tile.rows, kTileSide,
            values(tiles_.grad_columns) + (column * depth_tiles + (t - begin) * step_tiles) * kTileValues);
    add_weight(tile, l, begin, end, false, job_.layers[l].features, sets, input_sum);
    if (hidden_sum != nullptr) add_weight(tile, l, begin, end, true, job_.hidden, sets, hidden_sum);
  }

 private:
  static bf16_bits* values(float* tiles) { return reinterpret_cast<bf16_bits*>(tiles); }
  bf16_bits* turned(int64_t l, bool hidden) const {
    return values(tiles_.turned + (2 * l + (hidden ? 1 : 0)) * tiles_.turned_elements);
  }

  void multiply_turned(const float* sums, int64_t sum_stride, int64_t rows, const bf16_bits* weight,
                       int64_t columns, float* out, int64_t stride) const {
    pack_left_rows(sums, sum_stride, rows, job_.blocks * 64, values(tiles_.grads));
    store_product({values(tiles_.grads), weight, tiles_.depth_tiles}, rows, columns, false, out, stride,
                  tiles_.edge);
  }

  // Packs a transposed weight [panel][block][gate][lane][column] whose gates are sums from `first` on.
  void pack_turned(const float* weight, int64_t first, int64_t width, int64_t columns, bf16_bits* to) const {
    float rows[kTileDepth * kTileSide];
    for (int64_t j = 0; j < columns; j += kTileSide)
      for (int64_t k = 0; k < tiles_.depth_tiles; ++k, to += kTileValues) {
        for (int64_t row = 0; row < kTileDepth; ++row) {
          const int64_t block = k / 2, gate = k % 2 * 2 + row / kTileSide - first;
          const bool contributes = gate >= 0 && gate < Cell::kGates;
          const int64_t at = j / width * job_.blocks * Cell::kGates * kTileSide * width +
                             ((block * Cell::kGates + gate) * kTileSide + row % kTileSide) * width +
                             j % width;
          for (int64_t i = 0; i < kTileSide; ++i)
            rows[row * kTileSide + i] = contributes && j + i < columns ? weight[at + i] : 0;
        }
        pack_right(rows, kTileSide, kTileDepth, kTileSide, to);
      }
  }

  void add_weight(const BackwardTile<float>& tile, int64_t l, int64_t begin, int64_t end, bool hidden,
                  int64_t features, bool sets, float* sum) const {
    constexpr int64_t gates = Cell::kGates * kTileSide;
    const int64_t step_tiles = tiles_for(tile.rows, kTileDepth);
    // The first step has no h before it if there is no initial state: the product starts with the second one.
    const bool skips_first = hidden && output_rows<Cell>(job_, tile, l, begin - 1).data == nullptr;
    const int64_t first = begin + (skips_first ? 1 : 0), depth_tiles = (end - first) * step_tiles;
    if (depth_tiles == 0 && !sets) return;
    for (int64_t i = 0; i < features; i += kTileSide)
      for (int64_t t = first; t < end; ++t) {
        const ReadRows<float> rows =
            hidden ? output_rows<Cell>(job_, tile, l, t - 1) : input_rows<Cell>(job_, tile, l, t);
        pack_left(
            rows.data + i * rows.feature_stride, rows.feature_stride, rows.row_stride,
            smaller(kTileSide, features - i), tile.rows,
            values(tiles_.inputs) + (i / kTileSide * depth_tiles + (t - first) * step_tiles) * kTileValues);
      }
    for (int64_t block = 0; block < job_.blocks; ++block)
      for (int64_t gate = 0; gate < Cell::kGates; ++gate) {
        const int64_t column = block * 4 + (hidden ? kFirstHidden<Cell> : 0) + gate;
        const bf16_bits* const right =
            values(tiles_.grad_columns) +
            (column * (end - begin) * step_tiles + (first - begin) * step_tiles) * kTileValues;
        store_product({values(tiles_.inputs), right, depth_tiles}, features, kTileSide, !sets,
                      sum + block * features * gates + gate * kTileSide, gates, tiles_.edge);
      }
  }

  const RecurrentJob<float>& job_;
  const RecurrentGradientTiles<float> tiles_;
};

}  // namespace
