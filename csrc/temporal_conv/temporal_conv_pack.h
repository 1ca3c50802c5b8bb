// Host side of the temporal convolution kernels: checks the weights, plans the cone, packs the weights into
// panels and computes the offsets of all buffers. Host only.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <vector>

#include "common.h"
#include "cpu_dispatch.h"
#include "cpu_units.h"
#include "dropout_checks.h"
#include "temporal_conv/temporal_conv.h"
#include "temporal_conv/temporal_conv_pack_tiles.h"

namespace qfast {

constexpr int64_t kRowGroup = 4;   // rows that share a dropout counter
constexpr int64_t kRowsStep = 12;  // a multiple of this many rows fills the registers
constexpr int64_t kMostRows = 48;
// Size limit of the activations of a block of a tile, for a cache of 1 MB.
constexpr int64_t kTileBytes = 384 << 10;
constexpr int64_t kFewestWindows = 8;  // with fewer consecutive windows sharing does not pay
constexpr int64_t kFewestTiles = 8;    // if there are enough rows, so several threads have work
constexpr int64_t kPackGrain = 8192;   // fewest elements of weights that a thread packs

// The tensors and sizes of one block.
struct BlockTensors {
  Tensor first_weight, first_bias, second_weight, second_bias;
  std::optional<Tensor> residual_weight, residual_bias;
  int64_t features, channels, kernel;
  std::optional<Tensor> first_gain, second_gain;  // if the weights are normalized; CUDA only
};

inline void check_weight(const char* op, const char* name, int64_t block, const Tensor& tensor,
                         const Tensor& x, std::initializer_list<int64_t> shape) {
  check_same_device(op, name, tensor, x, "x");
  bool same = tensor.scalar_type() == x.scalar_type() && tensor.dim() == static_cast<int64_t>(shape.size());
  std::ostringstream expected_shape;
  int64_t axis = 0;
  for (const int64_t size : shape) {
    expected_shape << (axis ? ", " : "") << size;
    same = same && tensor.size(axis++) == size;
  }
  QFAST_CHECK(same, op, ": ", name, " of block ", block, ": expected shape (", expected_shape.str(),
              ") and the dtype of x, got ", shape_text(tensor), " of ",
              torch::headeronly::toString(tensor.scalar_type()), ".");
}

// Splits the list of weights into blocks of 4 tensors, or 6 if the width changes, and checks them. Two gains
// per block, with which the convolutions' weights are normalized, may follow the last block.
inline std::vector<BlockTensors> cut_blocks(const char* op, const Tensor& x,
                                            const std::vector<Tensor>& weights,
                                            const std::vector<int64_t>& dilations) {
  check_floating(op, "x", x);
  check_dims(op, "x", x, 3, "[B, T, F]");
  QFAST_CHECK(x.size(1) > 0 && x.size(2) > 0, op, ": x: expected at least one step and one feature, got ",
              shape_text(x), ".");
  std::vector<BlockTensors> blocks;
  int64_t features = x.size(2);
  std::size_t at = 0;
  const auto next = [&] {
    QFAST_CHECK(at < weights.size(), op, ": weights: expected 4 or 6 tensors for each block, got ",
                weights.size(), ".");
    return as_contiguous(weights[at++]);
  };
  const auto only_gains_left = [&] {
    return blocks.size() == dilations.size() && weights.size() - at == 2 * blocks.size();
  };
  while (at < weights.size() && !only_gains_left()) {
    const int64_t number = static_cast<int64_t>(blocks.size());
    BlockTensors block{next(), next(), next(), next(), {}, {}, features, 0, 0, {}, {}};
    check_dims(op, "weight", block.first_weight, 3, "[C, F, k]");
    const int64_t channels = block.channels = block.first_weight.size(0);
    const int64_t kernel = block.kernel = block.first_weight.size(2);
    QFAST_CHECK(channels > 0 && kernel > 0, op, ": weight: expected at least one channel and one tap, got ",
                shape_text(block.first_weight), ".");
    check_weight(op, "first weight", number, block.first_weight, x, {channels, features, kernel});
    check_weight(op, "first bias", number, block.first_bias, x, {channels});
    check_weight(op, "second weight", number, block.second_weight, x, {channels, channels, kernel});
    check_weight(op, "second bias", number, block.second_bias, x, {channels});
    if (features != channels) {
      block.residual_weight = next();
      block.residual_bias = next();
      check_weight(op, "1x1 weight", number, *block.residual_weight, x, {channels, features, 1});
      check_weight(op, "1x1 bias", number, *block.residual_bias, x, {channels});
    }
    features = channels;
    blocks.push_back(std::move(block));
  }
  QFAST_CHECK(!blocks.empty() && blocks.size() == dilations.size(), op,
              ": dilations: expected one for each of ", blocks.size(), " blocks, got ", dilations.size(),
              ".");
  for (std::size_t i = 0; i < blocks.size() && at < weights.size(); ++i) {
    const int64_t number = static_cast<int64_t>(i);
    blocks[i].first_gain = next();
    check_weight(op, "first gain", number, *blocks[i].first_gain, x, {blocks[i].channels, 1, 1});
    blocks[i].second_gain = next();
    check_weight(op, "second gain", number, *blocks[i].second_gain, x, {blocks[i].channels, 1, 1});
  }
  for (const int64_t dilation : dilations)
    QFAST_CHECK(dilation > 0 && dilation <= INT32_MAX, op, ": dilations: expected 1 to 2^31 - 1, got ",
                dilation, ".");
  QFAST_CHECK(x.size(1) <= INT32_MAX, op, ": x: expected fewer than 2^31 steps, got ", shape_text(x), ".");
  return blocks;
}

// A call without its buffers: sizes, tables, packed weights and offsets.
template <class Element>
class Network {
 public:
  Network(const char* op, const Tensor& x, const std::vector<Tensor>& weights,
          const std::vector<int64_t>& dilations, double dropout, const std::optional<Tensor>& seed,
          bool all_steps, bool keep, bool bf16)
      : tensors(cut_blocks(op, x, weights, dilations)) {
    QFAST_CHECK(!tensors[0].first_gain, op,
                ": weights: expected normalized weights without gains on the CPU, got ", weights.size(),
                " tensors.");
    std::vector<int64_t> kernels;
    for (const BlockTensors& block : tensors) kernels.push_back(block.kernel);
    plans = plan_blocks(x.size(1), kernels, dilations, all_steps);
    job.batch = x.size(0);
    job.x = {x.const_data_ptr<Element>(), x.stride(1), x.stride(0), x.stride(2)};
    job.dropout = dropout_rule(op, dropout, seed);
    shares_rows = !keep && !all_steps && !job.dropout.active && are_consecutive(x);
    with_tiles_ = bf16 && !shares_rows;
    for (std::size_t i = 0; i < tensors.size(); ++i) add_block(i);
    job.tile_rows = tile_rows();
    for (BlockJob<Element>& block : blocks_) {
      block.first_runs = runs(block.first, nullptr, every_slot(block.first.slots));
      block.second_runs = runs(block.second, block.residual, every_slot(block.second.slots));
      block.first_read_by_runs = runs(block.first_read_by, block.residual_of, every_slot(block.input_slots));
      block.second_read_by_runs = runs(block.second_read_by, nullptr, every_slot(block.first.slots));
    }
    job.blocks_count = static_cast<int64_t>(blocks_.size());
    job.blocks = blocks_.data();
  }
  Network(const Network&) = delete;

  // Packs the weights for the forward pass. Without `keep` the activations of all blocks of a tile share
  // buffers.
  void prepare_forward(bool keep) {
    int64_t between = 0, widest_panel = 0;
    if (!keep)
      for (const BlockJob<Element>& block : blocks_)
        between = std::max(between, block.first.slots * block.channels);
    int64_t output = 0;
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      BlockJob<Element>& block = blocks_[i];
      const BlockTensors& tensors_of_block = tensors[i];
      block.first_weight = packed(tensors_of_block.first_weight, block.panels);
      block.second_weight = packed(tensors_of_block.second_weight, block.panels);
      block.first_bias = padded(tensors_of_block.first_bias, block.panels);
      block.second_bias = padded(tensors_of_block.second_bias, block.panels);
      if (block.downsample) {
        block.residual_weight = packed(*tensors_of_block.residual_weight, block.panels);
        block.residual_bias = padded(*tensors_of_block.residual_bias, block.panels);
      }
      widest_panel = std::max(widest_panel, block.panels.width);
      if (!keep && i + 1 < blocks_.size()) output = std::max(output, block.second.slots * block.channels);
    }
    if (!keep) {
      for (std::size_t i = 0; i < blocks_.size(); ++i) {
        blocks_[i].between_at = 0;
        blocks_[i].output_at = between + (i % 2 ? output : 0);
      }
    }
    job.slot_elements = rounded_up(2 * std::max(job.tile_rows, kMostRows) * widest_panel, kPanelPadding);
    scratch_elements = job.slot_elements + (keep ? 0 : (between + 2 * output) * job.tile_rows);
    if (with_tiles_) place_forward_tiles(job, blocks_, scratch_elements);
    pack();
  }

  void prepare_backward(bool input_grad) {
    job.widest_elements = 0;
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      BlockJob<Element>& block = blocks_[i];
      const BlockTensors& tensors_of_block = tensors[i];
      block.second_turned = turned(tensors_of_block.second_weight, block.panels);
      if (i > 0 || input_grad) {
        block.first_turned = turned(tensors_of_block.first_weight, block.input_panels);
        if (block.downsample)
          block.residual_turned = turned(*tensors_of_block.residual_weight, block.input_panels);
      }
      const int64_t inputs = i > 0 ? block.input_slots * block.features : 0;
      job.widest_elements = std::max({job.widest_elements, inputs, block.first.slots * block.channels,
                                      block.second.slots * block.channels});
    }
    scratch_elements = (with_tiles_ ? 2 : 4) * (job.widest_elements * job.tile_rows + kPanelPadding);
    if (with_tiles_) place_backward_tiles(job, blocks_, scratch_elements);
    pack();
  }

  int64_t tiles() const { return job.batch == 0 ? 0 : (job.batch + job.tile_rows - 1) / job.tile_rows; }

  // Stores a table, which this object owns, and returns its data.
  const int32_t* hold(std::vector<int32_t> numbers) {
    numbers_.push_back(std::move(numbers));
    return numbers_.back().data();
  }
  const Tap* hold(std::vector<Tap> taps) {
    taps_.push_back(std::move(taps));
    return taps_.back().data();
  }
  RunList hold(std::vector<Run> runs) {
    runs_.push_back(std::move(runs));
    return {runs_.back().data(), static_cast<int64_t>(runs_.back().size())};
  }

  // Divides ascending slots into runs of at most the rows of a full tile. `residual`, if not null, has a
  // second slot that each slot reads, or -1.
  RunList runs(const TapTable& table, const int32_t* residual, const std::vector<int32_t>& slots) {
    const int64_t longest = std::max<int64_t>(1, kMostRows / job.tile_rows);
    std::vector<Run> runs_of_slots;
    for (const int32_t slot : slots) {
      if (!runs_of_slots.empty() && runs_of_slots.back().length < longest &&
          runs_of_slots.back().slot + runs_of_slots.back().length == slot && follows(table, residual, slot)) {
        ++runs_of_slots.back().length;
      } else {
        runs_of_slots.push_back({slot, 1});
      }
    }
    return hold(std::move(runs_of_slots));
  }

  std::vector<BlockJob<Element>>& blocks() { return blocks_; }

  std::vector<BlockTensors> tensors;
  std::vector<BlockPlan> plans;
  NetworkJob<Element> job{};
  // Whether the windows are consecutive and no gradient is requested. The kernel for such windows computes in
  // float32 (temporal_conv_pack_rolling.h).
  bool shares_rows = false;
  int64_t scratch_elements = 0;  // elements of scratch of one worker
  int64_t sum_elements = 0;      // elements of the gradient sums of all weights

 private:
  // Returns whether the windows of x are consecutive, and numerous and long enough to share values.
  bool are_consecutive(const Tensor& x) const {
    const BlockPlan& first = plans.front();
    return x.stride(0) == x.stride(1) && x.stride(0) != 0 && x.size(0) >= kFewestWindows &&
           x.size(1) > (first.kernel - 1) * first.dilation;
  }

  static Panels panels_of(int64_t columns) {
    const int64_t bytes = cpu_kernels().vector_bytes, lanes = bytes / static_cast<int64_t>(sizeof(Element));
    const int64_t most = bytes == 64 ? 4 : 2;
    const int64_t count = (columns + most * lanes - 1) / (most * lanes);
    return {columns, rounded_up((columns + count - 1) / count, lanes), count};
  }

  // Returns whether `slot` reads the next slots after those of the previous slot, with the same taps.
  static bool follows(const TapTable& table, const int32_t* residual, int32_t slot) {
    const int32_t before = table.begin[slot - 1], begin = table.begin[slot],
                  count = table.begin[slot + 1] - begin;
    if (begin - before != count) return false;
    for (int32_t t = 0; t < count; ++t) {
      const Tap &now = table.taps[begin + t], &earlier = table.taps[before + t];
      if (now.tap != earlier.tap || now.slot != earlier.slot + 1) return false;
    }
    if (residual == nullptr) return true;
    return residual[slot] < 0 ? residual[slot - 1] < 0
                              : residual[slot] == residual[slot - 1] + 1 && residual[slot - 1] >= 0;
  }

  static std::vector<int32_t> every_slot(int64_t count) {
    std::vector<int32_t> slots(count);
    std::iota(slots.begin(), slots.end(), 0);
    return slots;
  }

  static TapTable table(const TapLists& lists) {
    return {lists.begin.data(), lists.taps.data(), lists.slots()};
  }

  void add_block(std::size_t i) {
    const BlockPlan& plan = plans[i];
    const BlockTensors& tensors_of_block = tensors[i];
    BlockJob<Element> block{};
    block.features = tensors_of_block.features;
    block.channels = tensors_of_block.channels;
    block.kernel = tensors_of_block.kernel;
    block.dilation = plan.dilation;
    block.downsample = tensors_of_block.residual_weight.has_value();
    block.between_positions = plan.between.data();
    block.output_positions = plan.output.data();
    block.first = table(plan.first.reads);
    block.second = table(plan.second.reads);
    block.first_read_by = table(plan.first.read_by);
    block.second_read_by = table(plan.second.read_by);
    std::vector<int32_t> residual_begin{0};
    std::vector<Tap> residual_taps;
    for (const int32_t slot : plan.residual) {
      residual_taps.push_back({0, slot});
      residual_begin.push_back(static_cast<int32_t>(residual_taps.size()));
    }
    block.residual_reads = {hold(std::move(residual_begin)), hold(std::move(residual_taps)),
                            block.second.slots};
    block.residual = plan.residual.data();
    block.residual_of = plan.residual_of.data();
    block.input_slots = static_cast<int64_t>(plan.input.size());
    block.panels = panels_of(tensors_of_block.channels);
    block.input_panels = panels_of(tensors_of_block.features);
    block.between_at = job.row_elements;
    job.row_elements += block.first.slots * tensors_of_block.channels;
    block.output_at = job.row_elements;
    if (i + 1 < tensors.size()) job.row_elements += block.second.slots * tensors_of_block.channels;
    block.signs_at = job.row_signs;
    job.row_signs += block.second.slots * ((tensors_of_block.channels + 7) / 8);
    const auto sum = [&](int64_t elements) {
      const int64_t place = sum_elements;
      sum_elements += elements;
      return place;
    };
    block.sum_features = with_tiles_ ? rounded_up(block.features, kTileSide) : block.features;
    block.sum_channels = with_tiles_ ? rounded_up(block.channels, kTileSide) : block.channels;
    block.first_sum = sum(block.kernel * block.sum_features * block.sum_channels);
    block.second_sum = sum(block.kernel * block.sum_channels * block.sum_channels);
    block.residual_sum = sum(block.downsample ? block.sum_features * block.sum_channels : 0);
    block.first_bias_sum = sum(block.sum_channels);
    block.second_bias_sum = sum(block.sum_channels);
    block.residual_bias_sum = sum(block.downsample ? block.sum_channels : 0);
    blocks_.push_back(block);
  }

  // Returns the rows of a tile. They depend on the shapes only, because they determine the order of the
  // gradient sums.
  int64_t tile_rows() const {
    if (with_tiles_) return kTileDepth;
    int64_t widest = 1;
    for (const BlockJob<Element>& block : blocks_)
      widest = std::max(widest, (block.first.slots + block.second.slots) * block.channels);
    const int64_t fitting =
        kTileBytes / static_cast<int64_t>(sizeof(Element)) / widest / kRowsStep * kRowsStep;
    const int64_t shared = rounded_up((job.batch + kFewestTiles - 1) / kFewestTiles, kRowsStep);
    return std::min({std::clamp(fitting, kRowsStep, kMostRows), std::max(shared, kRowsStep),
                     std::max(rounded_up(job.batch, kRowGroup), kRowGroup)});
  }

  Element* space(int64_t elements) {
    const int64_t shape[] = {elements};
    buffers_.push_back(new_tensor(tensors[0].first_weight, {shape, 1}));
    return buffers_.back().template mutable_data_ptr<Element>();
  }

  // Packs a weight [columns, rows, taps] as [panel][tap][row][width].
  const Element* packed(const Tensor& weight, const Panels& panels) {
    return laid_out(weight, panels, weight.size(1), weight.size(1) * weight.size(2), weight.size(2));
  }

  // Packs the transposed weight [rows, columns, taps] as [panel][tap][row][width].
  const Element* turned(const Tensor& weight, const Panels& panels) {
    return laid_out(weight, panels, weight.size(0), weight.size(2), weight.size(1) * weight.size(2));
  }

  // Allocates a packed weight. pack() sets its elements.
  const Element* laid_out(const Tensor& weight, const Panels& panels, int64_t rows, int64_t column_stride,
                          int64_t row_stride) {
    const int64_t taps = weight.size(2);
    Element* const out = space(panels.count * taps * rows * panels.width);
    layouts_.push_back(
        {weight.const_data_ptr<Element>(), out, panels, rows, taps, column_stride, row_stride});
    return out;
  }

  // Packs the weights that laid_out() has allocated since the last call, on all threads.
  void pack() {
    std::vector<int64_t> first_row{0};
    int64_t longest = 1;
    for (const Layout& layout : layouts_) {
      first_row.push_back(first_row.back() + layout.panels.count * layout.rows);
      longest = std::max(longest, layout.taps * layout.panels.width);
    }
    share_units(first_row, std::max<int64_t>(1, kPackGrain / longest),
                [&](std::size_t item, int64_t begin, int64_t end) {
                  for (int64_t row = begin; row < end; ++row) layouts_[item].pack_row(row);
                });
    layouts_.clear();
  }

  const Element* padded(const Tensor& bias, const Panels& panels) {
    Element* const out = space(panels.count * panels.width);
    const Element* const from = bias.const_data_ptr<Element>();
    std::copy(from, from + panels.columns, out);
    std::fill(out + panels.columns, out + panels.count * panels.width, Element(0));
    return out;
  }

  // A weight to be packed.
  struct Layout {
    const Element* from;
    Element* to;
    Panels panels;
    int64_t rows, taps, column_stride, row_stride;

    // Packs one row of a panel, with all taps. `number` counts the rows of all panels.
    void pack_row(int64_t number) const {
      const int64_t panel = number / rows, row = number % rows, width = panels.width;
      const int64_t columns = std::min(width, panels.columns - panel * width);
      const Element* const source = from + panel * width * column_stride + row * row_stride;
      for (int64_t tap = 0; tap < taps; ++tap) {
        Element* const out = to + ((panel * taps + tap) * rows + row) * width;
        for (int64_t j = 0; j < columns; ++j) out[j] = source[j * column_stride + tap];
        std::fill(out + columns, out + width, Element(0));
      }
    }
  };

  bool with_tiles_ = false;  // products of bfloat16
  std::vector<Layout> layouts_;
  std::vector<BlockJob<Element>> blocks_;
  std::vector<std::vector<int32_t>> numbers_;
  std::vector<std::vector<Tap>> taps_;
  std::vector<std::vector<Run>> runs_;
  std::vector<Tensor> buffers_;
};

}  // namespace qfast
