// Arguments of the kernels of attention over time, shared by host code and the CPU instruction sets.
//
// The batch is cut into tiles of rows, and a tile's steps into blocks: what a block holds of each row and
// step lies as [row][step][column], columns padded with zeros to whole panels.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "panels.h"

namespace qfast {

template <class Element>
struct PoolJob {
  int64_t batch, steps, hidden, width;  // B, T, H and A, the width of the scores' hidden layer
  int64_t tile_rows, block_steps;       // the rows divide by 4, which share a counter of the dropout
  const Element* h;                     // features side by side
  int64_t row_stride, step_stride;
  PanelMatrix<Element> entering;  // H rows, A columns
  const Element *bias, *score;    // padded as the columns
  DropoutRule dropout;
  Element *attention, *pooled;  // [B, T] and [B, H]
  // Backward only.
  PanelMatrix<Element> turned;  // A rows, H columns
  const Element* grad;          // of pooled, [B, H]
  Element* grad_h;              // [B, T, H]
};

// Elements of scratch of a tile, and of a part's sums: weight [A][padded H], then bias and score [padded A].
template <class Element>
struct PoolSizes {
  static int64_t forward(const PoolJob<Element>& job) {
    return job.tile_rows * job.block_steps * job.entering.padded() * (job.dropout.active ? 2 : 1);
  }
  static int64_t backward(const PoolJob<Element>& job) {
    return forward(job) + job.tile_rows * (job.block_steps * job.turned.padded() + job.steps);
  }
  static int64_t sums(const PoolJob<Element>& job) {
    return job.width * job.turned.padded() + 2 * job.entering.padded();
  }
};

}  // namespace qfast
