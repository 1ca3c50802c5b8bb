// Arguments of the Adam kernels. Shared by host code, all CPU instruction sets and CUDA.
#pragma once

#include <cstdint>

namespace qfast {

// A parameter and its state. Each tensor has `count` elements without gaps, in the same order in all four.
template <class Element>
struct AdamTensor {
  Element* parameter;
  Element* gradient;
  Element* exp_avg;
  Element* exp_avg_sq;
  int64_t count;
};

// Settings shared by all tensors of a call.
template <class Element>
struct AdamSettings {
  Element limit, weight_decay, eps;
  Element beta1, beta2;
  Element rest1, rest2;  // 1 - beta, rounded once
  Element log1, log2;    // natural logarithm of beta, rounded once; -infinity for 0
};

// Bias corrections of one tensor, which depend on its number of steps.
template <class Element>
struct AdamCorrection {
  Element step_size;  // lr / (1 - beta1^step)
  Element root;       // sqrt(1 - beta2^step)
};

}  // namespace qfast
