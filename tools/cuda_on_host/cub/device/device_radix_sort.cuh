// The part of CUB that qfast uses, implemented with the standard library.
#pragma once

#include <cuda_runtime.h>

namespace cub {

template <class T>
struct DoubleBuffer {
  T* buffers[2];
  int selector = 0;
  DoubleBuffer(T* current, T* alternate) : buffers{current, alternate} {}
  T* Current() const { return buffers[selector]; }
};

struct DeviceRadixSort {
  template <class Key, class Value>
  static cudaError_t SortPairs(void* room, size_t& bytes, DoubleBuffer<Key>& keys,
                               DoubleBuffer<Value>& values, int64_t count, int begin_bit, int end_bit,
                               cudaStream_t) {
    if (room == nullptr) {
      bytes = 1;
      return cudaSuccess;
    }
    const auto part = [&](Key key) {
      const int width = end_bit - begin_bit;
      const Key mask = width >= static_cast<int>(8 * sizeof(Key)) ? ~Key{0} : (Key{1} << width) - 1;
      return key >> begin_bit & mask;
    };
    std::vector<int64_t> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), int64_t{0});
    const Key* const from = keys.Current();
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return part(from[a]) < part(from[b]); });
    const Value* const numbers = values.Current();
    for (int64_t i = 0; i < count; ++i) {
      keys.buffers[1 - keys.selector][i] = from[order[static_cast<size_t>(i)]];
      values.buffers[1 - values.selector][i] = numbers[order[static_cast<size_t>(i)]];
    }
    keys.selector = 1 - keys.selector, values.selector = 1 - values.selector;
    return cudaSuccess;
  }
};

}  // namespace cub
