// Temporal convolutions forward, for one instruction set.
#include "temporal_conv/temporal_conv.h"

#include "cpu_isa_begin.h"

#include "temporal_conv/temporal_conv_kernels.h"
#if defined(QFAST_AMX)
#include "temporal_conv/temporal_conv_kernels_amx.h"
#else
#include "temporal_conv/temporal_conv_kernels_rolling.h"

QFAST_BOTH_TYPES(temporal_conv_rolling)
#endif

QFAST_BOTH_TYPES(temporal_conv_forward)

#include "cpu_isa_end.h"
