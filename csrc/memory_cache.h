// Memory that calls reuse: scratch memory, packed weights, and the activations saved for a backward pass.
//
// The C library returns large blocks to the system when they are freed, so every call would use fresh pages,
// and the kernel clears each of them first. The cache holds freed blocks for the next call. It frees
// blocks that no call has used for half a minute. Idle blocks and those in use are together at most 512 MB
// larger than the blocks that were in use at the same time. The cache is safe under threads and in forked
// processes. Host only.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <utility>

#include "common.h"

namespace qfast {

struct MemoryCacheFacts {
  int64_t idle_bytes, used_bytes;  // blocks in the cache, and blocks that are in use
  int64_t reused, allocated;       // number of requests that the cache and the system have served
};

MemoryCacheFacts memory_cache_facts();

// Sets another limit of the idle blocks in bytes. With 0, nothing is cached; -1 restores the default.
void set_memory_cache_limit(int64_t bytes);

// Frees all idle blocks and returns their size in bytes.
int64_t release_idle_memory();

// Returns a block of at least this size, aligned to a cache line, or null if there is not enough memory.
void* take_block(int64_t bytes);
void return_block(void* block);

// Elements that are not set. Their memory returns to the cache with the object.
template <class Element>
class Buffer {
 public:
  Buffer(const Tensor& like, int64_t elements)
      : data_(static_cast<Element*>(take_block(static_cast<int64_t>(sizeof(Element)) * elements))) {
    if (data_ == nullptr)
      throw OutOfMemory(shortage_text(like, TensorSizes(&elements, 1), like.scalar_type()));
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() {
    if (data_ != nullptr) return_block(data_);
  }

  Element* data() const { return data_; }

 private:
  Element* data_;
};

// A new tensor for large values that only autograd uses: values saved for the backward pass, results that
// need a gradient, and gradients of inputs and of weights. It has the dtype of `like` unless `dtype` is set.
// Its elements are not set. Its memory returns to the cache when torch frees the tensor. Other results are
// not allocated here, because torch cannot resize such tensors.
Tensor saved_tensor(const Tensor& like, std::initializer_list<int64_t> shape,
                    std::optional<ScalarType> dtype = std::nullopt);

}  // namespace qfast
