// Packed weights of the feed-forward block, and the sizes of its tiles and groups. Host only.
#pragma once

#include "feed_forward/feed_forward.h"
#include "panel_store.h"

namespace qfast {

constexpr int64_t kSliceColumns = 256;  // hidden units of a slice
constexpr int64_t kGroupRows = 240;     // a multiple of the register tiles of all widths
// With two groups, the weights are packed in advance. With at least kLargeWeights hidden weights, this takes
// longer than what a second group saves, if there are at most kOneGroupRows rows.
constexpr int64_t kOneGroupRows = 360;
constexpr int64_t kLargeWeights = 1 << 18;

// Number of windows of `steps` rows that have about `rows` rows together.
inline int64_t windows_of(int64_t rows, int64_t steps, bool drops) {
  const int64_t windows = std::max<int64_t>(1, rows / steps);
  return drops ? rounded_up(windows, 4) : windows;  // four windows share a dropout counter
}

// Number of windows of a group of at most `batch` windows, so a small batch has small buffers. `weights` is
// the number of hidden units times the width of a row.
inline int64_t group_windows(int64_t batch, int64_t steps, bool drops, int64_t weights) {
  const int64_t all = rounded_up(std::max<int64_t>(batch, 1), drops ? 4 : 1);
  if (weights >= kLargeWeights && all * steps <= kOneGroupRows) return all;
  return std::min(windows_of(kGroupRows, steps, drops), all);
}

// Number of windows of a tile: about `rows` rows, or fewer if the batch would have fewer than 16 tiles. It
// depends on the sizes only, so sums have the same order for any number of threads.
inline int64_t tile_windows(int64_t rows, int64_t batch, int64_t steps, bool drops, int64_t weights) {
  const int64_t group = group_windows(batch, steps, drops, weights);
  const int64_t share = rounded_up((batch + kSumParts - 1) / kSumParts, group);
  return std::max(group, std::min(rounded_up(windows_of(rows, steps, drops), group), share));
}

// Packs the weights, without the bias of the results. The weights are contiguous and live as long as the
// call. `once`: there is one group of rows, so each weight is read by one product only.
template <class Element>
FeedForward<Element> packed_feed_forward(PanelStore<Element>& store, const Tensor& weight_in,
                                         const Tensor& bias_in, const Tensor& weight_out, bool backward,
                                         bool once) {
  FeedForward<Element> net{};
  const int64_t hidden = weight_in.size(0), out = weight_out.size(0);
  net.entering = store.linear(weight_in, 0, hidden, once);
  net.entering_bias = store.vector(bias_in.const_data_ptr<Element>(), hidden);
  if (backward) {
    net.leaving_turned = store.turned(weight_out, 0, out, once);
    net.entering_turned = store.turned(weight_in, 0, hidden, once);
    net.leaving.columns = out;
  } else {
    net.leaving = store.linear(weight_out, 0, out, once);
  }
  net.slice_panels = std::max<int64_t>(1, kSliceColumns / net.entering.width);
  return net;
}

}  // namespace qfast
