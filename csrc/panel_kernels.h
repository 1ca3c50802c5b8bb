// Products of a tile of rows with a packed matrix. The results are completed (bias, ReLU, ...) while they are
// in registers. It is compiled once per instruction set; cpu_isa_begin.h lists the language features that it
// may use.
//
// A panel (rows x at most four vectors) stays in the first-level cache while it is multiplied with all rows
// of the tile, six or more together. Bound by multiply-adds: 24 for 4 vector loads and 6 broadcasts.
#pragma once

#include "matrix_tiles.h"

enum class Finish { kPut, kAdd, kRelu, kGate };

// The target [row][column] of the sums. kPut writes sum + bias (bias may be null). kAdd adds the sum to the
// target. kRelu writes max(0, sum + bias). kGate writes sum * scale, or 0 if `gate` is 0 or less.
template <class Element>
struct Target {
  Element* to;
  int64_t stride;
  const Element* bias;  // padded to whole panels
  const Element* gate;  // same layout as `to`
  Element scale;
  bool gate_in_memory = false;  // an earlier call wrote the gate; it has left the caches
};

// Multiplies left x right for rows [0, rows). left(i, k) is at left[i * left_row + k * left_step]. Columns of
// the target beyond the last one are neither read nor written. panel_kernels.cpp compiles it once for all
// operators.
template <Finish Kind, class Element>
void multiply(const PanelMatrix<Element>& right, const Element* left, int64_t left_row, int64_t left_step,
              int64_t rows, const Target<Element>& target);

namespace {

// Adds the lanes as a tree, because each addition of a sequential sum would wait for the previous one.
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

// The largest lane. NaN is ignored.
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

// Rows with stride `step` as the right operand of a product, in place.
template <class Element>
QFAST_ALWAYS_INLINE PanelMatrix<Element> in_place(const Element* data, int64_t rows, int64_t columns,
                                                  int64_t step) {
  const int64_t most = kPanelVectors * kLanes<Element>, count = (columns + most - 1) / most;
  const int64_t panel_columns = (columns + count - 1) / count;
  const int64_t width = (panel_columns + kLanes<Element> - 1) / kLanes<Element> * kLanes<Element>;
  return {rows, columns, width, count, step, width, data};
}

// to[j] += sum over rows of element j. Several sums at a time: each addition waits for the one before.
template <class Element>
static void add_rows(const Element* from, int64_t stride, int64_t rows, int64_t columns, Element* to) {
  constexpr int64_t kWhole = kPanelVectors * kLanes<Element>;
  int64_t first = 0;
  for (; first + kWhole <= columns; first += kWhole) {
    Sums<Element, 1, kPanelVectors> sums = {};
    for (int64_t row = 0; row < rows; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v)
        sums.at[0][v] += load<Element>(from + row * stride + first + v * kLanes<Element>, AllLanes{});
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      Element* const at = to + first + v * kLanes<Element>;
      store<Element>(at, load<Element>(at, AllLanes{}) + sums.at[0][v], AllLanes{});
    }
  }
  for_vectors<Element>(columns - first, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
    Vector<Element> total = {};
    for (int64_t row = 0; row < rows; ++row) total += load<Element>(from + row * stride + first + j, lanes);
    store<Element>(to + first + j, load<Element>(to + first + j, lanes) + total, lanes);
  });
}

// Copies rows of any strides to to[row][0 : columns].
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
