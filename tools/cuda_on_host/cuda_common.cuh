// Replaces csrc/cuda_common.cuh when kernels run as host code: no device, no stream, tensors on the CPU.
#pragma once

#include <cuda_runtime.h>

#include "common.h"

#undef STD_CUDA_CHECK
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_CHECK(call) static_cast<void>(call)
#define STD_CUDA_KERNEL_LAUNCH_CHECK() static_cast<void>(0)

namespace qfast {

constexpr int kWarp = 32;

class CudaScope {
 public:
  explicit CudaScope(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

// A small grid makes every block process several tasks, which tests the loop over tasks.
inline unsigned int grid_for(int64_t tasks, int64_t per_block) {
  const int64_t blocks = (tasks + per_block - 1) / per_block;
  return static_cast<unsigned int>(std::min<int64_t>(blocks, cuda_on_host::setting("QFAST_HOST_GRID", 3)));
}

inline void check_cuda(const char*, const char*, const Tensor&) {}

}  // namespace qfast
