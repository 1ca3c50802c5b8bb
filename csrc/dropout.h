// What the kernels know of a call's dropout. The mask is a function of the seed and of an element's place.
#pragma once

#include <cstdint>

namespace qfast {

struct DropoutRule {
  bool active;
  uint64_t seed;
  uint32_t threshold;  // an element is kept if its random word is at least this
  double scale;        // of what is kept; 0 drops all
};

}  // namespace qfast
