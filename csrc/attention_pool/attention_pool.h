// Arguments of the kernels of attention over time. Shared by host code and all CPU instruction sets.
//
// The batch is divided into tiles of rows, and the steps of a tile into blocks. Buffers of a block are
// [row][step][column], with columns padded with zeros to whole panels.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "panels.h"

namespace qfast {

template <class Element>
struct PoolJob {
  int64_t batch, steps, hidden, width;  // B, T, H and A, the width of the scores' hidden layer
  int64_t tile_rows, block_steps;  // tile_rows is a multiple of 4, because four rows share a dropout counter
  const Element* h;                // its features are contiguous
  int64_t row_stride, step_stride;
  PanelMatrix<Element> entering;  // H rows, A columns
  const Element *bias, *score;    // padded like the columns
  DropoutRule dropout;
  Element *attention, *pooled;  // [B, T] and [B, H]
  // Backward only.
  PanelMatrix<Element> turned;  // A rows, H columns
  const Element* grad;          // gradient of pooled, [B, H]
  Element* grad_h;              // [B, T, H]
};

// Numbers of elements: scratch of a tile, and sums of a part, which are weight [A][padded H] and then bias
// and score [padded A].
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
