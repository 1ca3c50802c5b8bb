// Closes the namespace and the region that cpu_isa_begin.h opens.
#pragma once

}  // namespace qfast::QFAST_ISA

#if defined(QFAST_AVX512) || defined(QFAST_AMX) || defined(QFAST_AVX2)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
