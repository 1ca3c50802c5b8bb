// Host utilities of all CUDA operators: device guard, torch's current stream, grid size and device check. The
// library links only libtorch's stable ABI and contains its own static CUDA runtime.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include "common.h"

namespace qfast {

constexpr int kWarp = 32;

// Makes the tensor's device current for the lifetime of the object and returns torch's stream on it.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Number of thread blocks for `tasks` tasks, `per_block` each. The number is limited, so kernels must loop
// over their tasks.
inline unsigned int grid_for(int64_t tasks, int64_t per_block) {
  const int64_t blocks = (tasks + per_block - 1) / per_block;
  constexpr int64_t kMost = 1 << 20;
  return static_cast<unsigned int>(blocks < kMost ? blocks : kMost);
}

inline void check_cuda(const char* op, const char* name, const Tensor& tensor) {
  QFAST_CHECK(tensor.is_cuda(), op, ": ", name, ": expected a CUDA tensor, got one on the CPU.");
}

}  // namespace qfast
