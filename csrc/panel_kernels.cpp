// Products with packed matrices, for one instruction set. Several operators share them.
#include "panels.h"

#include "cpu_isa_begin.h"

#include "panel_kernels.h"

namespace {

// Completes a vector of sums and writes it to the target.
template <Finish Kind, class Element, class Lanes>
QFAST_ALWAYS_INLINE void finish(const Target<Element>& target, Vector<Element> sum, int64_t row,
                                int64_t column, Lanes lanes) {
  Element* const to = target.to + row * target.stride + column;
  if constexpr (Kind == Finish::kAdd) {
    sum += load<Element>(to, lanes);
  } else if constexpr (Kind == Finish::kGate) {
    const Vector<Element> gate = load<Element>(target.gate + row * target.stride + column, lanes);
    sum = gate <= Element(0) ? Vector<Element>{} : sum * target.scale;
  } else if constexpr (Kind == Finish::kRelu) {
    sum = sum < Element(0) ? Vector<Element>{} : sum;
  }
  store<Element>(to, sum, lanes);
}

// The body of `multiply`. It is here because lambdas of a function with external linkage must not capture
// types of the anonymous namespace.
template <Finish Kind, class Element>
void multiply_panels(const PanelMatrix<Element>& right, const Element* left, int64_t left_row,
                     int64_t left_step, int64_t rows, const Target<Element>& target) {
  for (int64_t panel = 0; panel < right.count; ++panel) {
    const Element* const data = right.data + panel * right.panel_stride;
    const int64_t column = panel * right.width, columns = right.columns - column;
    for_panel_width<Element>(right.width, [&]<int Vectors>() __attribute__((always_inline)) {
      for_row_tiles<kTileRows<Vectors>>(rows, [&]<int Rows>(int64_t row) __attribute__((always_inline)) {
        Sums<Element, Rows, Vectors> sums = {};
        add_product(sums, left + row * left_row, left_row, left_step, data, right.step, right.rows);
        for_panel_vectors<Element, Vectors>(columns, [&](int v, auto lanes) __attribute__((always_inline)) {
          const int64_t first = column + v * kLanes<Element>;
          if ((Kind == Finish::kPut || Kind == Finish::kRelu) && target.bias != nullptr) {
            const Vector<Element> bias = load<Element>(target.bias + first, AllLanes{});
#pragma GCC unroll 24
            for (int i = 0; i < Rows; ++i) sums.at[i][v] += bias;
          }
#pragma GCC unroll 24
          for (int i = 0; i < Rows; ++i) finish<Kind>(target, sums.at[i][v], row + i, first, lanes);
        });
      });
    });
  }
}

}  // namespace

template <Finish Kind, class Element>
void multiply(const PanelMatrix<Element>& right, const Element* left, int64_t left_row, int64_t left_step,
              int64_t rows, const Target<Element>& target) {
  multiply_panels<Kind>(right, left, left_row, left_step, rows, target);
}

#define QFAST_MULTIPLY(kind)                                                      \
  template decltype(multiply<Finish::kind, float>) multiply<Finish::kind, float>; \
  template decltype(multiply<Finish::kind, double>) multiply<Finish::kind, double>;
QFAST_MULTIPLY(kPut)
QFAST_MULTIPLY(kAdd)
QFAST_MULTIPLY(kRelu)
QFAST_MULTIPLY(kGate)

#include "cpu_isa_end.h"
