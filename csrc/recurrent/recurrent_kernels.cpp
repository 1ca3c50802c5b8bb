// LSTM and GRU forward, for one instruction set.
#include "recurrent/recurrent_tiles.h"

#include "cpu_isa_begin.h"

#include "recurrent/recurrent_kernels.h"

QFAST_BOTH_TYPES(lstm_forward)
QFAST_BOTH_TYPES(gru_forward)

#include "cpu_isa_end.h"
