// Convolution over the steps of each window, with zeros beyond its ends, and the gradients. It is included
// inside the namespace of an instruction set.
//
// A thread owns tiles of whole windows. It copies a tile into a buffer with rows of zeros between the
// windows, where the taps of every step are adjacent. The convolution of a window is then one product of
// [steps, taps * in] with the weight. The gradient of x is the same product with the reversed weight. The
// gradient of the weight is one product over all rows of a tile, summed in the memory of the tile's part.
// Backward reads x again; nothing is saved. Bound by multiply-adds: 2 taps in out flops per step in the
// forward pass, and twice as many in the backward pass.
#pragma once

#include "panel_kernels.h"

namespace {

// Copies [windows][steps] rows into a buffer with zeros between the windows. Columns beyond the last remain
// 0.
template <class Element>
static void copy_between_zeros(const WindowConvJob<Element>& job, const Element* from, int64_t window_stride,
                               int64_t step_stride, int64_t column_stride, int64_t windows, int64_t columns,
                               Element* to, int64_t padded) {
  for (int64_t w = 0; w < windows; ++w)
    copy_strided<Element>(from + w * window_stride, step_stride, column_stride, job.steps, columns,
                          to + (w * job.rows_apart() + job.taps / 2) * padded, padded);
  // The buffer starts as zeros and the rows between windows are never written. Only a tile with fewer windows
  // than the previous one needs this: the rows after its last window contain old values.
  const int64_t end = (windows * job.rows_apart() + job.taps / 2) * padded;
  for (int64_t i = windows * job.rows_apart() * padded; i < end; ++i) to[i] = 0;
}

// to[window][step] = (taps of the step) . weight + bias, without the bias if it is null.
template <class Element>
static void convolve(const WindowConvJob<Element>& job, const PanelMatrix<Element>& weight,
                     const Element* bias, const Element* from, int64_t padded, int64_t windows, Element* to) {
  for (int64_t w = 0; w < windows; ++w)
    multiply<Finish::kPut, Element>(weight, from + w * job.rows_apart() * padded, padded, 1, job.steps,
                                    {to + w * job.steps * weight.columns, weight.columns, bias, nullptr, 0});
}

// Copies the inputs of each step, [in][taps], with zeros beyond the ends of a window.
template <class Element>
static void unfold_steps(const WindowConvJob<Element>& job, Element* to) {
  for (int64_t w = 0; w < job.batch; ++w)
    for (int64_t t = 0; t < job.steps; ++t, to += job.padded_inputs)
      for (int64_t k = 0; k < job.taps; ++k) {
        const int64_t step = t + k - job.taps / 2;
        const bool inside = step >= 0 && step < job.steps;
        const Element* const from = job.x + w * job.x_window + step * job.x_step;
        for (int64_t d = 0; d < job.in; ++d)
          to[d * job.taps + k] = inside ? from[d * job.x_column] : Element(0);
      }
}

// grad_x = the gradients of the inputs of all steps, added up.
template <class Element>
static void fold_steps(const WindowConvJob<Element>& job, const Element* from) {
  for (int64_t w = 0; w < job.batch; ++w)
    for (int64_t t = 0; t < job.steps; ++t) {
      Element* const to = job.grad_x + (w * job.steps + t) * job.in;
      for (int64_t d = 0; d < job.in; ++d) to[d] = 0;
      for (int64_t k = 0; k < job.taps; ++k) {
        const int64_t step = t - k + job.taps / 2;
        if (step < 0 || step >= job.steps) continue;
        const Element* const row = from + (w * job.steps + step) * job.padded_inputs + k;
        for (int64_t d = 0; d < job.in; ++d) to[d] += row[d * job.taps];
      }
    }
}

constexpr int64_t kUnpackedSteps = 24;  // up to which the product is faster than packing

// The output, with the weight in place.
template <class Element>
static void convolve_unpacked(const WindowConvJob<Element>& job, const WindowConvTile<Element>& tile) {
  const int64_t inputs = job.in * job.taps;
  PanelMatrix<Element> weight = in_place<Element>(job.unpacked, inputs, job.out, inputs);
  weight.panel_stride = weight.width * inputs;
  weight.transposed = true;
  if (job.batch * job.steps > kUnpackedSteps) weight.room = tile.room;
  unfold_steps(job, tile.x);
  multiply<Finish::kPut, Element>(weight, tile.x, job.padded_inputs, 1, job.batch * job.steps,
                                  {job.output, job.out, job.bias, nullptr, 0});
}

// The gradients, with the weight in place.
template <class Element>
static void convolve_unpacked_backward(const WindowConvJob<Element>& job,
                                       const WindowConvTile<Element>& tile) {
  const int64_t inputs = job.in * job.taps, rows = job.batch * job.steps;
  unfold_steps(job, tile.x);
  multiply<Finish::kPut, Element>(in_place<Element>(tile.x, rows, inputs, job.padded_inputs), job.grad, 1,
                                  job.out, job.out, {job.grad_weight, inputs, nullptr, nullptr, 0});
  for (int64_t j = 0; j < job.out; ++j) job.grad_bias[j] = 0;
  add_rows<Element>(job.grad, job.out, rows, job.out, job.grad_bias);
  if (job.grad_x == nullptr) return;
  PanelMatrix<Element> weight = in_place<Element>(job.unpacked, job.out, inputs, inputs);
  weight.room = tile.room;
  multiply<Finish::kPut, Element>(weight, job.grad, job.out, 1, rows,
                                  {tile.grad, job.padded_inputs, nullptr, nullptr, 0});
  fold_steps(job, tile.grad);
}

}  // namespace

// Computes the output of tiles [begin, end).
template <class Element>
void window_conv(const WindowConvJob<Element>& job, int64_t begin, int64_t end, Element* scratch) {
  Carving<Element> space{scratch};
  const auto tile = WindowConvTile<Element>::carve(job, false, space);
  if (job.unpacked != nullptr) return convolve_unpacked(job, tile);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t * job.tile_windows, windows = smaller(job.tile_windows, job.batch - first);
    copy_between_zeros<Element>(job, job.x + first * job.x_window, job.x_window, job.x_step, job.x_column,
                                windows, job.in, tile.x, job.padded_in);
    convolve<Element>(job, job.weight, job.bias, tile.x, job.padded_in, windows,
                      job.output + first * job.steps * job.out);
  }
}

// Computes the gradients of tiles [begin, end). `part` contains the sums of these tiles.
template <class Element>
void window_conv_backward(const WindowConvJob<Element>& job, int64_t begin, int64_t end, Element* scratch,
                          Element* part) {
  Carving<Element> space{scratch}, total{part};
  const auto tile = WindowConvTile<Element>::carve(job, true, space);
  if (job.unpacked != nullptr) return convolve_unpacked_backward(job, tile);
  const auto sums = WindowConvSums<Element>::carve(job, total);
  const int64_t side = job.taps / 2, row = job.steps * job.out;
  for (int64_t j = 0; j < job.out; ++j) sums.bias[j] = 0;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t * job.tile_windows, windows = smaller(job.tile_windows, job.batch - first);
    copy_between_zeros<Element>(job, job.x + first * job.x_window, job.x_window, job.x_step, job.x_column,
                                windows, job.in, tile.x, job.padded_in);
    copy_between_zeros<Element>(job, job.grad + first * row, row, job.out, 1, windows, job.out, tile.grad,
                                job.padded_out);
    // Row i of the gradient multiplies rows i - side to i + side of x. The products with rows between windows
    // are 0.
    const Element* const grad = tile.grad + side * job.padded_out;
    const int64_t rows = windows * job.rows_apart() - side;
    const PanelMatrix<Element> right = in_place<Element>(grad, rows, job.out, job.padded_out);
    const Target<Element> target{sums.weight, job.padded_out, nullptr, nullptr, 0};
    const int64_t inputs = job.taps * job.padded_in;
    if (t == begin) {
      multiply<Finish::kPut, Element>(right, tile.x, 1, job.padded_in, inputs, target);
    } else {
      multiply<Finish::kAdd, Element>(right, tile.x, 1, job.padded_in, inputs, target);
    }
    add_rows<Element>(grad, job.padded_out, rows, job.out, sums.bias);
    if (job.grad_x != nullptr)
      convolve<Element>(job, job.weight_turned, nullptr, tile.grad, job.padded_out, windows,
                        job.grad_x + first * job.steps * job.in);
  }
}
