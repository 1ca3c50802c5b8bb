// Self-attention over the steps of a window, and its gradients. It is compiled once per instruction set;
// cpu_isa_begin.h lists the language features that it may use.
//
// Each head computes scores [results, T] = q k^T / sqrt(D / heads), their softmax, dropout, and the product
// with v. A thread computes one head of one window after the other, and all intermediate values stay in the
// caches. Nothing is saved: backward computes the attention weights again. Bound by multiply-adds: 4 T D
// flops per row with a result in forward, 12 T D in backward.
#pragma once

#include "dropout_kernels.h"
#include "panel_kernels.h"

namespace {

constexpr int32_t kHeadDropout = 3;  // third dropout counter of head 0; head h has kHeadDropout + h

// Replaces a row of scores by its softmax. The elements from `count` to `padded` become 0.
template <class Element>
static void padded_softmax(Element* scores, int64_t count, int64_t padded) {
  constexpr int64_t lanes = kLanes<Element>;
  for (int64_t s = count; s < padded; ++s) scores[s] = -static_cast<Element>(__builtin_inf());
  Vector<Element> most = load<Element>(scores, lanes);
  for (int64_t s = lanes; s < padded; s += lanes) {
    const Vector<Element> value = load<Element>(scores + s, lanes);
    most = value > most ? value : most;
  }
  const Element top = most_of_lanes<Element>(most);
  for (int64_t s = 0; s < padded; s += lanes)
    store<Element>(scores + s, load<Element>(scores + s, lanes) - top, lanes);
  exp_elements<Element>(scores, 0, padded);
  Vector<Element> total = {};
  for (int64_t s = 0; s < padded; s += lanes) total += load<Element>(scores + s, lanes);
  const Element scale = 1 / sum_of_lanes<Element>(total);
  for (int64_t s = 0; s < padded; s += lanes)
    store<Element>(scores + s, load<Element>(scores + s, lanes) * scale, lanes);
  for (int64_t s = count; s < padded; ++s) scores[s] = 0;
}

// One head of one window, in the buffers of a group.
template <class Element>
struct Head {
  const EncoderJob<Element>& job;
  const EncoderGroup<Element>& group;
  int64_t window, head;  // number of the window in the batch; number of the head
  int64_t in_group;      // number of the window in the group

  int64_t width() const { return job.width / job.heads; }
  int64_t at(int64_t rows) const { return in_group * rows; }
  Element* query_of(Element* queries) const {
    return queries + at(job.results) * job.padded + head * width();
  }
  Element* key_of(Element* pairs) const { return pairs + at(job.steps) * job.padded_pair + head * width(); }
  Element* value_of(Element* pairs) const { return key_of(pairs) + job.width; }

  PanelMatrix<Element> queries(const Element* from) const {
    return in_place(from, job.results, width(), job.padded);
  }
  PanelMatrix<Element> pairs(const Element* from) const {
    return in_place(from, job.steps, width(), job.padded_pair);
  }

  // Returns keys or values transposed and multiplied by `scale`. Columns beyond the last step, up to whole
  // panels, keep the zeros of the scratch memory.
  PanelMatrix<Element> turned(const Element* from, Element scale) const {
    PanelMatrix<Element> to = in_place<Element>(group.turned, width(), job.steps, 0);
    to.columns = to.padded();
    to.step = to.width;
    to.panel_stride = width() * to.width;
    for (int64_t s = 0; s < job.steps; ++s) {
      Element* const column = group.turned + s / to.width * to.panel_stride + s % to.width;
      for (int64_t j = 0; j < width(); ++j) column[j * to.width] = scale * from[s * job.padded_pair + j];
    }
    return to;
  }

  Element scale() const { return static_cast<Element>(1 / __builtin_sqrt(static_cast<double>(width()))); }

  // Computes the attention weights in group.scores, and after dropout in group.dropped (the same buffer
  // without dropout).
  void weigh() const {
    const int64_t stride = job.padded_steps;
    multiply<Finish::kPut, Element>(turned(key_of(group.key_value), scale()), query_of(group.query),
                                    job.padded, 1, job.results, {group.scores, stride, nullptr, nullptr, 0});
    for (int64_t t = 0; t < job.results; ++t)
      padded_softmax<Element>(group.scores + t * stride, job.steps, stride);
    if (!job.dropout.active) return;
    draw_mask();
    for (int64_t i = 0; i < job.results * stride; ++i) group.dropped[i] = group.scores[i] * group.mask[i];
  }

  // Computes the dropout mask. Four steps share a counter. If only the last step has a result, its mask is
  // that of its position in its group of four.
  void draw_mask() const {
    const int64_t stride = job.padded_steps, first = job.steps - job.results, inside = first % 4;
    const auto use = static_cast<int32_t>(kHeadDropout + head);
    Element* const mask = group.mask;
    if (inside == 0) {
      for (int64_t i = 0; i < job.results * stride; ++i) mask[i] = 1;
      drop<Element>(job.dropout, {first, 0, use, static_cast<int32_t>(window)}, job.results, job.steps, mask,
                    stride);
      return;
    }
    Element four[4 * kLanes<Element>];
    for (int64_t s = 0; s < job.steps; s += kLanes<Element>) {
      for (Element& value : four) value = 1;
      drop<Element>(job.dropout, {first - inside, s, use, static_cast<int32_t>(window)}, inside + 1,
                    smaller(kLanes<Element>, job.steps - s), four, kLanes<Element>);
      for (int64_t j = 0; j < smaller(kLanes<Element>, job.steps - s); ++j)
        mask[s + j] = four[inside * kLanes<Element> + j];
    }
  }

  // Multiplies weights and values into group.mixed.
  void mix() const {
    multiply<Finish::kPut, Element>(pairs(value_of(group.key_value)), group.dropped, job.padded_steps, 1,
                                    job.results, {query_of(group.mixed), job.padded, nullptr, nullptr, 0});
  }

  // Computes the gradients of queries, keys and values from group.grad_mixed.
  void backward() const {
    const int64_t stride = job.padded_steps;
    Element* const grad = query_of(group.grad_mixed);
    multiply<Finish::kPut, Element>(turned(value_of(group.key_value), 1), grad, job.padded, 1, job.results,
                                    {group.grad_scores, stride, nullptr, nullptr, 0});
    multiply<Finish::kPut, Element>(queries(grad), group.dropped, 1, stride, job.steps,
                                    {value_of(group.grad_key_value), job.padded_pair, nullptr, nullptr, 0});
    for (int64_t t = 0; t < job.results; ++t) through_softmax(t * stride);
    multiply<Finish::kPut, Element>(pairs(key_of(group.key_value)), group.grad_scores, stride, 1, job.results,
                                    {query_of(group.grad_query), job.padded, nullptr, nullptr, 0});
    multiply<Finish::kPut, Element>(queries(query_of(group.query)), group.grad_scores, 1, stride, job.steps,
                                    {key_of(group.grad_key_value), job.padded_pair, nullptr, nullptr, 0});
  }

  // Replaces a row of the gradients of the weights by the gradients of q . k. Both are 0 beyond the last
  // step.
  void through_softmax(int64_t row) const {
    constexpr int64_t lanes = kLanes<Element>;
    Element* const grad = group.grad_scores + row;
    const Element* const weights = group.scores + row;
    Vector<Element> along = {};
    for (int64_t s = 0; s < job.padded_steps; s += lanes) {
      Vector<Element> value = load<Element>(grad + s, lanes);
      if (job.dropout.active) {
        value *= load<Element>(group.mask + row + s, lanes);
        store<Element>(grad + s, value, lanes);
      }
      along += value * load<Element>(weights + s, lanes);
    }
    const Element mean = sum_of_lanes<Element>(along), by = scale();
    for (int64_t s = 0; s < job.padded_steps; s += lanes) {
      const Vector<Element> value = load<Element>(grad + s, lanes) - mean;
      store<Element>(grad + s, load<Element>(weights + s, lanes) * value * by, lanes);
    }
  }
};

}  // namespace
