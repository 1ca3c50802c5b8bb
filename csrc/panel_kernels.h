// Products of small matrices: rows of a tile times panels, with what becomes of the sums done while they are
// in registers. Included inside the namespace of the instruction set.
//
// A panel (rows x at most four vectors) stays in the first-level cache while the rows of the tile go by, six
// or more at a time. Bound by multiply-adds: 24 to a loop of 4 vector loads and 6 broadcasts.

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

template <Finish Kind, class Element>
QFAST_ALWAYS_INLINE void finish(const Target<Element>& target, Vector<Element> sum, int64_t row,
                                int64_t column, int64_t count) {
  Element* const to = target.to + row * target.stride + column;
  if constexpr (Kind == Finish::kAdd) {
    sum += load<Element>(to, count);
  } else if constexpr (Kind == Finish::kGate) {
    const Vector<Element> gate = load<Element>(target.gate + row * target.stride + column, count);
    sum = gate <= Element(0) ? Vector<Element>{} : sum * target.scale;
  } else {
    if (target.bias != nullptr) sum += load<Element>(target.bias + column, kLanes<Element>);
    if constexpr (Kind == Finish::kRelu) sum = sum < Element(0) ? Vector<Element>{} : sum;
  }
  store<Element>(to, sum, count);
}

// left x right, rows [0, rows): left(i, k) at left[i * left_row + k * left_step]. Columns beyond the last are
// neither read nor written in the target.
template <Finish Kind, class Element>
static void multiply(const PanelMatrix<Element>& right, const Element* left, int64_t left_row,
                     int64_t left_step, int64_t rows, const Target<Element>& target) {
  for (int64_t panel = 0; panel < right.count; ++panel) {
    const Element* const data = right.data + panel * right.apart;
    const int64_t column = panel * right.width, left_over = right.columns - column;
    for_panel_width<Element>(right.width, [&]<int Vectors>() __attribute__((always_inline)) {
      for_row_tiles<kTileRows<Vectors>>(rows, [&]<int Rows>(int64_t row) __attribute__((always_inline)) {
        Sums<Element, Rows, Vectors> sums = {};
        add_product(sums, left + row * left_row, left_row, left_step, data, right.step, right.rows);
#pragma GCC unroll 24
        for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) {
            const int64_t count = left_over - v * kLanes<Element>;
            if (count > 0)
              finish<Kind>(target, sums.at[i][v], row + i, column + v * kLanes<Element>,
                           smaller(kLanes<Element>, count));
          }
      });
    });
  }
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
