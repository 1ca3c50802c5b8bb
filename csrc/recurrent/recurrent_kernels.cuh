// Recurrent layers on CUDA, device side: what both directions share, and how they work. A layer's steps are
// one launch, forward (recurrent_kernels_forward.cuh) and backward (recurrent_kernels_backward.cuh). What
// goes before and after (products over all steps at once) is in recurrent.cu.
//
// A block of threads takes a tile of rows through all steps. A warp owns 8 units of them, a lane a quarter of
// the rows of one unit: its cells. The product of the tile's h with W_hh is split over the lanes: forward a
// lane adds up, for all rows and all gates of its unit, every fourth input; then the lanes of a unit exchange
// sums so that each has those of its own cells complete. Backward a lane adds up every sixteenth gate for
// four units, and the exchange leaves each with its own cells again. So a step is one pass of multiply-adds
// on registers (32 for each 2 loads of 16 bytes, and weights), and the order of every sum is fixed.
//
// Weights are in registers for all steps (float32 up to 64 units), else in shared memory where they fit
// (about 110 units), else they come through L1 and L2 at each step.
#pragma once

#include <cstdint>

#include "cuda_dropout.cuh"

namespace qfast {
namespace {

#include "recurrent/recurrent_cell.h"

constexpr int kLanes = 32;
constexpr int kWarpUnits = 8;
constexpr int kSlices = 4;         // of the inputs, forward; also lanes that share the rows of a unit
constexpr int kTurnedSlices = 16;  // of the gates, backward
constexpr int kTurnedUnits = 4;    // of a lane, backward

// The float32 forms have no branches and no call for rare cases: two units in the last place at the most
// beside the division's own, and what is infinite or NaN comes out as it should.
struct DeviceMath {
  static QFAST_DEVICE_INLINE float reciprocal(float x) {
#ifdef __CUDA_ARCH__
    return __fdividef(1.0f, x);  // within 2 units; 0 for what is infinite
#else
    return 1.0f / x;
#endif
  }
  static QFAST_DEVICE_INLINE float sigmoid(float x) { return reciprocal(1.0f + ::expf(-x)); }
  static QFAST_DEVICE_INLINE double sigmoid(double x) { return 1 / (1 + ::exp(-x)); }

  // Near 0, where 1 - 2 / (exp(2 |x|) + 1) loses digits, x + x^3 times a polynomial (least largest error).
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

// What both directions of a layer have. Rows are those of the whole batch.
template <class T>
struct LayerData {
  int64_t first_row, end_row, batch, steps, tiles;
  int32_t hidden;
  int32_t depth;   // inputs (backward: gates) of a slice
  bool in_shared;  // weights go there
  const T* weights;
  const T *first_h, *first_c;  // [B, H] or null: zeros
  T *gates, *carried;          // [T, B, 4, H] and [T, B, H]; forward null: not kept
  Dropout dropout;             // of the layer's output
  int32_t number;              // of the layer, for the dropout
};

template <class T>
struct ForwardLayer : LayerData<T> {
  Steps<const T> products;  // with W_ih, columns in torch's order; rows counted from first_row
  const T* bias;            // [H, 4 sums]
  T *last_h, *last_c;       // [B, H]
  T* last_output;           // [B, H] or null
  Steps<T> output;          // of all steps, or data null; rows counted from output_row
  int64_t output_row;
};

template <class T>
struct BackwardLayer : LayerData<T> {
  Steps<const T> entering;               // gradient of the output before its dropout; data null: none
  const T *grad_last, *grad_h, *grad_c;  // [B, H] or null
  T *of_input, *of_hidden;               // [B, T, gates * H], columns in torch's order
  T* before;                             // [B, T, H]: h of the step before
  T *of_first_h, *of_first_c;            // [B, H] or null
};

template <class T>
struct PackedLayer {
  const T *weight_hh, *bias_ih, *bias_hh;  // the last two may be null: no bias is packed
  T *weights, *bias;
  int32_t hidden, blocks, depth;
};

// ---------------------------------------------------------------- pieces
template <class T>
struct alignas(16) RowQuad {
  T of[4];
};

QFAST_DEVICE_INLINE void prefetch([[maybe_unused]] const void* from) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.L1 [%0];" ::"l"(from));
#endif
}

// Of the first 2 * kHalf sums a lane keeps the half that this bit of its number names, with those of the lane
// that keeps the other half added.
template <int kHalf, class T, int kAll>
QFAST_DEVICE_INLINE void exchange(T (&sums)[kAll], int bit) {
  const bool upper = (threadIdx.x & bit) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const T sent = upper ? sums[i] : sums[i + kHalf];
    const T own = upper ? sums[i + kHalf] : sums[i];
    sums[i] = own + __shfl_xor_sync(~0u, sent, bit, kLanes);
  }
}

// sums[v * kStride + row] += source[row][input] * weight of v, over the inputs of the lane's slice. Inputs
// lie [four rows][input][row]; weights [input of the slice][v][lane].
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

template <class T, int kValues, int kHeldDepth>
struct WeightsInRegisters {
  static constexpr int kDepth = kHeldDepth, kUnroll = kHeldDepth;
  T of[kDepth][kValues];
  QFAST_DEVICE_INLINE void load(const T* lane) {
#pragma unroll
    for (int i = 0; i < kDepth; ++i)
#pragma unroll
      for (int v = 0; v < kValues; ++v) of[i][v] = lane[(i * kValues + v) * kLanes];
  }
  QFAST_DEVICE_INLINE T operator()(int i, int v) const { return of[i][v]; }
};

// 0 or the scale, for an element of a layer's output.
template <class T>
QFAST_DEVICE_INLINE T kept_scale(const Dropout& rule, uint64_t seed, int64_t unit, int64_t step,
                                 int32_t number, int64_t row) {
  const PhiloxWords words = philox(seed, static_cast<uint32_t>(unit), static_cast<uint32_t>(step),
                                   static_cast<uint32_t>(number), static_cast<uint32_t>(row / 4));
  const uint32_t low = row & 1 ? words.word[1] : words.word[0];  // no index: that would go through memory
  const uint32_t high = row & 1 ? words.word[3] : words.word[2];
  const uint32_t word = row & 2 ? high : low;
  return word >= rule.threshold ? static_cast<T>(rule.scale) : T(0);
}

// A warp's place among the units and a lane's cells: kOwn rows of one unit.
template <int kTileRows>
struct Cells {
  static constexpr int kOwn = kTileRows / kSlices;
  int lane = static_cast<int>(threadIdx.x % kLanes), warp = static_cast<int>(threadIdx.x / kLanes);
  int warps = static_cast<int>(blockDim.x / kLanes);

  QFAST_DEVICE_INLINE int unit(int block) const { return block * kWarpUnits + lane / kSlices; }
  QFAST_DEVICE_INLINE int first_row() const { return lane % kSlices * kOwn; }
  // Of the block's cells in an array that has one element a cell.
  QFAST_DEVICE_INLINE int64_t place(int block) const {
    return (static_cast<int64_t>(block) * kLanes + lane) * kOwn;
  }
  // Element (row of the tile, input) of an operand of add_inputs.
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

// Threads of a block at most, and blocks of a multiprocessor at least: what 64 weights and the sums of four
// rows leave of 65,536 registers. Where a lane has more sums, one block of half as many threads.
constexpr int most_threads(int tile_rows, int held) { return held > 0 || tile_rows > 8 ? 256 : 512; }
constexpr int least_blocks(int tile_rows, int held) { return held > 0 && tile_rows <= 4 ? 2 : 1; }

// Held: inputs of a slice whose weights are in registers, forward, of a cell of four gates; 0: none are.
template <class Cell, bool kForward>
constexpr int held_depth(int held) {
  return kForward ? held : held * Cell::kGates / 4;
}

}  // namespace
}  // namespace qfast
