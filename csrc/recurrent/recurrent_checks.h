// Argument checks of the recurrent operators, shared by CPU and CUDA. Host only.
#pragma once

#include <optional>
#include <vector>

#include "common.h"

namespace qfast {

using MaybeTensor = std::optional<Tensor>;

// Checks x and the weights of all layers. `gates` is the number of blocks of H rows in a weight.
inline void check_layers(const char* op, const Tensor& x, const std::vector<Tensor>& weights, int64_t gates) {
  check_floating(op, "x", x);
  check_dims(op, "x", x, 3, "[B, T, F]");
  QFAST_CHECK(!weights.empty() && weights.size() % 4 == 0, op,
              ": weights: expected four tensors for each layer, got ", weights.size(), ".");
  check_dims(op, "weight_hh", weights[1], 2, "[gates * H, H]");
  const int64_t hidden = weights[1].size(1), rows = gates * hidden;
  QFAST_CHECK(x.size(2) > 0 && hidden > 0, op, ": x: expected at least one feature and one unit, got x ",
              shape_text(x), " and weight_hh ", shape_text(weights[1]), ".");
  for (size_t first = 0; first < weights.size(); first += 4) {
    const Tensor* const layer = &weights[first];
    check_shaped(op, "weight_ih", layer[0], x, {rows, first == 0 ? x.size(2) : hidden});
    check_shaped(op, "weight_hh", layer[1], x, {rows, hidden});
    check_shaped(op, "bias_ih", layer[2], x, {rows});
    check_shaped(op, "bias_hh", layer[3], x, {rows});
  }
}

}  // namespace qfast
