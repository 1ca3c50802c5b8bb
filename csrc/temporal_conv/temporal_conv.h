// Arguments of the temporal convolution kernels, shared by host code and the CPU instruction sets.
//
// The batch is cut into tiles of rows. In a tile an activation lies as [slot][row][channel], a slot being a
// time position of the cone (temporal_conv_plan.h). A tile goes through the whole stack before the next.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "temporal_conv/temporal_conv_plan.h"

namespace qfast {

// Columns of a convolution are handled a panel at a time. Its packed weights are [panel][tap][row][width],
// zeros beyond the last column; packed biases [panel][width].
struct Panels {
  int64_t columns, width, count;
};

// Element (slot, row, channel) at data + slot * slot_stride + row * row_stride + channel * channel_stride.
template <class Element>
struct Activation {
  Element* data;
  int64_t slot_stride, row_stride, channel_stride;
};

struct TapTable {
  const int32_t* begin;
  const Tap* taps;
  int64_t slots;
};

struct SlotList {
  const int32_t* slots;
  int64_t count;
};

// Slots side by side that read slots side by side by the same taps: where the rows of a slot follow those of
// the slot before, they are one matrix.
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
  const int32_t *between_positions, *output_positions;  // time steps, for the dropout
  TapTable first, second, beside_reads;                 // reads; the last of the 1x1
  TapTable first_read_by, second_read_by;
  RunList first_runs, second_runs;  // computed slots
  RunList first_read_by_runs, second_read_by_runs;
  const int32_t *beside, *beside_of;
  int64_t input_slots;
  Panels panels;  // of `channels`: both convolutions and the 1x1
  const Element *first_weight, *first_bias, *second_weight, *second_bias, *beside_weight, *beside_bias;
  // Turned over for the gradients of the inputs: panels of the input's channels,
  // [panel][tap][channel][width].
  Panels input_panels;
  const Element *first_turned, *second_turned, *beside_turned;
  int64_t between_at, output_at, signs_at;  // where they lie among what is kept, elements or bytes of one row
  // Where the gradients lie in the sums of a chunk: weights [tap][row][channel], then bias.
  int64_t first_sum, first_bias_sum, second_sum, second_bias_sum, beside_sum, beside_bias_sum;
};

template <class Element>
struct NetworkJob {
  int64_t batch, tile_rows, blocks_count;
  const BlockJob<Element>* blocks;
  Activation<const Element> x;  // slots are time steps
  Activation<Element> output;   // of the last block; rows are those of the batch
  Element* activations;         // kept for the backward: tile after tile, `row_elements` a row; or null
  unsigned char* signs;         // likewise, `row_signs` bytes a row; or null
  int64_t row_elements, row_signs;
  int64_t slot_elements;  // of scratch for a run of slots of a panel, forward: sums and what stands beside
  DropoutRule dropout;
  // Backward only.
  Activation<const Element> grad;  // of the output
  Activation<Element> grad_x;      // data null if not wanted
  int64_t widest_elements;         // of one row of the largest gradient
};

// Windows that follow each other by one row share what no window's beginning can reach: there a convolution's
// value depends on the row alone. Of the output of one convolution:
struct SharedRows {
  int64_t first_position,
      last_position;         // shared positions of the cone; none: first_position > last_position
  const int32_t* positions;  // time step of each slot
  SlotList copied;           // shared slots that a window's own positions read
  int64_t rows_at;           // where the shared rows lie in the scratch, elements
};

template <class Element>
struct RollingJob {
  NetworkJob<Element> windows;          // x: slots and rows have the same stride
  const BlockJob<Element>* row_blocks;  // the same weights; one slot, whose taps are rows further up
  const SharedRows *first, *second;     // of each block
  int64_t chunk_rows;                   // windows that share rows
  int64_t activations_at;               // where a tile's own activations lie in the scratch, elements
};

constexpr int64_t kPanelPadding = 64;  // elements that may be read past the end of a gradient

}  // namespace qfast
