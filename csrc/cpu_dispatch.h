// One build, any CPU: the kernels are compiled once per instruction set and chosen at run time by cpuid.
#pragma once

#include <string>
#include <vector>

#include "cpu_kernels.h"

namespace qfast {

struct CpuKernels {
  const char* isa;
  int64_t vector_bytes;
#define QFAST_KERNEL(name, ...) void (*name)(__VA_ARGS__);
  QFAST_CPU_KERNELS
#undef QFAST_KERNEL
};

// The kernels of the best instruction set this CPU has, or of the one selected.
const CpuKernels& cpu_kernels();

// Instruction sets usable here, best first; "baseline" is always among them.
std::vector<std::string> available_isas();

// Use `name` from now on, for tests. Throws std::invalid_argument if it is not among available_isas().
void select_isa(const std::string& name);

}  // namespace qfast
