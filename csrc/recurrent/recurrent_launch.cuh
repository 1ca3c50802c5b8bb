// Chooses the kernel variant of a recurrent layer on CUDA and launches it. `Device` allocates memory and
// launches kernels (cuda_device.cuh). Host only.
#pragma once

#include <algorithm>
#include <vector>

#include "recurrent/recurrent_kernels_backward.cuh"
#include "recurrent/recurrent_kernels_forward.cuh"

namespace qfast {
namespace {

// The weights of up to 64 units fit into registers, 64 in each of 256 threads.
constexpr int kThreads = 256;  // threads of a block in kernels without tiles
constexpr int64_t kRegisterUnits = 64;
// Rows of a tile whose weights are in registers. Two blocks fit on a multiprocessor, and one runs while the
// other waits.
constexpr int kRegisterRows = 4;
// Rows of a tile whose weights come from memory. 16 rows need half the loads of 8 rows.
constexpr int64_t kWideRows = 16;
constexpr int64_t kWideBatch = 132 * kWideRows;  // rows that fill a large device with such tiles

inline unsigned int blocks_for(int64_t tasks, int64_t per_block) {
  return static_cast<unsigned int>(
      std::clamp<int64_t>((tasks + per_block - 1) / per_block, 1, int64_t{1} << 20));
}

template <class Cell, class T, class Device>
class RecurrentLaunches {
 public:
  RecurrentLaunches(const char* op, Device& device, int64_t hidden, int64_t batch)
      : op_(op), device_(device), hidden_(hidden), batch_(batch) {
    blocks_ = (hidden + kWarpUnits - 1) / kWarpUnits;
  }

  // Returns the number of rows that the forward pass computes at the same time.
  int64_t rows_of_wave() const {
    int64_t result = 0;
    choose<true>(inputs_depth(), [&](auto rows, auto register_inputs) {
      constexpr int kRows = decltype(rows)::value, kRegisterInputs = decltype(register_inputs)::value;
      const int64_t depth = forward_depth(kRegisterInputs);
      const Block block =
          block_of(kRows, kRegisterInputs, forward_elements(kRows, depth), packed_count(Cell::kGates, depth));
      const auto kernel = recurrent_forward_kernel<Cell, T, kRows, kRegisterInputs>;
      result = kRows * device_.resident_blocks(kernel, block.threads, block.shared_bytes);
    });
    return result;
  }

  // Computes all steps of some rows of a layer. weight_hh and the biases have torch's layout. The first call
  // for a layer packs them, so layers must begin in order.
  void forward(ForwardLayer<T> layer, const T* weight_hh, const T* bias_ih, const T* bias_hh) {
    choose<true>(inputs_depth(), [&](auto rows, auto register_inputs) {
      constexpr int kRows = decltype(rows)::value, kRegisterInputs = decltype(register_inputs)::value;
      if (static_cast<size_t>(layer.number) == packed_.size()) {
        packed_.push_back(pack(Cell::kGates, forward_depth(kRegisterInputs), weight_hh, bias_ih, bias_hh));
        device_.launch(recurrent_pack_kernel<Cell, T>, pack_blocks(Cell::kGates, packed_.back()), kThreads, 0,
                       packed_.back());
      }
      const PackedLayer<T>& packed = packed_[static_cast<size_t>(layer.number)];
      layer.bias = packed.bias;
      const auto kernel = recurrent_forward_kernel<Cell, T, kRows, kRegisterInputs>;
      launch(kernel, layer, packed, kRows,
             block_of(kRows, kRegisterInputs, forward_elements(kRows, packed.depth),
                      packed_count(Cell::kGates, packed.depth)));
    });
  }

  void backward(BackwardLayer<T> layer, const T* weight_hh) {
    const int64_t gates_depth = (Cell::kGates * hidden_ + kTurnedSlices - 1) / kTurnedSlices;
    choose<false>(gates_depth, [&](auto rows, auto register_inputs) {
      constexpr int kRows = decltype(rows)::value, kRegisterInputs = decltype(register_inputs)::value;
      constexpr int kRegisterDepth = register_depth<Cell, false>(kRegisterInputs);
      const PackedLayer<T> packed =
          pack(kTurnedUnits, kRegisterDepth > 0 ? kRegisterDepth : gates_depth, weight_hh, nullptr, nullptr);
      device_.launch(recurrent_turn_kernel<Cell, T>, pack_blocks(kTurnedUnits, packed), kThreads, 0, packed);
      const auto kernel = recurrent_backward_kernel<Cell, T, kRows, kRegisterInputs>;
      launch(kernel, layer, packed, kRows,
             block_of(kRows, kRegisterInputs, backward_elements(kRows, packed.depth),
                      packed_count(kTurnedUnits, packed.depth)));
    });
  }

  void output(const SavedOutput<T>& job) {
    device_.launch(recurrent_output_kernel<Cell, T>, blocks_for(job.batch * job.steps * job.hidden, kThreads),
                   kThreads, 0, job);
  }

 private:
  template <int kValue>
  using Constant = std::integral_constant<int, kValue>;

  struct Block {
    int threads;
    size_t shared_bytes;
    bool weights_in_shared;
  };

  int64_t inputs_depth() const { return (hidden_ + kSlices - 1) / kSlices; }
  int64_t forward_depth(int register_inputs) const {
    const int registers = register_depth<Cell, true>(register_inputs);
    return registers > 0 ? registers : inputs_depth();
  }
  int64_t packed_count(int64_t values, int64_t depth) const { return blocks_ * depth * values * kLanes; }
  unsigned int pack_blocks(int64_t values, const PackedLayer<T>& packed) const {
    return blocks_for(packed_count(values, packed.depth), kThreads);
  }
  int64_t forward_elements(int64_t rows, int64_t depth) const {
    return rows * (2 * depth * kSlices + blocks_ * kWarpUnits);
  }
  int64_t backward_elements(int64_t rows, int64_t depth) const {
    return rows * (depth * kTurnedSlices + 2 * blocks_ * kWarpUnits);
  }
  bool fits(int64_t elements) const {
    return elements * static_cast<int64_t>(sizeof(T)) <= static_cast<int64_t>(device_.shared_limit());
  }

  // Calls body(rows of a tile, depth of weights in registers). The choice depends on the sizes only, and a
  // row has the same bits in any tile.
  template <bool kForward, class Body>
  void choose(int64_t depth, const Body& body) const {
    const auto tile_fits = [&](int64_t rows) {
      return fits(kForward ? forward_elements(rows, depth) : backward_elements(rows, depth));
    };
    constexpr int kLeast = sizeof(T) == 4 ? 8 : 4;
    QFAST_CHECK(hidden_ <= kRegisterUnits || tile_fits(kLeast), op_, ": ", hidden_,
                " units do not fit into this GPU's shared memory of ", device_.shared_limit(),
                " bytes. Remedy: fewer units, or QFAST_BACKEND=torch.");
    if constexpr (sizeof(T) == 4) {
      if (hidden_ <= kRegisterUnits / 2) return body(Constant<kRegisterRows>(), Constant<8>());
      if (hidden_ <= kRegisterUnits) return body(Constant<kRegisterRows>(), Constant<16>());
      if (batch_ >= kWideBatch && tile_fits(kWideRows)) return body(Constant<kWideRows>(), Constant<0>());
    }
    body(Constant<kLeast>(), Constant<0>());
  }

  PackedLayer<T> pack(int64_t values, int64_t depth, const T* weight_hh, const T* bias_ih, const T* bias_hh) {
    return {weight_hh,
            bias_ih,
            bias_hh,
            device_.template take<T>(packed_count(values, depth)),
            bias_ih == nullptr ? nullptr : device_.template take<T>(hidden_ * 4),
            static_cast<int32_t>(hidden_),
            static_cast<int32_t>(blocks_),
            static_cast<int32_t>(depth)};
  }

  // Returns the thread block of a tile whose values without the weights are `elements` numbers.
  Block block_of(int rows, int register_inputs, int64_t elements, int64_t weights) const {
    const int64_t warps = std::min<int64_t>(blocks_, most_threads(rows, register_inputs) / kLanes);
    const bool in_shared = register_inputs == 0 && fits(elements + weights);
    if (in_shared) elements += weights;
    return {static_cast<int>(warps * kLanes), static_cast<size_t>(elements) * sizeof(T), in_shared};
  }

  template <class Layer>
  void launch(void (*kernel)(Layer), Layer layer, const PackedLayer<T>& packed, int rows,
              const Block& block) {
    layer.weights = packed.weights;
    layer.hidden = packed.hidden;
    layer.depth = packed.depth;
    layer.tiles = (layer.end_row - layer.first_row + rows - 1) / rows;
    layer.in_shared = block.weights_in_shared;
    device_.launch(kernel, blocks_for(layer.tiles, 1), block.threads, block.shared_bytes, layer);
  }

  const char* op_;
  Device& device_;
  int64_t hidden_, batch_, blocks_;
  std::vector<PackedLayer<T>> packed_;  // of the forward pass, one for each layer
};

}  // namespace
}  // namespace qfast
