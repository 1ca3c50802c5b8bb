// Products with packed matrices, for one instruction set. Several operators share them.
#include "panels.h"

#include "cpu_isa_begin.h"

#if defined(QFAST_AMX)
#include "panel_kernels_amx.h"
#else
#include "panel_kernels.h"

template <class Element>
void transpose(const Element* from, int64_t from_stride, int64_t rows, int64_t columns, Element* to,
               int64_t to_stride);

namespace {

constexpr int kDotRows = kPanelVectors == 4 ? 6 : 3;  // rows x 4 sums in registers
constexpr int64_t kDottedRows = 8;           // with fewer rows, packing takes longer than the product
constexpr int64_t kRowsAhead = 8;            // rows between a prefetch and its use
constexpr int64_t kProductsPerPrefetch = 8;  // products that a sum adds between two rows of prefetched gates
constexpr int64_t kDirectRows = 64;          // up to which a panel is read too seldom for a packed copy
constexpr int64_t kBlockDepth = 64;  // rows of such a panel that are multiplied with all rows of a tile
constexpr int64_t kApartDepth = 64;  // rows of a matrix in place up to which its panels are copied
constexpr int64_t kApartPanels = 8;  // panels that are copied at a time
constexpr int64_t kChunkRows = 24;   // rows that are multiplied with all copied panels

// Completes the sums of a register tile and writes them to the target.
template <class Element, int Rows, int Vectors>
QFAST_ALWAYS_INLINE void finish(Finish kind, const Target<Element>& target,
                                Sums<Element, Rows, Vectors>& sums, int64_t row, int64_t column,
                                int64_t columns) {
  const auto store_each = [&](const auto& completed) __attribute__((always_inline)) {
    for_panel_vectors<Element, Vectors>(columns, [&](int v, auto lanes) __attribute__((always_inline)) {
#pragma GCC unroll 24
      for (int i = 0; i < Rows; ++i) {
        const int64_t place = (row + i) * target.stride + column + v * kLanes<Element>;
        store<Element>(target.to + place, completed(sums.at[i][v], place, lanes), lanes);
      }
    });
  };
  if (kind == Finish::kAdd) {
    store_each([&](Vector<Element> sum, int64_t place, auto lanes)
                   __attribute__((always_inline)) { return sum + load<Element>(target.to + place, lanes); });
  } else if (kind == Finish::kGate) {
    store_each([&](Vector<Element> sum, int64_t place, auto lanes) __attribute__((always_inline)) {
      const Vector<Element> gate = load<Element>(target.gate + place, lanes);
      return gate <= Element(0) ? Vector<Element>{} : sum * target.scale;
    });
  } else {
    if (target.bias != nullptr)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const Vector<Element> bias = load<Element>(target.bias + column + v * kLanes<Element>, AllLanes{});
#pragma GCC unroll 24
        for (int i = 0; i < Rows; ++i) sums.at[i][v] += bias;
      }
    // No value is below the bound of kPut. One comparison for both kinds saves code.
    const Vector<Element> lowest =
        splat(kind == Finish::kRelu ? Element(0) : -static_cast<Element>(__builtin_inf()));
    store_each([&](Vector<Element> sum, int64_t, auto) __attribute__((always_inline)) {
      return sum < lowest ? lowest : sum;  // keeps NaN
    });
  }
}

// The body of `multiply` for one panel. The kind is an argument, because four copies would take most of the
// time to compile this file.
template <int Vectors, class Element>
QFAST_ONE_COPY static void multiply_panel(Finish kind, const Element* data, int64_t step, int64_t depth,
                                          const Element* left, int64_t left_row, int64_t left_step,
                                          int64_t rows, const Target<Element>& target, int64_t column,
                                          int64_t columns) {
  for_row_tiles<kTileRows<Vectors> >(rows, [&]<int Rows>(int64_t row) __attribute__((always_inline)) {
    Sums<Element, Rows, Vectors> sums = {};
    add_product(sums, left + row * left_row, left_row, left_step, data, step, depth);
    finish(kind, target, sums, row, column, columns);
  });
}

// The same for a panel of the largest width whose gates are in memory. While a register tile is multiplied,
// the gates of the next are prefetched, row by row, because the processor drops part of many prefetches at
// once.
template <class Element>
QFAST_ONE_COPY static void multiply_gated(const Element* data, int64_t step, int64_t depth,
                                          const Element* left, int64_t left_row, int64_t left_step,
                                          int64_t rows, const Target<Element>& target, int64_t column,
                                          int64_t columns) {
  for_row_tiles<kTileRows<kPanelVectors> >(rows, [&]<int Rows>(int64_t row) __attribute__((always_inline)) {
    Sums<Element, Rows, kPanelVectors> sums = {};
    const Element* const tile_left = left + row * left_row;
    int64_t next = row + Rows;
    for (int64_t k = 0; k < depth; k += kProductsPerPrefetch, ++next) {
      const Element* const gate = target.gate + smaller(next, rows - 1) * target.stride + column;
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) __builtin_prefetch(gate + v * kLanes<Element>);
      add_product(sums, tile_left + k * left_step, left_row, left_step, data + k * step, step,
                  smaller(kProductsPerPrefetch, depth - k));
    }
    finish(Finish::kGate, target, sums, row, column, columns);
  });
}

// Copies sums to or from rows of whole panels.
template <bool kStore, class Element, int Rows, int Vectors>
QFAST_ALWAYS_INLINE void move_sums(Sums<Element, Rows, Vectors>& sums, Element* rows) {
#pragma GCC unroll 24
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      Element* const at = rows + (i * Vectors + v) * kLanes<Element>;
      if constexpr (kStore) {
        store<Element>(at, sums.at[i][v], AllLanes{});
      } else {
        sums.at[i][v] = load<Element>(at, AllLanes{});
      }
    }
}

// The same for a panel of the largest width and at most kDirectRows rows on the left. All of them are
// multiplied with a block of the panel, which stays in the caches, before the next. The products of a sum
// have the same order.
template <class Element>
QFAST_ONE_COPY static void multiply_blocks(Finish kind, const Element* data, int64_t step, int64_t depth,
                                           const Element* left, int64_t left_row, int64_t left_step,
                                           int64_t rows, const Target<Element>& target, int64_t column,
                                           int64_t columns) {
  constexpr int64_t kWidth = kPanelVectors * kLanes<Element>;
  alignas(64) Element parts[kDirectRows * kWidth];  // the sums of the blocks before
  for (int64_t k = 0; k < depth; k += kBlockDepth) {
    const int64_t count = smaller(kBlockDepth, depth - k);
    const Element* const block_left = left + k * left_step;
    for_row_tiles<kTileRows<kPanelVectors> >(rows, [&]<int Rows>(int64_t row) __attribute__((always_inline)) {
      Sums<Element, Rows, kPanelVectors> sums = {};
      if (k > 0) move_sums<false>(sums, parts + row * kWidth);
      add_product(sums, block_left + row * left_row, left_row, left_step, data + k * step, step, count);
      if (k + count < depth) {
        move_sums<true>(sums, parts + row * kWidth);
      } else {
        finish(kind, target, sums, row, column, columns);
      }
    });
  }
}

template <class Element>
QFAST_ALWAYS_INLINE void multiply_panels(Finish kind, const PanelMatrix<Element>& right, const Element* left,
                                         int64_t left_row, int64_t left_step, int64_t rows,
                                         const Target<Element>& target) {
  for (int64_t panel = 0; panel < right.count; ++panel)
    for_panel_width<Element>(right.width, [&]<int Vectors>() __attribute__((always_inline)) {
      const int64_t column = panel * right.width;
      const Element* const data = right.data + panel * right.panel_stride;
      if (Vectors == kPanelVectors && target.gate_in_memory)
        return multiply_gated(data, right.step, right.rows, left, left_row, left_step, rows, target, column,
                              right.columns - column);
      multiply_panel<Vectors>(kind, data, right.step, right.rows, left, left_row, left_step, rows, target,
                              column, right.columns - column);
    });
}

// Packs a panel of a matrix that is not packed yet. Columns beyond the last one are not set.
template <class Element>
static void pack_panel(const PanelMatrix<Element>& right, int64_t panel) {
  const Element* const from = right.data + panel * right.panel_stride;
  const int64_t columns = smaller(right.width, right.columns - panel * right.width);
  if (right.transposed) {
    transpose<Element>(from, right.step, columns, right.rows, right.room, right.width);
    return;
  }
  for (int64_t k = 0; k < right.rows; ++k) {
    __builtin_prefetch(from + (k + kRowsAhead) * right.step);
    __builtin_memcpy(right.room + k * right.width, from + k * right.step, sizeof(Element) * columns);
  }
}

// The sums of adjacent lanes of `a`, followed by the sums of adjacent lanes of `b`.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> add_pairs(Vector<Element> a, Vector<Element> b) {
  constexpr int L = kLanes<Element>;
  Integers<Element> even, odd;
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    even[i] = 2 * i;
    odd[i] = 2 * i + 1;
  }
  return shuffled<Element>(a, b, even) + shuffled<Element>(a, b, odd);
}

// Replaces `Count` vectors by one: with a vector for each lane, lane i is the sum of the lanes of vector i.
template <int Count, class Element>
QFAST_ALWAYS_INLINE Vector<Element> add_lanes(Vector<Element>* vectors) {
#pragma GCC unroll 4
  for (int count = Count; count > 1; count /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i) vectors[i] = add_pairs<Element>(vectors[2 * i], vectors[2 * i + 1]);
  return vectors[0];
}

// sums[i][c] += left row i x column c, for `lanes` elements from k on.
template <class Element, int Rows, int Columns, class Lanes>
QFAST_ALWAYS_INLINE void add_dots(Sums<Element, Rows, Columns>& sums, const Element* left, int64_t left_row,
                                  const Element* const* column, int64_t k, Lanes lanes) {
  Vector<Element> value[Columns];
#pragma GCC unroll 4
  for (int c = 0; c < Columns; ++c) value[c] = load<Element>(column[c] + k, lanes);
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i) {
    const Vector<Element> row = load<Element>(left + i * left_row + k, lanes);
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) sums.at[i][c] += row * value[c];
  }
}

// One vector of columns of a transposed matrix times a few rows. The sums run over vectors of k, whose lanes
// are added at the end.
template <int Rows, class Element>
static void multiply_dots(Finish kind, const PanelMatrix<Element>& right, int64_t first, const Element* left,
                          int64_t left_row, const Target<Element>& target, int64_t row) {
  constexpr int64_t L = kLanes<Element>;
  constexpr int kColumns = L < 4 ? L : 4;
  const int64_t columns = right.columns - first;
  Vector<Element> parts[Rows][L / kColumns];
#pragma GCC unroll 4
  for (int g = 0; g < L / kColumns; ++g) {
    const Element* column[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c)  // columns beyond the last one repeat it
      column[c] = right.data + (first + smaller(g * kColumns + c, columns - 1)) * right.step;
    Sums<Element, Rows, kColumns> sums = {};
    int64_t k = 0;
    for (; k + L <= right.rows; k += L) add_dots(sums, left, left_row, column, k, AllLanes{});
    if (k < right.rows) add_dots(sums, left, left_row, column, k, FirstLanes{right.rows - k});
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) parts[i][g] = add_lanes<kColumns, Element>(sums.at[i]);
  }
  Sums<Element, Rows, 1> total;
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i) total.at[i][0] = add_lanes<L / kColumns, Element>(parts[i]);
  finish(kind, target, total, row, first, columns);
}

template <class Element>
static void multiply_transposed(Finish kind, const PanelMatrix<Element>& right, const Element* left,
                                int64_t left_row, int64_t rows, const Target<Element>& target) {
  for (int64_t first = 0; first < right.columns; first += kLanes<Element>)
    for_row_tiles<kDotRows>(rows, [&]<int Rows>(int64_t row) __attribute__((always_inline)) {
      multiply_dots<Rows>(kind, right, first, left + row * left_row, left_row, target, row);
    });
}

// Packs and multiplies panel by panel: a panel is in the cache when it is multiplied. For few rows, panels
// are multiplied in place.
template <class Element>
static void multiply_unpacked(Finish kind, const PanelMatrix<Element>& right, const Element* left,
                              int64_t left_row, int64_t left_step, int64_t rows,
                              const Target<Element>& target) {
  const bool widest = right.width == kPanelVectors * kLanes<Element>;
  const bool in_blocks = widest && rows > kTileRows<kPanelVectors> && right.rows > kBlockDepth;
  for (int64_t panel = 0; panel < right.count; ++panel) {
    const int64_t column = panel * right.width, columns = right.columns - column;
    const bool direct = !right.transposed && rows <= kDirectRows && columns >= right.width;
    if (!direct) pack_panel(right, panel);
    const Element* const data = direct ? right.data + panel * right.panel_stride : right.room;
    const int64_t step = direct ? right.step : right.width;
    if (direct && in_blocks) {
      multiply_blocks(kind, data, step, right.rows, left, left_row, left_step, rows, target, column, columns);
      continue;
    }
    for_panel_width<Element>(right.width, [&]<int Vectors>() __attribute__((always_inline)) {
      multiply_panel<Vectors>(kind, data, step, right.rows, left, left_row, left_step, rows, target, column,
                              columns);
    });
  }
}

// Multiplies many rows with a matrix in place that has few rows far apart, such as for the gradient of a wide
// weight. Rows at equal places of many pages would evict each other from the cache, so panels are copied
// first. A chunk of rows is multiplied with all copied panels, because the target has pages of its own for
// each row.
template <class Element>
QFAST_ONE_COPY static void multiply_apart(Finish kind, PanelMatrix<Element> right, const Element* left,
                                          int64_t left_row, int64_t left_step, int64_t rows,
                                          const Target<Element>& target) {
  alignas(64) Element room[kApartPanels * kApartDepth * kPanelVectors * kLanes<Element>];
  const int64_t size = right.rows * right.width;
  for (int64_t first = 0; first < right.count; first += kApartPanels) {
    const PanelMatrix<Element> some = right.some(first, kApartPanels);
    const PanelMatrix<Element> packed{some.rows,  some.columns, some.width, some.count,
                                      some.width, size,         room};
    // Products with subnormal numbers in columns that remain unset would be slow.
    Element* const last = room + (some.count - 1) * size;
    for (int64_t i = 0; some.columns < some.padded() && i < size; ++i) last[i] = 0;
    for (int64_t panel = 0; panel < some.count; ++panel) {
      right.room = room + panel * size;
      pack_panel(right, first + panel);
    }
    for (int64_t row = 0; row < rows; row += kChunkRows) {
      const int64_t place = row * target.stride + first * right.width;
      const Element* const gate = kind == Finish::kGate ? target.gate + place : nullptr;
      const Element* const bias = target.bias == nullptr ? nullptr : target.bias + first * right.width;
      multiply_panels(kind, packed, left + row * left_row, left_row, left_step,
                      smaller(kChunkRows, rows - row),
                      {target.to + place, target.stride, bias, gate, target.scale});
    }
  }
}

}  // namespace

template <Finish Kind, class Element>
void multiply(const PanelMatrix<Element>& right, const Element* left, int64_t left_row, int64_t left_step,
              int64_t rows, const Target<Element>& target) {
  if (right.transposed && (right.room == nullptr || (rows <= kDottedRows && left_step == 1))) {
    multiply_transposed(Kind, right, left, left_row, rows, target);
  } else if (right.room != nullptr) {
    multiply_unpacked(Kind, right, left, left_row, left_step, rows, target);
  } else if (right.step > right.width && right.rows <= kApartDepth && rows > kDirectRows) {
    multiply_apart(Kind, right, left, left_row, left_step, rows, target);
  } else {
    multiply_panels(Kind, right, left, left_row, left_step, rows, target);
  }
}
#endif

#define QFAST_MULTIPLY(Element)                                                         \
  template decltype(multiply<Finish::kPut, Element>) multiply<Finish::kPut, Element>;   \
  template decltype(multiply<Finish::kAdd, Element>) multiply<Finish::kAdd, Element>;   \
  template decltype(multiply<Finish::kRelu, Element>) multiply<Finish::kRelu, Element>; \
  template decltype(multiply<Finish::kGate, Element>) multiply<Finish::kGate, Element>;
QFAST_MULTIPLY(float)
#if !defined(QFAST_AMX)
QFAST_MULTIPLY(double)
#endif

#include "cpu_isa_end.h"
