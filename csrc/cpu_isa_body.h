// Included once by each cpu_isa_*.cpp after the target pragma, with QFAST_ISA (the namespace) and
// QFAST_VECTOR_BYTES set. Everything below lies in an anonymous namespace and uses no library template:
// a function shared with another unit would be linked from either and could bring illegal instructions.
// System headers must be included before the pragma, never here.

#define QFAST_DEVICE_INLINE static inline __attribute__((always_inline))

namespace qfast::QFAST_ISA {
namespace {

#include "philox.h"
#include "simd.h"
#include "window_gather/window_resolve.h"
// Kernels.
#include "activations/activations.h"
#include "adam/adam_kernels.h"
#include "additive_attention/additive_attention_kernels.h"
#include "dropout_kernels.h"
#include "matrix_tiles.h"
#include "recurrent/recurrent_cell.h"
#include "recurrent/recurrent_kernels.h"
#include "recurrent/recurrent_kernels_backward.h"
#include "rolling/rolling_kernels.h"
#include "temporal_conv/temporal_conv_kernels.h"
#include "temporal_conv/temporal_conv_kernels_backward.h"
#include "temporal_conv/temporal_conv_kernels_rolling.h"
#include "window_gather/window_gather_kernels.h"
// Products of packed panels, of the kernels above.
#include "panel_kernels.h"
// Take parts of those.
#include "attention_pool/attention_pool_kernels.h"
#include "encoder_layer/encoder_layer_kernels_attention.h"
#include "feed_forward/feed_forward_kernels.h"
// The encoder layer holds a feed-forward.
#include "encoder_layer/encoder_layer_kernels.h"
#include "window_conv/window_conv_kernels.h"

}  // namespace

extern const CpuKernels kernels;
const CpuKernels kernels = {QFAST_ISA_NAME, QFAST_VECTOR_BYTES,
#define QFAST_KERNEL(name, ...) name,
                            QFAST_CPU_KERNELS
#undef QFAST_KERNEL
};

}  // namespace qfast::QFAST_ISA
