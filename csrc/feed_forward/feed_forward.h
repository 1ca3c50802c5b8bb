// Arguments of the kernels of the feed-forward block. Shared by host code and all CPU instruction sets.
//
// The rows are divided into tiles, and the hidden units into slices. The encoder layer uses the same block on
// rows of whole windows.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "panels.h"

namespace qfast {

// The block: rows of D inputs, M hidden units, rows of O results.
template <class Element>
struct FeedForward {
  PanelMatrix<Element> entering;         // D rows, M columns
  PanelMatrix<Element> leaving;          // M rows, O columns
  const Element* entering_bias;          // padded like the panels
  const Element* leaving_bias;           // padded like the panels
  PanelMatrix<Element> leaving_turned;   // O rows, M columns; backward only
  PanelMatrix<Element> entering_turned;  // M rows, D columns; backward only
  DropoutRule dropout;                   // dropout of the hidden activations
  int64_t slice_panels;                  // panels of hidden units in a slice
  int64_t group_windows;                 // windows in a group of rows; a multiple of 4 if there is dropout
  // The hidden activations of all rows after dropout, or null if backward computes them again:
  // [tile][slice][row of the tile][column of the slice]. Slices are full.
  Element* kept = nullptr;
};

// Rows of consecutive whole windows. A window has `steps` rows, which are its steps from first_step. Rows
// that do not belong to windows are windows of one step.
struct WindowRows {
  int64_t first_window, windows, steps, first_step;
};

// Sums of the gradients of the weights and biases of a part, in torch's layout: W1 [M, D], b1 [M], W2 [O, M]
// and b2 [O].
template <class Element>
struct FeedForwardSums {
  Element *entering, *entering_bias, *leaving, *leaving_bias;

  QFAST_SHARED_INLINE static FeedForwardSums carve(const FeedForward<Element>& net, Carving<Element>& space) {
    const int64_t hidden = net.entering.columns, out = net.leaving.columns;
    FeedForwardSums sums;
    sums.entering = space.take(hidden * net.entering.rows);
    sums.entering_bias = space.take(hidden);
    sums.leaving = space.take(hidden * out);
    sums.leaving_bias = space.take(out);
    return sums;
  }
};

// Hidden activations of a slice for a group of rows, and their gradients.
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

// The block as a separate operator, over a batch of rows.
template <class Element>
struct FeedForwardJob {
  int64_t rows, tile_rows;
  FeedForward<Element> net;
  int64_t padded_in, padded_out;
  const Element* x;
  int64_t x_row, x_column;  // strides
  Element* output;          // [rows, O]
  const Element* grad;      // gradient of the output; backward only
  Element* grad_x;          // [rows, D], or null
  // The gradients of the weights, where the first part is summed; backward only.
  FeedForwardSums<Element> gradients;
};

// Buffers of a tile.
template <class Element>
struct FeedForwardTile {
  Element *x, *y, *grad_x;  // in backward, y is the gradient of the output
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
