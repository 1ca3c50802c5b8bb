// Additive and graph attention, for one instruction set.
#include "additive_attention/additive_attention.h"

#include "cpu_isa_begin.h"

#include "additive_attention/additive_attention_kernels.h"

QFAST_BOTH_TYPES(block_sums)
QFAST_BOTH_TYPES(attend)
QFAST_BOTH_TYPES(attend_backward)
QFAST_BOTH_TYPES(row_dots)
QFAST_BOTH_TYPES(hidden_scores)
QFAST_BOTH_TYPES(hidden_scores_backward)

#include "cpu_isa_end.h"
