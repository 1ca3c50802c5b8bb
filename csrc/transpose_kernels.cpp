// Transposed copies of matrices, for packed weights and gradients. It is compiled once per instruction set.
#include <cstdint>

#include "cpu_isa_begin.h"

#include "transpose_square.h"

namespace {

constexpr int64_t kAhead = 4;  // squares between a prefetch and its use

}  // namespace

// to[column * to_stride + row] = from[row * from_stride + column]. Bound by the copy of `from` and `to`: a
// square of L x L elements needs L loads, L log2(L) shuffles and L stores.
template <class Element>
void transpose(const Element* from, int64_t from_stride, int64_t rows, int64_t columns, Element* to,
               int64_t to_stride) {
  constexpr int64_t L = kLanes<Element>;
  for (int64_t row = 0; row < rows; row += L) {
    const int64_t height = rows - row < L ? rows - row : L;
    for (int64_t column = 0; column < columns; column += L) {
      const int64_t width = columns - column < L ? columns - column : L;
      const Element* const source = from + row * from_stride + column;
      Element* const target = to + column * to_stride + row;
      Vector<Element> square[L] = {};
      if (height == L && width == L) {
        // The rows are too far apart for the hardware to detect that they are read in parallel.
#pragma GCC unroll 16
        for (int64_t i = 0; i < L; ++i) __builtin_prefetch(source + i * from_stride + kAhead * L);
#pragma GCC unroll 16
        for (int64_t i = 0; i < L; ++i) square[i] = load<Element>(source + i * from_stride, L);
        transpose_square<Element>(square);
#pragma GCC unroll 16
        for (int64_t i = 0; i < L; ++i) store<Element>(target + i * to_stride, square[i], L);
      } else {
        for (int64_t i = 0; i < height; ++i) square[i] = load<Element>(source + i * from_stride, width);
        transpose_square<Element>(square);
        for (int64_t i = 0; i < width; ++i) store<Element>(target + i * to_stride, square[i], height);
      }
    }
  }
}

QFAST_BOTH_TYPES(transpose)

#include "cpu_isa_end.h"
