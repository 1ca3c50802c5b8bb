// The price windows, for one instruction set.
#include "price_windows/price_windows.h"

#include "cpu_isa_begin.h"

#include "price_windows/price_windows_kernels.h"

#include "cpu_isa_end.h"
