// The list of CPU kernels. A new operator adds its job header, one line per kernel to the list, and its
// kernel header at the bottom of cpu_isa_body.h; the tables of all instruction sets follow from that.
#pragma once

#include <cstdint>

#include "window_gather.h"

#define QFAST_CPU_KERNELS                                                                               \
  QFAST_KERNEL(resolve_windows, const ::qfast::ResolveJob&, int64_t begin, int64_t end)                 \
  QFAST_KERNEL(gather_windows, const ::qfast::GatherJob&, int64_t begin, int64_t end, unsigned char* s) \
  QFAST_KERNEL(scatter_windows_f32, const ::qfast::ScatterJob&, int64_t begin, int64_t end)             \
  QFAST_KERNEL(scatter_windows_f64, const ::qfast::ScatterJob&, int64_t begin, int64_t end)
