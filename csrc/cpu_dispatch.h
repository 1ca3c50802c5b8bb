// One build, any CPU: the kernels are compiled once per instruction set and chosen at run time by cpuid.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

#include "cpu_kernels.h"

namespace qfast {

#define QFAST_FIELD(name, ...) void (*name)(__VA_ARGS__);
template <class Real>
struct RealKernels {
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

// The kernels of the best instruction set this CPU has, or of the one selected.
const CpuKernels& cpu_kernels();

// Its kernels for one element type: cpu_kernels<float>().lstm_forward.
template <class Real>
const RealKernels<Real>& cpu_kernels() {
  if constexpr (std::is_same_v<Real, float>) {
    return cpu_kernels().float32;
  } else {
    return cpu_kernels().float64;
  }
}

// Instruction sets usable here, best first; "baseline" is always among them.
std::vector<std::string> available_isas();

// Use `name` from now on, for tests. Throws std::invalid_argument if it is not among available_isas().
void select_isa(const std::string& name);

}  // namespace qfast
