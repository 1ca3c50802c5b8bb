// Temporal convolutions backward, for one instruction set.
#include "temporal_conv/temporal_conv.h"

#include "cpu_isa_begin.h"

#include "temporal_conv/temporal_conv_kernels_backward.h"
#if defined(QFAST_AMX)
#include "temporal_conv/temporal_conv_kernels_backward_amx.h"
#endif

QFAST_BOTH_TYPES(temporal_conv_backward)

#include "cpu_isa_end.h"
