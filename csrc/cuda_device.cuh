// A CUDA device for the length of a call, for operators with several launches: memory that is freed after the
// call, and launches on torch's stream.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda_common.cuh"
#include "cuda_shared_memory.cuh"

namespace qfast {

class CudaDevice {
 public:
  explicit CudaDevice(const Tensor& like) : scope_(like), like_(like) {
    const int device = like.get_device_index();
    STD_CUDA_CHECK(
        cleared(cudaDeviceGetAttribute(&shared_limit_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)));
    STD_CUDA_CHECK(cleared(cudaDeviceGetAttribute(&major_, cudaDevAttrComputeCapabilityMajor, device)));
    STD_CUDA_CHECK(
        cleared(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device)));
  }

  size_t shared_limit() const { return static_cast<size_t>(shared_limit_); }
  bool has_tensor_cores() const { return major_ >= 8; }  // with tf32 and bf16
  cudaStream_t stream() const { return scope_.stream(); }

  // Allocates `count` elements, freed when this object is destroyed.
  template <class T>
  T* take(int64_t count) {
    const int64_t shape[] = {count * static_cast<int64_t>(sizeof(T))};
    buffers_.push_back(new_tensor(like_, {shape, 1}, ScalarType::Byte));
    return static_cast<T*>(buffers_.back().mutable_data_ptr());
  }

  // Returns the number of thread blocks of a kernel that the device runs at the same time.
  template <class... Parameters>
  int64_t resident_blocks(void (*kernel)(Parameters...), int threads, size_t shared) const {
    const void* const function = reinterpret_cast<const void*>(kernel);
    int blocks = 0;
    request_shared_memory(function, shared);
    STD_CUDA_CHECK(
        cleared(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, shared)));
    return std::max<int64_t>(1, int64_t{blocks} * multiprocessors_);
  }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), unsigned int blocks, int threads, size_t shared,
              const Arguments&... arguments) {
    request_shared_memory(reinterpret_cast<const void*>(kernel), shared);
    kernel<<<blocks, threads, shared, scope_.stream()>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  void request_shared_memory(const void* kernel, size_t shared) const {
    constexpr size_t kDefaultShared = 48 << 10;  // a kernel must request more than this
    if (shared > kDefaultShared)
      STD_CUDA_CHECK(allow_shared_memory(kernel, like_.get_device_index(), shared_limit_));
  }

  CudaScope scope_;
  const Tensor& like_;
  int shared_limit_ = 0, major_ = 0, multiprocessors_ = 0;
  std::vector<Tensor>
      buffers_;  // freed to torch's allocator, which reuses memory in the order of this stream
};

}  // namespace qfast
