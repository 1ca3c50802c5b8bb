// Weights packed for the CPU kernels, for the length of a call. Host only.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu_dispatch.h"
#include "cpu_workers.h"
#include "panels.h"

namespace qfast {

template <class Element>
class PanelStore {
 public:
  explicit PanelStore(const Tensor& like) : like_(like) {}

  static PanelCut cut(int64_t columns) {
    return {columns, cpu_kernels().vector_bytes, static_cast<int64_t>(sizeof(Element))};
  }

  // The rows [first, first + columns) of a linear layer's weight as the right side of x . weight^T.
  PanelMatrix<Element> linear(const Tensor& weight, int64_t first, int64_t columns) {
    const int64_t rows = weight.size(1);
    return pack(weight.const_data_ptr<Element>() + first * rows, rows, columns, 1, rows);
  }

  // The same rows as the right side of grad . weight.
  PanelMatrix<Element> turned(const Tensor& weight, int64_t first, int64_t rows) {
    const int64_t columns = weight.size(1);
    return pack(weight.const_data_ptr<Element>() + first * columns, rows, columns, columns, 1);
  }

  // Elements of a vector, zeros up to whole panels.
  const Element* vector(const Element* from, int64_t columns) {
    Element* const to = zeros(cut(columns).padded());
    if (columns > 0) std::memcpy(to, from, sizeof(Element) * columns);
    return to;
  }

 private:
  // Element (k, j) from from[k * row_stride + j * column_stride]. A square at a time: both sides then stay in
  // the first-level cache.
  PanelMatrix<Element> pack(const Element* from, int64_t rows, int64_t columns, int64_t row_stride,
                            int64_t column_stride) {
    constexpr int64_t kSquare = 16;
    const PanelCut panel = cut(columns);
    Element* const to = zeros(rows * panel.padded());
    for (int64_t first = 0; first < columns; first += kSquare)
      for (int64_t begin = 0; begin < rows; begin += kSquare)
        for (int64_t j = first; j < std::min(first + kSquare, columns); ++j) {
          Element* const place = to + j / panel.width * rows * panel.width + j % panel.width;
          for (int64_t k = begin; k < std::min(begin + kSquare, rows); ++k)
            place[k * panel.width] = from[k * row_stride + j * column_stride];
        }
    return {rows, columns, panel.width, panel.count, panel.width, rows * panel.width, to};
  }

  Element* zeros(int64_t elements) {
    held_.push_back(empty(like_, {std::max<int64_t>(elements, 1)}));
    Element* const to = held_.back().template mutable_data_ptr<Element>();
    std::fill(to, to + elements, Element(0));
    return to;
  }

  Tensor like_;
  std::vector<Tensor> held_;
};

// [rows, columns] out of rows that stand `stride` apart.
template <class Element>
Tensor taken(const Tensor& like, const Element* from, int64_t rows, int64_t columns, int64_t stride) {
  const Tensor out = empty(like, {rows, columns});
  Element* const to = out.mutable_data_ptr<Element>();
  for (int64_t row = 0; columns > 0 && row < rows; ++row)
    std::memcpy(to + row * columns, from + row * stride, sizeof(Element) * columns);
  return out;
}

// [columns, rows] likewise: turned over.
template <class Element>
Tensor taken_turned(const Tensor& like, const Element* from, int64_t rows, int64_t columns, int64_t stride) {
  constexpr int64_t kSquare = 16;
  const Tensor out = empty(like, {columns, rows});
  Element* const to = out.mutable_data_ptr<Element>();
  for (int64_t first = 0; first < rows; first += kSquare)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t row = first; row < std::min(first + kSquare, rows); ++row)
        to[j * rows + row] = from[row * stride + j];
  return out;
}

template <class Element>
Tensor taken_vector(const Tensor& like, const Element* from, int64_t columns) {
  const Tensor out = empty(like, {columns});
  if (columns > 0) std::memcpy(out.mutable_data_ptr<Element>(), from, sizeof(Element) * columns);
  return out;
}

}  // namespace qfast
