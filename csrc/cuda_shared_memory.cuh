// The limit on dynamic shared memory of a kernel, and errors of the CUDA runtime. Independent of torch.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

namespace qfast {

// Returns the error of a call and clears it in this library's static CUDA runtime. Otherwise the check after
// the next launch would report it. Torch clears the errors of its own runtime only.
inline cudaError_t cleared(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

// Allows a kernel as much dynamic shared memory as a block of the device can have, `device_limit` bytes with
// static shared memory. This happens once per kernel and device. A limit for each launch would be a race
// between threads that launch the same kernel with different sizes.
inline cudaError_t allow_shared_memory(const void* kernel, int device, int device_limit) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) != 0) return cudaSuccess;
  cudaFuncAttributes attributes{};
  cudaError_t error = cleared(cudaFuncGetAttributes(&attributes, kernel));
  if (error == cudaSuccess) {
    const int limit = device_limit - static_cast<int>(attributes.sharedSizeBytes);
    error = cleared(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
  }
  if (error == cudaSuccess) allowed.insert({kernel, device});
  return error;
}

}  // namespace qfast
