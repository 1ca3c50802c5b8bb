// Places the operands of products of bfloat16 in the scratch of a thread. It extends temporal_conv_pack.h;
// temporal_conv_kernels_amx.h describes the buffers. Host only.
#pragma once

#include <algorithm>
#include <vector>

#include "common.h"
#include "temporal_conv/temporal_conv.h"

namespace qfast {

constexpr int64_t kTileSide = 16, kTileDepth = 32;             // as in amx_tiles.h
constexpr int64_t kTileElements = kTileSide * kTileDepth / 2;  // float32 elements in the memory of a tile

// Returns the elements of a packed weight, which has `rows` rows for each tap.
inline int64_t weight_elements(const Panels& panels, int64_t taps, int64_t rows) {
  const int64_t tiles = panels.width / kTileSide * (rounded_up(rows, kTileDepth) / kTileDepth);
  return panels.count * taps * tiles * kTileElements;
}

// Returns the elements of the left operands of some slots. The last tile may read beyond its rows.
inline int64_t operand_elements(int64_t slots, int64_t channels) {
  return (slots + 1) * kTileDepth * rounded_up(channels, kTileDepth) / 2;
}

// Returns the elements of tiles for some slots, with one row of tiles for all rows of the batch tile.
inline int64_t column_elements(int64_t slots, int64_t channels) {
  return slots * (rounded_up(channels, kTileSide) / kTileSide) * kTileElements;
}

// Appends buffers to the scratch.
class TilePlaces {
 public:
  explicit TilePlaces(int64_t& scratch_elements) : used_(scratch_elements) {
    used_ = rounded_up(used_, kTileSide);
  }

  int64_t add(int64_t elements) {
    const int64_t place = used_;
    used_ += elements;
    return place;
  }

 private:
  int64_t& used_;
};

template <class Element>
void place_forward_tiles(NetworkJob<Element>& job, std::vector<BlockJob<Element>>& blocks,
                         int64_t& scratch_elements) {
  TilePlaces places(scratch_elements);
  int64_t inputs[2] = {0, 0}, between = 0;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    BlockJob<Element>& block = blocks[i];
    inputs[i % 2] = std::max(inputs[i % 2], operand_elements(block.input_slots, block.features));
    between = std::max(between, operand_elements(block.first.slots, block.channels));
    block.first_tiles = places.add(weight_elements(block.panels, block.kernel, block.features));
    block.second_tiles = places.add(weight_elements(block.panels, block.kernel, block.channels));
    if (block.downsample) block.residual_tiles = places.add(weight_elements(block.panels, 1, block.features));
  }
  job.inputs_at[0] = places.add(inputs[0]);
  job.inputs_at[1] = places.add(inputs[1]);
  job.between_operands_at = places.add(between);
}

template <class Element>
void place_backward_tiles(NetworkJob<Element>& job, std::vector<BlockJob<Element>>& blocks,
                          int64_t& scratch_elements) {
  TilePlaces places(scratch_elements);
  int64_t of_second = 0, of_first = 0, of_sum = 0, transposed = 0, columns = 0, sum_columns = 0;
  for (BlockJob<Element>& block : blocks) {
    const int64_t between = block.first.slots, outputs = block.second.slots, channels = block.channels;
    of_second = std::max(of_second, operand_elements(outputs, channels));
    of_first = std::max(of_first, operand_elements(between, channels));
    transposed = std::max(
        {transposed, column_elements(between, channels), column_elements(block.input_slots, block.features)});
    columns = std::max(columns, column_elements(std::max(between, outputs), channels));
    block.second_tiles = places.add(weight_elements(block.panels, block.kernel, channels));
    block.first_tiles = places.add(weight_elements(block.input_panels, block.kernel, channels));
    if (!block.downsample) continue;
    of_sum = std::max(of_sum, operand_elements(outputs, channels));
    sum_columns = std::max(sum_columns, column_elements(outputs, channels));
    block.residual_tiles = places.add(weight_elements(block.input_panels, 1, channels));
  }
  job.of_second_at = places.add(of_second);
  job.of_first_at = places.add(of_first);
  job.of_sum_at = places.add(of_sum);
  job.transposed_at = places.add(transposed);
  job.columns_at = places.add(columns);
  job.sum_columns_at = places.add(sum_columns);
}

}  // namespace qfast
