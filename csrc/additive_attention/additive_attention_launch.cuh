// The launches of additive and graph attention, in order. `Device` launches kernels on a stream, allocates
// memory for the length of a call, and sorts (SortingDevice in additive_attention.cu). The host never waits
// for a launch, because all sizes follow from `longest` and the shapes, not from values on the device. Host
// only.
#pragma once

#include <cstdlib>
#include <string>

#include "additive_attention/additive_attention_kernels_days.cuh"
#include "additive_attention/additive_attention_kernels_dense.cuh"
#include "additive_attention/graph_attention_kernels.cuh"
#include "common.h"

namespace qfast {
namespace {

inline unsigned int blocks_for(int64_t tasks, int64_t per_block) {
  const int64_t blocks = (tasks + per_block - 1) / per_block;
  constexpr int64_t kMost = 1 << 20;  // kernels loop over further tasks
  return static_cast<unsigned int>(blocks < 1 ? 1 : blocks < kMost ? blocks : kMost);
}

// ---------------------------------------------------------------- days in global memory
// Rows of a day whose sums a thread block carries, and most arrays for which it does. A warp carries 32
// chunks per round, so such a day has at least 4 rounds. Both are estimates, not measurements.
constexpr int64_t kLongDay = 4 * kLanes * kChunk / 2;
constexpr int64_t kFewArrays = 2048;

// One launch per pass over all days, for days that do not fit in shared memory.
template <class T>
class Passes {
 public:
  template <class Device>
  Passes(Device& device, const Shape& shape, int64_t longest, int32_t* orders, T slope, bool backward)
      : shape_(shape), slope_(slope), lanes_(lanes_for(shape.width)), longest_(longest) {
    groups_ = (shape.width + lanes_ - 1) / lanes_;
    total_ = shape.heads * shape.days.rows;
    const int64_t chunks = shape.heads * shape.days.chunks();
    lists_ = {device.template take<T>(2 * total_),
              orders,
              device.template take<int32_t>(2 * total_),
              device.template take<T>(2 * total_),
              device.template take<T>(2 * total_),
              device.template take<T>(2 * chunks * shape.width),
              device.template take<double>(4 * chunks),
              backward ? device.template take<T>(shape.heads * shape.days.count * shape.width) : nullptr};
  }

  int groups() const { return groups_; }

  // Builds the list of every day from its sort orders and normalises its queries.
  template <class Device>
  void list(Device& device, const T* key, const T* query, T* share_weight) const {
    const T* none = nullptr;
    device.launch(sorted_scores_kernel<T>, rows(), kThreads, 0, shape_, lists_, key, query);
    device.launch(place_kernel<T>, rows(), kThreads, 0, shape_, lists_, slope_);
    device.launch(sum_scalars_kernel<false, T>, chunks(), kThreads, 0, shape_, lists_, none);
    carry_scalars<false>(device);
    device.launch(normalise_kernel<T>, chunks(), kThreads, 0, shape_, lists_, share_weight);
  }

  // Computes the results.
  template <class Device>
  void attend(Device& device, const Forward<T>& io) const {
    columns<false, Receiver<T>>(device, io.value, io);
  }

  // Computes the gradients.
  template <class Device>
  void attend(Device& device, const Backward<T>& io) const {
    const int64_t columns_of_days = shape_.heads * shape_.days.count * shape_.width;
    device.launch(center_kernel<T>, blocks_for(columns_of_days, kThreads), kThreads, 0, shape_, lists_, io);
    device.launch(query_gradient_kernel<T>, blocks_for(total_, kThreads / lanes_), kThreads, 0, shape_,
                  lists_, io, lanes_);
    device.launch(sum_scalars_kernel<true, T>, chunks(), kThreads, 0, shape_, lists_, const_delta(io));
    carry_scalars<true>(device);
    columns<true, BackwardReceiver<T>>(device, io.grad, io);
    device.launch(key_gradients_kernel<T>, chunks(), kThreads, 0, shape_, lists_, io, groups_);
    device.launch(shift_kernel<T>, carries(1), kThreads, 0, shape_, lists_);
    device.launch(finish_key_kernel<T>, blocks_for(total_, kThreads), kThreads, 0, shape_, lists_, io);
  }

 private:
  static const T* const_delta(const Backward<T>& io) { return io.delta; }
  unsigned int rows() const { return blocks_for(2 * total_, kThreads); }
  unsigned int chunks() const { return blocks_for(shape_.heads * shape_.days.chunks(), kThreads / kLanes); }
  unsigned int carries(int64_t columns) const {
    return blocks_for(shape_.heads * shape_.days.count * columns, kThreads / kLanes);
  }

  // Carries the sums of `columns` arrays of each day. A warp owns an array, or a thread block if the days are
  // long and there are too few arrays to occupy the device with warps. Both give the same bits.
  template <class Device>
  void carry(Device& device, int64_t columns, void (*by_warps)(Shape, Lists<T>),
             void (*by_blocks)(Shape, Lists<T>)) const {
    const int64_t arrays = shape_.heads * shape_.days.count * columns;
    if (longest_ >= kLongDay && arrays <= kFewArrays) {
      device.launch(by_blocks, blocks_for(arrays, 1), kThreads, 0, shape_, lists_);
    } else {
      device.launch(by_warps, carries(columns), kThreads, 0, shape_, lists_);
    }
  }

  template <bool kBackward, class Device>
  void carry_scalars(Device& device) const {
    carry(device, kBackward ? 4 : 2, carry_scalars_kernel<kBackward, T>,
          carry_long_scalars_kernel<kBackward, T>);
  }

  template <bool kBackward, class R, class Device, class Io>
  void columns(Device& device, const T* summed, const Io& io) const {
    const int64_t tasks = shape_.heads * shape_.days.chunks() * groups_;
    const unsigned int blocks = blocks_for(tasks, kThreads / lanes_);
    device.launch(sum_columns_kernel<kBackward, T>, blocks, kThreads, 0, shape_, lists_, lanes_, groups_,
                  summed);
    const int64_t width = 2 * static_cast<int64_t>(shape_.width);
    carry(device, width, carry_columns_kernel<T>, carry_long_columns_kernel<T>);
    device.launch(walk_kernel<kBackward, T, R, Io>, blocks, kThreads, 0, shape_, lists_, lanes_, groups_,
                  summed, io);
  }

  Shape shape_;
  T slope_;
  Lists<T> lists_;
  int lanes_, groups_ = 0;
  int64_t longest_, total_ = 0;
};

// Computes orders [2, heads, N]: keys ascending and queries descending within each day. Sorts by score and
// then, with a stable sort, by day. Each sort covers as many heads as 32-bit numbers allow.
template <class T, class Device>
void sort_scores(Device& device, const Shape& shape, const T* key, const T* query, int32_t* orders) {
  using Word = typename SortBits<T>::Word;
  const int64_t rows = shape.days.rows, per_head = rows > shape.days.count ? rows : shape.days.count;
  const int64_t most = std::numeric_limits<uint32_t>::max() / (2 * per_head);
  const int64_t step = most < 1 ? 1 : most < shape.heads ? most : shape.heads;
  const int64_t room = 2 * step * rows;
  Word* bits[2] = {device.template take<Word>(room), device.template take<Word>(room)};
  uint32_t* numbers[2] = {device.template take<uint32_t>(room), device.template take<uint32_t>(room)};
  for (int64_t head = 0; head < shape.heads; head += step) {
    const int64_t heads = step < shape.heads - head ? step : shape.heads - head;
    const Shape part{shape.days, heads, shape.width};
    const int64_t count = 2 * heads * rows;
    const unsigned int blocks = blocks_for(count, kThreads);
    device.launch(sort_bits_kernel<T>, blocks, kThreads, 0, part, key + head * rows, query + head * rows,
                  bits[0], numbers[0]);
    const uint32_t* by_score = device.sort(bits, numbers, count, 8 * static_cast<int>(sizeof(Word)));
    int day_bits = 1;
    while ((int64_t{1} << day_bits) < 2 * heads * shape.days.count) ++day_bits;
    uint32_t* days[2] = {reinterpret_cast<uint32_t*>(bits[0]), reinterpret_cast<uint32_t*>(bits[1])};
    uint32_t* sorted[2] = {by_score == numbers[0] ? numbers[0] : numbers[1],
                           by_score == numbers[0] ? numbers[1] : numbers[0]};
    device.launch(sort_days_kernel, blocks, kThreads, 0, part, by_score, days[0]);
    const uint32_t* by_day = device.sort(days, sorted, count, day_bits);
    device.launch(orders_kernel, blocks, kThreads, 0, part, by_day, orders, head, shape.heads);
  }
}

// ---------------------------------------------------------------- the operators
// Returns `shape` with a flag on the device that the offsets are invalid. Every row then becomes NaN.
template <class Device>
Shape checked(Device& device, Shape shape) {
  if (shape.days.offsets == nullptr) return shape;
  int32_t* broken = device.template take<int32_t>(1);
  device.launch(check_offsets_kernel, 1, kThreads, 0, shape.days, broken);
  shape.days.broken = broken;
  return shape;
}

// A call is computed in one of three ways: pair by pair (additive_attention_kernels_dense.cuh), one thread
// block per day, or one launch per pass over all days (both in additive_attention_kernels_days.cuh). The
// limits are estimates, not measurements: a thread block needs as long for a day of 1,000 rows as all
// multiprocessors need for about ten such days pair by pair.
enum class Way { kDense, kBlock, kPasses };

constexpr int64_t kDenseRows = 1024;    // most rows of a day that is computed pair by pair
constexpr int64_t kDenseTotal = 8192;   // most rows of all days
constexpr int kDenseWidth = 256;        // most columns: each group of columns repeats the work on the scores
constexpr int64_t kDenseForced = 2048;  // the same as kDenseRows if the user requests pair by pair
// Most days of all heads, because their tiles are numbered in 32 bits.
constexpr int64_t kMostLists = 1 << 20;

// QFAST_CUDA_ATTENTION=dense, block or passes requests a way, if the call allows it, for measurements and
// tests. Forward and backward must use the same way, so the variable must not change between them.
inline std::string requested_way() {
  const char* const value = std::getenv("QFAST_CUDA_ATTENTION");
  const std::string way = value == nullptr ? "auto" : value;
  QFAST_CHECK(way == "auto" || way == "dense" || way == "block" || way == "passes",
              "QFAST_CUDA_ATTENTION is '", way, "', allowed: auto, dense, block, passes.");
  return way;
}

template <class T, class Device>
Way way_of(const Device& device, const Shape& shape, int64_t longest) {
  const std::string requested = requested_way();
  const bool block = longest <= kDayRows && plan_day<T>(longest, shape.width).bytes <= device.shared_limit();
  const int64_t lists = shape.heads * shape.days.count;
  const bool dense = shape.width <= kDenseWidth && longest <= kDenseForced && lists <= kMostLists &&
                     plan_dense<T>(shape, longest, 1).bytes <= device.shared_limit();
  if (requested == "dense" && dense) return Way::kDense;
  if (requested == "block" && block) return Way::kBlock;
  if (requested == "passes") return Way::kPasses;
  const bool few = longest <= kDenseRows && lists * longest <= kDenseTotal;
  return dense && few ? Way::kDense : block ? Way::kBlock : Way::kPasses;
}

template <class T, class Device>
void attend(Device& device, Shape shape, int64_t longest, T slope, const Forward<T>& io) {
  const Way way = way_of<T>(device, shape, longest);
  if (way == Way::kDense) {
    const DensePlan plan = plan_dense<T>(shape, longest, (shape.width + kDenseColumns - 1) / kDenseColumns);
    device.launch(attend_dense_kernel<T>, blocks_for(plan.tasks(), 1), kDenseThreads<T>, plan.bytes, shape,
                  plan, io, slope);
    return;
  }
  if (way == Way::kBlock) {
    const DayPlan plan = plan_day<T>(longest, shape.width);
    device.launch(attend_day_kernel<T>, blocks_for(shape.heads * shape.days.count, 1), plan.threads,
                  plan.bytes, shape, plan, io, slope);
    return;
  }
  shape = checked(device, shape);
  int32_t* orders = io.orders;
  if (orders == nullptr) orders = device.template take<int32_t>(2 * shape.heads * shape.days.rows);
  sort_scores(device, shape, io.key, io.query, orders);
  const Passes<T> passes(device, shape, longest, orders, slope, false);
  passes.list(device, io.key, io.query, io.share_weight);
  passes.attend(device, io);
}

template <class T, class Device>
void attend_dense_backward(Device& device, const Shape& shape, int64_t longest, const Backward<T>& io) {
  const DensePlan queries = plan_dense<T>(shape, longest, 1);
  const DensePlan keys = plan_dense<T>(shape, longest, (shape.width + kDenseColumns - 1) / kDenseColumns);
  const DenseScratch<T> scratch{device.template take<T>(io.total), device.template take<T>(io.total),
                                device.template take<T>(keys.lists * shape.width),
                                device.template take<T>(keys.lists),
                                device.template take<double>(kSums * io.total)};
  device.launch(dense_queries_kernel<T>, blocks_for(queries.tasks(), 1), kThreads, queries.bytes, shape,
                queries, io, scratch);
  device.launch(dense_keys_kernel<T>, blocks_for(keys.tasks(), 1), kDenseThreads<T>, keys.bytes, shape, keys,
                io, scratch);
  const int groups = (shape.width + kLanes - 1) / kLanes;
  device.launch(dense_finish_kernel<T>, blocks_for(keys.lists, 1), kThreads, 0, shape, keys, io, scratch,
                groups);
}

// Computes the gradients. Allocates the scratch of `io`.
template <class T, class Device>
void attend_backward(Device& device, Shape shape, int64_t longest, Backward<T> io) {
  const int lanes = lanes_for(shape.width), groups = (shape.width + lanes - 1) / lanes;
  io.total = shape.heads * shape.days.rows;
  io.delta = device.template take<T>(io.total);
  io.dots = device.template take<T>(io.total * 2 * groups);
  io.to_key = device.template take<double>(2 * io.total);
  const Way way = way_of<T>(device, shape, longest);
  if (way == Way::kDense) {
    attend_dense_backward(device, shape, longest, io);
    return;
  }
  if (way == Way::kBlock) {
    const DayPlan plan = plan_day<T>(longest, shape.width);
    device.launch(attend_day_backward_kernel<T>, blocks_for(shape.heads * shape.days.count, 1), plan.threads,
                  plan.bytes, shape, plan, io);
    return;
  }
  shape = checked(device, shape);
  const Passes<T> passes(device, shape, longest, const_cast<int32_t*>(io.orders), io.slope, true);
  passes.list(device, io.key, io.query, static_cast<T*>(nullptr));
  passes.attend(device, io);
}

// Computes scores [2, N] from hidden.
template <class T, class Device>
void score_hidden(Device& device, const Scoring<T>& job, const T* bias, T* scores) {
  const int lanes = lanes_for(job.width);
  const unsigned int blocks = blocks_for(job.rows, kThreads / lanes);
  device.launch(hidden_scores_kernel<T>, blocks, kThreads, 0, job, bias, scores, lanes);
}

// Computes the gradients of hidden, weight and bias after the backward pass of the attention. On entry
// grad_hidden contains the gradient of the values.
template <class T, class Device>
void finish_hidden(Device& device, const Scoring<T>& job, const T* grad, const T* grad_query,
                   const T* grad_key, T* grad_hidden, T* grad_weight, T* grad_bias) {
  // Enough thread blocks for any device, and few enough partial sums.
  constexpr int64_t kBlocks = 2048, kLeast = 64;
  const int lanes = lanes_for(job.width);
  int64_t per_block = (job.rows + kBlocks - 1) / kBlocks;
  if (per_block < kLeast) per_block = kLeast;
  const int64_t blocks = (job.rows + per_block - 1) / per_block;
  double* parts = device.template take<double>(blocks * 2 * (job.width + 1));
  device.launch(hidden_gradient_kernel<T>, static_cast<unsigned int>(blocks), kThreads, 0, job, grad,
                grad_query, grad_key, grad_hidden, parts, per_block, lanes);
  const double* const finished_parts = parts;
  device.launch(add_parts_kernel<T>, blocks_for(2 * (job.width + 1), kThreads / kLanes), kThreads, 0,
                finished_parts, blocks, job.width, grad_weight, grad_bias);
}

}  // namespace
}  // namespace qfast
