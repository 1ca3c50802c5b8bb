// The feed-forward block as its kernels want it: packed weights and how it is cut. Host only.
#pragma once

#include "feed_forward/feed_forward.h"
#include "panel_store.h"

namespace qfast {

constexpr int64_t kSliceColumns = 256;  // of the hidden, computed at once
constexpr int64_t kGroupRows = 240;     // whole register tiles of any width

// Windows of `steps` rows each that are taken at once: about `rows` rows.
inline int64_t windows_of(int64_t rows, int64_t steps, bool drops) {
  const int64_t windows = std::max<int64_t>(1, rows / steps);
  return drops ? rounded_up(windows, 4) : windows;  // four share a random number of the dropout
}

// Windows of a tile: about `rows` rows, fewer where the batch would give fewer than 16 tiles. Fixed by the
// sizes, so that sums have the same order with any number of threads.
inline int64_t tile_windows(int64_t rows, int64_t batch, int64_t steps, bool drops) {
  const int64_t group = windows_of(kGroupRows, steps, drops);
  const int64_t share = rounded_up((batch + kSumParts - 1) / kSumParts, group);
  return std::max(group, std::min(rounded_up(windows_of(rows, steps, drops), group), share));
}

// Weights are contiguous and live as long as the call.
template <class Element>
FeedForward<Element> packed_feed_forward(PanelStore<Element>& store, const Tensor& weight_in,
                                         const Tensor& bias_in, const Tensor& weight_out, bool backward) {
  FeedForward<Element> net{};
  const int64_t hidden = weight_in.size(0), out = weight_out.size(0);
  net.entering = store.linear(weight_in, 0, hidden);
  net.entering_bias = store.vector(bias_in.const_data_ptr<Element>(), hidden);
  if (backward) {
    net.leaving_turned = store.turned(weight_out, 0, out);
    net.entering_turned = store.turned(weight_in, 0, hidden);
    net.leaving.columns = out;
  } else {
    net.leaving = store.linear(weight_out, 0, out);
  }
  net.slice_panels = std::max<int64_t>(1, kSliceColumns / net.entering.width);
  return net;
}

}  // namespace qfast
