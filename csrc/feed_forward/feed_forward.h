// Arguments of the kernels of the feed-forward block, shared by host code and the CPU instruction sets.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "panels.h"

namespace qfast {

// The block itself: D wide rows, M hidden units, O wide results.
template <class Element>
struct FeedForward {
  PanelMatrix<Element> entering;         // D rows, M columns
  PanelMatrix<Element> leaving;          // M rows, O columns
  const Element* entering_bias;          // padded as the panels
  const Element* leaving_bias;           // likewise
  PanelMatrix<Element> leaving_turned;   // O rows, M columns: backward only
  PanelMatrix<Element> entering_turned;  // M rows, D columns: likewise
  DropoutRule dropout;                   // of the hidden
  int64_t slice_panels;                  // panels of the hidden that are computed at once
  int64_t group_windows;  // windows whose rows are taken at once; divides by 4 if there is dropout
};

// Rows of whole windows that follow each other, and which steps of the windows they are. A row that is no
// part of a window is one of a single step.
struct WindowRows {
  int64_t first_window, windows, steps, first_step;
};

// Sums of a part's weight gradients: W1 [M][padded D], W2 turned over [M][padded O], b1 [M] and b2 [O].
template <class Element>
struct FeedForwardSums {
  Element *entering, *leaving, *entering_bias, *leaving_bias;

  QFAST_SHARED_INLINE static FeedForwardSums carve(const FeedForward<Element>& net, int64_t padded_in,
                                                   int64_t padded_out, Carving<Element>& space) {
    const int64_t hidden = net.entering.columns;
    FeedForwardSums sums;
    sums.entering = space.take(hidden * padded_in);
    sums.leaving = space.take(hidden * padded_out);
    sums.entering_bias = space.take(hidden);
    sums.leaving_bias = space.take(padded_out);
    return sums;
  }
};

// The hidden of a slice of the rows of a group, and its gradient.
template <class Element>
struct FeedForwardScratch {
  Element *hidden, *grad_hidden;

  QFAST_SHARED_INLINE static FeedForwardScratch carve(const FeedForward<Element>& net, int64_t steps,
                                                      bool backward, Carving<Element>& space) {
    const int64_t elements = net.group_windows * steps * net.slice_panels * net.entering.width;
    FeedForwardScratch scratch;
    scratch.hidden = space.take(elements);
    scratch.grad_hidden = space.take(backward ? elements : 0);
    return scratch;
  }
};

// The block alone, over a batch of rows.
template <class Element>
struct FeedForwardJob {
  int64_t rows, tile_rows;
  FeedForward<Element> net;
  int64_t padded_in, padded_out;
  const Element* x;
  int64_t x_row, x_column;  // strides
  Element* output;          // [rows, O]
  const Element* grad;      // of it; backward only
  Element* grad_x;          // [rows, D], or null
};

// Buffers of a tile.
template <class Element>
struct FeedForwardTile {
  Element *x, *y, *grad_x;  // backward: y is the gradient
  FeedForwardScratch<Element> hidden;

  QFAST_SHARED_INLINE static FeedForwardTile carve(const FeedForwardJob<Element>& job, bool backward,
                                                   Carving<Element>& space) {
    FeedForwardTile tile;
    tile.x = space.take(job.tile_rows * job.padded_in);
    tile.y = space.take(job.tile_rows * job.padded_out);
    tile.grad_x = space.take(backward ? job.tile_rows * job.padded_in : 0);
    tile.hidden = FeedForwardScratch<Element>::carve(job.net, 1, backward, space);
    return tile;
  }
};

}  // namespace qfast
