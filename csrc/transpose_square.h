// Transposition of as many vectors as they have lanes, in registers. This file is included inside the
// namespace of an instruction set.
#pragma once

#include "activations/activations.h"

namespace {

// Replaces the rows by a perfect shuffle of the first and the second half of them: row 2 i and 2 i + 1 are
// the interleaved lanes of rows i and i + L / 2. After log2(L) rounds, the square is transposed.
template <class Element>
QFAST_ALWAYS_INLINE void transpose_square(Vector<Element>* rows) {
  constexpr int L = kLanes<Element>;
#if defined(__clang__)
  Element values[L][L];
  __builtin_memcpy(values, rows, sizeof(values));
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < L; ++j) rows[i][j] = values[j][i];
#else
  Integers<Element> low, high;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    low[i] = i / 2 + i % 2 * L;
    high[i] = low[i] + L / 2;
  }
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
    Vector<Element> mixed[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      mixed[2 * i] = __builtin_shuffle(rows[i], rows[i + L / 2], low);
      mixed[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + L / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = mixed[i];
  }
#endif
}

}  // namespace
