// Kernels of the weights of temporal convolution stacks on CUDA: their gradients, weight normalization, and
// packing. temporal_conv.cu describes the sequence of launches.
#pragma once

#include <cstdint>

#include "temporal_conv/temporal_conv_kernels.cuh"

namespace qfast {
namespace {

// ---------------------------------------------------------------- gradients of weights
// A thread owns 8 x 8 elements of the weight of one tap and sums them over a part of the (slot, row) pairs
// whose tap is inside the window. It needs 4 loads of 16 bytes for 64 multiply-adds, which L1 can deliver in
// the same time. sum_parts_kernel adds the parts in order in float64 and applies the weight normalization.

// Two groups of four of `all` elements: number `group`, and number `group` + `groups`. With this distance
// neighbouring threads read adjacent memory. If the second group does not exist, the thread reads the first
// again and ignores it.
struct TwoQuads {
  int begin[2], count[2];
  QFAST_DEVICE_INLINE TwoQuads(int group, int groups, int all) {
    begin[0] = group * 4;
    begin[1] = (group + groups) * 4;
    count[0] = all - begin[0];
    count[1] = all - begin[1];
    if (count[1] <= 0) begin[1] = begin[0];
  }
  QFAST_DEVICE_INLINE bool whole() const { return count[0] >= 4 && (count[1] >= 4 || count[1] <= 0); }
};

// One operand of the rows of a part. Group q of a row is at address of[q]; the same group of the next row is
// `step` bytes later.
template <class T>
struct GradientOperand {
  const char* of[2];
  int64_t step, stride;  // stride is the number of elements between channels
  bool packed;

  QFAST_DEVICE_INLINE GradientOperand(const Place<T>& place, int64_t slot, int64_t row, const TwoQuads& quads)
      : step(place.row_stride * static_cast<int64_t>(sizeof(T))),
        stride(place.channel_stride),
        packed(place.packed) {
    const T* const begin = place.data + slot * place.slot_stride + row * place.row_stride;
#pragma unroll
    for (int q = 0; q < 2; ++q) of[q] = reinterpret_cast<const char*>(begin + quads.begin[q] * stride);
  }

  // Loads group q of a row and advances to the next row. kWhole means four elements that are aligned to 16
  // bytes.
  template <bool kWhole>
  QFAST_DEVICE_INLINE Quad<T> next(int q, const TwoQuads& quads) {
    const T* const from = reinterpret_cast<const T*>(of[q]);
    of[q] += step;
    if constexpr (kWhole) return *reinterpret_cast<const Quad<T>*>(from);
    return load_quad(from, stride, quads.count[q], packed);
  }
};

// Adds the products of `rows` rows. With kWhole the loop contains only loads, multiply-adds and four
// pointers.
template <bool kWhole, bool kBias, class T>
QFAST_DEVICE_INLINE void add_rows(GradientOperand<T> source, const TwoQuads& channels,
                                  GradientOperand<T> grad, const TwoQuads& columns, int rows, T (&sum)[8][8],
                                  T (&bias)[8]) {
#pragma unroll(kWhole && !kBias ? 2 : 1)
  for (; rows > 0; --rows) {
    Quad<T> values[2], grads[2];
#pragma unroll
    for (int q = 0; q < 2; ++q) values[q] = source.template next<kWhole>(q, channels);
#pragma unroll
    for (int q = 0; q < 2; ++q) grads[q] = grad.template next<kWhole>(q, columns);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const T of = grads[j / 4].of[j % 4];
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[k][j] += values[k / 4].of[k % 4] * of;
      if constexpr (kBias) bias[j] += of;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1)
    weight_gradient_kernel(WeightGradients<T> run) {
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < run.threads;
       at += int64_t{gridDim.x} * blockDim.x) {
    int number = run.count - 1;
    while (run.jobs[number].first_thread > at) --number;
    const WeightGradient<T>& job = run.jobs[number];
    const int64_t item = (at - job.first_thread) % job.items, part = (at - job.first_thread) / job.items;
    const int column_groups = gradient_groups(job.columns), channel_groups = gradient_groups(job.channels);
    const int64_t rest = item / column_groups;
    const TwoQuads columns(static_cast<int>(item % column_groups), column_groups, job.columns);
    const TwoQuads channels(static_cast<int>(rest % channel_groups), channel_groups, job.channels);
    const int tap = static_cast<int>(rest / channel_groups);
    // The last tap reads for every output, so its threads also sum the bias.
    const bool with_bias = rest % channel_groups == 0 && tap == job.taps - 1;
    const bool whole = job.source.packed && job.grad.packed && channels.whole() && columns.whole();
    // Make the same choice in the whole warp, so it loops over the rows once.
    const unsigned lanes = __activemask();
    const bool all_whole = __all_sync(lanes, whole), any_bias = __any_sync(lanes, with_bias);
    T sum[8][8] = {}, bias[8] = {};

    const int64_t back = (job.taps - 1 - tap) * job.dilation;
    int first_slot = 0;  // the first output whose tap is inside the window; positions are ascending
    while (first_slot < job.slots && job.positions[first_slot] < back) ++first_slot;
    const int64_t pairs = (job.slots - first_slot) * run.batch;
    const int64_t end = (part + 1) * run.steps < pairs ? (part + 1) * run.steps : pairs;
    for (int64_t pair = part * run.steps; pair < end;) {
      const int slot = first_slot + static_cast<int>(pair / run.batch);
      const int64_t row = pair % run.batch;
      constexpr int64_t kMost = 1 << 30;
      const int rows = static_cast<int>(min(min(run.batch - row, end - pair), kMost));
      const GradientOperand<T> source(job.source, job.source_slots[job.positions[slot] - back], row,
                                      channels);
      const GradientOperand<T> grad(job.grad, slot, row, columns);
      if (!all_whole) {
        add_rows<false, true>(source, channels, grad, columns, rows, sum, bias);
      } else if (any_bias) {
        add_rows<true, true>(source, channels, grad, columns, rows, sum, bias);
      } else {
        add_rows<true, false>(source, channels, grad, columns, rows, sum, bias);
      }
      pair += rows;
    }

    T* const to = run.sums + job.sums_at + part * job.elements;
    const int64_t weights = static_cast<int64_t>(job.taps) * job.channels * job.columns;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j % 4 >= columns.count[j / 4]) continue;
      const int column = columns.begin[j / 4] + j % 4;
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (k % 4 >= channels.count[k / 4]) continue;
        const int64_t tap_row = static_cast<int64_t>(tap) * job.channels + channels.begin[k / 4] + k % 4;
        to[tap_row * job.columns + column] = sum[k][j];
      }
      if (with_bias) to[weights + column] = bias[j];
    }
  }
}

// Sums over the elements v of the weight of an output channel, with the gradient w of gain * v / ||v||.
struct NormSums {
  double products, squares;  // of v * w, and of v * v

  QFAST_DEVICE_INLINE void add(const NormSums& other) {
    products += other.products;
    squares += other.squares;
  }
};

// The gradient of v is scale * (w - along * v).
struct NormGradient {
  double scale, along;
};

// Adds the sums of all threads that own the same column, in a fixed order, and stores the gradient of its
// gain. All threads of the block must call it. Thread i owns column i % kSumColumns of the group.
template <class T>
QFAST_DEVICE_INLINE NormGradient norm_gradient(NormSums sums, const Convolution<T>& convolution, int column,
                                               bool exists) {
  constexpr int kWarps = kSumThreads / kWarpLanes;
  __shared__ NormSums of_warps[kWarps][kSumColumns];
  __shared__ NormGradient of_columns[kSumColumns];
  const int thread = static_cast<int>(threadIdx.x), place = thread % kSumColumns;
#pragma unroll
  for (int step = kSumColumns; step < kWarpLanes; step *= 2)
    sums.add({__shfl_xor_sync(~0u, sums.products, step), __shfl_xor_sync(~0u, sums.squares, step)});
  if (thread % kWarpLanes < kSumColumns) of_warps[thread / kWarpLanes][place] = sums;
  __syncthreads();
  if (thread < kSumColumns && exists) {
    NormSums all{};
#pragma unroll 1
    for (int warp = 0; warp < kWarps; ++warp) all.add(of_warps[warp][place]);
    const double norm = sqrt(all.squares);
    of_columns[place] = {static_cast<double>(convolution.gain[column]) / norm, all.products / all.squares};
    convolution.of_gain[column] = static_cast<T>(all.products / norm);
  }
  __syncthreads();
  return of_columns[place];
}

// One thread's elements of a column of a weight: every kStep-th of [tap][channel].
template <class T>
struct ColumnPart {
  static constexpr int kStep = kSumThreads / kSumColumns;
  const WeightGradient<T>& job;
  int column, first, count;  // the bias follows the `count` elements

  // Returns the index of element i in torch's layout, [column][channel][tap].
  QFAST_DEVICE_INLINE int64_t place(int i) const {
    return int64_t{column} * count + i % job.channels * job.taps + i / job.channels;
  }

  QFAST_DEVICE_INLINE void add_parts(const T* sums) const {
    for (int i = first; i <= count; i += kStep) {
      const T* from = sums + job.sums_at + int64_t{i} * job.columns + column;
      double sum = 0;
      for (int64_t part = job.parts; part > 0; --part, from += job.elements)
        sum += static_cast<double>(*from);
      (i < count ? job.convolution.of_weight[place(i)] : job.convolution.of_bias[column]) =
          static_cast<T>(sum);
    }
  }

  QFAST_DEVICE_INLINE NormSums norm_sums() const {
    NormSums sums{};
    for (int i = first; i < count; i += kStep) {
      const double v = static_cast<double>(job.convolution.weight[place(i)]);
      sums.add({v * static_cast<double>(job.convolution.of_weight[place(i)]), v * v});
    }
    return sums;
  }

  QFAST_DEVICE_INLINE void normalize(const NormGradient& gradient) const {
    for (int i = first; i < count; i += kStep) {
      T& grad = job.convolution.of_weight[place(i)];
      const double v = static_cast<double>(job.convolution.weight[place(i)]);
      grad = static_cast<T>(gradient.scale * (static_cast<double>(grad) - gradient.along * v));
    }
  }
};

// Adds all parts and stores the gradients. A thread block owns a group of columns, which are output channels,
// and each thread reads only elements of a gradient that it has written.
template <class T>
__global__ void __launch_bounds__(kSumThreads, 3) sum_parts_kernel(WeightGradients<T> run) {
  for (int64_t group = blockIdx.x; group < run.groups; group += gridDim.x) {
    int number = run.count - 1;
    while (run.jobs[number].first_group > group) --number;
    const WeightGradient<T>& job = run.jobs[number];
    const int column = static_cast<int>(group - job.first_group) * kSumColumns + threadIdx.x % kSumColumns;
    const ColumnPart<T> part{job, column, static_cast<int>(threadIdx.x) / kSumColumns,
                             job.taps * job.channels};
    const bool exists = column < job.columns;
    if (exists) part.add_parts(run.sums);
    if (job.convolution.gain == nullptr) continue;
    const NormSums sums = exists ? part.norm_sums() : NormSums{};
    const NormGradient gradient = norm_gradient(sums, job.convolution, column, exists);
    if (exists) part.normalize(gradient);
  }
}

// ---------------------------------------------------------------- weights and tables
// Computes gain / ||v|| for `count` elements v of a weight, with all lanes of a warp.
template <class T>
QFAST_DEVICE_INLINE T norm_factor(const T* v, int64_t count, T gain) {
  double squares = 0;
  for (int64_t i = threadIdx.x % kWarpLanes; i < count; i += kWarpLanes)
    squares += static_cast<double>(v[i]) * static_cast<double>(v[i]);
#pragma unroll
  for (int step = kWarpLanes / 2; step > 0; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
  return static_cast<T>(static_cast<double>(gain) / sqrt(squares));
}

// Packs the weights, with zeros beyond the last column. A thread block owns 8 outputs of a weight, and each
// of its warps computes the factor of one.
template <class T>
__global__ void __launch_bounds__(kThreads)
    temporal_conv_pack_kernel(const Packing<T>* jobs, int count, int64_t groups) {
  static_assert(kThreads == kColumns * kWarpLanes);
  __shared__ T factors[kColumns];
  for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    int number = count - 1;
    while (jobs[number].first_group > group) --number;
    const Packing<T>& job = jobs[number];
    const int64_t first = (group - job.first_group) * kColumns, weights = int64_t{job.inputs} * job.taps;
    __syncthreads();  // all threads have read the factors of the previous group
    const int64_t of_warp = first + threadIdx.x / kWarpLanes;
    if (of_warp < job.outputs) {
      const T factor =
          job.gain == nullptr ? T(1) : norm_factor(job.from + of_warp * weights, weights, job.gain[of_warp]);
      if (threadIdx.x % kWarpLanes == 0) factors[threadIdx.x / kWarpLanes] = factor;
    }
    __syncthreads();
    const int64_t outputs = job.outputs - first < kColumns ? job.outputs - first : kColumns;
    const int64_t rows = job.turned ? outputs : job.inputs, columns = job.turned ? job.width : kColumns;
    for (int64_t at = threadIdx.x; at < job.taps * rows * columns; at += blockDim.x) {
      const int64_t column = at % columns, row = at / columns % rows, tap = at / columns / rows;
      const int64_t output = job.turned ? row : column, input = job.turned ? column : row;
      const bool inside = output < outputs && input < job.inputs;
      const T value =
          inside ? job.from[((first + output) * job.inputs + input) * job.taps + tap] * factors[output]
                 : T(0);
      T* const to = job.to + tap * (job.turned ? job.outputs : job.inputs) * job.width;
      to[job.turned ? (first + row) * job.width + column : row * job.width + first + column] = value;
    }
  }
}

// Writes tables that are kernel arguments. Without a copy from the host nothing synchronizes, and a CUDA
// graph contains the tables.
__global__ void __launch_bounds__(kThreads) write_kernel(Words words, uint32_t* to, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = words.word[i];
}

}  // namespace
}  // namespace qfast
