// Attention over the steps of a window, for one instruction set.
#include "attention_pool/attention_pool.h"

#include "cpu_isa_begin.h"

#include "attention_pool/attention_pool_kernels.h"

QFAST_BOTH_TYPES(attention_pool_forward)
QFAST_BOTH_TYPES(attention_pool_backward)

#include "cpu_isa_end.h"
