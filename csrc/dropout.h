// Dropout of a call, as the CPU kernels read it. The mask is a function of the seed and of the position of an
// element.
#pragma once

#include <cstdint>

namespace qfast {

struct DropoutRule {
  bool active;
  uint64_t seed;
  uint32_t threshold;  // an element is not dropped if its random word is at least this
  double scale;        // factor of the other elements; 0 drops all
};

}  // namespace qfast
