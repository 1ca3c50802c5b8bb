// Backward pass of a recurrent layer on CUDA: all steps of a layer. recurrent_kernels.cuh describes the
// method.
#pragma once

#include "recurrent/recurrent_kernels.cuh"

namespace qfast {
namespace {

// Computes the steps of a tile, from the last to the first. Shared memory contains the weights if they fit,
// the gradients of a step's gates as the operand of the product, and for each cell the gradients of h and of
// the carried value.
template <class Cell, class T, int kTileRows, int kRegisterInputs>
struct BackwardTile {
  static constexpr int kGates = Cell::kGates;
  using At = Cells<kTileRows>;

  const BackwardLayer<T>& layer;
  At at;
  T *operand, *grad_h, *grad_carried;
  int blocks, inputs;
  int64_t first_row;

  QFAST_DEVICE_INLINE bool has(int64_t row, int unit) const {
    return row < layer.end_row && unit < layer.hidden;
  }

  // Loads the gradients of the last state.
  QFAST_DEVICE_INLINE void start() {
    fill_zeros(operand, int64_t{kTileRows} * inputs);
    for (int block = at.warp; block < blocks; block += at.warps) {
      const int unit = at.unit(block);
#pragma unroll
      for (int c = 0; c < At::kCells; ++c) {
        const int64_t row = first_row + at.first_row() + c, element = row * layer.hidden + unit;
        const bool exists = has(row, unit);
        T of_h = exists ? element_or_zero(layer.grad_h, element) : T(0);
        if (exists) of_h += element_or_zero(layer.grad_last, element);
        grad_h[at.place(block) + c] = of_h;
        grad_carried[at.place(block) + c] = exists ? element_or_zero(layer.grad_c, element) : T(0);
      }
    }
    __syncthreads();
  }

  // Returns the carried value of the previous step.
  QFAST_DEVICE_INLINE T carried_before(int64_t t, int64_t row, int unit) const {
    if (t > 0) return layer.carried[((t - 1) * layer.batch + row) * layer.hidden + unit];
    return element_or_zero(Cell::kCarriesOutput ? layer.first_h : layer.first_c, row * layer.hidden + unit);
  }

  // Computes the gradients of a cell's gates, and stores them in global memory and as the operand of the
  // product.
  QFAST_DEVICE_INLINE void cell(int64_t t, int block, int c, int64_t row, int unit, uint64_t seed) {
    const int64_t hidden = layer.hidden, place = t * layer.batch + row, cell_index = at.place(block) + c;
    T gates[4], grads[4];
#pragma unroll
    for (int g = 0; g < 4; ++g) gates[g] = layer.gates[(place * 4 + g) * hidden + unit];
    const T after = layer.carried[place * hidden + unit];
    const T activated = Cell::kCarriesOutput ? after : DeviceMath::tanh(after);
    T of_h = grad_h[cell_index];
    if (layer.grad_output.data != nullptr) {
      T grad_above = layer.grad_output.at(row, t)[unit];
      if (layer.dropout.active)
        grad_above *= dropout_factor<T>(layer.dropout, seed, unit, t, layer.number, row);
      of_h += grad_above;
    }
    T of_carried = grad_carried[cell_index];
    Cell().backward(gates, carried_before(t, row, unit), activated, of_h, &of_carried, grads);
    grad_carried[cell_index] = of_carried;
    const int64_t step = row * layer.steps + t;
    if (t + 1 < layer.steps)
      layer.before[(step + 1) * hidden + unit] = Cell::kCarriesOutput ? after : gates[3] * activated;
    if (t == 0) layer.before[step * hidden + unit] = element_or_zero(layer.first_h, row * hidden + unit);
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      const int sum = g + 4 - kGates;
      const int64_t column = Cell::hidden_block(sum) * hidden + unit;
      layer.of_input[step * kGates * hidden + Cell::input_block(g) * hidden + unit] = grads[g];
      if (kGates < 4) layer.of_hidden[step * kGates * hidden + column] = grads[sum];
      operand[At::operand(at.first_row() + c, static_cast<int>(column), inputs)] = grads[sum];
    }
  }

  // Computes the gradients of the gates of all cells at step t.
  QFAST_DEVICE_INLINE void cells(int64_t t, uint64_t seed) {
    for (int block = at.warp; block < blocks; block += at.warps) {
      const int unit = at.unit(block);
#pragma unroll
      for (int c = 0; c < At::kCells; ++c) {
        const int64_t row = first_row + at.first_row() + c;
        if (has(row, unit)) cell(t, block, c, row, unit, seed);
      }
    }
  }

  // Prefetches the inputs of the next step, so they arrive during the product of this step.
  QFAST_DEVICE_INLINE void prefetch_step(int64_t t, int block) const {
    const int unit = at.unit(block);
#pragma unroll
    for (int c = 0; c < At::kCells; ++c) {
      const int64_t row = first_row + at.first_row() + c, place = t * layer.batch + row;
      if (!has(row, unit)) continue;
#pragma unroll
      for (int g = 0; g < 4; ++g) prefetch(layer.gates + (place * 4 + g) * layer.hidden + unit);
      if (t > 0) prefetch(layer.carried + (place - layer.batch) * layer.hidden + unit);
      if (layer.grad_output.data != nullptr) prefetch(layer.grad_output.at(row, t) + unit);
    }
  }

  // Computes the gradient of the previous h from those of the gates, for 8 units.
  template <class Weight>
  QFAST_DEVICE_INLINE void product(int64_t t, int block, const Weight& weight) {
    if (t > 0) prefetch_step(t - 1, block);
    T sums[kTurnedUnits * kTileRows] = {};
    add_inputs<kTileRows, kTurnedUnits, kTurnedSlices>(operand, inputs, layer.depth, weight, sums);
    // The exchanges leave two of the four units, one unit, half of its rows, and a quarter.
    exchange<2 * kTileRows>(sums, 8);
    exchange<kTileRows>(sums, 4);
    exchange<kTileRows / 2>(sums, 2);
    exchange<kTileRows / 4>(sums, 1);
#pragma unroll
    for (int c = 0; c < At::kCells; ++c) grad_h[at.place(block) + c] = sums[c];
  }

  // Stores the gradients of the initial state.
  QFAST_DEVICE_INLINE void end() {
    for (int block = at.warp; block < blocks; block += at.warps) {
      const int unit = at.unit(block);
#pragma unroll
      for (int c = 0; c < At::kCells; ++c) {
        const int64_t row = first_row + at.first_row() + c, element = row * layer.hidden + unit;
        if (!has(row, unit) || layer.of_first_h == nullptr) continue;
        const T of_h = grad_h[at.place(block) + c], of_carried = grad_carried[at.place(block) + c];
        layer.of_first_h[element] = Cell::kCarriesOutput ? of_h + of_carried : of_h;
        if (!Cell::kCarriesOutput) layer.of_first_c[element] = of_carried;
      }
    }
    __syncthreads();
  }
};

template <class Cell, class T, int kTileRows, int kRegisterInputs>
__global__ void __launch_bounds__(most_threads(kTileRows, kRegisterInputs),
                                  least_blocks(kTileRows, kRegisterInputs))
    recurrent_backward_kernel(BackwardLayer<T> layer) {
  extern __shared__ double shared_memory[];
  constexpr int kDepth = register_depth<Cell, false>(kRegisterInputs);
  const int blocks = (layer.hidden + kWarpUnits - 1) / kWarpUnits, inputs = layer.depth * kTurnedSlices;
  T* shared_free = reinterpret_cast<T*>(shared_memory);
  const T* weights = layer.weights;
  const int64_t block_weights = int64_t{layer.depth} * kTurnedUnits * kLanes;
  if (layer.in_shared) {
    copy_weights(shared_free, weights, blocks * block_weights);
    weights = shared_free;
    shared_free += blocks * block_weights;
  }
  const int64_t cells = int64_t{blocks} * kWarpUnits * kTileRows;
  T* const of_h = shared_free + int64_t{kTileRows} * inputs;
  BackwardTile<Cell, T, kTileRows, kRegisterInputs> tile{layer,        {},     shared_free, of_h,
                                                         of_h + cells, blocks, inputs,      0};
  const uint64_t seed = layer.dropout.active ? static_cast<uint64_t>(*layer.dropout.seed) : 0;
  WeightsInRegisters<T, kTurnedUnits, (kDepth > 0 ? kDepth : 1)> register_weights;
  if constexpr (kDepth > 0) register_weights.load(weights + tile.at.warp * block_weights + tile.at.lane);
  for (int64_t number = blockIdx.x; number < layer.tiles; number += gridDim.x) {
    tile.first_row = layer.first_row + number * kTileRows;
    tile.start();
    for (int64_t t = layer.steps - 1; t >= 0; --t) {
      tile.cells(t, seed);
      __syncthreads();
      if constexpr (kDepth > 0) {
        tile.product(t, tile.at.warp, register_weights);
      } else {
        for (int block = tile.at.warp; block < blocks; block += tile.at.warps)
          tile.product(t, block,
                       WeightsInMemory<T, kTurnedUnits>{weights + block * block_weights + tile.at.lane});
      }
      __syncthreads();
    }
    tile.end();
  }
}

// Packs W_hh for the backward pass as [8 units][gate of a slice][unit of a lane][lane].
template <class Cell, class T>
__global__ void recurrent_turn_kernel(PackedLayer<T> job) {
  const int64_t hidden = job.hidden, count = int64_t{job.blocks} * job.depth * kTurnedUnits * kLanes;
  const int64_t first = blockIdx.x * int64_t{blockDim.x} + threadIdx.x,
                stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = first; at < count; at += stride) {
    const int lane = static_cast<int>(at % kLanes), v = static_cast<int>(at / kLanes % kTurnedUnits);
    const int64_t i = at / kLanes / kTurnedUnits % job.depth, block = at / kLanes / kTurnedUnits / job.depth;
    const int64_t unit = block * kWarpUnits + lane / kTurnedSlices * kTurnedUnits + v;
    const int64_t row = i * kTurnedSlices + lane % kTurnedSlices;
    const bool exists = unit < hidden && row < Cell::kGates * hidden;
    job.weights[at] = exists ? job.weight_hh[row * hidden + unit] : T(0);
  }
}

template <class T>
struct SavedOutput {
  const T *gates, *carried;  // saved by a layer
  T* output;                 // [B, T, H], after dropout
  int64_t batch, steps, hidden;
  Dropout dropout;
  int32_t number;
};

// Computes the outputs of a layer from its saved values.
template <class Cell, class T>
__global__ void recurrent_output_kernel(SavedOutput<T> job) {
  const uint64_t seed = job.dropout.active ? static_cast<uint64_t>(*job.dropout.seed) : 0;
  const int64_t count = job.batch * job.steps * job.hidden, stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; at < count; at += stride) {
    const int64_t unit = at % job.hidden, t = at / job.hidden % job.steps, row = at / job.hidden / job.steps;
    const int64_t place = t * job.batch + row;
    T value = job.carried[place * job.hidden + unit];
    if (!Cell::kCarriesOutput)
      value = job.gates[(place * 4 + 3) * job.hidden + unit] * DeviceMath::tanh(value);
    if (job.dropout.active) value *= dropout_factor<T>(job.dropout, seed, unit, t, job.number, row);
    job.output[at] = value;
  }
}

}  // namespace
}  // namespace qfast
