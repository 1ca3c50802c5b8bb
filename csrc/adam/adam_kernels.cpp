// Adam, for one instruction set.
#include "adam/adam.h"

#include "cpu_isa_begin.h"

#include "adam/adam_kernels.h"

QFAST_BOTH_TYPES(clipped_adam)

#include "cpu_isa_end.h"
