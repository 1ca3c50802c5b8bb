// The cone of a stack of causal convolutions: the positions and taps that the requested steps depend on
// (docs/tcn.md). qfast/ops/temporal_conv_plan.py computes the same cone. Here it has the form of tables for
// the kernels. Host only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

namespace qfast {

// Tap `tap` of a convolution (0 is the oldest, kernel - 1 the current step), which reads slot `slot`.
struct Tap {
  int32_t tap, slot;
};

// The taps of slot i are taps[begin[i]] to taps[begin[i + 1] - 1].
struct TapLists {
  std::vector<int32_t> begin{0};
  std::vector<Tap> taps;

  int64_t slots() const { return static_cast<int64_t>(begin.size()) - 1; }
  void end_slot() { begin.push_back(static_cast<int32_t>(taps.size())); }
};

using Positions = std::vector<int32_t>;  // ascending time steps; a slot is an index into this vector

struct ConvolutionPlan {
  TapLists reads;    // the input slots that each output slot reads, oldest tap first
  TapLists read_by;  // the output slots that read each input slot, oldest tap first
};

// One residual block. The first convolution maps input to between, the second between to output.
struct BlockPlan {
  int64_t kernel, dilation;
  Positions input, between, output;
  ConvolutionPlan first, second;
  std::vector<int32_t> residual;     // input slot with the position of each output slot
  std::vector<int32_t> residual_of;  // output slot with the position of each input slot, or -1
};

// Returns the slot of each time step, -1 for steps without one.
inline std::vector<int32_t> slots_by_step(const Positions& positions, int64_t steps) {
  std::vector<int32_t> slots(steps, -1);
  int32_t slot = 0;
  for (const int32_t position : positions) slots[position] = slot++;
  return slots;
}

// Returns the time steps that a convolution reads.
inline Positions positions_read(const Positions& outputs, int64_t steps, int64_t kernel, int64_t dilation) {
  std::vector<char> read(steps, 0);
  for (const int64_t position : outputs)
    for (int64_t j = 0; j < kernel && position - j * dilation >= 0; ++j) read[position - j * dilation] = 1;
  Positions positions;
  for (int64_t step = 0; step < steps; ++step)
    if (read[step]) positions.push_back(static_cast<int32_t>(step));
  return positions;
}

// Returns the reads of a convolution, by output slot and by input slot.
inline ConvolutionPlan plan_convolution(const Positions& inputs, const Positions& outputs, int64_t steps,
                                        int64_t kernel, int64_t dilation) {
  const std::vector<int32_t> input_slot = slots_by_step(inputs, steps),
                             output_slot = slots_by_step(outputs, steps);
  // Taps that look back further than the window are never inside it.
  const int64_t oldest = std::max<int64_t>(0, kernel - 1 - (steps - 1) / dilation);
  ConvolutionPlan plan;
  for (const int64_t position : outputs) {
    for (int64_t tap = oldest; tap < kernel; ++tap) {
      const int64_t source = position - (kernel - 1 - tap) * dilation;
      if (source >= 0) plan.reads.taps.push_back({static_cast<int32_t>(tap), input_slot[source]});
    }
    plan.reads.end_slot();
  }
  for (const int64_t position : inputs) {
    for (int64_t tap = oldest; tap < kernel; ++tap) {
      const int64_t reader = position + (kernel - 1 - tap) * dilation;
      if (reader < steps && output_slot[reader] >= 0)
        plan.read_by.taps.push_back({static_cast<int32_t>(tap), output_slot[reader]});
    }
    plan.read_by.end_slot();
  }
  return plan;
}

// Returns the plans of all blocks for a window of `steps` and the output of its last step or of all steps.
// The input slots of the first block are all time steps, including those that nothing reads. The output slots
// of the last block are all time steps if all steps are requested.
inline std::vector<BlockPlan> plan_blocks(int64_t steps, const std::vector<int64_t>& kernels,
                                          const std::vector<int64_t>& dilations, bool all_steps) {
  Positions all_positions, requested;
  for (int64_t t = 0; t < steps; ++t) all_positions.push_back(static_cast<int32_t>(t));
  if (all_steps) {
    requested = all_positions;
  } else {
    requested.push_back(static_cast<int32_t>(steps - 1));
  }
  std::vector<BlockPlan> blocks(kernels.size());
  for (std::size_t i = blocks.size(); i-- > 0;) {
    BlockPlan& block = blocks[i];
    block.kernel = kernels[i];
    block.dilation = dilations[i];
    block.output = requested;
    block.between = positions_read(requested, steps, block.kernel, block.dilation);
    const Positions read = positions_read(block.between, steps, block.kernel, block.dilation);
    requested.clear();
    std::set_union(read.begin(), read.end(), block.output.begin(), block.output.end(),
                   std::back_inserter(requested));
    block.input = i == 0 ? all_positions : requested;
    block.first = plan_convolution(block.input, block.between, steps, block.kernel, block.dilation);
    block.second = plan_convolution(block.between, block.output, steps, block.kernel, block.dilation);
    const std::vector<int32_t> input_slot = slots_by_step(block.input, steps);
    const std::vector<int32_t> output_slot = slots_by_step(block.output, steps);
    for (const int32_t position : block.output) block.residual.push_back(input_slot[position]);
    for (const int32_t position : block.input) block.residual_of.push_back(output_slot[position]);
  }
  return blocks;
}

}  // namespace qfast
