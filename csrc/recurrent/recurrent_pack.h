// Host side of the recurrent kernels: checks the tensors, packs the weights and computes the sizes and
// offsets of all buffers. Host only.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "common.h"
#include "cpu_dispatch.h"
#include "cpu_workers.h"
#include "dropout_checks.h"
#include "memory_cache.h"
#include "recurrent/recurrent.h"
#include "recurrent/recurrent_checks.h"
#include "recurrent/recurrent_tiles.h"

#define QFAST_DEVICE_INLINE static inline

namespace qfast {

namespace host {
#include "recurrent/recurrent_cell.h"
}

// A multiple of this many rows fills the registers and the groups of 4 rows that share dropout words.
constexpr int64_t kRecurrentRowStep = 12;
constexpr int64_t kRecurrentMostRows = 48;
// Size limit of the gradients of the sums that a layer of a tile collects before one product with its inputs.
constexpr int64_t kChunkSumBytes = 128 << 10;
constexpr int64_t kMostChunkSteps = 4;
// Weights that are larger than this do not fit in the second-level cache next to each other. A layer then
// computes several steps, about kLayerRows rows, before another layer evicts its weights. Few rows take as
// long as reading the weights, so their limit also suits processors with 1 MB of second-level cache.
constexpr int64_t kCachedWeightBytes = 1 << 20;
constexpr int64_t kCachedWeightBytesOfFewRows = 512 << 10;
constexpr int64_t kLayerRows = 96;
constexpr int64_t kFewRows = 16;  // so few that the sums of all weights take longer than their products

// Returns the rows of a tile. They depend on the sizes only, so the sums of gradients have the same order for
// any number of threads.
inline int64_t even_tile_rows(int64_t rows) {
  const int64_t tiles = std::max<int64_t>(1, (rows + kRecurrentMostRows - 1) / kRecurrentMostRows);
  return std::max(kRecurrentRowStep, rounded_up((rows + tiles - 1) / tiles, kRecurrentRowStep));
}

// Returns the number of parts of the batch in a backward pass. Each part has its own sums of gradients. An
// even number of equal parts occupies two threads equally.
inline int64_t gradient_parts(int64_t rows) {
  const int64_t tiles = std::max<int64_t>(1, (rows + kRecurrentMostRows - 1) / kRecurrentMostRows);
  return std::min(kSumParts, tiles == 1 ? 1 : rounded_up(tiles, 2));
}

// Returns the first row of a part.
inline int64_t part_begin(int64_t rows, int64_t part, int64_t parts) {
  const int64_t units = (rows + kRecurrentRowStep - 1) / kRecurrentRowStep;
  return std::min(units * part / parts * kRecurrentRowStep, rows);
}

// Returns the rows of a tile of a part: all rows of the largest part if they fit in a tile, and otherwise
// equal tiles of the smallest part.
inline int64_t part_tile_rows(int64_t rows, int64_t parts) {
  const int64_t units = (rows + kRecurrentRowStep - 1) / kRecurrentRowStep;
  const int64_t largest = (units + parts - 1) / parts * kRecurrentRowStep;
  return even_tile_rows(largest <= kRecurrentMostRows ? largest : units / parts * kRecurrentRowStep);
}

template <class Cell, class Element>
class RecurrentNetwork {
 public:
  RecurrentNetwork(const char* op, const Tensor& x, const std::vector<Tensor>& weights,
                   const MaybeTensor& first_h, const MaybeTensor& first_c, double dropout,
                   const MaybeTensor& seed)
      : lanes_(cpu_kernels().vector_bytes / static_cast<int64_t>(sizeof(Element))) {
    check_layers(op, x, weights, Cell::kGates);
    job.batch = x.size(0);
    job.steps = x.size(1);
    job.hidden = weights[1].size(1);
    job.layer_count = static_cast<int64_t>(weights.size()) / 4;
    const int64_t H = job.hidden;
    for (const Tensor& weight : weights) weights_.push_back(as_contiguous(weight));
    job.blocks = (H + lanes_ - 1) / lanes_;
    job.stride = job.blocks * lanes_;
    job.x = {x.const_data_ptr<Element>(), x.stride(0), x.stride(1), x.stride(2)};
    job.first_h = state(op, "h0", first_h, x);
    job.first_c = state(op, "c0", first_c, x);
    job.dropout = dropout_rule(op, job.layer_count > 1 ? dropout : 0, seed);
    layers_.resize(job.layer_count);
    for (int64_t l = 0; l < job.layer_count; ++l) layers_[l].features = weights_[4 * l].size(1);
    job.layers = layers_.data();
  }

  // Returns the data of a contiguous copy [L, B, H], which this object owns, or null.
  const Element* state(const char* op, const char* name, const MaybeTensor& tensor, const Tensor& x) {
    if (!tensor) return nullptr;
    check_shaped(op, name, *tensor, x, {job.layer_count, job.batch, job.hidden});
    states_.push_back(as_contiguous(*tensor));
    return states_.back().const_data_ptr<Element>();
  }

  // `with_tiles` reserves the scratch memory of products with bfloat16 operands.
  void prepare_forward(bool rolling, bool with_tiles) {
    job.rolling = rolling;
    for (int64_t l = 0; l < job.layer_count; ++l) {
      layers_[l].input_weight = pack(weights_[4 * l], true);
      if (reads_hidden()) layers_[l].hidden_weight = pack(weights_[4 * l + 1], false);
      layers_[l].bias = pack_bias(weights_[4 * l + 2], weights_[4 * l + 3]);
    }
    job.layer_steps = with_tiles || weights_fit() ? 1 : layer_steps();
    const int64_t chunk_rows = job.layer_steps * job.tile_rows;
    scratch_elements = job.layer_count * (2 * chunk_rows + 2 * job.tile_rows) * job.stride;
    // Products of tiles also write the rows after the last one, up to whole tiles.
    if (rolling) scratch_elements += rounded_up(job.tile_rows + job.steps - 1, 16) * 4 * job.stride;
    if (job.layer_steps > 1) scratch_elements += chunk_rows * (4 * job.stride + layers_[0].features);
    job.vector_scratch = rounded_up(scratch_elements, 16);
    if (with_tiles)
      scratch_elements =
          job.vector_scratch + RecurrentTiles<Element>::carve(job, Cell::kGates, nullptr).elements;
  }

  void prepare_backward(bool input_grad, bool state_grad, bool with_tiles) {
    job.tile_rows = part_tile_rows(job.batch, gradient_parts(job.batch));
    job.hidden_width = panel_width(job.hidden);
    int64_t sum = 0;
    for (int64_t l = 0; l < job.layer_count; ++l) {
      RecurrentLayer<Element>& layer = layers_[l];
      if (reads_hidden() || state_grad)
        layer.hidden_turned = turn(weights_[4 * l + 1], false, job.hidden_width);
      layer.input_width = panel_width(layer.features);
      if (l > 0 || input_grad) layer.input_turned = turn(weights_[4 * l], true, layer.input_width);
      layer.input_sum = sum;
      sum += layer.features * Cell::kGates * job.stride;
      layer.hidden_sum = reads_hidden() ? sum : -1;
      if (reads_hidden()) sum += job.hidden * Cell::kGates * job.stride;
      layer.bias_sum = sum;
      sum += 4 * job.stride;
    }
    sum_elements = sum;
    job.sum_stride = 4 * job.stride + 64 / static_cast<int64_t>(sizeof(Element));
    const int64_t step_bytes = job.tile_rows * job.sum_stride * static_cast<int64_t>(sizeof(Element));
    job.chunk_steps = std::clamp<int64_t>(kChunkSumBytes / step_bytes, 1, kMostChunkSteps);
    if (job.batch <= kFewRows && !weights_fit()) job.chunk_steps = std::max(job.chunk_steps, layer_steps());
    job.tile_rows = std::min(job.tile_rows, rounded_up(std::max<int64_t>(job.batch, 1), 4));
    job.layer_scratch =
        job.tile_rows * ((4 + 3 * job.chunk_steps) * job.stride + job.chunk_steps * job.sum_stride);
    job.header_elements = 64;  // enough for the pointers of a layer
    scratch_elements = job.layer_count * (job.header_elements + job.layer_scratch);
    job.vector_scratch = rounded_up(scratch_elements, 16);
    if (with_tiles)
      scratch_elements = job.vector_scratch + RecurrentGradientTiles<Element>::carve(job, nullptr).elements;
  }

  // Returns the gradients of the weights of all layers from the sums of a part.
  std::vector<Tensor> weight_gradients(const Element* sums) const {
    std::vector<Tensor> grads;
    for (int64_t l = 0; l < job.layer_count; ++l) {
      const RecurrentLayer<Element>& layer = layers_[l];
      grads.push_back(unpack(weights_[4 * l], sums + layer.input_sum, true));
      grads.push_back(
          unpack(weights_[4 * l + 1], layer.hidden_sum < 0 ? nullptr : sums + layer.hidden_sum, false));
      grads.push_back(unpack_bias(weights_[4 * l + 2], sums + layer.bias_sum, true));
      grads.push_back(unpack_bias(weights_[4 * l + 3], sums + layer.bias_sum, false));
    }
    return grads;
  }

  RecurrentJob<Element> job{};
  int64_t scratch_elements = 0;  // elements of scratch of one worker
  int64_t sum_elements = 0;      // elements of the gradient sums of all weights

 private:
  // Returns whether a step has a previous h other than the zeros before the first step.
  bool reads_hidden() const { return job.steps > 1 || job.first_h != nullptr; }

  // Returns whether the packed weights of all layers fit in the second-level cache.
  bool weights_fit() const {
    int64_t rows = 0;
    for (const RecurrentLayer<Element>& layer : layers_) rows += layer.features + job.hidden;
    const int64_t most = job.batch <= kFewRows ? kCachedWeightBytesOfFewRows : kCachedWeightBytes;
    return rows * Cell::kGates * job.stride * static_cast<int64_t>(sizeof(Element)) <= most;
  }

  // Number of steps with about kLayerRows rows.
  int64_t layer_steps() const {
    const int64_t rows = std::max<int64_t>(1, std::min(job.batch, job.tile_rows));
    return std::max<int64_t>(1, std::min(kLayerRows / rows, job.steps));
  }

  // Width of equal panels of at most as many vectors as the registers hold.
  int64_t panel_width(int64_t columns) const {
    const int64_t most = (cpu_kernels().vector_bytes == 64 ? 4 : 2) * lanes_;
    const int64_t count = (columns + most - 1) / most;
    return rounded_up((columns + count - 1) / count, lanes_);
  }

  // Row of torch's weight for a unit and the gate at position `gate` of the packed gates.
  int64_t row_of(bool input, int64_t gate, int64_t unit) const {
    const int sum = static_cast<int>(gate + (input ? 0 : 4 - Cell::kGates));
    return (input ? Cell::input_block(sum) : Cell::hidden_block(sum)) * job.hidden + unit;
  }

  // Returns a new buffer of zeros, which this object owns.
  Element* new_zeros(int64_t elements) {
    Element* const to = zeros_beyond(elements);
    std::fill_n(to, elements, Element(0));
    return to;
  }

  // Returns a new buffer for packed weights, which this object owns. It contains zeros if there are lanes
  // beyond the last unit, and is not set otherwise.
  Element* zeros_beyond(int64_t elements) {
    packed_.emplace_back(weights_.front(), elements);
    if (job.stride != job.hidden) std::fill_n(packed_.back().data(), elements, Element(0));
    return packed_.back().data();
  }

  // Calls body(block, gate, lane, row) for all rows of torch's weights.
  template <class Body>
  void for_gate_rows(bool input, const Body& body) const {
    for (int64_t gate = 0; gate < Cell::kGates; ++gate)
      for (int64_t unit = 0; unit < job.hidden; ++unit)
        body(unit / lanes_, gate, unit % lanes_, row_of(input, gate, unit));
  }

  // Calls body(first unit, gate, units) for the blocks of units of each gate.
  template <class Body>
  void for_blocks(const Body& body) const {
    for (int64_t first = 0; first < job.hidden; first += lanes_)
      for (int64_t gate = 0; gate < Cell::kGates; ++gate)
        body(first, gate, std::min(lanes_, job.hidden - first));
  }

  // Packs a weight as [block][input][gate][lane].
  const Element* pack(const Tensor& weight, bool input) {
    const int64_t columns = weight.size(1), gates = Cell::kGates * lanes_;
    const Element* const from = weight.const_data_ptr<Element>();
    Element* const to = zeros_beyond(job.blocks * columns * gates);
    for_blocks([&](int64_t first, int64_t gate, int64_t units) {
      cpu_kernels<Element>().transpose(from + row_of(input, gate, first) * columns, columns, units, columns,
                                       to + first * columns * Cell::kGates + gate * lanes_, gates);
    });
    return to;
  }

  // Packs the sum of both biases as [block][4 sums][lane].
  const Element* pack_bias(const Tensor& input, const Tensor& hidden) {
    Element* const to = new_zeros(job.blocks * 4 * lanes_);
    const auto add = [&](const Element* from, bool is_input) {
      const int64_t first = is_input ? 0 : 4 - Cell::kGates;
      for_gate_rows(is_input, [&](int64_t block, int64_t gate, int64_t lane, int64_t row) {
        to[(block * 4 + first + gate) * lanes_ + lane] += from[row];
      });
    };
    add(input.const_data_ptr<Element>(), true);
    add(hidden.const_data_ptr<Element>(), false);
    return to;
  }

  // Packs a transposed weight as [panel][block][gate][lane][column].
  const Element* turn(const Tensor& weight, bool input, int64_t width) {
    const int64_t columns = weight.size(1), panels = (columns + width - 1) / width,
                  gates = Cell::kGates * lanes_;
    const Element* const from = weight.const_data_ptr<Element>();
    const int64_t elements = panels * job.blocks * gates * width;
    Element* const to = columns % width == 0 ? zeros_beyond(elements) : new_zeros(elements);
    for_gate_rows(input, [&](int64_t block, int64_t gate, int64_t lane, int64_t row) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t count = std::min(width, columns - panel * width);
        std::copy_n(from + row * columns + panel * width, count,
                    to + (((panel * job.blocks + block) * Cell::kGates + gate) * lanes_ + lane) * width);
      }
    });
    return to;
  }

  // Returns a gradient in torch's layout from sums in the layout of `pack`, or zeros if `sums` is null.
  Tensor unpack(const Tensor& like, const Element* sums, bool input) const {
    const int64_t columns = like.size(1), gates = Cell::kGates * lanes_;
    const Tensor out = empty(like, like.sizes());
    Element* const to = out.mutable_data_ptr<Element>();
    if (sums == nullptr) {
      std::fill_n(to, out.numel(), Element(0));
      return out;
    }
    for_blocks([&](int64_t first, int64_t gate, int64_t units) {
      cpu_kernels<Element>().transpose(sums + first * columns * Cell::kGates + gate * lanes_, gates, columns,
                                       units, to + row_of(input, gate, first) * columns, columns);
    });
    return out;
  }

  // Returns the gradient of a bias from sums in the layout of `pack_bias`.
  Tensor unpack_bias(const Tensor& like, const Element* sums, bool input) const {
    const Tensor out = empty(like, like.sizes());
    Element* const to = out.mutable_data_ptr<Element>();
    const int64_t first = input ? 0 : 4 - Cell::kGates;
    for_gate_rows(input, [&](int64_t block, int64_t gate, int64_t lane, int64_t row) {
      to[row] = sums[(block * 4 + first + gate) * lanes_ + lane];
    });
    return out;
  }

  int64_t lanes_;
  std::vector<Tensor> weights_, states_;
  std::vector<Buffer<Element>> packed_;
  std::vector<RecurrentLayer<Element>> layers_;
};

}  // namespace qfast
