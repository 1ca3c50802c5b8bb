// Every CPU kernel, compiled for: AVX-512 F, DQ, VL, BW.
#if defined(__x86_64__)
#include "cpu_dispatch.h"
#include "cpu_system_headers.h"

#define QFAST_ISA isa_avx512
#define QFAST_ISA_NAME "avx512"
#define QFAST_VECTOR_BYTES 64

// setuptools has no flags for a single file, hence pragmas.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,prefer-vector-width=512")
#endif
#include "cpu_isa_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
