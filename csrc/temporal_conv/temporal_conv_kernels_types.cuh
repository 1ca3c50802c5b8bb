// What the CUDA kernels of temporal convolution stacks are given (temporal_conv_kernels.cuh): filled by
// temporal_conv_launch.cuh on the host, read on the device.
#pragma once

#include <cstdint>

#include "cuda_dropout.cuh"

namespace qfast {
namespace {

constexpr int kRows = 4;     // of a thread
constexpr int kColumns = 8;  // of a thread
constexpr int kPanel = 8;    // groups of columns side by side in a warp
constexpr int kThreads = 256;

// Where a tensor [slot][row][channel] lies: in memory, rows being those of the batch, or, from `shared_at`
// on, in the shared memory of each block of threads, rows being those of its tile.
template <class T>
struct Place {
  T* data = nullptr;
  int64_t slot_stride = 0, row_stride = 0, channel_stride = 1;
  int64_t shared_at = -1;
  bool packed = false;  // channels side by side, every row aligned to 16 bytes

  QFAST_DEVICE_INLINE bool wanted() const { return data != nullptr || shared_at >= 0; }
};

// Tap by tap, source[position -+ (taps - 1 - tap) * dilation] times the tap's weight; `turned`: the
// gradient's way, +. What is not in the cone, or outside the window, counts as zeros.
template <class T>
struct Product {
  Place<T> source;
  const int32_t* slots = nullptr;  // of the source by time step, -1: none
  int64_t dilation = 1;
  const T* weight = nullptr;  // [tap][channel][width]; null: the source itself, channel by channel
  int32_t taps = 0;           // 0: no product
  int32_t channels = 0;       // of the source
  int32_t width = 0;          // columns of the weight, a multiple of 8
  int32_t steps = 0;          // T
  bool turned = false;
};

enum class Kind : int32_t {
  kPlain,            // product + beside
  kBetween,          // dropout(relu(product + bias))
  kOutput,           // relu(dropout(relu(product + bias)) + beside + beside_bias)
  kBetweenGradient,  // product where `kept` is above 0, times the scale of the dropout
  kOutputGradient,   // product + beside where `kept` is above 0; second: that, times the scale, where a sign
                     // is set
};

template <class T>
struct Stage {
  Kind kind = Kind::kPlain;
  int32_t slots = 0, columns = 0;
  int32_t convolution = 0;  // its number, for the dropout
  const int32_t* positions = nullptr;
  Product<T> product, beside;
  const T *bias = nullptr, *beside_bias = nullptr;  // bias: kBetween and kOutput only
  Place<T> near, far;                               // the result: for the next stage; for later
  Place<T> second_near, second_far;  // kOutputGradient: the gradient of the second convolution's result
  Place<T> kept;
  unsigned char* signs = nullptr;  // [slot][row of the batch][(columns + 7) / 8]
};

template <class T>
struct Stages {
  const Stage<T>* stages;
  int count;
  int64_t batch, tile_rows, tiles, parts;
  Dropout dropout;
};

template <class T>
struct WeightGradient {
  Place<T> source, grad;
  const int32_t* source_slots;  // by time step
  const int32_t* positions;     // of the gradient's slots
  int64_t dilation;
  int32_t slots, taps, channels, columns;
  int64_t items, parts, first_thread;        // items: threads of one part
  int64_t elements, sums_at, first_element;  // elements: [tap][channel][column], then the bias
  T *of_weight, *of_bias;
};

template <class T>
struct WeightGradients {
  const WeightGradient<T>* jobs;
  int count;
  int64_t batch;
  int64_t steps;  // (slot, row) pairs of a part
  int64_t threads, elements;
  T* sums;
};

template <class T>
struct Packing {
  const T* from;
  T* to;
  int32_t taps, rows, columns, width;
  int64_t row_stride, column_stride;
};

// Threads that share the columns, or the channels, of a weight's gradient: two quads each.
QFAST_DEVICE_INLINE constexpr int gradient_groups(int elements) { return ((elements + 3) / 4 + 1) / 2; }

struct Words {
  static constexpr int kMost = 896;  // what fits beside the other arguments of a launch
  uint32_t word[kMost];
};

}  // namespace
}  // namespace qfast
