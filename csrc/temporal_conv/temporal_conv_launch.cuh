// Memory layout and sequence of launches of temporal convolution stacks on CUDA. `Device` allocates memory
// and launches kernels (temporal_conv.cu). temporal_conv_kernels.cuh and temporal_conv_kernels_weights.cuh
// contain the kernels. Host only.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "temporal_conv/temporal_conv_kernels_weights.cuh"
#include "temporal_conv/temporal_conv_plan.h"

namespace qfast {
namespace {

constexpr int64_t kTileRows = 64;  // rows of a tile if every stage is a launch
// Largest size of the weights of a convolution that stay in L1 next to a stack in shared memory, where every
// thread block reads all of them for each slot. Larger weights are read from L2, where one launch per stage
// reads them 4 times less often.
constexpr int64_t kCachedBytes = 64 << 10;
// Smallest number of (slot, row) pairs of a thread; fewer would not pay for writing its sums.
constexpr int64_t kFillingTiles = 128;         // about one for each multiprocessor, if there are enough rows
constexpr int64_t kGradientThreads = 1 << 16;  // enough to fill any device; 16 MB of sums in float32
constexpr int64_t kLeastSteps = 64;

constexpr int64_t up_to(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
// Returns the size of the grid. It is limited, because kernels loop over their tasks.
inline unsigned int blocks_for(int64_t tasks, int64_t per_block) {
  return static_cast<unsigned int>(
      std::clamp<int64_t>((tasks + per_block - 1) / per_block, 1, int64_t{1} << 20));
}
constexpr int64_t parts_of(int64_t value, int64_t each) { return (value + each - 1) / each; }

// ---------------------------------------------------------------- the network
template <class T>
struct BlockData {
  Convolution<T> first, second, residual;  // the residual connection has a weight if the width changes
  int64_t features, channels, kernel;
};

template <class T>
struct NetworkData {
  std::vector<BlockData<T>> blocks;
  std::vector<BlockPlan> plans;
  int64_t batch, steps;
  Place<T> x, output;    // slots of x are time steps
  T* activations;        // saved: [between of block 0][its output][between of block 1]..., each
                         // [slot][row][channel]
  unsigned char* signs;  // saved: [slot][row][(channels + 7) / 8] of each block
  Dropout dropout;
  Place<T> grad, grad_x;  // backward only; grad_x has no data if it is not requested

  const BlockPlan& plan(int64_t i) const { return plans[static_cast<std::size_t>(i)]; }
  const BlockData<T>& block(int64_t i) const { return blocks[static_cast<std::size_t>(i)]; }
  int64_t count() const { return static_cast<int64_t>(blocks.size()); }
};

inline int64_t size_of(const Positions& positions) { return static_cast<int64_t>(positions.size()); }

// Returns the elements and bytes per row that are saved for backward.
template <class T>
std::pair<int64_t, int64_t> saved_sizes(const NetworkData<T>& network) {
  int64_t elements = 0, signs = 0;
  for (int64_t i = 0; i < network.count(); ++i) {
    const int64_t channels = network.block(i).channels, outputs = size_of(network.plan(i).output);
    elements += size_of(network.plan(i).between) * channels;
    if (i + 1 < network.count()) elements += outputs * channels;
    signs += outputs * parts_of(channels, kColumns);
  }
  return {elements, signs};
}

template <class T>
Place<T> in_memory(T* data, int64_t slot_stride, int64_t row_stride, int64_t channel_stride = 1) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % alignof(Quad<T>) == 0;
  return {data,       slot_stride,
          row_stride, channel_stride,
          -1,         channel_stride == 1 && aligned && slot_stride % 4 == 0 && row_stride % 4 == 0};
}

// Row stride of an odd number of 16 byte units, so groups of rows have few bank conflicts.
constexpr int64_t shared_pitch(int64_t channels) { return up_to(channels, 4) | 4; }

template <class T>
Place<T> in_shared(int64_t at, int64_t rows, int64_t channels) {
  const int64_t pitch = shared_pitch(channels);
  return {nullptr, rows * pitch, pitch, 1, at, true};
}

// ---------------------------------------------------------------- tables on the device
// All tables of the kernels, in one buffer that a few launches write.
template <class Device>
class Tables {
 public:
  Tables(Device& device, int64_t bytes) : device_(device), words_(static_cast<std::size_t>(bytes / 4 + 4)) {
    to_ = device.template take<uint32_t>(bytes / 4 + 4);
  }

  template <class Item>
  static int64_t bytes(int64_t items) {
    return up_to(items * static_cast<int64_t>(sizeof(Item)), 16);
  }

  template <class Item>
  const Item* add(const std::vector<Item>& items) {
    static_assert(std::is_trivially_copyable_v<Item>);
    if (!items.empty()) std::memcpy(&words_[used_], items.data(), items.size() * sizeof(Item));
    const Item* const on_device = reinterpret_cast<const Item*>(to_ + used_);
    used_ += static_cast<std::size_t>(bytes<Item>(static_cast<int64_t>(items.size())) / 4);
    return on_device;
  }

  void write() {
    for (std::size_t at = 0; at < used_; at += Words::kMost) {
      Words words{};
      const std::size_t count = std::min<std::size_t>(Words::kMost, used_ - at);
      std::memcpy(words.word, &words_[at], count * sizeof(uint32_t));
      device_.launch(write_kernel, 1, kThreads, 0, words, to_ + at, static_cast<int>(count));
    }
  }

 private:
  Device& device_;
  std::vector<uint32_t> words_;
  uint32_t* to_;
  std::size_t used_ = 0;
};

// The time step of each slot of a tensor, and the slot of each time step.
struct Cone {
  const int32_t *positions, *slots;
  int32_t count;
};

// ---------------------------------------------------------------- one call
template <class T, class Device>
class Call {
 public:
  Call(Device& device, const NetworkData<T>& network)
      : device_(device), network_(network), tables_(device, table_bytes()) {
    for (int64_t i = 0; i < network.count(); ++i) {
      inputs_.push_back(cone(network.plan(i).input));
      between_.push_back(cone(network.plan(i).between));
    }
    inputs_.push_back(cone(network.plan(network.count() - 1).output));
    int64_t at = 0, signs_at = 0;
    for (int64_t i = 0; i < network.count(); ++i) {
      const int64_t channels = network.block(i).channels;
      saved_offsets_.push_back(at);
      at += between_slots(i) * channels * network.batch;
      saved_offsets_.push_back(at);
      if (i + 1 < network.count()) at += output_slots(i) * channels * network.batch;
      signs_at_.push_back(signs_at);
      signs_at += output_slots(i) * parts_of(channels, kColumns) * network.batch;
    }
  }

  // Runs the forward pass. With `keep`, activations and signs are saved.
  void forward(bool keep) {
    plan_shared(true);
    for (const BlockData<T>& block : network_.blocks) pack_block(block, false);
    Place<T> input = network_.x;
    if (rows_ > 0) input = copy_of_x();
    for (int64_t i = 0; i < count(); ++i) input = forward_block(i, input, keep);
    run();
  }

  void backward() {
    plan_shared(false);
    for (const BlockData<T>& block : network_.blocks) pack_block(block, true);
    const int64_t last = count() - 1;
    Product<T> nothing, output_grad = product(network_.grad, inputs_[last + 1], channels(last));
    Place<T> grad = output_gradient(last, nothing, output_grad);
    for (int64_t i = last; i >= 0; --i) grad = backward_block(i, grad);
    run();
  }

 private:
  int64_t count() const { return network_.count(); }
  int64_t channels(int64_t i) const { return network_.block(i).channels; }
  int64_t between_slots(int64_t i) const { return size_of(network_.plan(i).between); }
  int64_t output_slots(int64_t i) const { return size_of(network_.plan(i).output); }

  int64_t table_bytes() const {
    int64_t bytes = 0;
    for (const BlockPlan& plan : network_.plans)
      for (const Positions* positions : {&plan.input, &plan.between, &plan.output})
        bytes += Tables<Device>::template bytes<int32_t>(size_of(*positions) + network_.steps) + 16;
    const int64_t each = Tables<Device>::template bytes<Stage<T>>(3) +
                         Tables<Device>::template bytes<WeightGradient<T>>(3) +
                         Tables<Device>::template bytes<Packing<T>>(3);
    return bytes + (count() + 1) * each;
  }

  Cone cone(const Positions& positions) {
    return {tables_.add(positions), tables_.add(slots_by_step(positions, network_.steps)),
            static_cast<int32_t>(positions.size())};
  }

  // ---------------------------------------------------------------- a stack in shared memory
  // Chooses the rows of a tile whose stack fits into shared memory, and the offsets of its tensors: two for
  // outputs, one for the values between the convolutions and, in the backward pass, one more for outputs.
  // With 0 rows every stage is a launch.
  void plan_shared(bool forward) {
    int64_t even = 0, odd = forward ? network_.steps * shared_pitch(network_.block(0).features) : 0;
    int64_t between = 0, second = 0, widest = 0;
    for (int64_t i = 0; i < count(); ++i) {
      const BlockData<T>& block = network_.block(i);
      const int64_t pitch = shared_pitch(block.channels), outputs = output_slots(i) * pitch;
      int64_t& place = i % 2 ? odd : even;
      if (!forward || i + 1 < count()) place = std::max(place, outputs);
      between = std::max(between, between_slots(i) * pitch);
      second = std::max(second, forward ? 0 : outputs);
      const int64_t wider = std::max(up_to(block.features, kColumns), up_to(block.channels, kColumns));
      widest = std::max(widest, block.kernel * wider * up_to(block.channels, kColumns));
    }
    const int64_t size = static_cast<int64_t>(sizeof(T)), row = (even + odd + between + second) * size;
    const int64_t limit = static_cast<int64_t>(device_.shared_limit());
    rows_ = 0;
    if (widest * size > kCachedBytes || kRows * row > limit) return;
    rows_ = kRows;
    // Use more rows if two thread blocks still fit on a multiprocessor and enough tiles remain to fill the
    // device.
    while (rows_ < 4 * kRows && 2 * rows_ * row <= limit / 2 && network_.batch >= 2 * rows_ * kFillingTiles)
      rows_ *= 2;
    odd_at_ = rows_ * even;
    between_at_ = odd_at_ + rows_ * odd;
    second_at_ = between_at_ + rows_ * between;
    shared_bytes_ = rows_ * row;
  }

  Place<T> near_output(int64_t i) const { return in_shared<T>(i % 2 ? odd_at_ : 0, rows_, channels(i)); }
  Place<T> near_between(int64_t i) const { return in_shared<T>(between_at_, rows_, channels(i)); }

  // ---------------------------------------------------------------- places in memory
  Place<T> dense(T* data, int64_t channels) const {
    return in_memory(data, network_.batch * channels, channels);
  }
  Place<T> new_place(int64_t slots, int64_t channels) {
    return dense(device_.template take<T>(slots * network_.batch * channels), channels);
  }
  Place<T> saved_between(int64_t i) const {
    return dense(network_.activations + saved_offsets_[2 * i], channels(i));
  }
  Place<T> saved_output(int64_t i) const {
    if (i + 1 == count()) return network_.output;
    return dense(network_.activations + saved_offsets_[2 * i + 1], channels(i));
  }
  unsigned char* saved_signs(int64_t i) const { return network_.signs + signs_at_[i]; }

  // ---------------------------------------------------------------- products
  void pack_block(const BlockData<T>& block, bool turned) {
    const int64_t features = block.features, channels = block.channels;
    first_.push_back(packed(block.first, block.kernel, features, channels, turned));
    second_.push_back(packed(block.second, block.kernel, channels, channels, turned));
    residual_.push_back(packed(block.residual, 1, features, channels, turned));
  }

  // Packs the weight of a convolution, normalized if it has a gain. If `turned`, the product maps gradients
  // of the outputs to gradients of the inputs.
  Product<T> packed(const Convolution<T>& convolution, int64_t taps, int64_t inputs, int64_t outputs,
                    bool turned) {
    const int64_t rows = turned ? outputs : inputs;
    Product<T> result;
    result.taps = static_cast<int32_t>(taps);
    result.channels = static_cast<int32_t>(rows);
    result.width = static_cast<int32_t>(up_to(turned ? inputs : outputs, kColumns));
    result.steps = static_cast<int32_t>(network_.steps);
    result.turned = turned;
    if (convolution.weight == nullptr) return result;
    T* const to = device_.template take<T>(taps * rows * result.width);
    result.weight = to;
    packing_.push_back({convolution.weight, convolution.gain, to, result.taps, static_cast<int32_t>(inputs),
                        static_cast<int32_t>(outputs), result.width, packing_groups_, turned});
    packing_groups_ += parts_of(outputs, kColumns);
    return result;
  }

  Product<T> reading(Product<T> result, const Place<T>& source, const Cone& cone, int64_t dilation) const {
    result.source = source;
    result.slots = cone.slots;
    result.dilation = dilation;
    return result;
  }

  // Returns a product that is the source itself at the same time step.
  Product<T> product(const Place<T>& source, const Cone& cone, int64_t channels) const {
    Product<T> result;
    result.taps = 1;
    result.channels = static_cast<int32_t>(channels);
    result.steps = static_cast<int32_t>(network_.steps);
    return reading(result, source, cone, 1);
  }

  Stage<T> stage(Kind kind, const Cone& cone, int64_t columns) const {
    Stage<T> result;
    result.kind = kind;
    result.slots = cone.count;
    result.positions = cone.positions;
    result.columns = static_cast<int32_t>(columns);
    return result;
  }

  // ---------------------------------------------------------------- forward
  Place<T> copy_of_x() {
    const int64_t features = network_.block(0).features;
    Stage<T> copy = stage(Kind::kPlain, inputs_[0], features);
    copy.product = product(network_.x, inputs_[0], features);
    copy.near = in_shared<T>(odd_at_, rows_, features);
    stages_.push_back(copy);
    return copy.near;
  }

  Place<T> forward_block(int64_t i, const Place<T>& input, bool keep) {
    const BlockData<T>& block = network_.block(i);
    const BlockPlan& plan = network_.plan(i);
    const bool last = i + 1 == count();
    Stage<T> first = stage(Kind::kBetween, between_[i], block.channels);
    first.product = reading(first_[i], input, inputs_[i], plan.dilation);
    first.bias = block.first.bias;
    first.convolution = static_cast<int32_t>(2 * i);
    if (keep) first.far = saved_between(i);
    Stage<T> second = stage(Kind::kOutput, inputs_[i + 1], block.channels);
    if (keep || last) second.far = saved_output(i);
    if (rows_ > 0) {
      first.near = near_between(i);
      if (!last) second.near = near_output(i);
    } else if (!keep) {
      first.far = new_place(between_slots(i), block.channels);
      if (!last) second.far = new_place(output_slots(i), block.channels);
    }
    second.product = reading(second_[i], rows_ > 0 ? first.near : first.far, between_[i], plan.dilation);
    second.bias = block.second.bias;
    second.residual = reading(residual_[i], input, inputs_[i], 1);
    second.residual_bias = block.residual.bias;
    second.convolution = static_cast<int32_t>(2 * i + 1);
    if (keep) second.signs = saved_signs(i);
    stages_.push_back(first);
    stages_.push_back(second);
    return rows_ > 0 ? second.near : second.far;
  }

  // ---------------------------------------------------------------- backward
  // Adds the stage for the gradients of the input of block i's last ReLU and of its second convolution.
  Place<T> output_gradient(int64_t i, const Product<T>& through, const Product<T>& residual) {
    Stage<T> result = stage(Kind::kOutputGradient, inputs_[i + 1], channels(i));
    result.product = through;
    result.residual = residual;
    result.saved = saved_output(i);
    result.signs = saved_signs(i);
    of_second_.push_back(new_place(output_slots(i), channels(i)));
    result.second_far = of_second_.back();
    const bool needed = rows_ == 0 || network_.block(i).residual.weight != nullptr;
    if (needed) result.far = new_place(output_slots(i), channels(i));
    of_sum_.push_back(result.far);
    if (rows_ > 0) {
      result.near = near_output(i);
      result.second_near = in_shared<T>(second_at_, rows_, channels(i));
    }
    near_second_ = rows_ > 0 ? result.second_near : result.second_far;
    stages_.push_back(result);
    return rows_ > 0 ? result.near : result.far;
  }

  // Adds the stages of block i. `grad` is the result of output_gradient for block i. Returns the
  // gradient of the previous block.
  Place<T> backward_block(int64_t i, const Place<T>& grad) {
    const BlockPlan& plan = network_.plan(i);
    const BlockData<T>& block = network_.block(i);
    Stage<T> between = stage(Kind::kBetweenGradient, between_[i], block.channels);
    between.product = reading(second_[i], near_second_, inputs_[i + 1], plan.dilation);
    between.saved = saved_between(i);
    between.far = new_place(between_slots(i), block.channels);
    if (rows_ > 0) between.near = near_between(i);
    stages_.push_back(between);
    add_weight_gradients(i, between.far);
    const Place<T> of_between = rows_ > 0 ? between.near : between.far;
    const Product<T> through = reading(first_[i], of_between, between_[i], plan.dilation);
    const Product<T> residual = reading(residual_[i], grad, inputs_[i + 1], 1);
    if (i > 0) return output_gradient(i - 1, through, residual);
    if (network_.grad_x.data == nullptr) return {};
    Stage<T> of_x = stage(Kind::kPlain, inputs_[0], block.features);
    of_x.product = through;
    of_x.residual = residual;
    of_x.far = network_.grad_x;
    stages_.push_back(of_x);
    return {};
  }

  void add_weight_gradients(int64_t i, const Place<T>& of_between) {
    const BlockData<T>& block = network_.block(i);
    const int64_t dilation = network_.plan(i).dilation;
    const Place<T> input = i > 0 ? saved_output(i - 1) : network_.x;
    add_weight_gradient(block.first, {input, of_between}, inputs_[i], between_[i], dilation, block.kernel,
                        block.features, block.channels);
    add_weight_gradient(block.second, {saved_between(i), of_second_.back()}, between_[i], inputs_[i + 1],
                        dilation, block.kernel, block.channels, block.channels);
    if (block.residual.weight != nullptr)
      add_weight_gradient(block.residual, {input, of_sum_.back()}, inputs_[i], inputs_[i + 1], 1, 1,
                          block.features, block.channels);
  }

  void add_weight_gradient(const Convolution<T>& convolution, std::pair<Place<T>, Place<T>> places,
                           const Cone& source, const Cone& grad, int64_t dilation, int64_t taps,
                           int64_t features, int64_t columns) {
    WeightGradient<T> job{};
    job.convolution = convolution;
    job.source = places.first;
    job.grad = places.second;
    job.source_slots = source.slots;
    job.positions = grad.positions;
    job.dilation = dilation;
    job.slots = grad.count;
    job.taps = static_cast<int32_t>(taps);
    job.channels = static_cast<int32_t>(features);
    job.columns = static_cast<int32_t>(columns);
    job.items = taps * gradient_groups(job.channels) * gradient_groups(job.columns);
    job.elements = (taps * features + 1) * columns;
    gradients_.push_back(job);
  }

  // Chooses enough parts to fill the device. They depend on the shapes only, because they determine the order
  // of the sums.
  WeightGradients<T> plan_weight_gradients() {
    int64_t work = 0, sums = 0;
    for (const WeightGradient<T>& job : gradients_) work += job.items * job.slots * network_.batch;
    WeightGradients<T> plan{};
    plan.steps = std::max(kLeastSteps, parts_of(work, kGradientThreads));
    for (WeightGradient<T>& job : gradients_) {
      job.parts = std::max<int64_t>(1, parts_of(job.slots * network_.batch, plan.steps));
      job.first_thread = plan.threads;
      job.first_group = plan.groups;
      job.sums_at = sums;
      plan.threads += job.parts * job.items;
      plan.groups += parts_of(job.columns, kSumColumns);
      sums += job.parts * job.elements;
    }
    plan.jobs = tables_.add(gradients_);
    plan.count = static_cast<int>(gradients_.size());
    plan.batch = network_.batch;
    plan.sums = device_.template take<T>(sums);
    return plan;
  }

  // ---------------------------------------------------------------- launches
  void run() {
    const Packing<T>* const packing = tables_.add(packing_);
    const Stage<T>* const stages = tables_.add(stages_);
    const WeightGradients<T> gradients = plan_weight_gradients();
    tables_.write();
    device_.launch(temporal_conv_pack_kernel<T>, blocks_for(packing_groups_, 1), kThreads, 0, packing,
                   static_cast<int>(packing_.size()), packing_groups_);
    if (network_.batch > 0) run_stages(stages);
    if (gradients.count == 0) return;
    device_.launch(weight_gradient_kernel<T>, blocks_for(gradients.threads, kThreads), kThreads, 0,
                   gradients);
    device_.launch(sum_parts_kernel<T>, blocks_for(gradients.groups, 1), kSumThreads, 0, gradients);
  }

  void run_stages(const Stage<T>* stages) {
    const int64_t batch = network_.batch;
    Stages<T> all{stages, static_cast<int>(stages_.size()), batch, rows_, 0, 1, network_.dropout};
    if (rows_ > 0) {
      all.tiles = parts_of(batch, rows_);
      device_.launch(stages_kernel<T>, blocks_for(all.tiles, 1), kThreads, static_cast<size_t>(shared_bytes_),
                     all);
      return;
    }
    all.tile_rows = std::min(kTileRows, up_to(batch, kRows));
    all.tiles = parts_of(batch, all.tile_rows);
    all.count = 1;
    for (const Stage<T>& stage : stages_) {
      const int64_t groups = parts_of(stage.columns, kColumns);
      const int64_t columns = groups < kPanel ? groups : up_to(groups, kPanel);
      all.parts = parts_of(stage.slots * columns * (all.tile_rows / kRows), kThreads);
      device_.launch(stages_kernel<T>, blocks_for(all.tiles * all.parts, 1), kThreads, 0, all);
      ++all.stages;
    }
  }

  Device& device_;
  const NetworkData<T>& network_;
  Tables<Device> tables_;
  // The cones of each block. The last element of inputs_ is the output of the stack.
  std::vector<Cone> inputs_, between_;
  std::vector<int64_t> saved_offsets_, signs_at_;
  std::vector<Product<T>> first_, second_, residual_;  // with packed weights but without sources
  std::vector<Packing<T>> packing_;
  int64_t packing_groups_ = 0;
  std::vector<Stage<T>> stages_;
  std::vector<WeightGradient<T>> gradients_;
  std::vector<Place<T>> of_sum_, of_second_;  // results of output_gradient in global memory
  Place<T> near_second_;
  int64_t rows_ = 0, odd_at_ = 0, between_at_ = 0, second_at_ = 0, shared_bytes_ = 0;
};

}  // namespace
}  // namespace qfast
