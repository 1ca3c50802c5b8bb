// Rolling statistics, for one instruction set.
#include "rolling/rolling.h"

#include "cpu_isa_begin.h"

#include "rolling/rolling_kernels.h"

#include "cpu_isa_end.h"
