// Convolution over windows, for one instruction set.
#include "window_conv/window_conv.h"

#include "cpu_isa_begin.h"

#include "window_conv/window_conv_kernels.h"

QFAST_BOTH_TYPES(window_conv)
QFAST_BOTH_TYPES(window_conv_backward)

#include "cpu_isa_end.h"
