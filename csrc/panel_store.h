// Weights packed for the CPU kernels, and gradients copied from padded sums. Host only.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu_dispatch.h"
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
  PanelMatrix<Element> linear(const Tensor& weight, int64_t first, int64_t columns) {
    const int64_t rows = weight.size(1);
    return pack(weight.const_data_ptr<Element>() + first * rows, rows, columns, 1, rows);
  }

  // Packs the same rows as the right operand of grad . weight.
  PanelMatrix<Element> turned(const Tensor& weight, int64_t first, int64_t rows) {
    const int64_t columns = weight.size(1);
    return pack(weight.const_data_ptr<Element>() + first * columns, rows, columns, columns, 1);
  }

  // Copies a vector, padded with zeros to whole panels.
  const Element* vector(const Element* from, int64_t columns) {
    Element* const to = zeros(cut(columns).padded());
    if (columns > 0) std::memcpy(to, from, sizeof(Element) * columns);
    return to;
  }

 private:
  // Packs the matrix with element (k, j) at from[k * row_stride + j * column_stride]. It copies square
  // blocks, because both sides then stay in the first-level cache.
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
    buffers_.push_back(empty(like_, {std::max<int64_t>(elements, 1)}));
    Element* const to = buffers_.back().template mutable_data_ptr<Element>();
    std::fill(to, to + elements, Element(0));
    return to;
  }

  Tensor like_;
  std::vector<Tensor> buffers_;
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
  constexpr int64_t kSquare = 16;
  const Tensor out = empty(like, {columns, rows});
  Element* const to = out.mutable_data_ptr<Element>();
  for (int64_t first = 0; first < rows; first += kSquare)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t row = first; row < std::min(first + kSquare, rows); ++row)
        to[j * rows + row] = from[row * stride + j];
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
