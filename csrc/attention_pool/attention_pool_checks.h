// Argument checks of attention over time, shared by CPU and CUDA. Host only.
#pragma once

#include "common.h"

namespace qfast {

struct PoolTensors {
  const char* op;
  const Tensor &h, &weight, &bias, &score;
};

inline void check_pool(const PoolTensors& tensors) {
  const auto& [op, h, weight, bias, score] = tensors;
  check_floating(op, "h", h);
  check_dims(op, "h", h, 3, "[B, T, H]");
  QFAST_CHECK(h.size(1) > 0 && h.size(2) > 0 && h.size(1) <= INT32_MAX, op,
              ": h: expected at least one step and one feature, and fewer than 2^31 steps, got ",
              shape_text(h), ".");
  check_dims(op, "weight", weight, 2, "[A, H]");
  check_dims(op, "bias", bias, 1, "[A]");
  check_dims(op, "score", score, 1, "[A]");
  const int64_t width = weight.size(0);
  QFAST_CHECK(weight.size(1) == h.size(2), op, ": weight: expected [A, ", h.size(2), "], got ",
              shape_text(weight), ".");
  QFAST_CHECK(bias.size(0) == width && score.size(0) == width, op, ": bias and score: expected [", width,
              "], got ", shape_text(bias), " and ", shape_text(score), ".");
  for (const Tensor* tensor : {&weight, &bias, &score}) {
    check_same_device(op, "weight, bias or score", *tensor, h, "h");
    QFAST_CHECK(tensor->scalar_type() == h.scalar_type(), op,
                ": weight, bias and score: expected the dtype of h, ",
                torch::headeronly::toString(h.scalar_type()), ", got ",
                torch::headeronly::toString(tensor->scalar_type()), ".");
  }
}

inline void check_pool_result(const char* op, const char* name, const Tensor& tensor, const Tensor& h,
                              int64_t columns) {
  const bool fits = tensor.dim() == 2 && tensor.size(0) == h.size(0) && tensor.size(1) == columns &&
                    tensor.scalar_type() == h.scalar_type();
  QFAST_CHECK(fits, op, ": ", name, ": expected shape (", h.size(0), ", ", columns, ") and the dtype of h, ",
              torch::headeronly::toString(h.scalar_type()), ", got ", shape_text(tensor), " and ",
              torch::headeronly::toString(tensor.scalar_type()), ".");
  check_same_device(op, name, tensor, h, "h");
}

}  // namespace qfast
