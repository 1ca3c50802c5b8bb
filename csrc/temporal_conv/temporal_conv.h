// Arguments of the temporal convolution kernels. Shared by host code and all CPU instruction sets.
//
// The batch is divided into tiles of rows. The layout of an activation in a tile is [slot][row][channel]. A
// slot is a time position of the cone, the positions that the output depends on (temporal_conv_plan.h). A
// thread computes the whole stack for a tile before the next tile.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "temporal_conv/temporal_conv_plan.h"

namespace qfast {

// The columns (output channels) of a convolution are computed in panels. Packed weights are
// [panel][tap][row][width] and packed biases [panel][width], with zeros beyond the last column.
struct Panels {
  int64_t columns, width, count;
};

// Element (slot, row, channel) at data + slot * slot_stride + row * row_stride + channel * channel_stride.
template <class Element>
struct Activation {
  Element* data;
  int64_t slot_stride, row_stride, channel_stride;
};

// The taps of slot i are taps[begin[i]] to taps[begin[i + 1] - 1].
struct TapTable {
  const int32_t* begin;
  const Tap* taps;
  int64_t slots;
};

struct SlotList {
  const int32_t* slots;
  int64_t count;
};

// Consecutive slots that read consecutive slots with the same taps. If the rows of consecutive slots are
// contiguous, a run is one matrix.
struct Run {
  int32_t slot, length;
};

struct RunList {
  const Run* runs;
  int64_t count;
};

template <class Element>
struct BlockJob {
  int64_t features, channels, kernel, dilation;
  bool downsample;
  // Slots that each convolution reads; the last table is for the 1x1 convolution.
  const int32_t *between_positions, *output_positions;  // time steps, which are dropout counters
  TapTable first, second, residual_reads;
  TapTable first_read_by, second_read_by;
  RunList first_runs, second_runs;  // slots to compute
  RunList first_read_by_runs, second_read_by_runs;
  const int32_t *residual, *residual_of;
  int64_t input_slots;
  Panels panels;  // panels of `channels`, for both convolutions and the 1x1 convolution
  const Element *first_weight, *first_bias, *second_weight, *second_bias, *residual_weight, *residual_bias;
  // Transposed weights for the gradients of the inputs, in panels of the input's channels:
  // [panel][tap][channel][width].
  Panels input_panels;
  const Element *first_turned, *second_turned, *residual_turned;
  // Offsets in the saved activations and signs, in elements or bytes per row.
  int64_t between_at, output_at, signs_at;
  // Offsets of the gradients in the sums of a chunk. Weights are [tap][row][channel], with this many rows and
  // channels. Products of bfloat16 pad both.
  int64_t first_sum, first_bias_sum, second_sum, second_bias_sum, residual_sum, residual_bias_sum;
  int64_t sum_features, sum_channels;
  // Products of bfloat16 only: offsets of the weights in the scratch.
  int64_t first_tiles, second_tiles, residual_tiles;
};

template <class Element>
struct NetworkJob {
  int64_t batch, tile_rows, blocks_count;
  const BlockJob<Element>* blocks;
  Activation<const Element> x;  // slots are time steps
  Activation<Element> output;   // output of the last block; rows count from the start of the batch
  Element* activations;  // saved for backward, `row_elements` per row, one tile after the other; or null
  unsigned char* signs;  // saved for backward, `row_signs` bytes per row; or null
  int64_t row_elements, row_signs;
  // Forward: scratch for a run of slots of a panel, for the sums and the residual.
  int64_t slot_elements;
  DropoutRule dropout;
  // Backward only.
  Activation<const Element> grad;  // gradient of the output
  Activation<Element> grad_x;      // data is null if it is not requested
  int64_t widest_elements;         // elements of one row of the largest gradient
  // Products of bfloat16 only: offsets of their operands in the scratch (temporal_conv_kernels_amx.h).
  int64_t inputs_at[2], between_operands_at;          // forward
  int64_t of_second_at, of_first_at, of_sum_at;       // backward
  int64_t transposed_at, columns_at, sum_columns_at;  // backward, gradients of weights
};

// Positions of the output of one convolution that consecutive windows share. If the zeros before a window
// cannot affect a position, the value depends on the panel row only.
struct SharedRows {
  int64_t first_position, last_position;  // shared positions; empty if first_position > last_position
  const int32_t* positions;               // time step of each slot
  SlotList copied;                        // shared slots that the positions of a single window read
  int64_t rows_at;                        // offset of the shared rows in the scratch, in elements
};

template <class Element>
struct RollingJob {
  NetworkJob<Element> windows;          // slots and rows of x have the same stride
  const BlockJob<Element>* row_blocks;  // the same weights with one slot, whose taps read earlier rows
  const SharedRows *first, *second;     // of each block
  int64_t chunk_rows;                   // number of windows that share rows
  int64_t activations_at;  // offset of the activations of a single tile in the scratch, in elements
};

constexpr int64_t kPanelPadding = 64;  // elements that may be read beyond the end of a gradient

}  // namespace qfast
