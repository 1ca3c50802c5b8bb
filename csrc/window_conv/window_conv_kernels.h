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

// to[window][step] = (taps of the step) . weight + bias, without the bias if it is null. A panel of the
// weight stays in the caches while it is multiplied with all windows.
template <class Element>
static void convolve(const WindowConvJob<Element>& job, const PanelMatrix<Element>& weight,
                     const Element* bias, const Element* from, int64_t padded, int64_t windows, Element* to) {
#if defined(QFAST_AMX)
  const int64_t panels = weight.count;  // a product packs its rows, too, and for all panels together
#else
  const int64_t panels = 1;
#endif
  for (int64_t panel = 0; panel < weight.count; panel += panels) {
    const int64_t column = panel * weight.width;
    for (int64_t w = 0; w < windows; ++w)
      multiply<Finish::kPut, Element>(weight.some(panel, panels), from + w * job.rows_apart() * padded,
                                      padded, 1, job.steps,
                                      {to + w * job.steps * weight.columns + column, weight.columns,
                                       bias == nullptr ? nullptr : bias + column, nullptr, 0});
  }
}

// Vector `which` of three vectors with the interleaved lanes of a, b and c.
template <int which, class Element>
QFAST_ALWAYS_INLINE Vector<Element> interleaved(Vector<Element> a, Vector<Element> b, Vector<Element> c) {
  constexpr int L = kLanes<Element>;
  Integers<Element> pair, third;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    const int place = which * L + i;
    pair[i] = place % 3 == 2 ? 0 : place % 3 * L + place / 3;
    third[i] = place % 3 == 2 ? L + place / 3 : i;
  }
  return shuffled<Element>(shuffled<Element>(a, b, pair), c, third);
}

// Lanes `which`, which + 3, which + 6, ... of three consecutive vectors.
template <int which, class Element>
QFAST_ALWAYS_INLINE Vector<Element> every_third(Vector<Element> a, Vector<Element> b, Vector<Element> c) {
  constexpr int L = kLanes<Element>;
  Integers<Element> pair, third;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    const int place = 3 * i + which;
    pair[i] = place < 2 * L ? place : 0;
    third[i] = place < 2 * L ? i : place - L;
  }
  return shuffled<Element>(shuffled<Element>(a, b, pair), c, third);
}

// Lanes of vector `which` of three that contain elements, if there are `count` elements.
template <class Element>
QFAST_ALWAYS_INLINE int64_t lanes_of(int64_t which, int64_t count) {
  const int64_t left = count - which * kLanes<Element>;
  return left < 0 ? 0 : smaller(left, kLanes<Element>);
}

// Copies the inputs of a step with three taps, rows `from` (null outside the window), to [in][3].
template <class Element>
QFAST_ALWAYS_INLINE void unfold_three(const Element* const* from, int64_t in, Element* to) {
  for_vectors<Element>(in, [&](int64_t d, int64_t lanes) __attribute__((always_inline)) {
    Vector<Element> row[3];
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k)
      row[k] = from[k] == nullptr ? Vector<Element>{} : load<Element>(from[k] + d, lanes);
    const Vector<Element> mixed[] = {interleaved<0, Element>(row[0], row[1], row[2]),
                                     interleaved<1, Element>(row[0], row[1], row[2]),
                                     interleaved<2, Element>(row[0], row[1], row[2])};
#pragma GCC unroll 3
    for (int v = 0; v < 3; ++v)
      store<Element>(to + 3 * d + v * kLanes<Element>, mixed[v], lanes_of<Element>(v, 3 * lanes));
  });
}

// Copies the inputs of each step, [in][taps], with zeros beyond the ends of a window.
template <class Element>
static void unfold_steps(const WindowConvJob<Element>& job, Element* to) {
  for (int64_t w = 0; w < job.batch; ++w)
    for (int64_t t = 0; t < job.steps; ++t, to += job.padded_inputs) {
      if (job.taps == 3 && job.x_column == 1) {
        const Element* const row = job.x + w * job.x_window + t * job.x_step;
        const Element* const from[] = {t == 0 ? nullptr : row - job.x_step, row,
                                       t + 1 == job.steps ? nullptr : row + job.x_step};
        unfold_three(from, job.in, to);
        continue;
      }
      for (int64_t k = 0; k < job.taps; ++k) {
        const int64_t step = t + k - job.taps / 2;
        const bool inside = step >= 0 && step < job.steps;
        const Element* const from = job.x + w * job.x_window + step * job.x_step;
        for (int64_t d = 0; d < job.in; ++d)
          to[d * job.taps + k] = inside ? from[d * job.x_column] : Element(0);
      }
    }
}

// to[d] = the sum of element (d, k) of row k over the three taps k, whose rows are [in][3] or null.
template <class Element>
QFAST_ALWAYS_INLINE void fold_three(const Element* const* rows, int64_t in, Element* to) {
  constexpr int64_t L = kLanes<Element>;
  for_vectors<Element>(in, [&](int64_t d, int64_t lanes) __attribute__((always_inline)) {
    Vector<Element> total = {};
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) {
      if (rows[k] == nullptr) continue;
      Vector<Element> part[3];
#pragma GCC unroll 3
      for (int v = 0; v < 3; ++v)
        part[v] = load<Element>(rows[k] + 3 * d + v * L, lanes_of<Element>(v, 3 * lanes));
      total += k == 0   ? every_third<0, Element>(part[0], part[1], part[2])
               : k == 1 ? every_third<1, Element>(part[0], part[1], part[2])
                        : every_third<2, Element>(part[0], part[1], part[2]);
    }
    store<Element>(to + d, total, lanes);
  });
}

// grad_x = the gradients of the inputs of all steps, added up.
template <class Element>
static void fold_steps(const WindowConvJob<Element>& job, const Element* from) {
  for (int64_t w = 0; w < job.batch; ++w)
    for (int64_t t = 0; t < job.steps; ++t) {
      Element* const to = job.grad_x + (w * job.steps + t) * job.in;
      if (job.taps == 3) {
        const Element* const row = from + (w * job.steps + t) * job.padded_inputs;
        const Element* const rows[] = {t + 1 == job.steps ? nullptr : row + job.padded_inputs, row,
                                       t == 0 ? nullptr : row - job.padded_inputs};
        fold_three(rows, job.in, to);
        continue;
      }
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
