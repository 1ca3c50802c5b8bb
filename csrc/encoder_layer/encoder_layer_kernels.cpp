// The encoder layer, for one instruction set.
#include "encoder_layer/encoder_layer.h"

#include "cpu_isa_begin.h"

#include "encoder_layer/encoder_layer_kernels.h"

QFAST_BOTH_TYPES(encoder_layer)
QFAST_BOTH_TYPES(encoder_layer_backward)

#include "cpu_isa_end.h"
