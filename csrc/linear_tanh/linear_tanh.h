// Arguments of the kernels of a linear layer with tanh. Shared by host code and all CPU instruction sets.
//
// The rows are the steps of all windows, [B * T]. A tile is a range of rows.
#pragma once

#include <cstdint>

#include "panels.h"

namespace qfast {

// Element (b, t, j) of the input is at x[b * window_stride + t * step_stride + j * feature_stride].
template <class Element>
struct LinearTanhJob {
  int64_t rows, steps, features, units;  // B * T, T, F and H
  int64_t tile_rows;
  const Element* x;
  int64_t window_stride, step_stride, feature_stride;
  PanelMatrix<Element> weight;  // F rows, H columns
  const Element* bias;          // padded like the columns
  Element* out;                 // [B, T, H]
  // Backward only.
  PanelMatrix<Element> turned;  // H rows, F columns; not set without grad_x
  const Element* grad;          // gradient of `out`, [B, T, H]
  Element* grad_x;              // [B, T, F], or null
};

// Numbers of elements: scratch of a tile in the backward pass, and sums of a part, which are the transposed
// weight [F][padded H] and then the bias [padded H].
template <class Element>
struct LinearTanhSizes {
  static int64_t scratch(const LinearTanhJob<Element>& job) { return job.tile_rows * job.weight.padded(); }
  static int64_t sums(const LinearTanhJob<Element>& job) { return (job.features + 1) * job.weight.padded(); }
};

}  // namespace qfast
