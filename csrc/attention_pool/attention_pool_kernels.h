// Attention over the steps of a window: scores = score . tanh(weight h + bias), their softmax over the steps,
// the mean of h under the softmax, and the gradients. It is compiled once per instruction set;
// cpu_isa_begin.h lists the language features that it may use.
//
// A thread owns tiles of rows and computes the steps of a tile in blocks that fit in the second-level cache.
// Saved for backward: the attention weights and the mean; the tanh is computed again. Bound by multiply-adds:
// 2 A H flops per step in forward, three times as many in backward, plus one tanh per step and hidden unit of
// the scores.
#pragma once

#include "dropout_kernels.h"
#include "panel_kernels.h"

namespace {

// A block of a tile: `count` steps from `step` of `rows` rows from `first`.
struct PoolBlock {
  int64_t first, rows, step, count;
};

// to[row] = from[row] . weight for rows with stride `stride`. The rows of `to` are contiguous.
template <class Element>
QFAST_ALWAYS_INLINE void project(const PanelMatrix<Element>& weight, const Element* from, int64_t stride,
                                 int64_t rows, Element* to) {
  multiply<Finish::kPut, Element>(weight, from, stride, 1, rows, {to, weight.padded(), nullptr, nullptr, 0});
}

// values = tanh((values + bias) * mask) over a block. If there is dropout, `mask` contains the mask
// afterwards.
template <class Element>
static void activate(const PoolJob<Element>& job, const PoolBlock& block, Element* values, Element* mask) {
  const int64_t padded = job.entering.padded(), cells = block.rows * block.count;
  const bool drops = job.dropout.active;
  if (drops) {
    for (int64_t i = 0; i < cells * padded; ++i) mask[i] = 1;
    for (int64_t s = 0; s < block.count; ++s) {
      const Place place{block.first, 0, INT32_MIN, static_cast<int32_t>(block.step + s)};
      drop<Element>(job.dropout, place, block.rows, job.width, mask + s * padded, block.count * padded);
    }
  }
  for (int64_t cell = 0; cell < cells; ++cell)
    for (int64_t j = 0; j < padded; j += kLanes<Element>) {
      Element* const at = values + cell * padded + j;
      Vector<Element> x = load<Element>(at, kLanes<Element>) + load<Element>(job.bias + j, kLanes<Element>);
      if (drops) x *= load<Element>(mask + cell * padded + j, kLanes<Element>);
      store<Element>(at, tanh<Element>(x), kLanes<Element>);
    }
}

// ---------------------------------------------------------------- forward
// Replaces a row of scores by its softmax.
template <class Element>
static void softmax(Element* scores, int64_t count) {
  Element most = scores[0];
  for (int64_t t = 1; t < count; ++t) most = scores[t] > most ? scores[t] : most;
  for (int64_t t = 0; t < count; ++t) scores[t] -= most;
  exp_elements<Element>(scores, 0, count);
  Vector<Element> total = {};
  for_vectors<Element>(count, [&](int64_t t, int64_t lanes) __attribute__((always_inline)) {
    total += load<Element>(scores + t, lanes);
  });
  const Element scale = 1 / sum_of_lanes<Element>(total);
  for (int64_t t = 0; t < count; ++t) scores[t] *= scale;
}

// to = sum over steps of weights[t] * h[t]
template <class Element>
static void weighted_sum(const Element* weights, const Element* h, int64_t stride, int64_t steps,
                         int64_t hidden, Element* to) {
  constexpr int64_t kWhole = kPanelVectors * kLanes<Element>;
  int64_t j = 0;
  for (; j + kWhole <= hidden; j += kWhole) {
    Sums<Element, 1, kPanelVectors> sums = {};
    add_product(sums, weights, 0, 1, h + j, stride, steps);
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v)
      store<Element>(to + j + v * kLanes<Element>, sums.at[0][v], kLanes<Element>);
  }
  for_vectors<Element>(hidden - j, [&](int64_t k, int64_t lanes) __attribute__((always_inline)) {
    Vector<Element> total = {};
    for (int64_t t = 0; t < steps; ++t)
      total += splat(weights[t]) * load<Element>(h + t * stride + j + k, lanes);
    store<Element>(to + j + k, total, lanes);
  });
}

// Computes the scores of a block, in job.attention.
template <class Element>
static void score_block(const PoolJob<Element>& job, const PoolBlock& block, Element* scratch) {
  const int64_t padded = job.entering.padded(), cells = block.rows * block.count;
  const Element* const h = job.h + block.first * job.row_stride + block.step * job.step_stride;
  if (job.row_stride == block.count * job.step_stride) {  // the block is one matrix
    project(job.entering, h, job.step_stride, cells, scratch);
  } else {
    for (int64_t row = 0; row < block.rows; ++row)
      project(job.entering, h + row * job.row_stride, job.step_stride, block.count,
              scratch + row * block.count * padded);
  }
  activate(job, block, scratch, scratch + job.tile_rows * job.block_steps * padded);
  for (int64_t row = 0; row < block.rows; ++row)
    for (int64_t s = 0; s < block.count; ++s)
      job.attention[(block.first + row) * job.steps + block.step + s] =
          dot<Element>(scratch + (row * block.count + s) * padded, job.score, job.width);
}

// ---------------------------------------------------------------- backward
// Computes the gradients of the scores of a row. It subtracts the mean of h first: a part that all steps
// share does not change the gradients of the scores, but its rounding would.
template <class Element>
static void score_gradients(const PoolJob<Element>& job, int64_t row, Element* to) {
  const Element* const attention = job.attention + row * job.steps;
  const Element* const pooled = job.pooled + row * job.hidden;
  const Element* const grad = job.grad + row * job.hidden;
  for (int64_t t = 0; t < job.steps; ++t) {
    const Element* const h = job.h + row * job.row_stride + t * job.step_stride;
    Vector<Element> total = {};
    for_vectors<Element>(job.hidden, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
      const Vector<Element> difference = load<Element>(h + j, lanes) - load<Element>(pooled + j, lanes);
      total += difference * load<Element>(grad + j, lanes);
    });
    to[t] = sum_of_lanes<Element>(total);
  }
  const Element mean = dot<Element>(attention, to, job.steps);
  for (int64_t t = 0; t < job.steps; ++t) to[t] = attention[t] * (to[t] - mean);
}

// Backward of a block.
template <class Element>
struct PoolBackward {
  const PoolJob<Element>& job;
  const PoolBlock block;
  Element *values, *mask, *rows;                  // scratch: tanh, dropout mask, h and then its gradient
  const Element* grad_scores;                     // gradients of the scores of the tile, [row][step]
  Element *grad_weight, *grad_bias, *grad_score;  // sums of the gradients of the part

  // Copies h of the block, padded with zeros.
  void copy_rows() const {
    const int64_t padded = job.turned.padded();
    for (int64_t row = 0; row < block.rows; ++row)
      for (int64_t s = 0; s < block.count; ++s) {
        const Element* const from =
            job.h + (block.first + row) * job.row_stride + (block.step + s) * job.step_stride;
        Element* const to = rows + (row * block.count + s) * padded;
        for_vectors<Element>(job.hidden, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
          store<Element>(to + j, load<Element>(from + j, lanes), lanes);
        });
        for (int64_t j = job.hidden; j < padded; ++j) to[j] = 0;
      }
  }

  // Replaces the tanh by the gradient of its input, and adds the gradients of bias and score.
  void through_tanh() const {
    const int64_t padded = job.entering.padded();
    const bool drops = job.dropout.active;
    for (int64_t j = 0; j < padded; j += kLanes<Element>) {
      const Vector<Element> score = load<Element>(job.score + j, kLanes<Element>);
      Vector<Element> bias_sum = {}, score_sum = {};
      for (int64_t row = 0; row < block.rows; ++row)
        for (int64_t s = 0; s < block.count; ++s) {
          const int64_t at = (row * block.count + s) * padded + j;
          const Vector<Element> grad_cell = splat(grad_scores[row * job.steps + block.step + s]);
          const Vector<Element> y = load<Element>(values + at, kLanes<Element>);
          Vector<Element> grad = grad_cell * score * (Element(1) - y * y);
          if (drops) grad *= load<Element>(mask + at, kLanes<Element>);
          score_sum += grad_cell * y;
          bias_sum += grad;
          store<Element>(values + at, grad, kLanes<Element>);
        }
      store<Element>(grad_bias + j, load<Element>(grad_bias + j, kLanes<Element>) + bias_sum,
                     kLanes<Element>);
      store<Element>(grad_score + j, load<Element>(grad_score + j, kLanes<Element>) + score_sum,
                     kLanes<Element>);
    }
  }

  // grad_weight += gradient^T . h
  void weight_sums() const {
    const int64_t from = job.entering.padded(), to = job.turned.padded();
    multiply<Finish::kAdd, Element>(in_place<Element>(rows, block.rows * block.count, job.hidden, to), values,
                                    1, from, job.width, {grad_weight, to, nullptr, nullptr, 0});
  }

  // Computes the gradient of h, which is the sum of the gradients through the scores and through the mean.
  void input_gradient() const {
    const int64_t padded = job.turned.padded();
    project(job.turned, values, job.entering.padded(), block.rows * block.count, rows);
    for (int64_t row = 0; row < block.rows; ++row)
      for (int64_t s = 0; s < block.count; ++s) {
        const Element* const from = rows + (row * block.count + s) * padded;
        const Element* const grad = job.grad + (block.first + row) * job.hidden;
        const int64_t at = (block.first + row) * job.steps + block.step + s;
        const Vector<Element> attention = splat(job.attention[at]);
        for_vectors<Element>(job.hidden, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
          const Vector<Element> through = load<Element>(from + j, lanes);
          store<Element>(job.grad_h + at * job.hidden + j,
                         through + attention * load<Element>(grad + j, lanes), lanes);
        });
      }
  }
};

}  // namespace

// Forward for tiles [begin, end).
template <class Element>
void attention_pool_forward(const PoolJob<Element>& job, int64_t begin, int64_t end, Element* scratch) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * job.tile_rows, rows = smaller(job.tile_rows, job.batch - first);
    for (int64_t step = 0; step < job.steps; step += job.block_steps)
      score_block(job, PoolBlock{first, rows, step, smaller(job.block_steps, job.steps - step)}, scratch);
    for (int64_t row = first; row < first + rows; ++row) {
      Element* const attention = job.attention + row * job.steps;
      softmax<Element>(attention, job.steps);
      weighted_sum<Element>(attention, job.h + row * job.row_stride, job.step_stride, job.steps, job.hidden,
                            job.pooled + row * job.hidden);
    }
  }
}

// Backward for tiles [begin, end), which belong to one part.
template <class Element>
void attention_pool_backward(const PoolJob<Element>& job, int64_t begin, int64_t end, Element* scratch,
                             Element* sums) {
  const int64_t narrow = job.entering.padded();
  const int64_t wide = job.turned.padded();
  const int64_t cells = job.tile_rows * job.block_steps;
  Element* const mask = scratch + cells * narrow;
  Element* const rows = mask + (job.dropout.active ? cells * narrow : 0);
  Element* const grad_scores = rows + cells * wide;
  Element* const grad_bias = sums + job.width * wide;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * job.tile_rows, count = smaller(job.tile_rows, job.batch - first);
    for (int64_t row = 0; row < count; ++row)
      score_gradients<Element>(job, first + row, grad_scores + row * job.steps);
    for (int64_t step = 0; step < job.steps; step += job.block_steps) {
      const PoolBlock block{first, count, step, smaller(job.block_steps, job.steps - step)};
      const PoolBackward<Element> pass{job,  block,     scratch,           mask, rows, grad_scores,
                                       sums, grad_bias, grad_bias + narrow};
      pass.copy_rows();
      project(job.entering, rows, wide, block.rows * block.count, scratch);
      activate(job, block, scratch, mask);
      pass.through_tanh();
      pass.weight_sums();
      pass.input_gradient();
    }
  }
}
