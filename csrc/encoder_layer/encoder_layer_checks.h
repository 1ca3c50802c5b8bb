// Argument checks of an encoder layer, shared by CPU and CUDA. Host only.
#pragma once

#include <vector>

#include "common.h"

namespace qfast {

// The parameters of torch.nn.TransformerEncoderLayer, in the same order.
enum EncoderWeight {
  kInWeight,
  kInBias,
  kOutWeight,
  kOutBias,
  kLinear1Weight,
  kLinear1Bias,
  kLinear2Weight,
  kLinear2Bias,
  kNorm1Weight,
  kNorm1Bias,
  kNorm2Weight,
  kNorm2Bias,
  kEncoderWeights
};

inline void check_encoder_layer(const char* op, const Tensor& x, const std::vector<Tensor>& weights,
                                int64_t heads) {
  check_floating(op, "x", x);
  check_dims(op, "x", x, 3, "[B, T, D]");
  QFAST_CHECK(weights.size() == kEncoderWeights, op, ": weights: expected 12 tensors, got ", weights.size(),
              ".");
  const int64_t D = x.size(2);
  QFAST_CHECK(x.size(1) > 0 && x.size(1) <= INT32_MAX && D > 0, op,
              ": x: expected at least one step and one feature, and fewer than 2^31 steps, got ",
              shape_text(x), ".");
  QFAST_CHECK(x.size(0) <= INT32_MAX, op, ": x: expected fewer than 2^31 windows, got ", x.size(0), ".");
  QFAST_CHECK(heads > 0 && D % heads == 0, op, ": heads: expected a divisor of D = ", D, ", got ", heads,
              ".");
  check_dims(op, "linear1.weight", weights[kLinear1Weight], 2, "[M, D]");
  const int64_t M = weights[kLinear1Weight].size(0);
  QFAST_CHECK(M > 0, op, ": linear1.weight: expected at least one hidden unit, got ",
              shape_text(weights[kLinear1Weight]), ".");
  check_shaped(op, "in_proj_weight", weights[kInWeight], x, {3 * D, D});
  check_shaped(op, "in_proj_bias", weights[kInBias], x, {3 * D});
  check_shaped(op, "out_proj.weight", weights[kOutWeight], x, {D, D});
  check_shaped(op, "out_proj.bias", weights[kOutBias], x, {D});
  check_shaped(op, "linear1.weight", weights[kLinear1Weight], x, {M, D});
  check_shaped(op, "linear1.bias", weights[kLinear1Bias], x, {M});
  check_shaped(op, "linear2.weight", weights[kLinear2Weight], x, {D, M});
  check_shaped(op, "linear2.bias", weights[kLinear2Bias], x, {D});
  check_shaped(op, "norm1.weight", weights[kNorm1Weight], x, {D});
  check_shaped(op, "norm1.bias", weights[kNorm1Bias], x, {D});
  check_shaped(op, "norm2.weight", weights[kNorm2Weight], x, {D});
  check_shaped(op, "norm2.bias", weights[kNorm2Bias], x, {D});
}

}  // namespace qfast
