// Arguments of the kernels of the convolution over a window's steps, shared by host code and the CPU
// instruction sets.
#pragma once

#include <cstdint>

#include "panels.h"

namespace qfast {

// Rows of a window stand [step] with `taps` / 2 rows of zeros on either side, which the window after shares:
// the taps of a step are then one row of `taps` * padded elements.
template <class Element>
struct WindowConvJob {
  int64_t batch, steps, in, out, taps;  // taps: odd
  int64_t padded_in, padded_out, tile_windows;
  const Element* x;
  int64_t x_window, x_step, x_column;  // strides
  PanelMatrix<Element> weight;         // taps * padded_in rows, `out` columns
  const Element* bias;                 // padded
  Element* output;                     // [B, T, out]
  // Backward only.
  const Element* grad;                 // of it
  PanelMatrix<Element> weight_turned;  // taps * padded_out rows, `in` columns
  Element* grad_x;                     // [B, T, in], or null

  QFAST_SHARED_INLINE int64_t rows_apart() const { return steps + taps / 2; }  // from window to window
};

// Buffers of a tile: x, and for the backward the gradient, between zeros.
template <class Element>
struct WindowConvTile {
  Element *x, *grad;

  QFAST_SHARED_INLINE static WindowConvTile carve(const WindowConvJob<Element>& job, bool backward,
                                                  Carving<Element>& space) {
    const int64_t rows = job.tile_windows * job.rows_apart() + job.taps / 2;
    WindowConvTile tile;
    tile.x = space.take(rows * job.padded_in), tile.grad = space.take(backward ? rows * job.padded_out : 0);
    return tile;
  }
};

// Sums of a part: weight [taps][padded_in][padded_out], bias [padded_out].
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
