// Weights packed for the CPU kernels, and gradients copied from padded sums. Host only.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu_bf16.h"
#include "cpu_workers.h"
#include "panels.h"

namespace qfast {

// Packs matrices and vectors and owns the packed copies for the length of a call.
template <class Element>
class PanelStore {
 public:
  explicit PanelStore(const Tensor& like) : like_(like) {}

  static PanelCut cut(int64_t columns) {
    return {columns, cpu_kernels().vector_bytes, static_cast<int64_t>(sizeof(Element))};
  }

  // Packs rows [first, first + columns) of the weight of a linear layer as the right operand of x . weight^T.
  // If the product is computed only `once`, by one thread, it packs the panels itself while they are in
  // cache.
  PanelMatrix<Element> linear(const Tensor& weight, int64_t first, int64_t columns, bool once = false) {
    const int64_t rows = weight.size(1);
    const Element* const from = weight.const_data_ptr<Element>() + first * rows;
    if (once) return unpacked(rows, columns, from, rows, true);
    return pack(rows, columns, [&](int64_t column, int64_t count, int64_t width, Element* to) {
      cpu_kernels<Element>().transpose(from + column * rows, rows, count, rows, to, width);
    });
  }

  // Packs the same rows as the right operand of grad . weight. The weight itself is used if it is a single
  // panel.
  PanelMatrix<Element> turned(const Tensor& weight, int64_t first, int64_t rows, bool once = false) {
    const int64_t columns = weight.size(1);
    const Element* const from = weight.const_data_ptr<Element>() + first * columns;
    const PanelCut panel = cut(columns);
    if (panel.width == columns) return {rows, columns, columns, 1, columns, rows * columns, from};
    if (once) return unpacked(rows, columns, from, columns, false);
    return pack(rows, columns, [&](int64_t column, int64_t count, int64_t width, Element* to) {
      for (int64_t row = 0; row < rows; ++row)
        std::memcpy(to + row * width, from + row * columns + column, sizeof(Element) * count);
    });
  }

  // Copies a vector, padded with zeros to whole panels.
  const Element* vector(const Element* from, int64_t columns) {
    const int64_t padded = cut(columns).padded();
    Element* const to = buffer(padded);
    if (columns > 0) std::memcpy(to, from, sizeof(Element) * columns);
    std::fill(to + columns, to + padded, Element(0));
    return to;
  }

  // Packs a matrix panel by panel. copy(first column, columns, width, to) writes the columns of a panel,
  // whose rows are `width` elements long.
  template <class Copy>
  PanelMatrix<Element> pack(int64_t rows, int64_t columns, const Copy& copy) {
    const PanelCut panel = cut(columns);
    Element* const to = buffer(rows * panel.padded());
    for (int64_t first = 0; first < columns; first += panel.width) {
      const int64_t count = std::min(panel.width, columns - first);
      Element* const place = to + first * rows;
      for (int64_t row = 0; count < panel.width && row < rows; ++row)
        std::fill(place + row * panel.width + count, place + (row + 1) * panel.width, Element(0));
      copy(first, count, panel.width, place);
    }
    return {rows, columns, panel.width, panel.count, panel.width, rows * panel.width, to};
  }

 private:
  // A matrix that its product packs.
  PanelMatrix<Element> unpacked(int64_t rows, int64_t columns, const Element* from, int64_t step,
                                bool transposed) {
    const PanelCut panel = cut(columns);
    const int64_t stride = panel.width * (transposed ? step : 1);
    Element* const room = buffer(rows * panel.width);
    // A single panel that is not full leaves columns unset. Products with subnormal numbers there are slow.
    if (columns < panel.width) std::fill_n(room, rows * panel.width, Element(0));
    return {rows, columns, panel.width, panel.count, step, stride, from, room, transposed};
  }

  // Returns memory whose elements are not set.
  Element* buffer(int64_t elements) {
    buffers_.emplace_back(like_, elements);
    return buffers_.back().data();
  }

  Tensor like_;
  std::vector<Buffer<Element>> buffers_;
};

// Returns a tensor [rows, columns] copied from rows with stride `stride`.
template <class Element>
Tensor copied(const Tensor& like, const Element* from, int64_t rows, int64_t columns, int64_t stride) {
  const Tensor out = empty(like, {rows, columns});
  Element* const to = out.mutable_data_ptr<Element>();
  for (int64_t row = 0; columns > 0 && row < rows; ++row)
    std::memcpy(to + row * columns, from + row * stride, sizeof(Element) * columns);
  return out;
}

// Returns the transposed tensor [columns, rows].
template <class Element>
Tensor copied_transposed(const Tensor& like, const Element* from, int64_t rows, int64_t columns,
                         int64_t stride) {
  const Tensor out = empty(like, {columns, rows});
  cpu_kernels<Element>().transpose(from, stride, rows, columns, out.mutable_data_ptr<Element>(), rows);
  return out;
}

// Returns a tensor [columns] copied from a vector.
template <class Element>
Tensor copied_vector(const Tensor& like, const Element* from, int64_t columns) {
  const Tensor out = empty(like, {columns});
  if (columns > 0) std::memcpy(out.mutable_data_ptr<Element>(), from, sizeof(Element) * columns);
  return out;
}

}  // namespace qfast
