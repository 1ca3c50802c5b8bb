// Host side of the kernel for consecutive windows, each shifted by one row. It extends temporal_conv_pack.h.
// Host only.
#pragma once

#include <set>

#include "temporal_conv/temporal_conv_pack.h"

namespace qfast {

// Largest number of windows that share rows. The rows before the first window are computed again for every
// chunk, so the number of chunks is the smallest possible. They have almost equal sizes, because threads that
// compute the same number of chunks then finish at the same time.
constexpr int64_t kChunkRows = 256;

template <class Element>
class RollingNetwork {
 public:
  explicit RollingNetwork(Network<Element>& network) : network_(network) {
    network.prepare_forward(false);
    std::vector<BlockJob<Element>>& blocks = network.blocks();
    first_.resize(blocks.size());
    second_.resize(blocks.size());
    row_blocks_ = blocks;
    int64_t reach = 0;  // number of earlier steps that a position depends on
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      const BlockPlan& plan = network.plans[i];
      separate_first_.push_back(split(plan.between, reach += (plan.kernel - 1) * plan.dilation, first_[i]));
      separate_second_.push_back(split(plan.output, reach += (plan.kernel - 1) * plan.dilation, second_[i]));
      blocks[i].first_runs = network.runs(blocks[i].first, nullptr, separate_first_[i]);
      blocks[i].second_runs = network.runs(blocks[i].second, blocks[i].residual, separate_second_[i]);
      make_row_block(row_blocks_[i]);
    }
    for (std::size_t i = 0; i < blocks.size(); ++i) set_copied(i);
    place();
  }

  int64_t chunks() const { return (network_.job.batch + job.chunk_rows - 1) / job.chunk_rows; }

  RollingJob<Element> job{};
  int64_t scratch_elements = 0;

 private:
  // Returns the slots that each window computes separately. Positions of at least `reach` are shared.
  static std::vector<int32_t> split(const Positions& positions, int64_t reach, SharedRows& shared) {
    std::vector<int32_t> separate;
    shared = {1, 0, positions.data(), {nullptr, 0}, 0};
    for (std::size_t slot = 0; slot < positions.size(); ++slot) {
      if (positions[slot] < reach) {
        separate.push_back(static_cast<int32_t>(slot));
      } else {
        if (shared.first_position > shared.last_position) shared.first_position = positions[slot];
        shared.last_position = positions[slot];
      }
    }
    return separate;
  }

  void make_row_block(BlockJob<Element>& block) {
    std::vector<Tap> taps;
    for (int32_t tap = 0; tap < block.kernel; ++tap) taps.push_back({tap, tap});
    const int32_t last = static_cast<int32_t>(block.kernel - 1);
    block.first = {network_.hold(std::vector<int32_t>{0, last + 1}), network_.hold(std::move(taps)), 1};
    block.second = block.first;
    block.first_runs = block.second_runs = network_.hold(std::vector<Run>{{0, 1}});
    block.residual = network_.hold(std::vector<int32_t>{last});
  }

  static void add_shared_reads(const TapTable& reads, const std::vector<int32_t>& separate,
                               const SharedRows& shared, std::set<int32_t>& shared_slots) {
    for (const int32_t slot : separate)
      for (int32_t t = reads.begin[slot]; t < reads.begin[slot + 1]; ++t)
        if (is_shared(shared, reads.taps[t].slot)) shared_slots.insert(reads.taps[t].slot);
  }

  static bool is_shared(const SharedRows& shared, int32_t slot) {
    return shared.first_position <= shared.last_position && shared.positions[slot] >= shared.first_position;
  }

  void set_copied(std::size_t i) {
    const std::vector<BlockJob<Element>>& blocks = network_.blocks();
    std::set<int32_t> between, output;
    add_shared_reads(blocks[i].second, separate_second_[i], first_[i], between);
    if (i + 1 < blocks.size()) {
      const BlockJob<Element>& next = blocks[i + 1];
      add_shared_reads(next.first, separate_first_[i + 1], second_[i], output);
      add_shared_reads(next.residual_reads, separate_second_[i + 1], second_[i], output);
    } else if (is_shared(second_[i], 0)) {
      output.insert(0);  // the result of the stack
    }
    first_[i].copied = slot_list(between);
    second_[i].copied = slot_list(output);
  }

  SlotList slot_list(const std::set<int32_t>& slots) {
    return {network_.hold(std::vector<int32_t>(slots.begin(), slots.end())),
            static_cast<int64_t>(slots.size())};
  }

  // Divides the scratch into the buffer for a slot of a panel, the shared rows and the activations of a tile.
  void place() {
    const std::vector<BlockJob<Element>>& blocks = network_.blocks();
    int64_t most_rows = kMostRows, widest = 0;
    const auto rows = [](const SharedRows& shared) {
      return shared.first_position > shared.last_position
                 ? 0
                 : kChunkRows + shared.last_position - shared.first_position;
    };
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      most_rows = std::max({most_rows, rows(first_[i]), rows(second_[i])});
      widest = std::max(widest, blocks[i].panels.width);
    }
    scratch_elements = rounded_up(2 * most_rows * widest, kPanelPadding);
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      for (SharedRows* shared : {&first_[i], &second_[i]}) {
        shared->rows_at = scratch_elements;
        scratch_elements += rounded_up(rows(*shared) * blocks[i].channels, kPanelPadding);
      }
    }
    job = {network_.job, row_blocks_.data(), first_.data(), second_.data(), chunk_rows(), scratch_elements};
    scratch_elements += network_.scratch_elements - network_.job.slot_elements;
  }

  // Returns the size of all chunks but the last one.
  int64_t chunk_rows() const {
    const int64_t batch = network_.job.batch, chunks = (batch + kChunkRows - 1) / kChunkRows;
    return std::min(kChunkRows, rounded_up((batch + chunks - 1) / chunks, kRowsStep));
  }

  Network<Element>& network_;
  std::vector<BlockJob<Element>> row_blocks_;
  std::vector<SharedRows> first_, second_;
  // Slots that each window computes separately.
  std::vector<std::vector<int32_t>> separate_first_, separate_second_;
};

}  // namespace qfast
