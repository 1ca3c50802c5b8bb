// The list of CPU kernels. A new operator adds its job header, one line per kernel to the list, and its
// kernel header at the bottom of cpu_isa_body.h; the tables of all instruction sets follow from that.
#pragma once

#include <cstdint>

#include "recurrent.h"
#include "window_gather.h"

#define QFAST_CPU_KERNELS                                                                               \
  QFAST_KERNEL(resolve_windows, const ::qfast::ResolveJob&, int64_t begin, int64_t end)                 \
  QFAST_KERNEL(gather_windows, const ::qfast::GatherJob&, int64_t begin, int64_t end, unsigned char* s) \
  QFAST_KERNEL(scatter_windows_f32, const ::qfast::ScatterJob&, int64_t begin, int64_t end)             \
  QFAST_KERNEL(scatter_windows_f64, const ::qfast::ScatterJob&, int64_t begin, int64_t end)             \
  QFAST_KERNEL(lstm_forward_f32, const ::qfast::LstmForwardJob<float>&, int64_t begin, int64_t end)     \
  QFAST_KERNEL(lstm_backward_f32, const ::qfast::LstmBackwardJob<float>&, int64_t begin, int64_t end,   \
               float* sums)                                                                             \
  QFAST_KERNEL(lstm_forward_f64, const ::qfast::LstmForwardJob<double>&, int64_t begin, int64_t end)    \
  QFAST_KERNEL(lstm_backward_f64, const ::qfast::LstmBackwardJob<double>&, int64_t begin, int64_t end,  \
               double* sums)                                                                            \
  QFAST_KERNEL(gru_forward_f32, const ::qfast::GruForwardJob<float>&, int64_t begin, int64_t end)       \
  QFAST_KERNEL(gru_backward_f32, const ::qfast::GruBackwardJob<float>&, int64_t begin, int64_t end,     \
               float* sums)                                                                             \
  QFAST_KERNEL(gru_forward_f64, const ::qfast::GruForwardJob<double>&, int64_t begin, int64_t end)      \
  QFAST_KERNEL(gru_backward_f64, const ::qfast::GruBackwardJob<double>&, int64_t begin, int64_t end,    \
               double* sums)
