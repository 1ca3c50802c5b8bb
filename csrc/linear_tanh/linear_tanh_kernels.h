// tanh(weight x + bias) for every step of every window, and the gradients. It is compiled once per
// instruction set; cpu_isa_begin.h lists the language features that it may use.
//
// A thread owns tiles of rows. The products of a tile are still in the first-level cache when the tanh is
// computed. Saved for backward: the result. Bound by multiply-adds, 2 F H flops per row in forward and twice
// as many in backward, for few features by the tanh (about 40 flops per element) and by memory: 4 (F + H)
// bytes per row in forward, 4 (F + 2 H) in backward without grad_x, in float32.
#pragma once

#include "panel_kernels.h"

namespace {

// Calls body(x of the first row, first row, rows) for the rows [begin, end) of each window in turn.
template <class Element, class Body>
QFAST_ALWAYS_INLINE void for_windows(const LinearTanhJob<Element>& job, int64_t begin, int64_t end,
                                     const Body& body) {
  for (int64_t row = begin, count; row < end; row += count) {
    const int64_t window = row / job.steps, step = row % job.steps;
    count = smaller(job.steps - step, end - row);
    body(job.x + window * job.window_stride + step * job.step_stride, row, count);
  }
}

// Computes grad * (1 - out^2) for the rows [begin, end) in `to`, [row][padded H], and adds it to the bias
// sums.
template <class Element>
static void through_tanh(const LinearTanhJob<Element>& job, int64_t begin, int64_t end, Element* to,
                         Element* bias_sum) {
  const int64_t padded = job.weight.padded();
  for (int64_t j = 0; j < job.units; j += kPanelVectors * kLanes<Element>) {
    Vector<Element> totals[kPanelVectors] = {};
    for (int64_t row = begin; row < end; ++row) {
      const Element* const out = job.out + row * job.units + j;
      const Element* const grad = job.grad + row * job.units + j;
      for_panel_vectors<Element, kPanelVectors>(
          job.units - j, [&](int v, auto lanes) __attribute__((always_inline)) {
            const int64_t at = v * kLanes<Element>;
            const Vector<Element> y = load<Element>(out + at, lanes);
            const Vector<Element> through = load<Element>(grad + at, lanes) * (Element(1) - y * y);
            totals[v] += through;
            store<Element>(to + (row - begin) * padded + j + at, through, lanes);
          });
    }
    for_panel_vectors<Element, kPanelVectors>(
        job.units - j, [&](int v, auto lanes) __attribute__((always_inline)) {
          Element* const sum = bias_sum + j + v * kLanes<Element>;
          store<Element>(sum, load<Element>(sum, lanes) + totals[v], lanes);
        });
  }
}

}  // namespace

// Forward for tiles [begin, end).
template <class Element>
void linear_tanh(const LinearTanhJob<Element>& job, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * job.tile_rows, last = smaller(first + job.tile_rows, job.rows);
    for_windows(job, first, last, [&](const Element* x, int64_t row, int64_t count) {
      multiply<Finish::kPut, Element>(job.weight, x, job.step_stride, job.feature_stride, count,
                                      {job.out + row * job.units, job.units, job.bias, nullptr, 0});
    });
    tanh_elements<Element>(job.out, job.out, first * job.units, last * job.units);
  }
}

// Backward for tiles [begin, end), which belong to one part.
template <class Element>
void linear_tanh_backward(const LinearTanhJob<Element>& job, int64_t begin, int64_t end, Element* scratch,
                          Element* sums) {
  const int64_t padded = job.weight.padded();
  Element* const bias_sum = sums + job.features * padded;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * job.tile_rows, last = smaller(first + job.tile_rows, job.rows);
    through_tanh(job, first, last, scratch, bias_sum);
    for_windows(job, first, last, [&](const Element* x, int64_t row, int64_t count) {
      const Element* const grads = scratch + (row - first) * padded;
      multiply<Finish::kAdd, Element>(in_place<Element>(grads, count, job.units, padded), x,
                                      job.feature_stride, job.step_stride, job.features,
                                      {sums, padded, nullptr, nullptr, 0});
    });
    if (job.grad_x != nullptr)
      multiply<Finish::kPut, Element>(job.turned, scratch, padded, 1, last - first,
                                      {job.grad_x + first * job.features, job.features, nullptr, nullptr, 0});
  }
}
