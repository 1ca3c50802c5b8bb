// Chooses the CPU kernels at run time. They are compiled once per instruction set, so one build runs on any
// CPU.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

#include "cpu_kernels.h"

namespace qfast {

#define QFAST_FIELD(name, ...) void (*name)(__VA_ARGS__);
template <class Real>
struct ProductKernels {
  QFAST_PRODUCT_KERNELS(QFAST_FIELD)
};

template <class Real>
struct RealKernels {
  ProductKernels<Real> products;
  QFAST_REAL_KERNELS(QFAST_FIELD)
};

struct CpuKernels {
  const char* isa;
  int64_t vector_bytes;
  RealKernels<float> float32;
  RealKernels<double> float64;
  QFAST_OTHER_KERNELS(QFAST_FIELD)
};
#undef QFAST_FIELD

// Returns the kernels of the selected instruction set, by default the best one of this CPU.
const CpuKernels& cpu_kernels();

// Returns the kernels for one element type, for example cpu_kernels<float>().transpose.
template <class Real>
const RealKernels<Real>& cpu_kernels() {
  if constexpr (std::is_same_v<Real, float>) {
    return cpu_kernels().float32;
  } else {
    return cpu_kernels().float64;
  }
}

// Returns the instruction sets of this CPU, best first. The last one is "baseline".
std::vector<std::string> available_isas();

// Selects an instruction set, for tests. Throws std::invalid_argument if available_isas() does not contain
// it.
void select_isa(const std::string& name);

}  // namespace qfast
