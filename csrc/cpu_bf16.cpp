#include "cpu_bf16.h"

#include "message.h"

#if defined(__x86_64__) && __has_include(<amxbf16intrin.h>)
#define QFAST_HAS_AMX
#endif

#if defined(QFAST_HAS_AMX)
#include <cpuid.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#endif

#define QFAST_AMX
#include "cpu_isa_begin.h"

#define QFAST_DECLARE(name, ...) \
  template <class Real>          \
  void name(__VA_ARGS__);
QFAST_PRODUCT_KERNELS(QFAST_DECLARE)

namespace {

// The layout of the eight tile registers while a kernel runs: 16 rows of 64 bytes each.
struct alignas(64) TileLayout {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

template <auto kernel>
struct WithTiles;

// Runs a kernel with configured tile registers, and releases them afterwards: the system would otherwise save
// them at every change of threads.
template <class... Arguments, void (*kernel)(Arguments...)>
struct WithTiles<kernel> {
  static void run(Arguments... arguments) {
    const TileLayout layout;
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(&layout);
    kernel(arguments...);
    _tile_release();
  }
};

#define QFAST_ENTRY(name, ...) .name = WithTiles<name<float>>::run,
constexpr ProductKernels<float> kernels = {QFAST_PRODUCT_KERNELS(QFAST_ENTRY)};

}  // namespace

const ProductKernels<float>& kernels_with_tiles() { return kernels; }

#include "cpu_isa_end.h"
#endif

namespace qfast {
namespace {

#if defined(QFAST_HAS_AMX)
// Returns the feature that the CPU or its operating system lacks, or an empty string.
std::string missing_feature() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & bit_OSXSAVE) == 0) return "this CPU lacks XSAVE";
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & 1u << 5) == 0) return "this CPU lacks AVX512-BF16";
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  if ((d & 1u << 22) == 0 || (d & 1u << 24) == 0) return "this CPU lacks AMX-BF16";
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;
  if ((low & kTileState) != kTileState) return "the operating system does not enable AMX";
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0)
    return message("Linux does not permit the use of AMX (arch_prctl fails with error ", errno, ")");
#endif
  return "";
}
#else
std::string missing_feature() { return "qfast was built for another CPU, or by a compiler without AMX"; }
#endif

}  // namespace

const std::string& bf16_obstacle() {
  static const std::string missing = missing_feature();
  static const std::string other_isa = "bf16 needs the instruction set avx512, and another one is selected";
  return missing.empty() && cpu_kernels().isa != std::string("avx512") ? other_isa : missing;
}

const ProductKernels<float>& bf16_kernels() {
#if defined(QFAST_HAS_AMX)
  return isa_amx::kernels_with_tiles();
#else
  throw std::logic_error("bf16_kernels: " + bf16_obstacle());
#endif
}

}  // namespace qfast
