// The list of CPU kernels. A new operator adds its job header, one line per kernel to the list, and its
// kernel header at the bottom of cpu_isa_body.h; the tables of all instruction sets follow from that.
#pragma once

#include <cstdint>

#include "adam/adam.h"
#include "additive_attention/additive_attention.h"
#include "attention_pool/attention_pool.h"
#include "encoder_layer/encoder_layer.h"
#include "feed_forward/feed_forward.h"
#include "recurrent/recurrent.h"
#include "rolling/rolling.h"
#include "temporal_conv/temporal_conv.h"
#include "window_conv/window_conv.h"
#include "window_gather/window_gather.h"

#define QFAST_CPU_KERNELS                                                                                    \
  QFAST_KERNEL(tanh_f32, const float* from, float* to, int64_t begin, int64_t end)                           \
  QFAST_KERNEL(tanh_f64, const double* from, double* to, int64_t begin, int64_t end)                         \
  QFAST_KERNEL(clipped_adam_f32, const ::qfast::AdamTensor<float>&, const ::qfast::AdamSettings<float>&,     \
               const ::qfast::AdamCorrection<float>&, int64_t begin, int64_t end)                            \
  QFAST_KERNEL(clipped_adam_f64, const ::qfast::AdamTensor<double>&, const ::qfast::AdamSettings<double>&,   \
               const ::qfast::AdamCorrection<double>&, int64_t begin, int64_t end)                           \
  QFAST_KERNEL(resolve_windows, const ::qfast::ResolveJob&, int64_t begin, int64_t end)                      \
  QFAST_KERNEL(gather_windows, const ::qfast::GatherJob&, int64_t begin, int64_t end, unsigned char* s)      \
  QFAST_KERNEL(scatter_windows_f32, const ::qfast::ScatterJob&, int64_t begin, int64_t end)                  \
  QFAST_KERNEL(scatter_windows_f64, const ::qfast::ScatterJob&, int64_t begin, int64_t end)                  \
  QFAST_KERNEL(lstm_forward_f32, const ::qfast::RecurrentJob<float>&, int64_t begin, int64_t end, float* s)  \
  QFAST_KERNEL(lstm_backward_f32, const ::qfast::RecurrentJob<float>&, int64_t begin, int64_t end, float* s, \
               float* sums)                                                                                  \
  QFAST_KERNEL(lstm_forward_f64, const ::qfast::RecurrentJob<double>&, int64_t begin, int64_t end,           \
               double* s)                                                                                    \
  QFAST_KERNEL(lstm_backward_f64, const ::qfast::RecurrentJob<double>&, int64_t begin, int64_t end,          \
               double* s, double* sums)                                                                      \
  QFAST_KERNEL(gru_forward_f32, const ::qfast::RecurrentJob<float>&, int64_t begin, int64_t end, float* s)   \
  QFAST_KERNEL(gru_backward_f32, const ::qfast::RecurrentJob<float>&, int64_t begin, int64_t end, float* s,  \
               float* sums)                                                                                  \
  QFAST_KERNEL(gru_forward_f64, const ::qfast::RecurrentJob<double>&, int64_t begin, int64_t end, double* s) \
  QFAST_KERNEL(gru_backward_f64, const ::qfast::RecurrentJob<double>&, int64_t begin, int64_t end,           \
               double* s, double* sums)                                                                      \
  QFAST_KERNEL(block_sums_f32, const ::qfast::RunningSums<float>&, int64_t begin, int64_t end)               \
  QFAST_KERNEL(attend_f32, const ::qfast::AttendJob<float>&, int64_t begin, int64_t end)                     \
  QFAST_KERNEL(attend_backward_f32, const ::qfast::AttendBackwardJob<float>&, int64_t begin, int64_t end)    \
  QFAST_KERNEL(row_dots_f32, const ::qfast::RowDotsJob<float>&, int64_t begin, int64_t end)                  \
  QFAST_KERNEL(hidden_scores_f32, const ::qfast::ScoresJob<float>&, int64_t begin, int64_t end)              \
  QFAST_KERNEL(hidden_scores_backward_f32, const ::qfast::ScoresBackwardJob<float>&, int64_t begin,          \
               int64_t end)                                                                                  \
  QFAST_KERNEL(exp_f32, float* values, int64_t begin, int64_t end)                                           \
  QFAST_KERNEL(block_sums_f64, const ::qfast::RunningSums<double>&, int64_t begin, int64_t end)              \
  QFAST_KERNEL(attend_f64, const ::qfast::AttendJob<double>&, int64_t begin, int64_t end)                    \
  QFAST_KERNEL(attend_backward_f64, const ::qfast::AttendBackwardJob<double>&, int64_t begin, int64_t end)   \
  QFAST_KERNEL(row_dots_f64, const ::qfast::RowDotsJob<double>&, int64_t begin, int64_t end)                 \
  QFAST_KERNEL(hidden_scores_f64, const ::qfast::ScoresJob<double>&, int64_t begin, int64_t end)             \
  QFAST_KERNEL(hidden_scores_backward_f64, const ::qfast::ScoresBackwardJob<double>&, int64_t begin,         \
               int64_t end)                                                                                  \
  QFAST_KERNEL(exp_f64, double* values, int64_t begin, int64_t end)                                          \
  QFAST_KERNEL(attention_pool_forward_f32, const ::qfast::PoolJob<float>&, int64_t begin, int64_t end,       \
               float* s)                                                                                     \
  QFAST_KERNEL(attention_pool_backward_f32, const ::qfast::PoolJob<float>&, int64_t begin, int64_t end,      \
               float* s, float* sums)                                                                        \
  QFAST_KERNEL(attention_pool_forward_f64, const ::qfast::PoolJob<double>&, int64_t begin, int64_t end,      \
               double* s)                                                                                    \
  QFAST_KERNEL(attention_pool_backward_f64, const ::qfast::PoolJob<double>&, int64_t begin, int64_t end,     \
               double* s, double* sums)                                                                      \
  QFAST_KERNEL(feed_forward_f32, const ::qfast::FeedForwardJob<float>&, int64_t begin, int64_t end,          \
               float* s)                                                                                     \
  QFAST_KERNEL(feed_forward_f64, const ::qfast::FeedForwardJob<double>&, int64_t begin, int64_t end,         \
               double* s)                                                                                    \
  QFAST_KERNEL(feed_forward_backward_f32, const ::qfast::FeedForwardJob<float>&, int64_t begin, int64_t end, \
               float* s, float* sums)                                                                        \
  QFAST_KERNEL(feed_forward_backward_f64, const ::qfast::FeedForwardJob<double>&, int64_t begin,             \
               int64_t end, double* s, double* sums)                                                         \
  QFAST_KERNEL(encoder_layer_f32, const ::qfast::EncoderJob<float>&, int64_t begin, int64_t end, float* s)   \
  QFAST_KERNEL(encoder_layer_backward_f32, const ::qfast::EncoderJob<float>&, int64_t begin, int64_t end,    \
               float* s, float* sums)                                                                        \
  QFAST_KERNEL(encoder_layer_f64, const ::qfast::EncoderJob<double>&, int64_t begin, int64_t end, double* s) \
  QFAST_KERNEL(encoder_layer_backward_f64, const ::qfast::EncoderJob<double>&, int64_t begin, int64_t end,   \
               double* s, double* sums)                                                                      \
  QFAST_KERNEL(window_conv_f32, const ::qfast::WindowConvJob<float>&, int64_t begin, int64_t end, float* s)  \
  QFAST_KERNEL(window_conv_backward_f32, const ::qfast::WindowConvJob<float>&, int64_t begin, int64_t end,   \
               float* s, float* sums)                                                                        \
  QFAST_KERNEL(window_conv_f64, const ::qfast::WindowConvJob<double>&, int64_t begin, int64_t end,           \
               double* s)                                                                                    \
  QFAST_KERNEL(window_conv_backward_f64, const ::qfast::WindowConvJob<double>&, int64_t begin, int64_t end,  \
               double* s, double* sums)                                                                      \
  QFAST_KERNEL(rolling, const ::qfast::RollingStatsJob&, int64_t begin, int64_t end, int64_t longest,        \
               double* s)                                                                                    \
  QFAST_KERNEL(temporal_conv_forward_f32, const ::qfast::NetworkJob<float>&, int64_t begin, int64_t end,     \
               float* s)                                                                                     \
  QFAST_KERNEL(temporal_conv_forward_f64, const ::qfast::NetworkJob<double>&, int64_t begin, int64_t end,    \
               double* s)                                                                                    \
  QFAST_KERNEL(temporal_conv_rolling_f32, const ::qfast::RollingJob<float>&, int64_t begin, int64_t end,     \
               float* s)                                                                                     \
  QFAST_KERNEL(temporal_conv_rolling_f64, const ::qfast::RollingJob<double>&, int64_t begin, int64_t end,    \
               double* s)                                                                                    \
  QFAST_KERNEL(temporal_conv_backward_f32, const ::qfast::NetworkJob<float>&, int64_t begin, int64_t end,    \
               float* s, float* sums)                                                                        \
  QFAST_KERNEL(temporal_conv_backward_f64, const ::qfast::NetworkJob<double>&, int64_t begin, int64_t end,   \
               double* s, double* sums)
