// A post-norm encoder layer over whole windows, and the gradients. It is compiled once per instruction set;
// cpu_isa_begin.h lists the language features that it may use.
//
// A thread owns tiles of whole windows. Attention is computed for groups of windows that fit in the
// second-level cache. Its normalised results are collected in the tile for the feed-forward block, which
// needs many rows for each slice of its weights. If only the last step has a result, a window contributes one
// row, and a tile has many more windows.
//
// Saved for backward: the results of the norms before their weights, their scales and, if the caller asks for
// it, the hidden activations. Everything else is computed again. Bound by multiply-adds: 4 M D flops per row
// in the feed-forward block, and 8 D D in the projections, of which keys and values are 4 D D.
#pragma once

#include "encoder_layer/encoder_layer_kernels_attention.h"
#include "feed_forward/feed_forward_kernels.h"

namespace {

// The rows of a group that have results: their address in x, stride and number.
template <class Element>
struct ResultRows {
  const Element* x;
  int64_t x_stride, count;
};

template <class Element>
QFAST_ALWAYS_INLINE ResultRows<Element> result_rows(const EncoderJob<Element>& job, const Element* x,
                                                    int64_t windows) {
  if (job.results == job.steps) return {x, job.padded, windows * job.steps};
  return {x + (job.steps - 1) * job.padded, job.steps * job.padded, windows};
}

// ---------------------------------------------------------------- norms
template <class Element>
QFAST_ALWAYS_INLINE Element sum_of(const Element* values, int64_t columns) {
  Vector<Element> total = {};
  for_vectors<Element>(columns, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
    total += load<Element>(values + j, lanes);
  });
  return sum_of_lanes<Element>(total);
}

// Replaces rows by weight * normalised + bias, where normalised = (row - mean) / sqrt(variance + eps). Saves
// normalised rows and scales unless they are null.
template <class Element>
static void normalise(Element* rows, int64_t stride, int64_t count, int64_t width, double eps,
                      const Element* weight, const Element* bias, Element* normalised, Element* scales) {
  for (int64_t row = 0; row < count; ++row) {
    Element* const at = rows + row * stride;
    const Element mean = sum_of<Element>(at, width) / static_cast<Element>(width);
    Vector<Element> squares = {};
    for_vectors<Element>(width, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
      const Vector<Element> difference = load<Element>(at + j, lanes) - mean;
      const Vector<Element> square = difference * difference;
      if (lanes == kLanes<Element>) {
        squares += square;
      } else {
        for (int64_t l = 0; l < lanes; ++l) squares[l] += square[l];
      }
    });
    const Element variance = sum_of_lanes<Element>(squares) / static_cast<Element>(width);
    const auto scale = static_cast<Element>(1 / __builtin_sqrt(static_cast<double>(variance) + eps));
    if (scales != nullptr) scales[row] = scale;
    for_vectors<Element>(width, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
      const Vector<Element> value = (load<Element>(at + j, lanes) - mean) * scale;
      if (normalised != nullptr) store<Element>(normalised + row * width + j, value, lanes);
      store<Element>(
          at + j,
          multiply_add<Element>(value, load<Element>(weight + j, lanes), load<Element>(bias + j, lanes)),
          lanes);
    });
  }
}

// Computes the gradients of the rows before the norm from those after it, `from` [row][from_stride]. Adds the
// gradients of weight and bias, which are first summed in `sums` [2][sums_stride]: the rounding error then
// grows with the rows of a tile only.
template <class Element>
static void normalise_backward(const Element* from, int64_t from_stride, const Element* normalised,
                               const Element* scales, int64_t count, int64_t width, const Element* weight,
                               Element* to, int64_t to_stride, Element* sums, int64_t sums_stride,
                               Element* weight_sum, Element* bias_sum) {
  const Element share = 1 / static_cast<Element>(width);
  for (int64_t i = 0; i < 2 * sums_stride; ++i) sums[i] = 0;
  for (int64_t row = 0; row < count; ++row) {
    const Element *const grad = from + row * from_stride, *const x = normalised + row * width;
    Vector<Element> sum = {}, along = {};
    for_vectors<Element>(width, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
      const Vector<Element> grad_value = load<Element>(grad + j, lanes), value = load<Element>(x + j, lanes);
      const Vector<Element> weighted = grad_value * load<Element>(weight + j, lanes);
      sum += weighted;
      along += weighted * value;
      store<Element>(sums + j, load<Element>(sums + j, lanes) + grad_value * value, lanes);
      store<Element>(sums + sums_stride + j, load<Element>(sums + sums_stride + j, lanes) + grad_value,
                     lanes);
    });
    const Element mean = sum_of_lanes<Element>(sum) * share, slope = sum_of_lanes<Element>(along) * share;
    for_vectors<Element>(width, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
      const Vector<Element> weighted = load<Element>(grad + j, lanes) * load<Element>(weight + j, lanes);
      const Vector<Element> value = (weighted - mean - load<Element>(x + j, lanes) * slope) * scales[row];
      store<Element>(to + row * to_stride + j, value, lanes);
    });
  }
  add_rows<Element>(sums, sums_stride, 1, width, weight_sum);
  add_rows<Element>(sums + sums_stride, sums_stride, 1, width, bias_sum);
}

// to += from
template <class Element>
static void add_to_rows(Element* to, int64_t stride, const Element* from, int64_t from_stride, int64_t rows,
                        int64_t columns) {
  for (int64_t row = 0; row < rows; ++row)
    for_vectors<Element>(columns, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
      Element* const at = to + row * stride + j;
      store<Element>(at, load<Element>(at, lanes) + load<Element>(from + row * from_stride + j, lanes),
                     lanes);
    });
}

// Saved rows and scales of norm `which`, from a window on.
template <class Element>
struct SavedRows {
  Element *normalised, *scales;
};

template <class Element>
QFAST_ALWAYS_INLINE SavedRows<Element> saved_rows(const EncoderJob<Element>& job, int64_t which,
                                                  int64_t window) {
  if (job.normalised == nullptr) return {nullptr, nullptr};
  const int64_t row = (which * job.batch + window) * job.results;
  return {job.normalised + row * job.width, job.scales + row};
}

// ---------------------------------------------------------------- forward
constexpr int32_t kAttentionDropout = 0;
constexpr int32_t kLeavingDropout = 2;

// Copies x of a group of windows and computes queries, keys and values.
template <class Element>
static void project_group(const EncoderJob<Element>& job, const EncoderGroup<Element>& group,
                          const WindowRows& rows) {
  for (int64_t w = 0; w < rows.windows; ++w)
    copy_strided<Element>(job.x + (rows.first_window + w) * job.x_window, job.x_step, job.x_column, job.steps,
                          job.width, group.x + w * job.steps * job.padded, job.padded);
  const ResultRows<Element> results = result_rows<Element>(job, group.x, rows.windows);
  multiply<Finish::kPut, Element>(job.query, results.x, results.x_stride, 1, results.count,
                                  {group.query, job.padded, job.query_bias, nullptr, 0});
  multiply<Finish::kPut, Element>(job.key_value, group.x, job.padded, 1, rows.windows * job.steps,
                                  {group.key_value, job.padded_pair, job.key_value_bias, nullptr, 0});
}

// Calls body(head) for all heads of all windows of the group.
template <class Element, class Body>
QFAST_ALWAYS_INLINE void for_heads(const EncoderJob<Element>& job, const EncoderGroup<Element>& group,
                                   const WindowRows& rows, const Body& body) {
  for (int64_t w = 0; w < rows.windows; ++w)
    for (int64_t head = 0; head < job.heads; ++head)
      body(Head<Element>{job, group, rows.first_window + w, head, w});
}

// Attention, projection, dropout, residual and first norm of a group.
template <class Element>
static void attention_block(const EncoderJob<Element>& job, const EncoderGroup<Element>& group,
                            const WindowRows& rows, Element* to) {
  project_group<Element>(job, group, rows);
  for_heads<Element>(job, group, rows, [&](const Head<Element>& head) {
    head.weigh();
    head.mix();
  });
  const ResultRows<Element> results = result_rows<Element>(job, group.x, rows.windows);
  multiply<Finish::kPut, Element>(job.out, group.mixed, job.padded, 1, results.count,
                                  {to, job.padded, job.out_bias, nullptr, 0});
  drop_windows<Element>(job.dropout, kAttentionDropout, rows, 0, job.width, to, job.padded);
  add_to_rows<Element>(to, job.padded, results.x, results.x_stride, results.count, job.width);
  const SavedRows<Element> saved = saved_rows<Element>(job, 0, rows.first_window);
  normalise<Element>(to, job.padded, results.count, job.width, job.eps, job.norm1_weight, job.norm1_bias,
                     saved.normalised, saved.scales);
}

template <class Element>
QFAST_ALWAYS_INLINE WindowRows windows_of_tile(const EncoderJob<Element>& job, int64_t tile) {
  const int64_t first = tile * job.tile_windows;
  return {first, smaller(job.tile_windows, job.batch - first), job.results, job.steps - job.results};
}

// ---------------------------------------------------------------- backward
// Computes the gradient of the input of the first norm, in tile.grad_first, from the gradient of the output.
template <class Element>
static void feed_forward_block_backward(const EncoderJob<Element>& job, const EncoderTile<Element>& tile,
                                        const WindowRows& all, const EncoderSums<Element>& sums,
                                        bool first_rows) {
  const int64_t count = all.windows * all.steps, width = job.width, padded = job.padded;
  const SavedRows<Element> first = saved_rows<Element>(job, 0, all.first_window);
  const SavedRows<Element> second = saved_rows<Element>(job, 1, all.first_window);
  normalise_backward<Element>(job.grad + all.first_window * job.results * width, width, second.normalised,
                              second.scales, count, width, job.norm2_weight, tile.grad_first, padded,
                              tile.norm_sums, padded, sums.norm2_weight, sums.norm2_bias);
  copy_strided<Element>(tile.grad_first, padded, 1, count, width, tile.grad_second, padded);
  drop_windows<Element>(job.dropout, kLeavingDropout, all, 0, width, tile.grad_second, padded);
  // The same bits as in forward, whose hidden activations may be kept.
  for (int64_t row = 0; row < count; ++row)
    for_vectors<Element>(width, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
      const Vector<Element> value = load<Element>(first.normalised + row * width + j, lanes);
      const Vector<Element> weight = load<Element>(job.norm1_weight + j, lanes);
      const Vector<Element> bias = load<Element>(job.norm1_bias + j, lanes);
      store<Element>(tile.entering + row * padded + j, multiply_add<Element>(value, weight, bias), lanes);
    });
  add_feed_forward_gradients<Element>(job.net, all, tile.entering, padded, tile.grad_second, padded,
                                      tile.grad_first, padded, tile.hidden, sums.net, first_rows);
  normalise_backward<Element>(tile.grad_first, padded, first.normalised, first.scales, count, width,
                              job.norm1_weight, tile.grad_first, padded, tile.norm_sums, padded,
                              sums.norm1_weight, sums.norm1_bias);
}

// Adds the gradients of the weight, grad^T x, and of the bias of a linear layer with `columns` results. For
// the `first` rows, it sets the gradient of the weight.
template <class Element>
static void add_linear_gradients(bool first, const Element* grad, int64_t grad_stride, int64_t columns,
                                 const PanelMatrix<Element>& x, Element* weight, Element* bias) {
  sum_products<Element>(first, grad, grad_stride, columns, x, weight, x.columns);
  add_rows<Element>(grad, grad_stride, x.rows, columns, bias);
}

// Sets the sums of all vectors to 0. The first products set the other sums.
template <class Element>
static void begin_sums(const EncoderJob<Element>& job, const EncoderSums<Element>& sums) {
  for (int64_t i = 0; i < 3 * job.width; ++i) sums.in_bias[i] = 0;
  Element* const vectors[] = {sums.out_bias, sums.norm1_weight, sums.norm1_bias, sums.norm2_weight,
                              sums.norm2_bias};
  for (Element* const vector : vectors)
    for (int64_t i = 0; i < job.width; ++i) vector[i] = 0;
  begin_sums(job.net, sums.net);
}

// Computes the gradients of a group. `grad_sum` is the gradient of the input of the first norm, and `dropped`
// is this gradient after dropout.
template <class Element>
static void attention_block_backward(const EncoderJob<Element>& job, const EncoderGroup<Element>& group,
                                     const WindowRows& rows, const Element* grad_sum, const Element* dropped,
                                     const EncoderSums<Element>& sums, bool first) {
  const int64_t D = job.width, padded = job.padded, all = rows.windows * job.steps;
  project_group<Element>(job, group, rows);
  const ResultRows<Element> results = result_rows<Element>(job, group.x, rows.windows);
  multiply<Finish::kPut, Element>(job.out_turned, dropped, padded, 1, results.count,
                                  {group.grad_mixed, padded, nullptr, nullptr, 0});
  for_heads<Element>(job, group, rows, [&](const Head<Element>& head) {
    head.weigh();
    head.mix();
    head.backward();
  });
  add_linear_gradients<Element>(first, dropped, padded, D,
                                in_place<Element>(group.mixed, results.count, D, padded), sums.out,
                                sums.out_bias);
  add_linear_gradients<Element>(first, group.grad_query, padded, D,
                                in_place(results.x, results.count, D, results.x_stride), sums.in,
                                sums.in_bias);
  add_linear_gradients<Element>(first, group.grad_key_value, job.padded_pair, 2 * D,
                                in_place<Element>(group.x, all, D, padded), sums.in + D * D,
                                sums.in_bias + D);
  if (job.grad_x == nullptr) return;
  multiply<Finish::kPut, Element>(job.key_value_turned, group.grad_key_value, job.padded_pair, 1, all,
                                  {group.grad_x, padded, nullptr, nullptr, 0});
  Element* const grad_results = group.grad_x + (results.x - group.x);
  multiply<Finish::kAdd, Element>(job.query_turned, group.grad_query, padded, 1, results.count,
                                  {grad_results, results.x_stride, nullptr, nullptr, 0});
  add_to_rows<Element>(grad_results, results.x_stride, grad_sum, padded, results.count, D);
  copy_strided<Element>(group.grad_x, padded, 1, all, D, job.grad_x + rows.first_window * job.steps * D, D);
}

}  // namespace

// Forward for tiles [begin, end).
template <class Element>
void encoder_layer(const EncoderJob<Element>& job, int64_t begin, int64_t end, Element* scratch) {
  Carving<Element> space{scratch};
  const auto tile = EncoderTile<Element>::carve(job, false, space);
  for (int64_t t = begin; t < end; ++t) {
    const WindowRows all = windows_of_tile<Element>(job, t);
    const int64_t count = all.windows * all.steps;
    for_groups(all, job.group_windows, [&](const WindowRows& rows, int64_t at) {
      attention_block<Element>(job, tile.group, rows, tile.entering + at * job.padded);
    });
    for (int64_t row = 0; row < count; ++row)
      __builtin_memcpy(tile.leaving + row * job.padded, job.net.leaving_bias, sizeof(Element) * job.width);
    add_feed_forward<Element>(job.net, all, tile.entering, job.padded, tile.leaving, job.padded,
                              tile.hidden.hidden);
    drop_windows<Element>(job.dropout, kLeavingDropout, all, 0, job.width, tile.leaving, job.padded);
    add_to_rows<Element>(tile.leaving, job.padded, tile.entering, job.padded, count, job.width);
    const SavedRows<Element> saved = saved_rows<Element>(job, 1, all.first_window);
    normalise<Element>(tile.leaving, job.padded, count, job.width, job.eps, job.norm2_weight, job.norm2_bias,
                       saved.normalised, saved.scales);
    copy_strided<Element>(tile.leaving, job.padded, 1, count, job.width,
                          job.output + all.first_window * job.results * job.width, job.width);
  }
}

// Backward for tiles [begin, end), which belong to one part.
template <class Element>
void encoder_layer_backward(const EncoderJob<Element>& job, int64_t begin, int64_t end, Element* scratch,
                            Element* part) {
  Carving<Element> space{scratch}, total{part};
  const auto tile = EncoderTile<Element>::carve(job, true, space);
  const auto sums = part == nullptr ? job.gradients : EncoderSums<Element>::carve(job.width, job.net, total);
  begin_sums(job, sums);
  for (int64_t t = begin; t < end; ++t) {
    const WindowRows all = windows_of_tile<Element>(job, t);
    feed_forward_block_backward<Element>(job, tile, all, sums, t == begin);
    copy_strided<Element>(tile.grad_first, job.padded, 1, all.windows * all.steps, job.width,
                          tile.grad_second, job.padded);
    drop_windows<Element>(job.dropout, kAttentionDropout, all, 0, job.width, tile.grad_second, job.padded);
    for_groups(all, job.group_windows, [&](const WindowRows& rows, int64_t at) {
      attention_block_backward<Element>(job, tile.group, rows, tile.grad_first + at * job.padded,
                                        tile.grad_second + at * job.padded, sums, t == begin && at == 0);
    });
  }
}
