// Argument checks of the feed-forward block, shared by CPU and CUDA. Host only.
#pragma once

#include "common.h"

namespace qfast {

inline void check_feed_forward(const char* op, const Tensor& x, const Tensor& weight_in,
                               const Tensor& bias_in, const Tensor& weight_out) {
  check_floating(op, "x", x);
  check_dims(op, "x", x, 2, "[N, D]");
  check_dims(op, "weight_in", weight_in, 2, "[M, D]");
  check_dims(op, "weight_out", weight_out, 2, "[O, M]");
  const int64_t hidden = weight_in.size(0), out = weight_out.size(0);
  QFAST_CHECK(x.size(1) > 0 && hidden > 0 && out > 0, op, ": expected D, M and O of at least 1, got D ",
              x.size(1), ", M ", hidden, ", O ", out, ".");
  check_shaped(op, "weight_in", weight_in, x, {hidden, x.size(1)});
  check_shaped(op, "bias_in", bias_in, x, {hidden});
  check_shaped(op, "weight_out", weight_out, x, {out, hidden});
}

}  // namespace qfast
