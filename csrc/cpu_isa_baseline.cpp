// Every CPU kernel, compiled for: portable: whatever the compiler's default target is, SSE2 on x86-64.
#include "cpu_dispatch.h"
#include "cpu_system_headers.h"

#define QFAST_ISA isa_baseline
#define QFAST_ISA_NAME "baseline"
#define QFAST_VECTOR_BYTES 16

#include "cpu_isa_body.h"
