// Forward pass of a temporal convolution stack with products of bfloat16 operands. It replaces the kernel of
// temporal_conv_kernels.h, and stores the same activations in float32 for the backward pass.
//
// A thread owns tiles of 32 batch rows. An operand is packed once, when it is computed, and multiplied for
// all taps that read it. Bias, ReLU, dropout and residual are applied to the sums before they are packed.
// Bound by the vector instructions that do this and by the memory of the saved activations.
#pragma once

#include "temporal_conv/temporal_conv_tiles_amx.h"

namespace {

// The packed weights of a block.
struct ForwardWeights {
  TileWeight first, second, residual;

  ForwardWeights(const BlockJob<float>& block, float* scratch)
      : first(scratch + block.first_tiles, block.panels, block.kernel, block.features),
        second(scratch + block.second_tiles, block.panels, block.kernel, block.channels),
        residual(scratch + block.residual_tiles, block.panels, 1, block.features) {}
};

struct ForwardTile {
  const NetworkJob<float>& job;
  int64_t first_row, rows;

  // between = dropout(relu(first(input) + bias)), as an operand and, unless its data is null, in float32.
  void first(const BlockJob<float>& block, int32_t convolution, const TileWeight& weight,
             const Operands& input, const Operands& between, const Activation<float>& kept) const {
    for_column_tiles(block.panels, [&](int64_t p, int64_t j, bool two) __attribute__((always_inline)) {
      const int64_t column = p * block.panels.width + j;
      const int64_t columns = smaller(two ? kSumsSide : kTileSide, block.channels - column);
      for (int64_t slot = 0; slot < block.first.slots; ++slot) {
        TileBuffer buffer;
        sum_products(rows, two, products(block.first, slot, input, weight, p, j), nullptr,
                     block.first_bias + column, buffer);
        drop_sums(buffer, {first_row, column, convolution, block.between_positions[slot]}, columns);
        for (int64_t row = 0; row < rows; ++row) {
          const Vector<float> values = relu_lanes(buffer, row, 0, columns),
                              next = relu_lanes(buffer, row, kTileSide, columns);
          store_operand(between, slot, row, column, values, next);
          if (kept.data == nullptr) continue;
          float* const to = kept.data + slot * kept.slot_stride + row * kept.row_stride + column;
          store<float>(to, values, smaller(kTileSide, columns));
          if (columns > kTileSide) store<float>(to + kTileSide, next, columns - kTileSide);
        }
      }
    });
  }

  // output = relu(dropout(relu(second(between) + bias)) + residual), in float32 and, unless `operands` is
  // null, as an operand.
  void second(const BlockJob<float>& block, int32_t convolution, const ForwardWeights& weights,
              const Operands& input, const Activation<const float>& residual, const Operands& between,
              const Activation<float>& output, const Operands* operands, unsigned char* signs) const {
    for_column_tiles(block.panels, [&](int64_t p, int64_t j, bool two) __attribute__((always_inline)) {
      const int64_t column = p * block.panels.width + j;
      const int64_t columns = smaller(two ? kSumsSide : kTileSide, block.channels - column);
      for (int64_t slot = 0; slot < block.second.slots; ++slot) {
        TileBuffer buffer, down;
        sum_products(rows, two, products(block.second, slot, between, weights.second, p, j), nullptr,
                     block.second_bias + column, buffer);
        Activation<const float> other{
            at(residual, block.residual[slot], 0) + column * residual.channel_stride, 0, residual.row_stride,
            residual.channel_stride};
        if (block.downsample) {
          sum_products(rows, two, products(block.residual_reads, slot, input, weights.residual, p, j),
                       nullptr, block.residual_bias + column, down);
          other = {down.sums, 0, kSumsSide, 1};
        }
        drop_sums(buffer, {first_row, column, convolution, block.output_positions[slot]}, columns);
        finish_slot(block, slot, column, columns, buffer, other, output, operands, signs);
      }
    });
  }

 private:
  static TapProducts products(const TapTable& reads, int64_t slot, const Operands& left,
                              const TileWeight& weight, int64_t panel, int64_t column) {
    return {reads.taps + reads.begin[slot],
            reads.taps + reads.begin[slot + 1],
            left,
            weight.at(panel, column),
            weight.tap_stride,
            weight.depth_tiles};
  }

  static Vector<float> relu_lanes(const TileBuffer& buffer, int64_t row, int64_t column, int64_t columns) {
    if (columns <= column) return Vector<float>{};
    const auto values = load<float>(buffer.sums + row * kSumsSide + column, AllLanes{});
    return first_lanes(relu<float>(values), columns - column);
  }

  // Applies ReLU and dropout to the sums, if there is dropout.
  void drop_sums(TileBuffer& buffer, const Place& place, int64_t columns) const {
    if (!job.dropout.active) return;
    for (int64_t i = 0; i < rows * kSumsSide; i += kTileSide)
      store<float>(buffer.sums + i, relu<float>(load<float>(buffer.sums + i, AllLanes{})), AllLanes{});
    drop<float>(job.dropout, place, rows, columns, buffer.sums, kSumsSide);
  }

  static Vector<float> residual_lanes(const float* from, int64_t stride, int64_t lanes) {
    if (stride == 1) return load<float>(from, lanes);
    Vector<float> values = {};
    for (int64_t l = 0; l < lanes; ++l) values[l] = from[l * stride];
    return values;
  }

  // Stores the signs of the result of the second convolution, and the output.
  void finish_slot(const BlockJob<float>& block, int64_t slot, int64_t column, int64_t columns,
                   const TileBuffer& buffer, const Activation<const float>& other,
                   const Activation<float>& output, const Operands* operands, unsigned char* signs) const {
    const int64_t row_signs = (block.channels + 7) / 8;
    for (int64_t row = 0; row < rows; ++row) {
      float* const to = output.data + slot * output.slot_stride + row * output.row_stride + column;
      const float* const residual = other.data + row * other.row_stride;
      Vector<float> values[2] = {};
#pragma GCC unroll 2
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t first = half * kTileSide, lanes = smaller(kTileSide, columns - first);
        if (lanes <= 0) continue;
        const auto value = relu_lanes(buffer, row, first, columns);
        if (signs != nullptr)
          store_signs<float>(signs + (slot * rows + row) * row_signs, column + first, lanes,
                             passing_lanes<float>(value));
        const auto sum =
            value + residual_lanes(residual + first * other.channel_stride, other.channel_stride, lanes);
        values[half] = first_lanes(relu<float>(sum), lanes);
        store<float>(to + first, values[half], lanes);
      }
      if (operands != nullptr) store_operand(*operands, slot, row, column, values[0], values[1]);
    }
  }
};

}  // namespace

// Computes tiles [begin, end). The scratch contains the packed weights, the operands and, if activations are
// not saved, the activations of a tile.
template <>
void temporal_conv_forward<float>(const NetworkJob<float>& job, int64_t begin, int64_t end, float* scratch) {
  for (int64_t i = 0; i < job.blocks_count && begin < end; ++i) {
    const BlockJob<float>& block = job.blocks[i];
    const ForwardWeights weights(block, scratch);
    weights.first.pack(block.first_weight);
    weights.second.pack(block.second_weight);
    if (block.downsample) weights.residual.pack(block.residual_weight);
  }
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first_row = tile * job.tile_rows, rows = smaller(job.tile_rows, job.batch - first_row);
    const ForwardTile forward{job, first_row, rows};
    float* const activations = job.activations == nullptr ? scratch + job.slot_elements
                                                          : job.activations + first_row * job.row_elements;
    unsigned char* const signs = job.signs == nullptr ? nullptr : job.signs + first_row * job.row_signs;
    Activation<const float> input = job.x;
    input.data += first_row * input.row_stride;
    const Operands inputs(scratch + job.inputs_at[0], rows, job.blocks[0].features);
    for (int64_t slot = 0; slot < job.blocks[0].input_slots; ++slot)
      if (is_read(job.blocks[0], slot)) pack_slot(input, slot, rows, job.blocks[0].features, inputs);
    for (int32_t i = 0; i < job.blocks_count; ++i) {
      const BlockJob<float>& block = job.blocks[i];
      const int64_t channels = block.channels;
      const bool last = i + 1 == job.blocks_count;
      const Operands read(scratch + job.inputs_at[i % 2], rows, block.features),
          between(scratch + job.between_operands_at, rows, channels),
          next(scratch + job.inputs_at[(i + 1) % 2], rows, channels);
      Activation<float> kept{nullptr, rows * channels, channels, 1}, output = kept;
      if (job.activations != nullptr) kept.data = activations + block.between_at * rows;
      output.data = activations + block.output_at * rows;
      if (last) {
        output = job.output;
        output.data += first_row * output.row_stride;
      }
      const ForwardWeights weights(block, scratch);
      forward.first(block, 2 * i, weights.first, read, between, kept);
      forward.second(block, 2 * i + 1, weights, read, input, between, output, last ? nullptr : &next,
                     signs == nullptr ? nullptr : signs + block.signs_at * rows);
      input = reading(output);
    }
  }
}
