// Arguments of the recurrent kernels, shared by host code and the CPU instruction sets.
//
// The batch is cut into tiles of rows. A tile goes through all steps, and at each step through all layers,
// before the next. Units are handled a block at a time, as many as a vector holds; buffers of a tile are
// [row][unit] with room for whole blocks.
#pragma once

#include <cstdint>

#include "dropout.h"

namespace qfast {

// Packed weights, zeros beyond the last unit. For the steps [block][input][gate][lane]; turned over for the
// gradients of the inputs, in panels of columns of this width: [panel][block][gate][lane][column].
template <class Element>
struct RecurrentLayer {
  int64_t features;
  const Element *input_weight, *hidden_weight;
  const Element* bias;  // [block][4 sums][lane]
  const Element *input_turned, *hidden_turned;
  int64_t input_width;  // of a panel of input_turned
  // Where the gradients lie among the sums of a part: weights [block][input][gate][lane], bias as above.
  int64_t input_sum, hidden_sum, bias_sum;
};

// Element (row, step, unit or feature) at data + row * row_stride + step * step_stride + feature *
// feature_stride.
template <class Element>
struct Sequence {
  Element* data;
  int64_t row_stride, step_stride, feature_stride;
};

template <class Element>
struct RecurrentJob {
  int64_t batch, steps, hidden, layer_count, tile_rows;
  int64_t blocks, stride;  // of units; elements from row to row of a tile's buffers
  const RecurrentLayer<Element>* layers;
  Sequence<const Element> x;
  bool rolling;                      // rows of x are windows that follow each other by one row
  const Element *first_h, *first_c;  // [L, B, H] or null: zeros
  Element *last_h, *last_c;          // [L, B, H]
  Sequence<Element> output;          // of all steps; data null if only the last is wanted
  Element *gates, *carried;          // [L, T, B, 4, H] and [L, T, B, H], kept for the backward; or null
  bool streamed;                     // what is kept goes past the caches
  DropoutRule dropout;
  // Backward only.
  Sequence<const Element> grad_output;   // of all steps, or data null
  const Element* grad_last;              // [B, H] of the last step of the top layer, or null
  const Element *grad_h, *grad_c;        // [L, B, H] of the last states, or null
  Element* grad_x;                       // [B, T, F] or null
  Element *grad_first_h, *grad_first_c;  // [L, B, H] or null
  int64_t chunk_steps;                   // steps whose weight gradients are multiplied at a time
  int64_t hidden_width;                  // of a panel of hidden_turned
  int64_t
      sum_stride;  // of a row of gradients of the sums: not a power of two, or rows would share cache sets
  int64_t layer_scratch;    // elements of a layer's buffers
  int64_t header_elements;  // that hold a layer's pointers
};

}  // namespace qfast
