// Launches and cuBLAS products of the feed-forward block on CUDA, shared by the operators feed_forward and
// encoder_layer. Chooses between tiles in shared memory, tensor cores and cuBLAS. Host only.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "cuda_device.cuh"
#include "cuda_matrix.cuh"
#include "feed_forward/feed_forward_kernels.cuh"
#include "feed_forward/feed_forward_launch_tensor_core.cuh"

namespace qfast {
namespace {

constexpr int64_t kHiddenBytes = 32 << 20;  // hidden activations of a part, small enough to stay in L2
constexpr int64_t kLeastSlices = 4;         // per thread block
// Slices that take as long as the work that each thread block adds: it reads the rows of its tile, and the
// forward pass writes and reads partial sums. A count of bytes and flops, not a measurement: between 1 in
// ieee and 4 in bf16.
constexpr int64_t kSlicesPerBlock = 2;
constexpr int64_t kWidest = 128;  // largest number of results whose sums fit in registers

// Adds the gradients of the parts of the rows, in the order of the parts.
class PartSums {
 public:
  PartSums(CudaDevice& device, std::vector<Tensor> totals) : device_(device), totals_(std::move(totals)) {}

  // Starts a part and returns the tensors for its gradients. The first part writes to the totals.
  const std::vector<Tensor>& open() {
    if (!any_) return totals_;
    if (parts_.empty())
      for (const Tensor& total : totals_) parts_.push_back(new_tensor_like(total));
    return parts_;
  }

  // Ends a part: adds its gradients to the totals.
  template <class T>
  void close() {
    for (size_t i = 0; i < totals_.size() && any_; ++i) {
      const int64_t count = totals_[i].numel();
      device_.launch(add_kernel<T>, grid_for(count, kPlainThreads), kPlainThreads, 0,
                     totals_[i].mutable_data_ptr<T>(), parts_[i].const_data_ptr<T>(), count);
    }
    any_ = true;
  }

  // Sets the totals to zero if there was no part.
  void finish() {
    for (size_t i = 0; i < totals_.size() && !any_; ++i) torch::stable::zero_(totals_[i]);
  }

 private:
  CudaDevice& device_;
  std::vector<Tensor> totals_, parts_;
  bool any_ = false;
};

// Partial sums of W2 drop(relu(W1 x + b1)), one for each group of hidden units, without b2.
struct SumsOfUnits {
  Tensor partial;  // [parts][rows][O]
  int64_t parts;
};

// Returns the number of thread blocks for each tile that minimizes the time, waves of blocks x slices of a
// block. `places` blocks run at the same time. More blocks need more memory, so a larger number must save 5%.
inline int64_t splits_of_tiles(int64_t tiles, int64_t slices, int64_t places) {
  const auto divided = [](int64_t count, int64_t by) { return (count + by - 1) / by; };
  const auto time = [&](int64_t splits) {
    return divided(tiles * splits, places) * (divided(slices, splits) + kSlicesPerBlock);
  };
  int64_t best = 1;
  for (int64_t splits = 2; splits <= slices / kLeastSlices; ++splits) {
    if (20 * time(splits) < 19 * time(best)) best = splits;
  }
  return best;
}

template <class T>
class FeedForwardLaunches {
 public:
  // The weights are contiguous.
  FeedForwardLaunches(CudaDevice& device, const Tensor& weight_in, const Tensor& bias_in,
                      const Tensor& weight_out, const Dropout& dropout, bool backward, Precision precision)
      : device_(device), weight_in_(weight_in), weight_out_(weight_out) {
    job_.inputs = static_cast<int32_t>(weight_in.size(1));
    job_.hidden = static_cast<int32_t>(weight_in.size(0));
    job_.outputs = static_cast<int32_t>(weight_out.size(0));
    job_.slices = (job_.hidden + kUnits - 1) / kUnits;
    job_.padded = static_cast<int32_t>(rounded_up(job_.outputs, kTallRows));
    job_.bias = bias_in.const_data_ptr<T>();
    job_.dropout = dropout;
    const bool narrow = backward || job_.outputs <= kWidest;
    if constexpr (kSingle) {
      tensor_.emplace(device, job_, weight_in.const_data_ptr<T>(), weight_out.const_data_ptr<T>(), precision,
                      backward, narrow);
      if (tensor_->serve()) return;
    }
    in_shared_ = narrow && shared_bytes(backward) <= device.shared_limit();
    if (in_shared_) pack(backward);
  }

  // Returns the partial sums for x [rows][D].
  SumsOfUnits forward(const Tensor& x, Rows rows) {
    rows = in_order(rows);
    const int64_t N = rows.count(), O = job_.outputs;
    const int64_t tiles = tiles_of(rows);
    const int64_t splits = in_tiles() ? splits_for(tiles, false) : 1;
    const SumsOfUnits result{room(x, {splits * N, O}), splits};
    if (N == 0) return result;
    if (!in_tiles()) {
      for_parts(rows, [&](int64_t first, const Rows& part) {
        activate(rows_of(x, first, part.count()), nullptr, part);
        multiply(rows_of(result.partial, first, part.count()), rows_of(units_, 0, part.count()),
                 turned(weight_out_));
      });
      return result;
    }
    FeedForwardData<T> job = job_;
    job.rows = rows;
    job.splits = static_cast<int32_t>(splits);
    job.x = x.const_data_ptr<T>();
    job.sums = result.partial.mutable_data_ptr<T>();
    if (launch_tensor(job, tiles)) return result;
    device_.launch(kernel_for(false), grid_for(tiles * splits, 1), kTileThreads, shared_bytes(false), job);
    return result;
  }

  // Adds the gradients of W1, b1, W2 and b2 to `sums`. Writes the gradient of x to grad_x [rows][D] unless it
  // is null.
  void backward(const Tensor& x, const Tensor& grad, Rows rows, const Tensor* grad_x, PartSums& sums) {
    for_parts(in_order(rows), [&](int64_t first, const Rows& part) {
      const int64_t N = part.count();
      const Tensor part_x = rows_of(x, first, N), part_grad = rows_of(grad, first, N);
      activate(part_x, &part_grad, part);
      const Tensor units = rows_of(units_, 0, N), grad_units = rows_of(grad_units_, 0, N);
      const std::vector<Tensor>& grads = sums.open();
      Tensor grad_bias_in = grads[1], grad_bias_out = grads[3];
      multiply(grads[0], turned(grad_units), part_x);
      sum_rows(grad_bias_in, grad_units);
      multiply(grads[2], turned(part_grad), units);
      sum_rows(grad_bias_out, part_grad);
      sums.close<T>();
      if (grad_x != nullptr) multiply(rows_of(*grad_x, first, N), grad_units, weight_in_);
    });
  }

 private:
  static constexpr bool kSingle = std::is_same_v<T, float>;

  // Returns whether a kernel of this project computes the hidden activations, not cuBLAS.
  bool in_tiles() const { return in_shared_ || (tensor_ && tensor_->serve()); }

  // Launches the tensor core kernel, if it is used, and returns whether it is.
  bool launch_tensor(const FeedForwardData<T>& job, int64_t tiles) {
    if constexpr (kSingle) {
      if (tensor_->serve()) {
        tensor_->launch(job, grid_for(tiles * job.splits, 1));
        return true;
      }
    }
    return false;
  }

  static Tensor rows_of(const Tensor& matrix, int64_t first, int64_t count) {
    Tensor source = matrix;
    return torch::stable::narrow(source, 0, first, count);
  }

  // Only dropout depends on which window a row belongs to. Without it, every row is a window.
  Rows in_order(const Rows& rows) const { return job_.dropout.active ? rows : Rows{rows.count(), 1, 0, 0}; }

  static int64_t tiles_of(const Rows& rows) {
    constexpr int64_t kQuads = Tile<T>::kRows / kQuad;
    return (rows.quads() + kQuads - 1) / kQuads;
  }

  void (*kernel_for(bool backward) const)(FeedForwardData<T>) {
    if (backward) return feed_forward_hidden_kernel<T>;
    return job_.padded > kTallRows ? feed_forward_kernel<T, 2> : feed_forward_kernel<T, 1>;
  }

  // Number of thread blocks that the device runs at the same time.
  int64_t resident_blocks(bool backward) const {
    if constexpr (kSingle) {
      if (tensor_->serve()) return tensor_->resident_blocks();
    }
    return device_.resident_blocks(kernel_for(backward), kTileThreads, shared_bytes(backward));
  }

  // Number of thread blocks that share a tile, each with some of the slices. The blocks run in waves of
  // `resident_blocks`, and the last wave is often partly empty. Chooses the number with the shortest time, so
  // the order of the sums depends on the sizes and on the device.
  int64_t splits_for(int64_t tiles, bool backward) const {
    return splits_of_tiles(tiles, job_.slices, resident_blocks(backward));
  }

  size_t shared_bytes(bool backward) const {
    const int64_t stride = Tile<T>::kStride, D = job_.inputs, O = job_.outputs;
    const int64_t elements = backward ? (D + O) * (stride + kUnits)
                                      : D * (stride + kUnits) + kUnits * (stride + int64_t{job_.padded});
    return Tile<T>::kRows * sizeof(int64_t) + static_cast<size_t>(elements) * sizeof(T);
  }

  // Packs W1 and W2 in the order in which the kernels read them.
  void pack(bool backward) {
    const int64_t D = job_.inputs, M = job_.hidden, O = job_.outputs, padded = int64_t{job_.slices} * kUnits;
    job_.entering = packed({weight_in_.const_data_ptr<T>(), nullptr, D, M, 1, D, D, padded, !backward});
    const T* const leaving = weight_out_.const_data_ptr<T>();
    job_.leaving = packed(backward ? Packing<T>{leaving, nullptr, O, M, M, 1, O, padded, false}
                                   : Packing<T>{leaving, nullptr, M, O, 1, M, padded, job_.padded, false});
  }

  const T* packed(Packing<T> packing) {
    const int64_t elements = packing.padded_rows * packing.padded_columns;
    packing.to = device_.take<T>(elements);
    device_.launch(pack_kernel<T>, grid_for(elements, kPlainThreads), kPlainThreads, 0, packing);
    return packing.to;
  }

  // Calls body(first row, rows of the part) for each part. A part has a multiple of four windows, which share
  // dropout counters.
  template <class Body>
  void for_parts(const Rows& rows, const Body& body) {
    const int64_t row_bytes = int64_t{job_.hidden} * static_cast<int64_t>(sizeof(T));
    const int64_t most = std::max<int64_t>(kHiddenBytes / row_bytes, Tile<T>::kRows);
    const int64_t windows = std::max<int64_t>(most / rows.steps / kQuad, 1) * kQuad;
    for (int64_t first = 0; first < rows.windows; first += windows)
      body(first * rows.steps, Rows{std::min(windows, rows.windows - first), rows.steps,
                                    rows.first_window + first, rows.first_step});
  }

  // Computes the hidden activations of a part in units_ and, if `grad` is not null, their gradients in
  // grad_units_.
  void activate(const Tensor& x, const Tensor* grad, const Rows& rows) {
    const int64_t N = rows.count();
    if (!allocated_) {  // the first part is the largest
      units_ = room(x, {N, job_.hidden});
      allocated_ = true;
      if (grad != nullptr) grad_units_ = room(x, {N, job_.hidden});
    }
    FeedForwardData<T> job = job_;
    job.rows = rows;
    job.units = units_.mutable_data_ptr<T>();
    if (grad != nullptr) job.grad_units = grad_units_.mutable_data_ptr<T>();
    if (in_tiles() && grad != nullptr) {
      const int64_t tiles = tiles_of(rows), splits = splits_for(tiles, true);
      job.splits = static_cast<int32_t>(splits);
      job.x = x.const_data_ptr<T>();
      job.grad = grad->const_data_ptr<T>();
      if (launch_tensor(job, tiles)) return;
      device_.launch(kernel_for(true), grid_for(tiles * splits, 1), kTileThreads, shared_bytes(true), job);
      return;
    }
    multiply(rows_of(units_, 0, N), x, turned(weight_in_));
    if (grad != nullptr) multiply(rows_of(grad_units_, 0, N), *grad, weight_out_);
    device_.launch(feed_forward_activate_kernel<T>, grid_for(rows.quads() * job_.hidden, kPlainThreads),
                   kPlainThreads, 0, job);
  }

  CudaDevice& device_;
  Tensor weight_in_, weight_out_, units_, grad_units_;
  FeedForwardData<T> job_{};
  std::optional<TensorLaunches> tensor_;  // float32 only
  bool in_shared_ = false, allocated_ = false;
};

}  // namespace
}  // namespace qfast
