// The right operand of a matrix product, as the CPU kernels read it, and scratch memory divided into buffers.
//
// Host code and all instruction sets share this file. It therefore uses no library template, and its
// functions are always inlined: otherwise the linker could choose a function that was compiled for another
// instruction set.
#pragma once

#include <cstdint>

#define QFAST_SHARED_INLINE inline __attribute__((always_inline))

namespace qfast {

// A matrix [rows, columns] whose columns are divided into `count` panels of `width` columns, a multiple of a
// vector. Element (k, j) is at data[j / width * panel_stride + k * step + j % width]. In a packed matrix,
// each panel is contiguous, with zeros beyond the last column. A matrix may also be used in place: the memory
// after the last column is then read, but its values are not used.
//
// A matrix with `room` is not packed yet: each product packs one panel after the other there, and only one
// thread may use it. Its element (k, j) is at data[k * step + j], or at data[j * step + k] if `transposed`.
// For few rows, or without room, a transposed matrix is not packed: the products are sums over vectors of k.
template <class Element>
struct PanelMatrix {
  int64_t rows, columns, width, count, step, panel_stride;
  const Element* data;
  Element* room = nullptr;  // rows * width elements
  bool transposed = false;

  QFAST_SHARED_INLINE int64_t padded() const { return width * count; }

  // Panels [first, first + number), or as many of them as exist.
  QFAST_SHARED_INLINE PanelMatrix some(int64_t first, int64_t number) const {
    const int64_t panels = number < count - first ? number : count - first;
    const int64_t left = columns - first * width, most = panels * width;
    return {rows,         left < most ? left : most,   width, panels,    step,
            panel_stride, data + first * panel_stride, room,  transposed};
  }

  // Rows [first, first + number).
  QFAST_SHARED_INLINE PanelMatrix rows_from(int64_t first, int64_t number) const {
    const Element* const from = data + first * (transposed ? 1 : step);
    return {number, columns, width, count, step, panel_stride, from, room, transposed};
  }
};

// Number and width of the panels for some columns: panels of equal width, at most as wide as the registers
// allow.
struct PanelCut {
  int64_t width, count;

  QFAST_SHARED_INLINE PanelCut(int64_t columns, int64_t vector_bytes, int64_t element_bytes) {
    const int64_t lanes = vector_bytes / element_bytes, most = (vector_bytes == 64 ? 4 : 2) * lanes;
    count = (columns + most - 1) / most;
    width = count == 0 ? 0 : ((columns + count - 1) / count + lanes - 1) / lanes * lanes;
  }

  QFAST_SHARED_INLINE int64_t padded() const { return width * count; }
};

// Divides memory into consecutive buffers that start on cache lines. If `base` is null, it only counts the
// elements.
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
