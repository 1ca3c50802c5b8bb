// Device code that the forward and backward passes of the recurrent layers on CUDA share. All steps of a
// layer are one launch, forward (recurrent_kernels_forward.cuh) or backward (recurrent_kernels_backward.cuh).
// recurrent.cu computes the products over all steps before and after it.
//
// A thread block owns a tile of rows and computes all its steps. A warp owns 8 units of the tile, and a lane
// owns a quarter of the rows of one unit, which are its cells. The lanes share the product of the tile's h
// with W_hh. In the forward pass a lane sums every fourth input, for all rows and all gates of its unit. The
// lanes of a unit then exchange sums, after which each lane has the complete sums of its own cells. In the
// backward pass a lane sums every sixteenth gate for four units, and the exchange again gives each lane its
// own cells. A step is therefore one pass of multiply-adds on registers (32 for each two loads of 16 bytes,
// plus the weights), and the order of every sum is fixed.
//
// The weights are in registers for all steps (float32 with up to 64 units), otherwise in shared memory if
// they fit (about 110 units), otherwise they are read through L1 and L2 at every step.
//
// Saved for backward: four gates and one carried value per unit and step.
#pragma once

#include <cstdint>

#include "cuda_dropout.cuh"

namespace qfast {
namespace {

#include "recurrent/recurrent_cell.h"

constexpr int kLanes = 32;
constexpr int kWarpUnits = 8;
// Slices of the inputs in the forward pass, and lanes that share the rows of a unit.
constexpr int kSlices = 4;
constexpr int kTurnedSlices = 16;  // slices of the gates in the backward pass
constexpr int kTurnedUnits = 4;    // units of a lane in the backward pass

// Sigmoid and tanh. The float32 forms have no branches and no calls for rare cases. Their error is at most
// two units in the last place in addition to that of the division. Infinite and NaN arguments give the
// correct results.
struct DeviceMath {
  static QFAST_DEVICE_INLINE float reciprocal(float x) {
#ifdef __CUDA_ARCH__
    return __fdividef(1.0f, x);  // within 2 units in the last place; 0 for infinite x
#else
    return 1.0f / x;
#endif
  }
  static QFAST_DEVICE_INLINE float sigmoid(float x) { return reciprocal(1.0f + ::expf(-x)); }
  static QFAST_DEVICE_INLINE double sigmoid(double x) { return 1 / (1 + ::exp(-x)); }

  // 1 - 2 / (exp(2 |x|) + 1) loses digits near 0. There the result is x + x^3 p(x^2) with a minimax
  // polynomial p.
  static QFAST_DEVICE_INLINE float tanh(float x) {
    const float size = ::fabsf(x), square = x * x;
    const float far = ::copysignf(::fmaf(-2.0f, reciprocal(::expf(2.0f * size) + 1.0f), 1.0f), x);
    float tail = ::fmaf(0.016273934f, square, -0.052586887f);
    tail = ::fmaf(tail, square, 0.13319421f);
    tail = ::fmaf(tail, square, -0.3333289f) * square;
    return size < 0.55f ? ::fmaf(tail, x, x) : far;
  }
  static QFAST_DEVICE_INLINE double tanh(double x) { return ::tanh(x); }
};

// Element (row, step, unit) at data + row * row_stride + step * step_stride + unit.
template <class T>
struct Steps {
  T* data = nullptr;
  int64_t row_stride = 0, step_stride = 0;

  QFAST_DEVICE_INLINE T* at(int64_t row, int64_t step) const {
    return data + row * row_stride + step * step_stride;
  }
};

// Arguments of a layer that both directions need. Rows count from the start of the whole batch.
template <class T>
struct LayerData {
  int64_t first_row, end_row, batch, steps, tiles;
  int32_t hidden;
  int32_t depth;   // inputs of a slice; gates of a slice in the backward pass
  bool in_shared;  // copy the weights to shared memory
  const T* weights;
  const T *first_h, *first_c;  // [B, H], or null for zeros
  T *gates, *carried;          // [T, B, 4, H] and [T, B, H] for backward; the forward pass may have null
  Dropout dropout;             // dropout of the layer's output
  int32_t number;              // number of the layer, a dropout counter
};

template <class T>
struct ForwardLayer : LayerData<T> {
  Steps<const T> products;  // products with W_ih, columns in torch's order; rows count from first_row
  const T* bias;            // [H, 4 sums]
  T *last_h, *last_c;       // [B, H]
  T* last_output;           // [B, H] or null
  Steps<T> output;          // all steps, or data is null; rows count from output_row
  int64_t output_row;
};

template <class T>
struct BackwardLayer : LayerData<T> {
  Steps<const T> grad_output;            // gradient of the output after its dropout; data may be null
  const T *grad_last, *grad_h, *grad_c;  // [B, H] or null
  T *of_input, *of_hidden;               // [B, T, gates * H], columns in torch's order
  T* before;                             // [B, T, H], h of the previous step
  T *of_first_h, *of_first_c;            // [B, H] or null
};

template <class T>
struct PackedLayer {
  const T *weight_hh, *bias_ih, *bias_hh;  // if the last two are null, no bias is packed
  T *weights, *bias;
  int32_t hidden, blocks, depth;
};

// ---------------------------------------------------------------- pieces
// Four rows of an input, loaded as 16 bytes in float32.
template <class T>
struct alignas(16) RowQuad {
  T of[4];
};

QFAST_DEVICE_INLINE void prefetch([[maybe_unused]] const void* from) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.L1 [%0];" ::"l"(from));
#endif
}

// Adds the first 2 * kHalf sums of two lanes whose numbers differ in `bit`. The lane without the bit gets the
// totals of the first half, the lane with the bit those of the second half.
template <int kHalf, class T, int kAll>
QFAST_DEVICE_INLINE void exchange(T (&sums)[kAll], int bit) {
  const bool upper = (threadIdx.x & bit) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const T sent = upper ? sums[i] : sums[i + kHalf];
    const T retained = upper ? sums[i + kHalf] : sums[i];
    sums[i] = retained + __shfl_xor_sync(~0u, sent, bit, kLanes);
  }
}

// sums[v * kTileRows + row] += source[row][input] * weight of v, over the inputs of the lane's slice. The
// layout of `source` is [four rows][input][row], that of the weights [input of the slice][v][lane].
template <int kTileRows, int kValues, int kSlicesOfWarp, class T, class Weight>
QFAST_DEVICE_INLINE void add_inputs(const T* source, int inputs, int depth, const Weight& weight,
                                    T (&sums)[kValues * kTileRows]) {
  const T* const from = source + (threadIdx.x % kSlicesOfWarp) * 4;
  const int count = Weight::kDepth > 0 ? Weight::kDepth : depth;
#pragma unroll(Weight::kUnroll)
  for (int i = 0; i < count; ++i) {
    T weights[kValues];
#pragma unroll
    for (int v = 0; v < kValues; ++v) weights[v] = weight(i, v);
#pragma unroll
    for (int quad = 0; quad < kTileRows / 4; ++quad) {
      const RowQuad<T> rows = *reinterpret_cast<const RowQuad<T>*>(
          from + (static_cast<int64_t>(quad) * inputs + i * kSlicesOfWarp) * 4);
#pragma unroll
      for (int v = 0; v < kValues; ++v)
#pragma unroll
        for (int r = 0; r < 4; ++r) sums[v * kTileRows + quad * 4 + r] += rows.of[r] * weights[v];
    }
  }
}

template <class T, int kValues>
struct WeightsInMemory {
  static constexpr int kDepth = 0, kUnroll = 4;
  const T* lane;
  QFAST_DEVICE_INLINE T operator()(int i, int v) const { return lane[(i * kValues + v) * kLanes]; }
};

template <class T, int kValues, int kRegisterDepth>
struct WeightsInRegisters {
  static constexpr int kDepth = kRegisterDepth, kUnroll = kRegisterDepth;
  T of[kDepth][kValues];
  QFAST_DEVICE_INLINE void load(const T* lane) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i)
#pragma unroll
      for (int v = 0; v < kValues; ++v) of[i][v] = lane[(i * kValues + v) * kLanes];
  }
  QFAST_DEVICE_INLINE T operator()(int i, int v) const { return of[i][v]; }
};

// Returns the dropout factor of an element of a layer's output: 0 or the scale.
template <class T>
QFAST_DEVICE_INLINE T dropout_factor(const Dropout& rule, uint64_t seed, int64_t unit, int64_t step,
                                     int32_t number, int64_t row) {
  const PhiloxWords words = philox(seed, static_cast<uint32_t>(unit), static_cast<uint32_t>(step),
                                   static_cast<uint32_t>(number), static_cast<uint32_t>(row / 4));
  const uint32_t low = row & 1
                           ? words.word[1]
                           : words.word[0];  // selected without an index, which would go through local memory
  const uint32_t high = row & 1 ? words.word[3] : words.word[2];
  const uint32_t word = row & 2 ? high : low;
  return word >= rule.threshold ? static_cast<T>(rule.scale) : T(0);
}

// The units of a warp and the cells of a lane, which are kCells rows of one unit.
template <int kTileRows>
struct Cells {
  static constexpr int kCells = kTileRows / kSlices;
  int lane = static_cast<int>(threadIdx.x % kLanes), warp = static_cast<int>(threadIdx.x / kLanes);
  int warps = static_cast<int>(blockDim.x / kLanes);

  QFAST_DEVICE_INLINE int unit(int block) const { return block * kWarpUnits + lane / kSlices; }
  QFAST_DEVICE_INLINE int first_row() const { return lane % kSlices * kCells; }
  // Index of the lane's first cell in an array with one element per cell.
  QFAST_DEVICE_INLINE int64_t place(int block) const {
    return (static_cast<int64_t>(block) * kLanes + lane) * kCells;
  }
  // Index of (row of the tile, input) in the `source` of add_inputs.
  static QFAST_DEVICE_INLINE int64_t operand(int row, int input, int inputs) {
    return (static_cast<int64_t>(row / 4) * inputs + input) * 4 + row % 4;
  }
};

template <class T>
QFAST_DEVICE_INLINE void copy_weights(T* to, const T* from, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}

template <class T>
QFAST_DEVICE_INLINE void fill_zeros(T* to, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) to[i] = T(0);
}

template <class T>
QFAST_DEVICE_INLINE T element_or_zero(const T* from, int64_t at) {
  return from == nullptr ? T(0) : from[at];
}

// Largest number of threads of a block and smallest number of blocks per multiprocessor. 64 weights in
// registers and the sums of four rows allow two blocks of 256 threads in 65,536 registers. With more sums per
// lane, one block fits.
constexpr int most_threads(int tile_rows, int register_inputs) {
  return register_inputs > 0 || tile_rows > 8 ? 256 : 512;
}
constexpr int least_blocks(int tile_rows, int register_inputs) {
  return register_inputs > 0 && tile_rows <= 4 ? 2 : 1;
}

// Number of inputs of a slice whose weights are in registers. `register_inputs` is that number for the
// forward pass of a cell with four gates, or 0 if the weights are not in registers.
template <class Cell, bool kForward>
constexpr int register_depth(int register_inputs) {
  return kForward ? register_inputs : register_inputs * Cell::kGates / 4;
}

}  // namespace
}  // namespace qfast
