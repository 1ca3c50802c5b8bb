#include "cpu_dispatch.h"

#include <atomic>
#include <stdexcept>

namespace qfast {

namespace isa_baseline {
extern const CpuKernels kernels;
}
#if defined(__x86_64__)
namespace isa_avx2 {
extern const CpuKernels kernels;
}
namespace isa_avx512 {
extern const CpuKernels kernels;
}
#endif

namespace {

std::vector<const CpuKernels*> usable_kernels() {
  std::vector<const CpuKernels*> usable;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (avx2 && avx512) usable.push_back(&isa_avx512::kernels);
  if (avx2) usable.push_back(&isa_avx2::kernels);
#endif
  usable.push_back(&isa_baseline::kernels);
  return usable;
}

std::atomic<const CpuKernels*>& chosen() {
  static std::atomic<const CpuKernels*> kernels{usable_kernels().front()};
  return kernels;
}

}  // namespace

const CpuKernels& cpu_kernels() { return *chosen().load(std::memory_order_acquire); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const CpuKernels* kernels : usable_kernels()) names.emplace_back(kernels->isa);
  return names;
}

void select_isa(const std::string& name) {
  std::string allowed;
  for (const CpuKernels* kernels : usable_kernels()) {
    if (name == kernels->isa) {
      chosen().store(kernels, std::memory_order_release);
      return;
    }
    allowed += (allowed.empty() ? "" : ", ") + std::string(kernels->isa);
  }
  throw std::invalid_argument("instruction set '" + name + "' is not usable here; allowed: " + allowed + ".");
}

}  // namespace qfast
