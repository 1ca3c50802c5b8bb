// Linear, ReLU, dropout, linear over rows, and the gradients. It is compiled once per instruction set;
// cpu_isa_begin.h lists the language features that it may use.
//
// A thread owns tiles of rows. The hidden activations [rows, M] stay in the caches: a slice of hidden units
// is computed for a group of rows of the tile, multiplied into the results, and overwritten by the next.
// Slices are the outer loop, so a slice of the weights is read once per tile. Backward computes each slice
// again, unless forward has kept it: M numbers per row, written and read once.
//
// Bound by multiply-adds: 2 M (D + O) flops per row in forward, and 2 M (3 D + 2 O) in backward, or 2 M (2 D
// + 2 O) without the gradient of x. Kept activations save 2 M D flops per row.
#pragma once

#include "dropout_kernels.h"
#include "panel_kernels.h"

namespace {

// Applies dropout to values [windows * steps][columns], with the mask of their position in the batch.
template <class Element>
static void drop_windows(const DropoutRule& rule, int32_t use, const WindowRows& rows, int64_t first_column,
                         int64_t columns, Element* values, int64_t stride) {
  if (!rule.active) return;
  for (int64_t t = 0; t < rows.steps; ++t) {
    const Place place{rows.first_window, first_column, use, static_cast<int32_t>(rows.first_step + t)};
    drop<Element>(rule, place, rows.windows, columns, values + t * stride, rows.steps * stride);
  }
}

constexpr int32_t kHiddenDropout = 1;

// Calls body(rows, offset of the first row in the tile) for each group of rows.
template <class Body>
QFAST_ALWAYS_INLINE void for_groups(const WindowRows& all, int64_t windows, const Body& body) {
  for (int64_t first = 0; first < all.windows; first += windows) {
    const WindowRows rows{all.first_window + first, smaller(windows, all.windows - first), all.steps,
                          all.first_step};
    body(rows, first * all.steps);
  }
}

// The place of the hidden activations of a group of rows, from row `at` of the tile on, for the slice from
// column `first` on: among the kept ones, or in `room`.
template <class Element>
QFAST_ALWAYS_INLINE Element* hidden_place(const FeedForward<Element>& net, const WindowRows& tile, int64_t at,
                                          int64_t first, Element* room) {
  if (net.kept == nullptr) return room;
  const int64_t tile_row = tile.first_window * tile.steps, stride = net.slice_panels * net.entering.width;
  return net.kept + tile_row * net.entering.columns + first * tile.windows * tile.steps + at * stride;
}

// Computes the hidden activations of a slice after dropout, [row][slice].
template <class Element>
static void hidden_slice(const FeedForward<Element>& net, const WindowRows& rows, int64_t first_panel,
                         const Element* x, int64_t x_stride, Element* hidden) {
  const PanelMatrix<Element> entering = net.entering.some(first_panel, net.slice_panels);
  const int64_t first = first_panel * entering.width, stride = net.slice_panels * entering.width;
  multiply<Finish::kRelu, Element>(entering, x, x_stride, 1, rows.windows * rows.steps,
                                   {hidden, stride, net.entering_bias + first, nullptr, 0});
  drop_windows<Element>(net.dropout, kHiddenDropout, rows, first, entering.columns, hidden, stride);
}

// y += leaving . drop(relu(entering . x + bias)), without the bias of y.
template <class Element>
static void add_feed_forward(const FeedForward<Element>& net, const WindowRows& all, const Element* x,
                             int64_t x_stride, Element* y, int64_t y_stride, Element* hidden) {
  const int64_t stride = net.slice_panels * net.entering.width;
  for (int64_t panel = 0; panel < net.entering.count; panel += net.slice_panels) {
    const int64_t first = panel * net.entering.width;
    const PanelMatrix<Element> leaving =
        net.leaving.rows_from(first, smaller(stride, net.leaving.rows - first));
    for_groups(all, net.group_windows, [&](const WindowRows& rows, int64_t at) {
      Element* const slice = hidden_place<Element>(net, all, at, first, hidden);
      hidden_slice<Element>(net, rows, panel, x + at * x_stride, x_stride, slice);
      multiply<Finish::kAdd, Element>(leaving, slice, stride, 1, rows.windows * rows.steps,
                                      {y + at * y_stride, y_stride, nullptr, nullptr, 0});
    });
  }
}

// Sets the sums of the biases to 0. The first products set the other sums.
template <class Element>
static void begin_sums(const FeedForward<Element>& net, const FeedForwardSums<Element>& sums) {
  for (int64_t i = 0; i < net.entering.columns; ++i) sums.entering_bias[i] = 0;
  for (int64_t i = 0; i < net.leaving.columns; ++i) sums.leaving_bias[i] = 0;
}

// to [columns of left][columns of right] = or += left^T x right, over the rows of both.
template <class Element>
static void sum_products(bool first, const Element* left, int64_t left_stride, int64_t columns,
                         const PanelMatrix<Element>& right, Element* to, int64_t to_stride) {
  const Target<Element> target{to, to_stride, nullptr, nullptr, 0};
  if (first) {
    multiply<Finish::kPut, Element>(right, left, 1, left_stride, columns, target);
  } else {
    multiply<Finish::kAdd, Element>(right, left, 1, left_stride, columns, target);
  }
}

// Adds the gradients of the weights to `sums`, or sets them if the rows are the `first` ones, and the
// gradient of x to grad_x unless it is null. Whole vectors may be read after the last columns of x and grad.
template <class Element>
static void add_feed_forward_gradients(const FeedForward<Element>& net, const WindowRows& all,
                                       const Element* x, int64_t x_stride, const Element* grad,
                                       int64_t grad_stride, Element* grad_x, int64_t grad_x_stride,
                                       const FeedForwardScratch<Element>& scratch,
                                       const FeedForwardSums<Element>& sums, bool first_rows) {
  const int64_t stride = net.slice_panels * net.entering.width;
  const int64_t in = net.entering.rows, out = net.leaving.columns;
  const Element scale = net.dropout.active ? static_cast<Element>(net.dropout.scale) : Element(1);
  add_rows<Element>(grad, grad_stride, all.windows * all.steps, out, sums.leaving_bias);
  for (int64_t panel = 0; panel < net.entering.count; panel += net.slice_panels) {
    const int64_t first = panel * net.entering.width;
    const PanelMatrix<Element> turned = net.leaving_turned.some(panel, net.slice_panels);
    const int64_t columns = turned.columns;
    for_groups(all, net.group_windows, [&](const WindowRows& rows, int64_t at) {
      const int64_t count = rows.windows * rows.steps;
      const Element* const group_x = x + at * x_stride;
      const Element* const group_grad = grad + at * grad_stride;
      Element* const slice = hidden_place<Element>(net, all, at, first, scratch.hidden);
      if (net.kept == nullptr) hidden_slice<Element>(net, rows, panel, group_x, x_stride, slice);
      multiply<Finish::kGate, Element>(
          turned, group_grad, grad_stride, 1, count,
          {scratch.grad_hidden, stride, nullptr, slice, scale, net.kept != nullptr});
      add_rows<Element>(scratch.grad_hidden, stride, count, columns, sums.entering_bias + first);
      const bool sets = first_rows && at == 0;
      sum_products<Element>(sets, group_grad, grad_stride, out,
                            in_place<Element>(slice, count, columns, stride), sums.leaving + first,
                            net.entering.columns);
      sum_products<Element>(sets, scratch.grad_hidden, stride, columns,
                            in_place(group_x, count, in, x_stride), sums.entering + first * in, in);
      if (grad_x != nullptr)
        multiply<Finish::kAdd, Element>(net.entering_turned.rows_from(first, columns), scratch.grad_hidden,
                                        stride, 1, count,
                                        {grad_x + at * grad_x_stride, grad_x_stride, nullptr, nullptr, 0});
    });
  }
}

}  // namespace

// Forward for tiles [begin, end).
template <class Element>
void feed_forward(const FeedForwardJob<Element>& job, int64_t begin, int64_t end, Element* scratch) {
  Carving<Element> space{scratch};
  const auto tile = FeedForwardTile<Element>::carve(job, false, space);
  const int64_t in = job.net.entering.rows, out = job.net.leaving.columns;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t * job.tile_rows, rows = smaller(job.tile_rows, job.rows - first);
    copy_strided<Element>(job.x + first * job.x_row, job.x_row, job.x_column, rows, in, tile.x,
                          job.padded_in);
    for (int64_t row = 0; row < rows; ++row)
      __builtin_memcpy(tile.y + row * job.padded_out, job.net.leaving_bias, sizeof(Element) * out);
    add_feed_forward<Element>(job.net, {first, rows, 1, 0}, tile.x, job.padded_in, tile.y, job.padded_out,
                              tile.hidden.hidden);
    copy_strided<Element>(tile.y, job.padded_out, 1, rows, out, job.output + first * out, out);
  }
}

// Backward for tiles [begin, end), which belong to one part.
template <class Element>
void feed_forward_backward(const FeedForwardJob<Element>& job, int64_t begin, int64_t end, Element* scratch,
                           Element* part) {
  Carving<Element> space{scratch}, total{part};
  const auto tile = FeedForwardTile<Element>::carve(job, true, space);
  const auto sums = part == nullptr ? job.gradients : FeedForwardSums<Element>::carve(job.net, total);
  const int64_t in = job.net.entering.rows, out = job.net.leaving.columns;
  begin_sums(job.net, sums);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t * job.tile_rows, rows = smaller(job.tile_rows, job.rows - first);
    copy_strided<Element>(job.x + first * job.x_row, job.x_row, job.x_column, rows, in, tile.x,
                          job.padded_in);
    copy_strided<Element>(job.grad + first * out, out, 1, rows, out, tile.y, job.padded_out);
    Element* const grad_x = job.grad_x == nullptr ? nullptr : tile.grad_x;
    for (int64_t i = 0; grad_x != nullptr && i < rows * job.padded_in; ++i) grad_x[i] = 0;
    add_feed_forward_gradients<Element>(job.net, {first, rows, 1, 0}, tile.x, job.padded_in, tile.y,
                                        job.padded_out, grad_x, job.padded_in, tile.hidden, sums, t == begin);
    if (grad_x != nullptr)
      copy_strided<Element>(grad_x, job.padded_in, 1, rows, in, job.grad_x + first * in, in);
  }
}
