// Argument checks of dropout for the CPU, where the host reads the seed. Host only.
#pragma once

#include <cmath>
#include <optional>

#include "common.h"
#include "dropout.h"

namespace qfast {

// Checks `dropout` and `seed` and returns the rule for the kernels.
inline DropoutRule dropout_rule(const char* op, double dropout, const std::optional<Tensor>& seed) {
  QFAST_CHECK(dropout >= 0 && dropout <= 1, op, ": dropout: expected 0 to 1, got ", dropout, ".");
  if (dropout == 0) return {false, 0, 0, 1};
  QFAST_CHECK(seed && seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op,
              ": seed: expected one int64 on the device of x if dropout is not 0, got ", tensor_text(seed),
              ".");
  const double threshold = std::nearbyint(dropout * 4294967296.0);
  const bool drops_all = threshold >= 4294967296.0;  // larger than every word
  return {true, static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()),
          drops_all ? 0 : static_cast<uint32_t>(threshold), drops_all ? 0 : 1 / (1 - dropout)};
}

}  // namespace qfast
