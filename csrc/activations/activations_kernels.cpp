// tanh and exp, for one instruction set.
#include "cpu_system_headers.h"

#include "cpu_isa_begin.h"

#include "activations/activations.h"

QFAST_BOTH_TYPES(tanh_elements)
QFAST_BOTH_TYPES(exp_in_place)

#include "cpu_isa_end.h"
