// LSTM and GRU backward, for one instruction set.
#include "recurrent/recurrent_tiles.h"

#include "cpu_isa_begin.h"

#include "recurrent/recurrent_kernels_backward.h"

QFAST_BOTH_TYPES(lstm_backward)
QFAST_BOTH_TYPES(gru_backward)

#include "cpu_isa_end.h"
