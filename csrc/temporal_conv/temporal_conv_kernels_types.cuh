// Arguments of the CUDA kernels of temporal convolution stacks (temporal_conv_kernels*.cuh).
// temporal_conv_launch.cuh fills them on the host.
#pragma once

#include <cstdint>

#include "cuda_dropout.cuh"

namespace qfast {
namespace {

constexpr int kRows = 4;     // rows of a thread
constexpr int kColumns = 8;  // columns of a thread
constexpr int kPanel = 8;    // adjacent groups of columns in a warp
constexpr int kThreads = 256;
constexpr int kWarpLanes = 32;
// Threads of sum_parts_kernel and columns that they own. Few columns make many blocks, which the narrow
// stacks need.
constexpr int kSumThreads = 512;
constexpr int kSumColumns = 4;

// Location of a tensor [slot][row][channel]. In global memory, rows count from the start of the batch. In the
// shared memory of a thread block, at offset `shared_at`, rows count from the start of its tile.
template <class T>
struct Place {
  T* data = nullptr;
  int64_t slot_stride = 0, row_stride = 0, channel_stride = 1;
  int64_t shared_at = -1;
  bool packed = false;  // channels are adjacent and every row is aligned to 16 bytes

  QFAST_DEVICE_INLINE bool wanted() const { return data != nullptr || shared_at >= 0; }
};

// A convolution: the sum over taps of source[position - (taps - 1 - tap) * dilation] times the weight of the
// tap. `turned` selects the direction of gradients, which is + instead of -. Positions outside the cone or
// the window count as zeros.
template <class T>
struct Product {
  Place<T> source;
  const int32_t* slots = nullptr;  // slot of the source for each time step, or -1
  int64_t dilation = 1;
  const T* weight = nullptr;  // [tap][channel][width]; if null, the product is the source itself
  int32_t taps = 0;           // 0 for no product
  int32_t channels = 0;       // channels of the source
  int32_t width = 0;          // columns of the weight, a multiple of 8
  int32_t steps = 0;          // T
  bool turned = false;
};

enum class Kind : int32_t {
  kPlain,            // product + residual
  kBetween,          // dropout(relu(product + bias))
  kOutput,           // relu(dropout(relu(product + bias)) + residual + residual_bias)
  kBetweenGradient,  // product where `saved` is above 0, times the scale of the dropout
  kOutputGradient,   // product + residual where `saved` is above 0; second: the same times the scale where a
                     // sign is set
};

// Computes one tensor [slot][row][column] of the stack.
template <class T>
struct Stage {
  Kind kind = Kind::kPlain;
  int32_t slots = 0, columns = 0;
  int32_t convolution = 0;  // number of the convolution, a dropout counter
  const int32_t* positions = nullptr;
  Product<T> product, residual;
  const T *bias = nullptr, *residual_bias = nullptr;  // bias is for kBetween and kOutput only
  Place<T> near, far;                                 // the result for the next stage, and for later kernels
  Place<T> second_near, second_far;  // kOutputGradient only: gradient of the second convolution
  Place<T> saved;
  unsigned char* signs = nullptr;  // [slot][row of the batch][(columns + 7) / 8]
};

// All stages of a launch. Each of `tiles` tiles of rows is divided among `parts` thread blocks.
template <class T>
struct Stages {
  const Stage<T>* stages;
  int count;
  int64_t batch, tile_rows, tiles, parts;
  Dropout dropout;
};

// The parameters of a convolution, and their gradients in the backward pass. With a gain, the weight of the
// convolution is gain * weight / ||weight|| per output. Without the convolution, weight is null.
template <class T>
struct Convolution {
  const T *weight, *gain, *bias;  // [output][input][tap], [output] and [output]
  T *of_weight, *of_gain, *of_bias;
};

// The gradient of one weight and its bias, computed as sums over `parts` parts of the (slot, row) pairs.
template <class T>
struct WeightGradient {
  Place<T> source, grad;
  const int32_t* source_slots;  // slot for each time step
  const int32_t* positions;     // time steps of the gradient's slots
  int64_t dilation;
  int32_t slots, taps, channels, columns;
  int64_t items, parts, first_thread;  // items is the number of threads of one part
  int64_t elements, sums_at;           // elements are [tap][channel][column], then the bias
  int64_t first_group;                 // of kSumColumns columns
  Convolution<T> convolution;
};

template <class T>
struct WeightGradients {
  const WeightGradient<T>* jobs;
  int count;
  int64_t batch;
  int64_t steps;  // (slot, row) pairs of a part
  int64_t threads, groups;
  T* sums;
};

// A weight to be packed as [tap][input][width] or, if `turned`, as [tap][output][width].
template <class T>
struct Packing {
  const T *from, *gain;  // as in Convolution
  T* to;
  int32_t taps, inputs, outputs, width;
  int64_t first_group;  // of kColumns outputs
  bool turned;
};

// Number of threads that share the columns, or the channels, of a weight gradient. Each owns two groups of
// four.
QFAST_DEVICE_INLINE constexpr int gradient_groups(int elements) { return ((elements + 3) / 4 + 1) / 2; }

// Table data that is passed as a kernel argument.
struct Words {
  static constexpr int kMost = 896;  // words that fit into the arguments of a launch
  uint32_t word[kMost];
};

}  // namespace
}  // namespace qfast
