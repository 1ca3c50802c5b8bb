// The right side of a matrix product, as the CPU kernels read it, and scratch memory cut into buffers. Shared
// by host code and the instruction sets: hence no library template, and always inlined, or a function could
// be linked from a unit of another instruction set.
#pragma once

#include <cstdint>

#define QFAST_SHARED_INLINE inline __attribute__((always_inline))

namespace qfast {

// A matrix [rows, columns] whose columns are cut into `count` panels of `width`, whole vectors. Element
// (k, j) stands at data[j / width * apart + k * step + j % width]. Packed: a panel is a matrix of its own,
// zeros beyond the last column. In place: rows side by side, followed by anything that may be read.
template <class Element>
struct PanelMatrix {
  int64_t rows, columns, width, count, step, apart;
  const Element* data;

  QFAST_SHARED_INLINE int64_t padded() const { return width * count; }

  // PanelMatrix [first, first + number) of it, as far as there are so many.
  QFAST_SHARED_INLINE PanelMatrix some(int64_t first, int64_t number) const {
    const int64_t taken = number < count - first ? number : count - first;
    const int64_t left = columns - first * width, most = taken * width;
    return {rows, left < most ? left : most, width, taken, step, apart, data + first * apart};
  }

  // Rows [first, first + number) of it.
  QFAST_SHARED_INLINE PanelMatrix rows_from(int64_t first, int64_t number) const {
    return {number, columns, width, count, step, apart, data + first * step};
  }
};

// How columns are cut: panels of equal width, at most what the registers hold.
struct PanelCut {
  int64_t width, count;

  QFAST_SHARED_INLINE PanelCut(int64_t columns, int64_t vector_bytes, int64_t element_bytes) {
    const int64_t lanes = vector_bytes / element_bytes, most = (vector_bytes == 64 ? 4 : 2) * lanes;
    count = (columns + most - 1) / most;
    width = count == 0 ? 0 : ((columns + count - 1) / count + lanes - 1) / lanes * lanes;
  }

  QFAST_SHARED_INLINE int64_t padded() const { return width * count; }
};

// Buffers one after the other, each on a cache line of its own. Without memory it counts.
template <class Element>
struct Carving {
  Element* base;
  int64_t used = 0;

  QFAST_SHARED_INLINE Element* take(int64_t elements) {
    constexpr int64_t line = 64 / sizeof(Element);
    Element* const buffer = base == nullptr ? nullptr : base + used;
    used += (elements + line - 1) / line * line;
    return buffer;
  }
};

}  // namespace qfast
