// Arguments of the kernels of a post-norm encoder layer. Shared by host code and all CPU instruction sets.
//
// A tile is a number of whole windows, and a group is a number of windows of a tile. Each window has results
// at all steps, or at the last step only; `results` is their number. Rows are [window][step] with a stride of
// `padded` elements.
#pragma once

#include <cstdint>

#include "feed_forward/feed_forward.h"

namespace qfast {

// Sums of the gradients of all parameters of a part, in torch's order and layout.
template <class Element>
struct EncoderSums {
  Element *in, *in_bias, *out, *out_bias;  // `in` has 3 D rows, `out` has D rows
  FeedForwardSums<Element> net;
  Element *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;

  QFAST_SHARED_INLINE static EncoderSums carve(int64_t width, const FeedForward<Element>& net,
                                               Carving<Element>& space) {
    EncoderSums sums;
    sums.in = space.take(3 * width * width);
    sums.in_bias = space.take(3 * width);
    sums.out = space.take(width * width);
    sums.out_bias = space.take(width);
    sums.net = FeedForwardSums<Element>::carve(net, space);
    sums.norm1_weight = space.take(width);
    sums.norm1_bias = space.take(width);
    sums.norm2_weight = space.take(width);
    sums.norm2_bias = space.take(width);
    return sums;
  }
};

template <class Element>
struct EncoderJob {
  int64_t batch, steps, width, heads;  // B, T, D, heads
  int64_t results;                     // T or 1
  int64_t tile_windows, group_windows;
  double eps;
  DropoutRule dropout;
  FeedForward<Element> net;

  const Element* x;
  int64_t x_window, x_step, x_column;                                    // strides
  PanelMatrix<Element> query, key_value, out;                            // D, 2 D and D columns
  const Element *query_bias, *key_value_bias, *out_bias;                 // padded like the panels
  const Element *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;  // padded
  Element* output;                                                       // [B, results, D]
  Element *normalised, *scales;  // [2, B, results, D] and [2, B, results] saved for backward, or null
  // Backward only.
  const Element* grad;                                              // gradient of the output
  PanelMatrix<Element> query_turned, key_value_turned, out_turned;  // D, 2 D and D rows
  Element* grad_x;                                                  // [B, T, D], or null
  EncoderSums<Element> gradients;  // of all parameters, where the first part is summed

  // D, 2 D, T and D / heads, padded to whole panels.
  int64_t padded;
  int64_t padded_pair, padded_steps, padded_head;
};

// Buffers for the attention of a group. A buffer whose heads are read in place as matrices has room for one
// more head at its end.
template <class Element>
struct EncoderGroup {
  Element *x, *query, *key_value, *mixed;  // mixed: the results of all heads
  Element *turned, *scores;                // for one head: transposed keys, attention weights
  // With dropout: the mask, and the weights after dropout.
  Element *mask, *dropped;
  // Backward only.
  Element *grad_mixed, *grad_query, *grad_key_value, *grad_scores, *grad_x;

  QFAST_SHARED_INLINE static EncoderGroup carve(const EncoderJob<Element>& job, bool backward,
                                                Carving<Element>& space) {
    const int64_t rows = job.group_windows * job.steps, result_rows = job.group_windows * job.results;
    const int64_t wide = result_rows * job.padded + job.padded_head, cells = job.results * job.padded_steps;
    const int64_t pair = rows * job.padded_pair + job.padded_head;
    const int64_t times = backward ? 1 : 0;
    EncoderGroup group;
    group.x = space.take(rows * job.padded);
    group.query = space.take(wide);
    group.key_value = space.take(pair);
    group.mixed = space.take(wide);
    group.turned = space.take(job.width / job.heads * job.padded_steps);
    group.scores = space.take(cells);
    group.mask = space.take(job.dropout.active ? cells : 0);
    group.dropped = job.dropout.active ? space.take(cells) : group.scores;
    group.grad_mixed = space.take(times * wide);
    group.grad_query = space.take(times * wide);
    group.grad_key_value = space.take(times * pair);
    group.grad_scores = space.take(times * cells);
    group.grad_x = space.take(times * rows * job.padded);
    return group;
  }
};

// Buffers of a tile, [windows * results][padded]. In forward they are the input and output of the
// feed-forward block. In backward they are its input and the gradients of the two sums before the norms, the
// second one after dropout.
template <class Element>
struct EncoderTile {
  Element *entering, *leaving;
  Element *grad_first, *grad_second;
  Element* norm_sums;  // gradients of a norm's weight and bias, [2][padded]
  EncoderGroup<Element> group;
  FeedForwardScratch<Element> hidden;

  QFAST_SHARED_INLINE static EncoderTile carve(const EncoderJob<Element>& job, bool backward,
                                               Carving<Element>& space) {
    const int64_t elements = job.tile_windows * job.results * job.padded;
    EncoderTile tile;
    tile.entering = space.take(elements);
    tile.leaving = space.take(backward ? 0 : elements);
    tile.grad_first = space.take(backward ? elements : 0);
    tile.grad_second = space.take(backward ? elements : 0);
    tile.norm_sums = space.take(2 * job.padded);
    tile.group = EncoderGroup<Element>::carve(job, backward, space);
    tile.hidden = FeedForwardScratch<Element>::carve(job.net, job.results, backward, space);
    return tile;
  }
};

}  // namespace qfast
