// Temporal convolutions forward, for one instruction set.
#include "temporal_conv/temporal_conv.h"

#include "cpu_isa_begin.h"

#include "temporal_conv/temporal_conv_kernels.h"
#include "temporal_conv/temporal_conv_kernels_rolling.h"

QFAST_BOTH_TYPES(temporal_conv_forward)
QFAST_BOTH_TYPES(temporal_conv_rolling)

#include "cpu_isa_end.h"
