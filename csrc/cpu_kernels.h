// The list of CPU kernels. A new operator adds its job header and one line for each kernel; the tables of all
// instruction sets follow from that. <operator>_kernels.cpp defines the kernels.
#pragma once

#include <cstdint>

#include "adam/adam.h"
#include "additive_attention/additive_attention.h"
#include "attention_pool/attention_pool.h"
#include "encoder_layer/encoder_layer.h"
#include "feed_forward/feed_forward.h"
#include "linear_tanh/linear_tanh.h"
#include "price_windows/price_windows.h"
#include "recurrent/recurrent.h"
#include "rolling/rolling.h"
#include "temporal_conv/temporal_conv.h"
#include "window_conv/window_conv.h"
#include "window_gather/window_gather.h"

// Kernels that multiply matrices, for float32 and float64: templates over the element type `Real`. cpu_bf16.h
// has a second table, whose kernels multiply bfloat16 operands.
#define QFAST_PRODUCT_KERNELS(KERNEL)                                                                     \
  KERNEL(lstm_forward, const RecurrentJob<Real>&, int64_t begin, int64_t end, Real* scratch)              \
  KERNEL(lstm_backward, const RecurrentJob<Real>&, int64_t begin, int64_t end, Real* scratch, Real* sums) \
  KERNEL(gru_forward, const RecurrentJob<Real>&, int64_t begin, int64_t end, Real* scratch)               \
  KERNEL(gru_backward, const RecurrentJob<Real>&, int64_t begin, int64_t end, Real* scratch, Real* sums)  \
  KERNEL(attention_pool_forward, const PoolJob<Real>&, int64_t begin, int64_t end, Real* scratch)         \
  KERNEL(attention_pool_backward, const PoolJob<Real>&, int64_t begin, int64_t end, Real* scratch,        \
         Real* sums)                                                                                      \
  KERNEL(feed_forward, const FeedForwardJob<Real>&, int64_t begin, int64_t end, Real* scratch)            \
  KERNEL(feed_forward_backward, const FeedForwardJob<Real>&, int64_t begin, int64_t end, Real* scratch,   \
         Real* sums)                                                                                      \
  KERNEL(encoder_layer, const EncoderJob<Real>&, int64_t begin, int64_t end, Real* scratch)               \
  KERNEL(encoder_layer_backward, const EncoderJob<Real>&, int64_t begin, int64_t end, Real* scratch,      \
         Real* sums)                                                                                      \
  KERNEL(temporal_conv_forward, const NetworkJob<Real>&, int64_t begin, int64_t end, Real* scratch)       \
  KERNEL(temporal_conv_backward, const NetworkJob<Real>&, int64_t begin, int64_t end, Real* scratch,      \
         Real* sums)                                                                                      \
  KERNEL(window_conv, const WindowConvJob<Real>&, int64_t begin, int64_t end, Real* scratch)              \
  KERNEL(window_conv_backward, const WindowConvJob<Real>&, int64_t begin, int64_t end, Real* scratch,     \
         Real* sums)

// The other kernels for float32 and float64.
#define QFAST_REAL_KERNELS(KERNEL)                                                                      \
  KERNEL(linear_tanh, const LinearTanhJob<Real>&, int64_t begin, int64_t end)                           \
  KERNEL(linear_tanh_backward, const LinearTanhJob<Real>&, int64_t begin, int64_t end, Real* scratch,   \
         Real* sums)                                                                                    \
  KERNEL(tanh_elements, const Real* from, Real* to, int64_t begin, int64_t end)                         \
  KERNEL(transpose, const Real* from, int64_t from_stride, int64_t rows, int64_t columns, Real* to,     \
         int64_t to_stride)                                                                             \
  KERNEL(clipped_adam, const AdamTensor<Real>&, const AdamSettings<Real>&, const AdamCorrection<Real>&, \
         int64_t begin, int64_t end)                                                                    \
  KERNEL(scatter_windows, const ScatterJob&, int64_t begin, int64_t end)                                \
  KERNEL(exp_in_place, Real* values, int64_t begin, int64_t end)                                        \
  KERNEL(block_sums, const RunningSums<Real>&, int64_t begin, int64_t end)                              \
  KERNEL(attend, const AttendJob<Real>&, int64_t begin, int64_t end)                                    \
  KERNEL(attend_backward, const AttendBackwardJob<Real>&, int64_t begin, int64_t end)                   \
  KERNEL(row_dots, const RowDotsJob<Real>&, int64_t begin, int64_t end)                                 \
  KERNEL(hidden_scores, const ScoresJob<Real>&, int64_t begin, int64_t end)                             \
  KERNEL(hidden_scores_backward, const ScoresBackwardJob<Real>&, int64_t begin, int64_t end)            \
  KERNEL(temporal_conv_rolling, const RollingJob<Real>&, int64_t begin, int64_t end, Real* scratch)

#define QFAST_OTHER_KERNELS(KERNEL)                                                            \
  KERNEL(resolve_windows, const ResolveJob&, int64_t begin, int64_t end)                       \
  KERNEL(gather_windows, const GatherJob&, int64_t begin, int64_t end, unsigned char* scratch) \
  KERNEL(price_windows, const PriceWindowJob&, int64_t begin, int64_t end)                     \
  KERNEL(rolling, const RollingStatsJob&, int64_t begin, int64_t end, int64_t longest, double* scratch)
