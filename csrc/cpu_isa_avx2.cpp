// Every CPU kernel, compiled for: AVX2 and FMA.
#if defined(__x86_64__)
#include "cpu_dispatch.h"
#include "cpu_system_headers.h"

#define QFAST_ISA isa_avx2
#define QFAST_ISA_NAME "avx2"
#define QFAST_VECTOR_BYTES 32

// setuptools has no flags for a single file, hence pragmas.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include "cpu_isa_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
