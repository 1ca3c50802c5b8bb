// Products of small matrices: rows of a tile times panels, with what becomes of the sums done while they are
// in registers. Included inside the namespace of the instruction set.
//
// A panel (rows x at most four vectors) stays in the first-level cache while the rows of the tile go by, six
// or more at a time. Bound by multiply-adds: 24 to a loop of 4 vector loads and 6 broadcasts.
#pragma once

#include "matrix_tiles.h"

enum class Finish { kPut, kAdd, kRelu, kGate };

// Where the sums go, [row][column], and what is done on the way. kPut: + bias, if there is one. kAdd: to what
// stands there. kRelu: max(0, + bias). kGate: times `scale` where `gate` is not 0 or less, else 0.
template <class Element>
struct Target {
  Element* to;
  int64_t stride;
  const Element* bias;  // padded to whole panels
  const Element* gate;  // as `to`
  Element scale;
};

// left x right, rows [0, rows): left(i, k) at left[i * left_row + k * left_step]. Columns beyond the last are
// neither read nor written in the target.
// Compiled in panel_kernels.cpp, once for all operators.
template <Finish Kind, class Element>
void multiply(const PanelMatrix<Element>& right, const Element* left, int64_t left_row, int64_t left_step,
              int64_t rows, const Target<Element>& target);

namespace {

// As a tree: the lanes one after the other would wait for each other.
template <class Element>
QFAST_ALWAYS_INLINE Element sum_of_lanes(Vector<Element> values) {
  Element part[kLanes<Element>];
  __builtin_memcpy(part, &values, sizeof(values));
#pragma GCC unroll 4
  for (int64_t half = kLanes<Element> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

// NaN is passed over.
template <class Element>
QFAST_ALWAYS_INLINE Element most_of_lanes(Vector<Element> values) {
  Element part[kLanes<Element>];
  __builtin_memcpy(part, &values, sizeof(values));
#pragma GCC unroll 4
  for (int64_t half = kLanes<Element> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; ++i) part[i] = part[i + half] > part[i] ? part[i + half] : part[i];
  return part[0];
}

template <class Element>
QFAST_ALWAYS_INLINE Element dot(const Element* a, const Element* b, int64_t columns) {
  Vector<Element> total = {};
  for_vectors<Element>(columns, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
    total += load<Element>(a + j, lanes) * load<Element>(b + j, lanes);
  });
  return sum_of_lanes<Element>(total);
}

// Rows that stand `step` apart as the right side of a product.
template <class Element>
QFAST_ALWAYS_INLINE PanelMatrix<Element> in_place(const Element* data, int64_t rows, int64_t columns,
                                                  int64_t step) {
  const int64_t most = kPanelVectors * kLanes<Element>, count = (columns + most - 1) / most;
  const int64_t each = (columns + count - 1) / count;
  const int64_t width = (each + kLanes<Element> - 1) / kLanes<Element> * kLanes<Element>;
  return {rows, columns, width, count, step, width, data};
}

// to[j] += sum of the rows' element j
template <class Element>
static void add_rows(const Element* from, int64_t stride, int64_t rows, int64_t columns, Element* to) {
  for_vectors<Element>(columns, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
    Vector<Element> total = {};
    for (int64_t row = 0; row < rows; ++row) total += load<Element>(from + row * stride + j, lanes);
    store<Element>(to + j, load<Element>(to + j, lanes) + total, lanes);
  });
}

// ---------------------------------------------------------------- the block alone
// to[row][0 : columns] from rows of any strides.
template <class Element>
static void copy_strided(const Element* from, int64_t row_stride, int64_t column_stride, int64_t rows,
                         int64_t columns, Element* to, int64_t to_stride) {
  for (int64_t row = 0; row < rows; ++row) {
    if (column_stride == 1) {
      __builtin_memcpy(to + row * to_stride, from + row * row_stride, sizeof(Element) * columns);
      continue;
    }
    for (int64_t j = 0; j < columns; ++j)
      to[row * to_stride + j] = from[row * row_stride + j * column_stride];
  }
}

}  // namespace
