// What one step of Adam over clipped gradients needs to know of a tensor and of the step; both devices.
#pragma once

#include <cstdint>

namespace qfast {

// A tensor of `count` elements that lie in memory without gaps and, in all four, in the same order.
template <class Element>
struct AdamTensor {
  Element* parameter;
  Element* gradient;
  Element* exp_avg;
  Element* exp_avg_sq;
  int64_t count;
};

// Of all tensors of a call.
template <class Element>
struct AdamSettings {
  Element limit, weight_decay, eps;
  Element beta1, beta2;
  Element rest1, rest2;  // 1 - beta, rounded once
};

// Of one tensor, from the number of steps it has made.
template <class Element>
struct AdamCorrection {
  Element step_size;  // lr / (1 - beta1^step)
  Element root;       // sqrt(1 - beta2^step)
};

}  // namespace qfast
