// A linear layer with tanh, for one instruction set.
#include "linear_tanh/linear_tanh.h"

#include "cpu_isa_begin.h"

#include "linear_tanh/linear_tanh_kernels.h"

QFAST_BOTH_TYPES(linear_tanh)
QFAST_BOTH_TYPES(linear_tanh_backward)

#include "cpu_isa_end.h"
