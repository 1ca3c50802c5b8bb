// The innermost loop of all matrix products on the CPU: a tile of sums of products, in registers. This file
// is included inside the namespace of an instruction set.
#pragma once

#include "activations/activations.h"

namespace {

QFAST_ALWAYS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

#if QFAST_VECTOR_BYTES == 64
constexpr int kPanelVectors = 4;  // 32 registers: 6 x 4 sums, 4 columns, 1 broadcast
#else
constexpr int kPanelVectors = 2;  // 16 registers: 6 x 2 sums, 2 columns, 1 broadcast
#endif

// Rows of sums that fill the registers not used for columns.
template <int Vectors>
constexpr int kTileRows = kPanelVectors == 4 ? (Vectors == 4   ? 6
                                                : Vectors == 3 ? 8
                                                : Vectors == 2 ? 12
                                                               : 24)
                                             : (Vectors == 2 ? 6 : 12);

// Lane i is lane lanes[i] of a and b, whose lanes are numbered consecutively. `lanes` is a constant.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> shuffled(Vector<Element> a, Vector<Element> b, Integers<Element> lanes) {
#if defined(__clang__)
  constexpr int L = kLanes<Element>;
  Vector<Element> result;
  for (int i = 0; i < L; ++i) result[i] = lanes[i] < L ? a[lanes[i]] : b[lanes[i] - L];
  return result;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

// x * y + z, with a single rounding if the instruction set has FMA. The compiler rounds an expression once or
// twice, depending on the code around it.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> multiply_add(Vector<Element> x, Vector<Element> y, Vector<Element> z) {
#if defined(__x86_64__) && QFAST_VECTOR_BYTES == 64
  if constexpr (sizeof(Element) == 4) {
    return (Vector<Element>)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
  } else {
    return (Vector<Element>)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)z);
  }
#elif defined(__x86_64__) && QFAST_VECTOR_BYTES == 32
  if constexpr (sizeof(Element) == 4) {
    return (Vector<Element>)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
  } else {
    return (Vector<Element>)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)z);
  }
#else
  return x * y + z;
#endif
}

template <class Element, int Rows, int Vectors>
struct Sums {
  Vector<Element> at[Rows][Vectors];
};

template <class Element, int Rows, int Vectors>
QFAST_ALWAYS_INLINE void add(Sums<Element, Rows, Vectors>& sums, const Sums<Element, Rows, Vectors>& part) {
#pragma GCC unroll 24
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sums.at[i][v] += part.at[i][v];
}

// sums[i][First : First + Count] += sum over k of a[i * a_row + k * a_step] * b[k * b_step : ... + width]
template <int First, int Count, class Element, int Rows, int Vectors>
QFAST_ALWAYS_INLINE void add_columns(Sums<Element, Rows, Vectors>& sums, const Element* a, int64_t a_row,
                                     int64_t a_step, const Element* b, int64_t b_step, int64_t count) {
  // One pointer for four rows. The addressing modes of x86 reach the other three rows by a scaled index.
  constexpr int kPointers = (Rows + 3) / 4;
  const Element* base[kPointers];
#pragma GCC unroll 8
  for (int p = 0; p < kPointers; ++p) base[p] = a + 4 * p * a_row;
  for (int64_t k = 0; k < count; ++k) {
    Vector<Element> column[Count];
#pragma GCC unroll 4
    for (int v = 0; v < Count; ++v) column[v] = load<Element>(b + v * kLanes<Element>, kLanes<Element>);
#pragma GCC unroll 24
    for (int i = 0; i < Rows; ++i) {
      const Vector<Element> value = splat(base[i / 4][(i % 4) * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < Count; ++v) sums.at[i][First + v] += value * column[v];
    }
#pragma GCC unroll 8
    for (int p = 0; p < kPointers; ++p) base[p] += a_step;
    b += b_step;
  }
}

template <class Element, int Rows, int Vectors>
QFAST_ALWAYS_INLINE void add_product(Sums<Element, Rows, Vectors>& sums, const Element* a, int64_t a_row,
                                     int64_t a_step, const Element* b, int64_t b_step, int64_t count) {
  add_columns<0, Vectors>(sums, a, a_row, a_step, b, b_step, count);
}

// Calls body.template operator()<Rows>(first row) for tiles that cover [0, count), with the largest tiles
// that fit. Without kManySizes, the rows after the last full tile are computed one by one, which saves code.
template <int Full, bool kManySizes = true, class Body>
QFAST_ALWAYS_INLINE void for_row_tiles(int64_t count, const Body& body) {
  int64_t row = 0;
  for (; row + Full <= count; row += Full) body.template operator()<Full>(row);
  if constexpr (Full > 12 && kManySizes)
    for (; row + 12 <= count; row += 12) body.template operator()<12>(row);
  if constexpr (Full > 6 && kManySizes)
    for (; row + 6 <= count; row += 6) body.template operator()<6>(row);
  if constexpr (Full > 4 && kManySizes)
    for (; row + 4 <= count; row += 4) body.template operator()<4>(row);
  if constexpr (Full > 2 && kManySizes)
    for (; row + 2 <= count; row += 2) body.template operator()<2>(row);
  for (; row < count; ++row) body.template operator()<1>(row);
}

// Calls body.template operator()<Vectors>() with the number of vectors of a panel.
template <class Element, class Body>
QFAST_ALWAYS_INLINE void for_panel_width(int64_t width, const Body& body) {
  switch (width / kLanes<Element>) {
    case 1:
      return body.template operator()<1>();
    case 2:
      return body.template operator()<2>();
#if QFAST_VECTOR_BYTES == 64
    case 3:
      return body.template operator()<3>();
    default:
      return body.template operator()<4>();
#endif
  }
}

// Calls body(first column, lanes) for vectors that cover `columns` columns.
template <class Element, class Body>
QFAST_ALWAYS_INLINE void for_vectors(int64_t columns, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes<Element> <= columns; j += kLanes<Element>) body(j, kLanes<Element>);
  if (j < columns) body(j, columns - j);
}

// Calls body(v, lanes) for the vectors of a panel with `columns` columns. Two loops, one of them for whole
// vectors only, compile in a fraction of the time of one loop with a branch for each vector of each row.
template <class Element, int Vectors, class Body>
QFAST_ALWAYS_INLINE void for_panel_vectors(int64_t columns, const Body& body) {
  if (columns >= Vectors * kLanes<Element>) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) body(v, AllLanes{});
  } else {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v)
      if (columns > v * kLanes<Element>)
        body(v, FirstLanes{smaller(kLanes<Element>, columns - v * kLanes<Element>)});
  }
}

}  // namespace
