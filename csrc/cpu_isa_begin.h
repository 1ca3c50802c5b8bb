// Opens the namespace of the instruction set that a unit is compiled for, and the region in which the
// compiler may use its instructions. cpu_isa_end.h closes both.
//
// A file whose name ends in _kernels.cpp or _kernels_backward.cpp contains a pair of these. setup.py compiles
// it once for each instruction set, with QFAST_AVX512, QFAST_AVX2 or neither of them defined. The files
// of BF16_SOURCES in setup.py are also compiled with QFAST_AMX, for products of bfloat16 (cpu_bf16.h).
//
// Code between the two files uses no library template, and no system header is included there: an inline
// function shared with another unit could be linked from either, and then run instructions that the CPU
// lacks. For the same reason everything except the kernels themselves is in an anonymous namespace.
#pragma once

#include "cpu_system_headers.h"

#define QFAST_DEVICE_INLINE static inline __attribute__((always_inline))

// Compiles a kernel template for float32 and float64, and for AMX only for float32.
#if defined(QFAST_AMX)
#define QFAST_BOTH_TYPES(kernel) template decltype(kernel<float>) kernel<float>;
#else
#define QFAST_BOTH_TYPES(kernel)                  \
  template decltype(kernel<float>) kernel<float>; \
  template decltype(kernel<double>) kernel<double>;
#endif

// Pragmas select the instruction set, because setuptools has no compiler flags for single files.
#if defined(QFAST_AVX512)
#define QFAST_ISA isa_avx512
#define QFAST_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,prefer-vector-width=512")
#endif
#elif defined(QFAST_AMX)
#define QFAST_ISA isa_amx
#define QFAST_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(                                                                            \
    __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,avx2,fma,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,avx2,fma,amx-tile,amx-bf16,prefer-vector-width=512")
#endif
#elif defined(QFAST_AVX2)
#define QFAST_ISA isa_avx2
#define QFAST_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#else  // the default target of the compiler, SSE2 on x86-64
#define QFAST_ISA isa_baseline
#define QFAST_VECTOR_BYTES 16
#endif

namespace qfast::QFAST_ISA {
