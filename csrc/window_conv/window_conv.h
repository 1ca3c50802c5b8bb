// Arguments of the kernels that convolve the steps of each window. Shared by host code and all CPU
// instruction sets.
#pragma once

#include <cstdint>

#include "panels.h"

namespace qfast {

// A tile stores the steps of its windows as consecutive rows, with taps / 2 rows of zeros before and after
// each window. Neighbouring windows share these zeros. The inputs of a step are then `taps` adjacent rows,
// which the product reads as one row of taps * padded_in elements.
constexpr int64_t kMostPanelWidth = 64;  // columns, on any instruction set

template <class Element>
struct WindowConvJob {
  int64_t batch, steps, in, out, taps;  // taps is odd
  int64_t padded_in, padded_out, tile_windows;
  const Element* x;
  int64_t x_window, x_step, x_column;  // strides
  PanelMatrix<Element> weight;         // taps * padded_in rows, `out` columns
  const Element* bias;                 // padded_out elements
  Element* output;                     // [B, T, out]
  // Backward only.
  const Element* grad;                 // of `output`
  PanelMatrix<Element> weight_turned;  // taps * padded_out rows, `in` columns
  Element* grad_x;                     // [B, T, in], or null
  // With few steps and a large weight, packing would take longer than the products. The weight [out, in,
  // taps] is then used in place, and otherwise null. The inputs of a step are [in][taps], in rows of
  // `padded_inputs` elements.
  const Element* unpacked;
  int64_t padded_inputs;
  Element *grad_weight, *grad_bias;

  // Number of rows from the start of one window to the start of the next.
  QFAST_SHARED_INLINE int64_t rows_apart() const { return steps + taps / 2; }
};

// Buffers of a tile: x and, in the backward pass, the gradient, both with zeros between the windows. With a
// weight in place: the inputs of all steps, and the gradients of the inputs.
template <class Element>
struct WindowConvTile {
  Element *x, *grad;
  Element* room;  // for a panel of the weight

  QFAST_SHARED_INLINE static WindowConvTile carve(const WindowConvJob<Element>& job, bool backward,
                                                  Carving<Element>& space) {
    WindowConvTile tile;
    if (job.unpacked != nullptr) {
      tile.x = space.take(job.batch * job.steps * job.padded_inputs);
      tile.grad = space.take(backward ? job.batch * job.steps * job.padded_inputs : 0);
      tile.room = space.take((backward ? job.out : job.in * job.taps) * kMostPanelWidth);
      return tile;
    }
    const int64_t rows = job.tile_windows * job.rows_apart() + job.taps / 2;
    tile.x = space.take(rows * job.padded_in);
    tile.grad = space.take(backward ? rows * job.padded_out : 0);
    return tile;
  }
};

// Gradient sums of one part of the tiles: weight [taps][padded_in][padded_out], bias [padded_out].
template <class Element>
struct WindowConvSums {
  Element *weight, *bias;

  QFAST_SHARED_INLINE static WindowConvSums carve(const WindowConvJob<Element>& job,
                                                  Carving<Element>& space) {
    WindowConvSums sums;
    sums.weight = space.take(job.taps * job.padded_in * job.padded_out);
    sums.bias = space.take(job.padded_out);
    return sums;
  }
};

}  // namespace qfast
