// Backward pass of a temporal convolution stack with products of bfloat16 operands (amx_tiles.h). It replaces
// the kernel of temporal_conv_kernels_backward.h.
//
// Gradients are packed twice when they are computed: as left operands [slot][row][channel] of the products
// with weights, and as pairs of rows for the gradients of weights. The other operand of these is the input,
// transposed. A tile of 32 batch rows is a single tile of products, so the sums of the gradient of a weight
// remain in registers for all slots. Bound by packing, by memory and by the tile products.
#pragma once

#include "temporal_conv/temporal_conv_kernels_backward.h"
#include "temporal_conv/temporal_conv_tiles_amx.h"

namespace {

// Tiles of all rows of some slots: [slot][tile].
struct SlotTiles {
  bf16_bits* data;
  int64_t slot_stride;

  SlotTiles(float* memory, int64_t channels)
      : data(reinterpret_cast<bf16_bits*>(memory)),
        slot_stride(tiles_for(channels, kTileSide) * kTileValues) {}

  bf16_bits* at(int64_t slot, int64_t tile) const { return data + slot * slot_stride + tile * kTileValues; }
};

// The gradient of a weight: for each slot that has the tap, `left` of the slot that it reads and `right` of
// the slot itself.
struct WeightProducts {
  const TapTable& reads;
  const SlotTiles &left, &right;
  int64_t back;  // number of the tap from the end
  float* sums;
  int64_t stride;
};

// Adds the products to Rows x Columns tiles of the sums, as in add_tiles.
template <int Rows, int Columns>
QFAST_ALWAYS_INLINE void add_weight_tiles(const WeightProducts& products, int64_t row, int64_t column) {
  __asm__ volatile("" ::: "memory");  // the compiler does not know that loads of tiles read memory
  float* const to = products.sums + row * kTileSide * products.stride + column * kTileSide;
  float* const next = to + kTileSide * products.stride;
  const int64_t bytes = products.stride * 4;
  _tile_loadd(0, to, bytes);
  if constexpr (Columns > 1) _tile_loadd(1, to + kTileSide, bytes);
  if constexpr (Rows > 1) _tile_loadd(2, next, bytes);
  if constexpr (Rows > 1 && Columns > 1) _tile_loadd(3, next + kTileSide, bytes);
  for (int64_t slot = 0; slot < products.reads.slots; ++slot) {
    // The last tap of a slot is the current step. Taps before the window are missing at the front.
    const int64_t tap = products.reads.begin[slot + 1] - products.back;
    if (tap < products.reads.begin[slot]) continue;
    const bf16_bits* const left = products.left.at(products.reads.taps[tap].slot, row);
    const bf16_bits* const right = products.right.at(slot, column);
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Columns > 1) {
      _tile_loadd(7, right + kTileValues, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Rows > 1) {
      _tile_loadd(5, left + kTileValues, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Columns > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, to, bytes);
  if constexpr (Columns > 1) _tile_stored(1, to + kTileSide, bytes);
  if constexpr (Rows > 1) _tile_stored(2, next, bytes);
  if constexpr (Rows > 1 && Columns > 1) _tile_stored(3, next + kTileSide, bytes);
}

// to[tap][feature][channel] += sum over slots and rows of input * grad.
QFAST_ONE_COPY static void add_weight(const TapTable& reads, int64_t kernel, const SlotTiles& input,
                                      int64_t features, const SlotTiles& grad, int64_t channels, float* to) {
  const int64_t row_tiles = tiles_for(features, kTileSide), column_tiles = tiles_for(channels, kTileSide);
  for (int64_t tap = 0; tap < kernel; ++tap) {
    const int64_t stride = column_tiles * kTileSide;
    const WeightProducts products{reads, input, grad, kernel - tap, to + tap * row_tiles * kTileSide * stride,
                                  stride};
    for (int64_t i = 0; i < row_tiles; i += 2)
      for (int64_t j = 0; j < column_tiles; j += 2) {
        const bool two_rows = i + 1 < row_tiles, two_columns = j + 1 < column_tiles;
        if (two_rows && two_columns) {
          add_weight_tiles<2, 2>(products, i, j);
        } else if (two_rows) {
          add_weight_tiles<2, 1>(products, i, j);
        } else if (two_columns) {
          add_weight_tiles<1, 2>(products, i, j);
        } else {
          add_weight_tiles<1, 1>(products, i, j);
        }
      }
  }
}

// Packs rows [rows][16 columns], row stride `stride`, as pairs of rows.
QFAST_ALWAYS_INLINE void pack_row_pairs(const float* from, int64_t stride, int64_t rows, bf16_bits* to) {
  Vector<float> pairs[16];
  load_pairs(from, stride, rows, kTileSide, pairs);
  store_tile(pairs, to);
}

// The packed transposed weights of a block.
struct BackwardWeights {
  TileWeight first, second, residual;

  BackwardWeights(const BlockJob<float>& block, float* scratch)
      : first(scratch + block.first_tiles, block.input_panels, block.kernel, block.channels),
        second(scratch + block.second_tiles, block.panels, block.kernel, block.channels),
        residual(scratch + block.residual_tiles, block.input_panels, 1, block.channels) {}
};

struct BackwardTile {
  const NetworkJob<float>& job;
  int64_t first_row, rows;
  float *scratch, *sums;

  Activation<float> dense(float* data, int64_t channels) const {
    return {data, rows * channels, channels, 1};
  }

  // Computes the gradients of one block, as in TileBackward. `of_sum` may be the memory of `grad`.
  void block(const BlockJob<float>& block, const Activation<const float>& grad,
             const Activation<const float>& input, const Activation<const float>& between,
             const Activation<const float>& output, const unsigned char* signs,
             const Activation<float>& of_sum, const Activation<float>& of_input) const {
    const int64_t channels = block.channels;
    const Operands of_second(scratch + job.of_second_at, rows, channels),
        of_first(scratch + job.of_first_at, rows, channels),
        of_sum_operands(scratch + job.of_sum_at, rows, channels);
    const SlotTiles columns(scratch + job.columns_at, channels),
        sum_columns(scratch + job.sum_columns_at, channels);
    through_output(block, grad, output, signs, of_sum, of_second, columns, of_sum_operands, sum_columns);
    const SlotTiles between_rows = transposed(between, block.first.slots, channels, nullptr);
    add_weight(block.second, block.kernel, between_rows, channels, columns, channels,
               sums + block.second_sum);
    through_second(block, of_second, between, of_first, columns);
    const SlotTiles input_rows = transposed(input, block.input_slots, block.features, &block);
    add_weight(block.first, block.kernel, input_rows, block.features, columns, channels,
               sums + block.first_sum);
    if (block.downsample)
      add_weight(block.residual_reads, 1, input_rows, block.features, sum_columns, channels,
                 sums + block.residual_sum);
    if (of_input.data != nullptr) through_first(block, of_first, of_sum_operands, of_sum, of_input);
  }

 private:
  // Packs the slots of an activation with its channels as rows, for slots that the block reads.
  SlotTiles transposed(const Activation<const float>& from, int64_t slots, int64_t channels,
                       const BlockJob<float>* reader) const {
    const SlotTiles to(scratch + job.transposed_at, channels);
    for (int64_t slot = 0; slot < slots; ++slot)
      if (reader == nullptr || is_read(*reader, slot))
        pack_left(at(from, slot, 0), from.channel_stride, from.row_stride, channels, rows, to.at(slot, 0));
    return to;
  }

  // Computes of_sum and the operands of the gradients of the sum y + residual and of the second convolution
  // before ReLU and dropout.
  void through_output(const BlockJob<float>& block, const Activation<const float>& grad,
                      const Activation<const float>& output, const unsigned char* signs,
                      const Activation<float>& of_sum, const Operands& of_second, const SlotTiles& columns,
                      const Operands& of_sum_operands, const SlotTiles& sum_columns) const {
    const int64_t row_signs = (block.channels + 7) / 8;
    const float scale = static_cast<float>(job.dropout.scale);
    for (int64_t column = 0; column < block.channels; column += kTileSide) {
      const int64_t lanes = smaller(kTileSide, block.channels - column), tile = column / kTileSide;
      Vector<float> second_total = {}, sum_total = {};
      for (int64_t slot = 0; slot < block.second.slots; ++slot) {
        alignas(64) float of_seconds[kTileDepth * kTileSide], of_sums[kTileDepth * kTileSide];
        Vector<float> second_part = {}, sum_part = {};  // one sum per slot, as in add_columns
        for (int64_t row = 0; row < rows; ++row) {
          const auto value = load<float>(at(output, slot, row) + column, lanes);
          const auto of_output = passed<float>(value, load<float>(at(grad, slot, row) + column, lanes));
          const auto second =
              where_sign<float>(signs + (slot * rows + row) * row_signs, column, lanes, of_output * scale);
          store<float>(of_sum.data + slot * of_sum.slot_stride + row * of_sum.row_stride + column, of_output,
                       lanes);
          store<float>(of_seconds + row * kTileSide, second, AllLanes{});
          second_part += second;
          store_operand(of_second, slot, row, column, second, Vector<float>{});
          if (!block.downsample) continue;
          store<float>(of_sums + row * kTileSide, of_output, AllLanes{});
          sum_part += of_output;
          store_operand(of_sum_operands, slot, row, column, of_output, Vector<float>{});
        }
        pack_row_pairs(of_seconds, kTileSide, rows, columns.at(slot, tile));
        if (block.downsample) pack_row_pairs(of_sums, kTileSide, rows, sum_columns.at(slot, tile));
        second_total += second_part;
        sum_total += sum_part;
      }
      add_to(sums + block.second_bias_sum + column, second_total);
      if (block.downsample) add_to(sums + block.residual_bias_sum + column, sum_total);
    }
  }

  // The sums of biases are padded to whole vectors.
  static void add_to(float* sum, Vector<float> values) {
    store<float>(sum, load<float>(sum, AllLanes{}) + values, AllLanes{});
  }

  // Computes the operands of the gradient of the first convolution before ReLU and dropout.
  void through_second(const BlockJob<float>& block, const Operands& of_second,
                      const Activation<const float>& between, const Operands& of_first,
                      const SlotTiles& columns) const {
    const TileWeight weight = BackwardWeights(block, scratch).second;
    const TapTable& taps = block.second_read_by;
    for_column_tiles(block.panels, [&](int64_t p, int64_t j, bool two) __attribute__((always_inline)) {
      const int64_t column = p * block.panels.width + j;
      const int64_t count = smaller(two ? kSumsSide : kTileSide, block.channels - column);
      Vector<float> totals[2] = {};
      for (int64_t slot = 0; slot < block.first.slots; ++slot) {
        TileBuffer buffer;
        sum_products(rows, two,
                     {taps.taps + taps.begin[slot], taps.taps + taps.begin[slot + 1], of_second,
                      weight.at(p, j), weight.tap_stride, weight.depth_tiles},
                     nullptr, nullptr, buffer);
        gate_slot(slot, column, count, between, buffer, of_first, totals);
        for (int64_t first = 0; first < count; first += kTileSide)
          pack_row_pairs(buffer.sums + first, kSumsSide, rows,
                         columns.at(slot, (column + first) / kTileSide));
      }
      for (int64_t half = 0; half * kTileSide < count; ++half)
        add_to(sums + block.first_bias_sum + column + half * kTileSide, totals[half]);
    });
  }

  // Sets the gradient to 0 where the output of the first convolution is, packs it and adds it to the totals.
  void gate_slot(int64_t slot, int64_t column, int64_t count, const Activation<const float>& between,
                 TileBuffer& buffer, const Operands& of_first, Vector<float> totals[2]) const {
    const float scale = static_cast<float>(job.dropout.scale);
    Vector<float> parts[2] = {};
    for (int64_t row = 0; row < rows; ++row) {
      const float* const outputs = at(between, slot, row) + column;
      Vector<float> values[2] = {};
#pragma GCC unroll 2
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t first = half * kTileSide, lanes = smaller(kTileSide, count - first);
        if (lanes <= 0) continue;
        float* const sum = buffer.sums + row * kSumsSide + first;
        values[half] = first_lanes(
            passed<float>(load<float>(outputs + first, lanes), load<float>(sum, AllLanes{}) * scale), lanes);
        store<float>(sum, values[half], AllLanes{});
        parts[half] += values[half];
      }
      store_operand(of_first, slot, row, column, values[0], values[1]);
    }
    totals[0] += parts[0];
    totals[1] += parts[1];
  }

  // Computes the gradient of the block's input.
  void through_first(const BlockJob<float>& block, const Operands& of_first, const Operands& of_sum_operands,
                     const Activation<float>& of_sum, const Activation<float>& of_input) const {
    const Panels& panels = block.input_panels;
    const BackwardWeights weights(block, scratch);
    const TapTable& taps = block.first_read_by;
    for_column_tiles(panels, [&](int64_t p, int64_t j, bool two) __attribute__((always_inline)) {
      const int64_t column = p * panels.width + j;
      const int64_t count = smaller(two ? kSumsSide : kTileSide, block.features - column);
      for (int64_t slot = 0; slot < block.input_slots; ++slot) {
        const int32_t residual = block.residual_of[slot];
        const Tap only{0, residual};
        const TapProducts down{&only,
                               &only + 1,
                               of_sum_operands,
                               weights.residual.at(p, j),
                               weights.residual.tap_stride,
                               weights.residual.depth_tiles};
        TileBuffer buffer;
        sum_products(rows, two,
                     {taps.taps + taps.begin[slot], taps.taps + taps.begin[slot + 1], of_first,
                      weights.first.at(p, j), weights.first.tap_stride, weights.first.depth_tiles},
                     block.downsample && residual >= 0 ? &down : nullptr, nullptr, buffer);
        const bool adds = !block.downsample && residual >= 0;
        store_slot(slot, column, count, buffer, adds ? at(reading(of_sum), residual, 0) + column : nullptr,
                   of_sum.row_stride, of_input);
      }
    });
  }

  // Stores the sums of a slot plus `residual` unless it is null.
  void store_slot(int64_t slot, int64_t column, int64_t count, const TileBuffer& buffer,
                  const float* residual, int64_t residual_stride, const Activation<float>& to) const {
    for (int64_t row = 0; row < rows; ++row) {
      float* const place = to.data + slot * to.slot_stride + row * to.row_stride + column;
      for_vectors<float>(count, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
        Vector<float> values = load<float>(buffer.sums + row * kSumsSide + j, AllLanes{});
        if (residual != nullptr) values += load<float>(residual + row * residual_stride + j, lanes);
        store<float>(place + j, values, lanes);
      });
    }
  }
};

}  // namespace

// Computes the gradients of tiles [begin, end) and adds the weight gradients to `sums`. The scratch contains
// two gradients of a tile, the packed weights and the operands.
template <>
void temporal_conv_backward<float>(const NetworkJob<float>& job, int64_t begin, int64_t end, float* scratch,
                                   float* sums) {
  for (int64_t i = 0; i < job.blocks_count && begin < end; ++i) {
    const BlockJob<float>& block = job.blocks[i];
    const BackwardWeights weights(block, scratch);
    weights.second.pack(block.second_turned);
    weights.first.pack(block.first_turned);
    if (block.downsample) weights.residual.pack(block.residual_turned);
  }
  const int64_t buffer_elements = job.widest_elements * job.tile_rows + kPanelPadding;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first_row = tile * job.tile_rows, rows = smaller(job.tile_rows, job.batch - first_row);
    const BackwardTile backward{job, first_row, rows, scratch, sums};
    float* const activations = job.activations + first_row * job.row_elements;
    const unsigned char* const signs = job.signs + first_row * job.row_signs;
    Activation<const float> grad = job.grad, output = reading(job.output);
    grad.data += first_row * grad.row_stride;
    output.data += first_row * output.row_stride;
    float *current = scratch, *next = scratch + buffer_elements;
    for (int64_t i = job.blocks_count - 1; i >= 0; --i) {
      const BlockJob<float>& block = job.blocks[i];
      const auto between = backward.dense(activations + block.between_at * rows, block.channels);
      Activation<const float> input = job.x;
      Activation<float> of_input = job.grad_x;
      if (i > 0) {
        input = reading(backward.dense(activations + job.blocks[i - 1].output_at * rows, block.features));
        of_input = backward.dense(next, block.features);
      } else {
        input.data += first_row * input.row_stride;
        if (of_input.data != nullptr) of_input.data += first_row * of_input.row_stride;
      }
      backward.block(block, grad, input, reading(between), output, signs + block.signs_at * rows,
                     backward.dense(current, block.channels), of_input);
      grad = reading(of_input);
      output = input;
      float* const unused = current;
      current = next;
      next = unused;
    }
  }
}
