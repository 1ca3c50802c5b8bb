// Products of bfloat16 operands with the tile registers of AMX. This file is included inside the namespace of
// the instruction set "amx".
//
// A tile of the left operand has 16 rows of 32 values. A tile of the right operand has 16 rows of 16 pairs:
// row p contains rows 2 p and 2 p + 1 of the matrix, column by column. An instruction multiplies both and
// adds 16 x 16 sums in float32. Operands are packed tile by tile: [row tile][depth tile] on the left and
// [column tile][depth tile] on the right, with zeros beyond the edges. Packing rounds float32 to the nearest
// bfloat16, ties to even.
//
// Subnormal operands and results count as zero, as in all instructions for bfloat16.
#pragma once

#include "matrix_tiles.h"
#include "transpose_square.h"

namespace {

typedef uint16_t bf16_bits;  // two bytes of memory that only the instructions for bfloat16 interpret

constexpr int64_t kTileSide = 16;   // rows of a tile, and columns of its sums
constexpr int64_t kTileDepth = 32;  // products that one instruction adds to a sum
constexpr int64_t kTileValues = kTileSide * kTileDepth;

QFAST_ALWAYS_INLINE int64_t tiles_for(int64_t count, int64_t side) { return (count + side - 1) / side; }

// The first `count` of 16 floats, which may be none or more than 16, and zeros.
QFAST_ALWAYS_INLINE __m512 first_floats(const float* from, int64_t count) {
  if (count >= 16) return _mm512_loadu_ps(from);
  return count <= 0 ? _mm512_setzero_ps()
                    : _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}

// Packs left(i, k) at from[i * row_stride + k] for `rows` rows and `depth` values of k.
[[maybe_unused]] QFAST_ONE_COPY static void pack_left_rows(const float* from, int64_t row_stride,
                                                           int64_t rows, int64_t depth, bf16_bits* to) {
  const int64_t depth_tiles = tiles_for(depth, kTileDepth), whole = depth / kTileDepth;
  for (int64_t first = 0; first < rows; first += kTileSide) {
    bf16_bits* const tiles = to + first * depth_tiles * kTileDepth;
    for (int64_t i = 0; i < kTileSide; ++i) {
      bf16_bits* place = tiles + i * kTileDepth;
      const float* row = from + (first + i) * row_stride;
      if (first + i >= rows) {
        for (int64_t t = 0; t < depth_tiles; ++t)
          _mm512_store_si512(place + t * kTileValues, _mm512_setzero_si512());
        continue;
      }
      for (int64_t t = 0; t < whole; ++t, row += kTileDepth, place += kTileValues)
        _mm512_store_si512(place,
                           (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(row + 16), _mm512_loadu_ps(row)));
      const int64_t left = depth - whole * kTileDepth;
      if (left > 0)
        _mm512_store_si512(
            place, (__m512i)_mm512_cvtne2ps_pbh(first_floats(row + 16, left - 16), first_floats(row, left)));
    }
  }
}

// Loads the pairs of rows 2 p and 2 p + 1 of `from` for 16 columns: pairs[p] has one pair in each lane.
QFAST_ALWAYS_INLINE void load_pairs(const float* from, int64_t step, int64_t depth, int64_t columns,
                                    Vector<float> pairs[16]) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                         22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  if (depth >= kTileDepth && columns >= kTileSide) {
#pragma GCC unroll 16
    for (int p = 0; p < 16; ++p) {
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + (2 * p + 1) * step),
                                                _mm512_loadu_ps(from + 2 * p * step));
      pairs[p] = (Vector<float>)_mm512_permutexvar_epi16(order, (__m512i)both);
    }
    return;
  }
  for (int p = 0; p < 16; ++p) {
    const __m512 even = 2 * p < depth ? first_floats(from + 2 * p * step, columns) : _mm512_setzero_ps();
    const __m512 odd =
        2 * p + 1 < depth ? first_floats(from + (2 * p + 1) * step, columns) : _mm512_setzero_ps();
    pairs[p] = (Vector<float>)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
  }
}

QFAST_ALWAYS_INLINE void store_tile(const Vector<float> rows[16], bf16_bits* to) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * kTileDepth, (__m512i)rows[i]);
}

// Packs left(i, k) at from[i + k * step].
[[maybe_unused]] QFAST_ONE_COPY static void pack_left_columns(const float* from, int64_t step, int64_t rows,
                                                              int64_t depth, bf16_bits* to) {
  for (int64_t i = 0; i < rows; i += kTileSide)
    for (int64_t k = 0; k < depth; k += kTileDepth, to += kTileValues) {
      Vector<float> pairs[16];
      load_pairs(from + i + k * step, step, depth - k, rows - i, pairs);
      transpose_square<float>(pairs);
      store_tile(pairs, to);
    }
}

// Packs left(i, k) at from[i * row_stride + k * step].
[[maybe_unused]] QFAST_ONE_COPY static void pack_left_strided(const float* from, int64_t row_stride,
                                                              int64_t step, int64_t rows, int64_t depth,
                                                              bf16_bits* to) {
  for (int64_t first = 0; first < rows; first += kTileSide)
    for (int64_t k = 0; k < depth; k += kTileDepth, to += kTileValues)
      for (int64_t i = 0; i < kTileSide; ++i) {
        float values[kTileDepth] = {};
        const int64_t count = first + i < rows ? smaller(kTileDepth, depth - k) : 0;
        for (int64_t j = 0; j < count; ++j) values[j] = from[(first + i) * row_stride + (k + j) * step];
        _mm512_store_si512(to + i * kTileDepth, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + 16),
                                                                             _mm512_loadu_ps(values)));
      }
}

[[maybe_unused]] static void pack_left(const float* from, int64_t row_stride, int64_t step, int64_t rows,
                                       int64_t depth, bf16_bits* to) {
  if (step == 1) {
    pack_left_rows(from, row_stride, rows, depth, to);
  } else if (row_stride == 1) {
    pack_left_columns(from, step, rows, depth, to);
  } else {
    pack_left_strided(from, row_stride, step, rows, depth, to);
  }
}

// Packs right(k, j) at from[k * step + j].
[[maybe_unused]] QFAST_ONE_COPY static void pack_right(const float* from, int64_t step, int64_t depth,
                                                       int64_t columns, bf16_bits* to) {
  for (int64_t j = 0; j < columns; j += kTileSide)
    for (int64_t k = 0; k < depth; k += kTileDepth, to += kTileValues) {
      Vector<float> pairs[16];
      load_pairs(from + j + k * step, step, depth - k, columns - j, pairs);
      store_tile(pairs, to);
    }
}

// Packs right(k, j) at from[j * step + k].
[[maybe_unused]] QFAST_ONE_COPY static void pack_right_transposed(const float* from, int64_t step,
                                                                  int64_t depth, int64_t columns,
                                                                  bf16_bits* to) {
  for (int64_t j = 0; j < columns; j += kTileSide)
    for (int64_t k = 0; k < depth; k += kTileDepth, to += kTileValues) {
      Vector<float> rows[16];
      for (int64_t i = 0; i < kTileSide; ++i) {
        const float* const row = from + (j + i) * step + k;
        const int64_t count = j + i < columns ? depth - k : 0;
        rows[i] =
            (Vector<float>)_mm512_cvtne2ps_pbh(first_floats(row + 16, count - 16), first_floats(row, count));
      }
      transpose_square<float>(rows);
      store_tile(rows, to);
    }
}

// Packed operands of a product: the addresses of their first tiles, and the number of depth tiles.
struct TileProduct {
  const bf16_bits *left, *right;
  int64_t depth_tiles;
};

// Where sums start and where they are stored. A row stride of 0 starts all rows from the same values.
struct TileSums {
  const float* start;  // null for zeros
  int64_t start_stride;
  float* to;
  int64_t stride;
};

#define QFAST_START_TILE(tile, i, j)                                                      \
  if (sums.start == nullptr) {                                                            \
    _tile_zero(tile);                                                                     \
  } else {                                                                                \
    _tile_loadd(tile, sums.start + (i) * kTileSide * sums.start_stride + (j) * kTileSide, \
                sums.start_stride * 4);                                                   \
  }
#define QFAST_STORE_TILE(tile, i, j) \
  _tile_stored(tile, sums.to + (i) * kTileSide * sums.stride + (j) * kTileSide, sums.stride * 4)

// Adds the products of Rows x Columns tiles, at most 2 x 2. The instructions need the numbers of the
// registers as literals: sums are in 0 to 3, the left tiles in 4 and 5, the right tiles in 6 and 7.
template <int Rows, int Columns>
QFAST_ALWAYS_INLINE void add_tiles(const TileProduct& product, const TileSums& sums) {
  __asm__ volatile("" ::: "memory");  // the compiler does not know that loads of tiles read memory
  QFAST_START_TILE(0, 0, 0)
  if constexpr (Columns > 1) {
    QFAST_START_TILE(1, 0, 1)
  }
  if constexpr (Rows > 1) {
    QFAST_START_TILE(2, 1, 0)
  }
  if constexpr (Rows > 1 && Columns > 1) {
    QFAST_START_TILE(3, 1, 1)
  }
  const int64_t next = product.depth_tiles * kTileValues;
  for (int64_t k = 0; k < next; k += kTileValues) {
    _tile_loadd(4, product.left + k, 64);
    _tile_loadd(6, product.right + k, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Columns > 1) {
      _tile_loadd(7, product.right + next + k, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Rows > 1) {
      _tile_loadd(5, product.left + next + k, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Columns > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  QFAST_STORE_TILE(0, 0, 0);
  if constexpr (Columns > 1) QFAST_STORE_TILE(1, 0, 1);
  if constexpr (Rows > 1) QFAST_STORE_TILE(2, 1, 0);
  if constexpr (Rows > 1 && Columns > 1) QFAST_STORE_TILE(3, 1, 1);
}

#undef QFAST_START_TILE
#undef QFAST_STORE_TILE

// The same with the numbers of row and column tiles as arguments.
[[maybe_unused]] QFAST_ONE_COPY static void add_tiles(const TileProduct& product, const TileSums& sums,
                                                      bool two_rows, bool two_columns) {
  if (two_rows && two_columns) {
    add_tiles<2, 2>(product, sums);
  } else if (two_rows) {
    add_tiles<2, 1>(product, sums);
  } else if (two_columns) {
    add_tiles<1, 2>(product, sums);
  } else {
    add_tiles<1, 1>(product, sums);
  }
}

}  // namespace
