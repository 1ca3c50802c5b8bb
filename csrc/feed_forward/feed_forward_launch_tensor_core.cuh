// Launches of the feed-forward block on tensor cores: decides whether they can be used and packs the weights.
// Host only.
#pragma once

#include "cuda_device.cuh"
#include "feed_forward/feed_forward_kernels_tensor_core.cuh"

namespace qfast {
namespace {

inline Precision checked_precision(const char* op, int64_t precision) {
  QFAST_CHECK(precision >= 0 && precision <= static_cast<int64_t>(Precision::kBf16), op,
              ": precision: expected 0 (ieee), 1 (3xtf32), 2 (tf32) or 3 (bf16), got ", precision, ".");
  return static_cast<Precision>(precision);
}

class TensorLaunches {
 public:
  // Packs the weights, contiguous [M][D] and [O][M], if tensor cores can be used. They cannot before sm_80,
  // for more results than the registers hold (`narrow` is false), or if the rows do not fit in shared memory.
  TensorLaunches(CudaDevice& device, const FeedForwardData<float>& net, const float* entering,
                 const float* leaving, Precision precision, bool backward, bool narrow)
      : device_(device), precision_(precision), backward_(backward), padded_(net.padded) {
    if (precision == Precision::kIeee || !narrow || !device.has_tensor_cores()) return;
    job_.input_chunks = chunks_of(precision, net.inputs);
    job_.output_chunks = backward ? chunks_of(precision, net.outputs) : 0;
    SlicePacking packing{};
    packing.entering = entering;
    packing.bias = net.bias;
    packing.leaving = leaving;
    packing.inputs = net.inputs;
    packing.hidden = net.hidden;
    packing.outputs = net.outputs;
    packing.slices = net.slices;
    packing.padded = net.padded;
    packing.backward = backward;
    packing.entering_words = job_.input_chunks * kUnits * kWords;
    packing.leaving_words =
        backward ? job_.output_chunks * kUnits * kWords : chunks_of(precision, kUnits) * net.padded * kWords;
    packing.slice_words = packing.entering_words + packing.leaving_words + kUnits;
    job_.slice_words = packing.slice_words;
    serves_ = shared_bytes() <= device.shared_limit();
    if (!serves_) return;
    const int64_t words = int64_t{net.slices} * job_.slice_words;
    packing.to = device.take<uint32_t>(words);
    job_.packed = packing.to;
    device.launch(by_precision(pack_slices_kernel<Precision::k3xTf32>, pack_slices_kernel<Precision::kTf32>,
                               pack_slices_kernel<Precision::kBf16>),
                  grid_for(words, kPlainThreads), kPlainThreads, 0, packing);
  }

  // Returns whether tensor cores are used.
  bool serve() const { return serves_; }

  // Number of thread blocks that the device runs at the same time.
  int64_t resident_blocks() const { return device_.resident_blocks(kernel(), kTileThreads, shared_bytes()); }

  void launch(const FeedForwardData<float>& net, unsigned int blocks) {
    TensorJob job = job_;
    job.net = net;
    device_.launch(kernel(), blocks, kTileThreads, shared_bytes(), job);
  }

 private:
  template <class Kernel>
  Kernel by_precision(Kernel three, Kernel one, Kernel bf16) const {
    return precision_ == Precision::k3xTf32 ? three : precision_ == Precision::kTf32 ? one : bf16;
  }

  void (*kernel() const)(TensorJob) {
    constexpr Precision kThree = Precision::k3xTf32, kOne = Precision::kTf32, kBf16 = Precision::kBf16;
    if (backward_)
      return by_precision(feed_forward_hidden_tensor_kernel<kThree>, feed_forward_hidden_tensor_kernel<kOne>,
                          feed_forward_hidden_tensor_kernel<kBf16>);
    if (padded_ > kTallRows)
      return by_precision(feed_forward_tensor_kernel<kThree, 2>, feed_forward_tensor_kernel<kOne, 2>,
                          feed_forward_tensor_kernel<kBf16, 2>);
    return by_precision(feed_forward_tensor_kernel<kThree, 1>, feed_forward_tensor_kernel<kOne, 1>,
                        feed_forward_tensor_kernel<kBf16, 1>);
  }

  size_t shared_bytes() const {
    const int64_t words = int64_t{job_.input_chunks + job_.output_chunks} * kTensorRows * kWords +
                          2 * int64_t{job_.slice_words};
    return kTensorRows * sizeof(int64_t) + static_cast<size_t>(words) * sizeof(uint32_t);
  }

  CudaDevice& device_;
  Precision precision_;
  bool backward_, serves_ = false;
  int32_t padded_;
  TensorJob job_{};
};

}  // namespace
}  // namespace qfast
