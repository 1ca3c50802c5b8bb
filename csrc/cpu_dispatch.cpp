#include "cpu_dispatch.h"

#include <atomic>
#include <stdexcept>

namespace qfast {

// Declares the kernels of an instruction set and defines their table. The files *_kernels*.cpp define the
// kernels.
#define QFAST_DECLARE_REAL(name, ...) \
  template <class Real>               \
  void name(__VA_ARGS__);
#define QFAST_DECLARE(name, ...) void name(__VA_ARGS__);
#define QFAST_ENTRY_REAL(name, ...) .name = name<Real>,
#define QFAST_ENTRY(name, ...) .name = name,
#define QFAST_INSTRUCTION_SET(namespace_name, isa_name, bytes)                                       \
  namespace namespace_name {                                                                         \
  QFAST_PRODUCT_KERNELS(QFAST_DECLARE_REAL)                                                          \
  QFAST_REAL_KERNELS(QFAST_DECLARE_REAL)                                                             \
  QFAST_OTHER_KERNELS(QFAST_DECLARE)                                                                 \
  template <class Real>                                                                              \
  constexpr RealKernels<Real> real_kernels = {.products = {QFAST_PRODUCT_KERNELS(QFAST_ENTRY_REAL)}, \
                                              QFAST_REAL_KERNELS(QFAST_ENTRY_REAL)};                 \
  constexpr CpuKernels kernels = {.isa = isa_name,                                                   \
                                  .vector_bytes = bytes,                                             \
                                  .float32 = real_kernels<float>,                                    \
                                  .float64 = real_kernels<double>,                                   \
                                  QFAST_OTHER_KERNELS(QFAST_ENTRY)};                                 \
  }

// The macros QFAST_WITHOUT_<ISA> leave out what setup.py does not compile (QFAST_ISAS).
#if !defined(QFAST_WITHOUT_BASELINE)
QFAST_INSTRUCTION_SET(isa_baseline, "baseline", 16)
#endif
#if defined(__x86_64__) && !defined(QFAST_WITHOUT_AVX2)
#define QFAST_HAS_AVX2
QFAST_INSTRUCTION_SET(isa_avx2, "avx2", 32)
#endif
#if defined(__x86_64__) && !defined(QFAST_WITHOUT_AVX512)
#define QFAST_HAS_AVX512
QFAST_INSTRUCTION_SET(isa_avx512, "avx512", 64)
#endif

namespace {

std::vector<const CpuKernels*> usable_kernels() {
  std::vector<const CpuKernels*> usable;
#if defined(__x86_64__)
  [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if defined(QFAST_HAS_AVX512)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (avx2 && avx512) usable.push_back(&isa_avx512::kernels);
#endif
#if defined(QFAST_HAS_AVX2)
  if (avx2) usable.push_back(&isa_avx2::kernels);
#endif
#if !defined(QFAST_WITHOUT_BASELINE)
  usable.push_back(&isa_baseline::kernels);
#endif
  if (usable.empty())
    throw std::runtime_error(
        "qfast was built without kernels for this CPU. Remedy: build without QFAST_ISAS.");
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
  std::string names;
  for (const CpuKernels* kernels : usable_kernels()) {
    if (name == kernels->isa) {
      chosen().store(kernels, std::memory_order_release);
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(kernels->isa);
  }
  throw std::invalid_argument("instruction set '" + name + "' is not usable here; allowed: " + names + ".");
}

}  // namespace qfast
