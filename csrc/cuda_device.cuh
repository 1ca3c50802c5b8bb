// The device as operators' host code uses it where kernels come in several launches: memory that lives as
// long as the call, and launches on torch's stream.
#pragma once

#include <vector>

#include "cuda_common.cuh"

namespace qfast {

class CudaDevice {
 public:
  explicit CudaDevice(const Tensor& like) : scope_(like), like_(like) {
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared_limit_, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                          like.get_device_index()));
    STD_CUDA_CHECK(
        cudaDeviceGetAttribute(&major_, cudaDevAttrComputeCapabilityMajor, like.get_device_index()));
  }

  size_t shared_limit() const { return static_cast<size_t>(shared_limit_); }
  bool has_tensor_cores() const { return major_ >= 8; }  // for tf32 and bf16
  cudaStream_t stream() const { return scope_.stream(); }

  template <class T>
  T* take(int64_t count) {
    const int64_t shape[] = {count * static_cast<int64_t>(sizeof(T))};
    held_.push_back(torch::stable::new_empty(like_, {shape, 1}, ScalarType::Byte));
    return static_cast<T*>(held_.back().mutable_data_ptr());
  }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), unsigned int blocks, int threads, size_t shared,
              const Arguments&... arguments) {
    constexpr size_t kUnasked = 48 << 10;
    if (shared > kUnasked) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared)));
    }
    kernel<<<blocks, threads, shared, scope_.stream()>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  CudaScope scope_;
  const Tensor& like_;
  int shared_limit_ = 0, major_ = 0;
  std::vector<Tensor> held_;  // goes back to torch's allocator, which reuses it on this stream in order
};

}  // namespace qfast
