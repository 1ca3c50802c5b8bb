// Checks what a call says about its dropout. CPU: the seed is read here.
#pragma once

#include <cmath>
#include <optional>

#include "common.h"
#include "dropout.h"

namespace qfast {

inline DropoutRule dropout_rule(const char* op, double dropout, const std::optional<Tensor>& seed) {
  QFAST_CHECK(dropout >= 0 && dropout <= 1, op, ": dropout: expected 0 to 1, got ", dropout, ".");
  if (dropout == 0) return {false, 0, 0, 1};
  QFAST_CHECK(seed && seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op,
              ": seed: expected one int64 on the device of x where there is dropout, got ",
              seed ? shape_text(*seed) + " of " + torch::headeronly::toString(seed->scalar_type()) : "none",
              ".");
  const double threshold = std::nearbyint(dropout * 4294967296.0);
  const bool none = threshold >= 4294967296.0;  // a word cannot be that large, so nothing is kept
  return {true, static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()),
          none ? 0 : static_cast<uint32_t>(threshold), none ? 0 : 1 / (1 - dropout)};
}

}  // namespace qfast
