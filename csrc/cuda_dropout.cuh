// Dropout of a call, as the CUDA kernels read it. The seed stays on the device, so each replay of a captured
// call can use a new one.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>

#include "common.h"

#define QFAST_DEVICE_INLINE __device__ __forceinline__

namespace qfast {
namespace {

#include "philox.h"

struct Dropout {
  bool active = false;
  const int64_t* seed = nullptr;  // on the device
  uint32_t threshold = 0;         // an element is not dropped if its random word is at least this
  double scale = 1;               // factor of the other elements; 0 drops all
};

inline Dropout device_dropout(const char* op, const char* first_name, const Tensor& first, double dropout,
                              const std::optional<Tensor>& seed) {
  QFAST_CHECK(dropout >= 0 && dropout <= 1, op, ": dropout: expected 0 to 1, got ", dropout, ".");
  Dropout rule;
  if (dropout == 0) return rule;
  QFAST_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op,
              ": seed: expected one int64 on the device of ", first_name, " if dropout is not 0, got ",
              tensor_text(seed), ".");
  check_same_device(op, "seed", *seed, first, first_name);
  const double threshold = std::nearbyint(dropout * 4294967296.0);
  const bool drops_all = threshold >= 4294967296.0;  // larger than every word
  rule.active = true;
  rule.seed = seed->const_data_ptr<int64_t>();
  rule.threshold = drops_all ? 0 : static_cast<uint32_t>(threshold);
  rule.scale = drops_all ? 0 : 1 / (1 - dropout);
  return rule;
}

}  // namespace
}  // namespace qfast
