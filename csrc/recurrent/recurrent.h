// Arguments of the recurrent kernels. Shared by host code and all CPU instruction sets.
//
// The batch is divided into tiles of rows. A thread computes all steps of a tile, and all layers of each
// step, before the next tile. Units are computed in blocks of one vector. Buffers of a tile are [row][unit],
// padded to whole blocks.
#pragma once

#include <cstdint>

#include "dropout.h"

namespace qfast {

// Packed weights of a layer, with zeros beyond the last unit. The forward pass reads them as
// [block][input][gate][lane]. The gradients of the inputs need the transposed weights, which are packed in
// panels of columns: [panel][block][gate][lane][column].
template <class Element>
struct RecurrentLayer {
  int64_t features;
  const Element *input_weight, *hidden_weight;
  const Element* bias;  // [block][4 sums][lane]
  const Element *input_turned, *hidden_turned;
  int64_t input_width;  // columns of a panel of input_turned
  // Offsets of the gradients in the sums of a part: weights as [block][input][gate][lane], bias as above.
  // hidden_sum is -1 if no step has a previous h, so the gradient of the hidden weight is 0.
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
  int64_t blocks, stride;  // number of unit blocks; row stride of a tile's buffers
  const RecurrentLayer<Element>* layers;
  Sequence<const Element> x;
  bool rolling;                      // x has windows of consecutive rows, each shifted by one row
  const Element *first_h, *first_c;  // [L, B, H], or null for zeros
  Element *last_h, *last_c;          // [L, B, H]
  Sequence<Element> output;          // all steps; data is null if only the last step is requested
  Element *gates, *carried;          // [L, T, B, 4, H] and [L, T, B, H] saved for backward, or null
  bool streamed;                     // saved values are written with non-temporal stores
  DropoutRule dropout;
  // Forward only: steps that a layer computes before the next layer. With several, the products of their
  // inputs with W_ih are one product.
  int64_t layer_steps;
  // Backward only.
  Sequence<const Element> grad_output;   // gradient of all steps, or data is null
  const Element* grad_last;              // [B, H] gradient of the last step of the top layer, or null
  const Element *grad_h, *grad_c;        // [L, B, H] gradients of the last states, or null
  Element* grad_x;                       // [B, T, F] or null
  Element *grad_first_h, *grad_first_c;  // [L, B, H] or null
  int64_t chunk_steps;                   // steps that one product of the weight gradients covers
  int64_t hidden_width;                  // columns of a panel of hidden_turned
  // Row stride of the gradients of the sums. It is not a power of two, because rows would then share cache
  // sets.
  int64_t sum_stride;
  int64_t layer_scratch;    // elements of a layer's buffers
  int64_t header_elements;  // elements that contain a layer's pointers
  int64_t vector_scratch;   // elements of scratch before the part of recurrent_tiles.h
};

}  // namespace qfast
