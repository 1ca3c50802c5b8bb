// The gather of rolling windows, for one instruction set.
#include "window_gather/window_gather.h"

#include "cpu_isa_begin.h"

#include "window_gather/window_gather_kernels.h"

QFAST_BOTH_TYPES(scatter_windows)

#include "cpu_isa_end.h"
