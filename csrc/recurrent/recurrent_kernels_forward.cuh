// Forward pass of a recurrent layer on CUDA: all steps of a layer. recurrent_kernels.cuh describes the
// method.
#pragma once

#include "recurrent/recurrent_kernels.cuh"

namespace qfast {
namespace {

// Computes the steps of a tile. Shared memory contains the weights if they fit, h of the current and of the
// next step, and one carried value per cell.
template <class Cell, class T, int kTileRows, int kRegisterInputs>
struct ForwardTile {
  static constexpr int kGates = Cell::kGates;
  using At = Cells<kTileRows>;

  const ForwardLayer<T>& layer;
  At at;
  T *h, *carried;
  int blocks, inputs;
  int64_t first_row;  // of the tile, in the batch

  QFAST_DEVICE_INLINE bool has(int64_t row, int unit) const {
    return row < layer.end_row && unit < layer.hidden;
  }

  // Loads the initial state.
  QFAST_DEVICE_INLINE void start() {
    fill_zeros(h, int64_t{2} * kTileRows * inputs);
    __syncthreads();
    for (int block = at.warp; block < blocks; block += at.warps) {
      const int unit = at.unit(block);
#pragma unroll
      for (int c = 0; c < At::kCells; ++c) {
        const int64_t row = first_row + at.first_row() + c, element = row * layer.hidden + unit;
        T state = T(0), first = T(0);
        if (has(row, unit)) {
          state = element_or_zero(layer.first_h, element);
          first = Cell::kCarriesOutput ? state : element_or_zero(layer.first_c, element);
          h[At::operand(at.first_row() + c, unit, inputs)] = state;
        }
        carried[at.place(block) + c] = first;
      }
    }
    __syncthreads();
  }

  // Computes step t of 8 units.
  template <class Weight>
  QFAST_DEVICE_INLINE void step(int64_t t, int block, const Weight& weight, uint64_t seed) {
    const int64_t buffer = int64_t{kTileRows} * inputs;
    const T* const current = h + (t % 2) * buffer;
    T* const next = h + (1 - t % 2) * buffer;
    const int unit = at.unit(block);
    T products[At::kCells][kGates];
#pragma unroll
    for (int c = 0; c < At::kCells; ++c) {
      const int64_t row = first_row + at.first_row() + c;
      const bool exists = has(row, unit);
      const T* const from = layer.products.at(row - layer.first_row, t) + unit;
#pragma unroll
      for (int g = 0; g < kGates; ++g)
        products[c][g] = exists ? from[static_cast<int64_t>(Cell::input_block(g)) * layer.hidden] : T(0);
    }
    T sums[kGates * kTileRows] = {};
    add_inputs<kTileRows, kGates, kSlices>(current, inputs, layer.depth, weight, sums);
    // The first exchange leaves half of the rows of every gate, the second a quarter.
    T totals_of_gates[kGates][kTileRows];
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) totals_of_gates[g][r] = sums[g * kTileRows + r];
      exchange<kTileRows / 2>(totals_of_gates[g], 2);
      exchange<kTileRows / 4>(totals_of_gates[g], 1);
    }
#pragma unroll
    for (int c = 0; c < At::kCells; ++c) {
      const int64_t row = first_row + at.first_row() + c;
      if (!has(row, unit)) continue;
      T totals[4];
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        totals[s] = layer.bias[static_cast<int64_t>(unit) * 4 + s];
        if (s < kGates) totals[s] += products[c][s < kGates ? s : 0];
        if (s >= 4 - kGates) totals[s] += totals_of_gates[s >= 4 - kGates ? s - (4 - kGates) : 0][c];
      }
      const T value = finish(t, block, c, row, unit, totals, seed);
      next[At::operand(at.first_row() + c, unit, inputs)] = value;
    }
  }

  // Computes a cell from its sums, stores the results and returns h.
  QFAST_DEVICE_INLINE T finish(int64_t t, int block, int c, int64_t row, int unit, const T (&totals)[4],
                               uint64_t seed) {
    T gates[4], value, new_carried = carried[at.place(block) + c];
    Cell().template forward<DeviceMath>(totals, gates, &new_carried, &value);
    carried[at.place(block) + c] = new_carried;
    if (layer.gates != nullptr) {
      const int64_t place = t * layer.batch + row, hidden = layer.hidden;
#pragma unroll
      for (int g = 0; g < 4; ++g) layer.gates[(place * 4 + g) * hidden + unit] = gates[g];
      layer.carried[place * hidden + unit] = new_carried;
    }
    if (layer.output.data != nullptr) {
      const bool drops = layer.dropout.active;
      const T scale = drops ? dropout_factor<T>(layer.dropout, seed, unit, t, layer.number, row) : T(1);
      layer.output.at(row - layer.output_row, t)[unit] = drops ? value * scale : value;
    }
    return value;
  }

  // Stores the last state.
  QFAST_DEVICE_INLINE void end() {
    const T* const last = h + (layer.steps % 2) * kTileRows * inputs;
    for (int block = at.warp; block < blocks; block += at.warps) {
      const int unit = at.unit(block);
#pragma unroll
      for (int c = 0; c < At::kCells; ++c) {
        const int64_t row = first_row + at.first_row() + c, element = row * layer.hidden + unit;
        if (!has(row, unit)) continue;
        const T value = last[At::operand(at.first_row() + c, unit, inputs)];
        layer.last_h[element] = value;
        if (!Cell::kCarriesOutput) layer.last_c[element] = carried[at.place(block) + c];
        if (layer.last_output != nullptr) layer.last_output[element] = value;
      }
    }
    __syncthreads();
  }
};

template <class Cell, class T, int kTileRows, int kRegisterInputs>
__global__ void __launch_bounds__(most_threads(kTileRows, kRegisterInputs),
                                  least_blocks(kTileRows, kRegisterInputs))
    recurrent_forward_kernel(ForwardLayer<T> layer) {
  extern __shared__ double shared_memory[];
  constexpr int kGates = Cell::kGates, kDepth = register_depth<Cell, true>(kRegisterInputs);
  const int blocks = (layer.hidden + kWarpUnits - 1) / kWarpUnits, inputs = layer.depth * kSlices;
  T* shared_free = reinterpret_cast<T*>(shared_memory);
  const T* weights = layer.weights;
  const int64_t block_weights = int64_t{layer.depth} * kGates * kLanes;
  if (layer.in_shared) {
    copy_weights(shared_free, weights, blocks * block_weights);
    weights = shared_free;
    shared_free += blocks * block_weights;
  }
  ForwardTile<Cell, T, kTileRows, kRegisterInputs> tile{layer, {}, shared_free, nullptr, blocks, inputs, 0};
  tile.carried = shared_free + int64_t{2} * kTileRows * inputs;
  const uint64_t seed = layer.dropout.active ? static_cast<uint64_t>(*layer.dropout.seed) : 0;
  WeightsInRegisters<T, kGates, (kDepth > 0 ? kDepth : 1)> register_weights;
  if constexpr (kDepth > 0) register_weights.load(weights + tile.at.warp * block_weights + tile.at.lane);
  for (int64_t number = blockIdx.x; number < layer.tiles; number += gridDim.x) {
    tile.first_row = layer.first_row + number * kTileRows;
    tile.start();
    for (int64_t t = 0; t < layer.steps; ++t) {
      if constexpr (kDepth > 0) {
        tile.step(t, tile.at.warp, register_weights, seed);
      } else {
        for (int block = tile.at.warp; block < blocks; block += tile.at.warps)
          tile.step(t, block, WeightsInMemory<T, kGates>{weights + block * block_weights + tile.at.lane},
                    seed);
      }
      __syncthreads();
    }
    tile.end();
  }
}

// Packs W_hh for the forward pass as [8 units][input of a slice][gate][lane], and the sum of both biases.
template <class Cell, class T>
__global__ void recurrent_pack_kernel(PackedLayer<T> job) {
  constexpr int kGates = Cell::kGates;
  const int64_t hidden = job.hidden, count = int64_t{job.blocks} * job.depth * kGates * kLanes;
  const int64_t first = blockIdx.x * int64_t{blockDim.x} + threadIdx.x,
                stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = first; at < count; at += stride) {
    const int lane = static_cast<int>(at % kLanes), gate = static_cast<int>(at / kLanes % kGates);
    const int64_t i = at / kLanes / kGates % job.depth, block = at / kLanes / kGates / job.depth;
    const int64_t unit = block * kWarpUnits + lane / kSlices, input = i * kSlices + lane % kSlices;
    const int64_t row = Cell::hidden_block(gate + 4 - kGates) * hidden + unit;
    job.weights[at] = unit < hidden && input < hidden ? job.weight_hh[row * hidden + input] : T(0);
  }
  for (int64_t at = first; at < hidden * 4; at += stride) {
    const int sum = static_cast<int>(at % 4);
    const int64_t unit = at / 4;
    T value = T(0);
    if (sum < kGates) value += job.bias_ih[Cell::input_block(sum) * hidden + unit];
    if (sum >= 4 - kGates) value += job.bias_hh[Cell::hidden_block(sum) * hidden + unit];
    job.bias[at] = value;
  }
}

}  // namespace
}  // namespace qfast
