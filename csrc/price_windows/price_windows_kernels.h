// CPU kernel of the price windows. It is compiled once per instruction set; cpu_isa_begin.h lists the
// language features that it may use.
//
// A thread owns a range of output rows. Nothing is saved for a backward pass, because prices have no
// gradient. A vector of prices stays in registers from the first division to the last stage. Bound by
// arithmetic while the series are in the second-level cache: one division per element and one more for each
// stage, which must be divisions because the results equal stored columns bit for bit. Larger series are
// bound by cache lines: the F windows of a row are in F different places.
#pragma once

#include "activations/activations.h"
#include "price_windows/price_windows.h"

namespace {

// Rows between the current one and the row whose place, and then whose prices, are prefetched.
constexpr int64_t kPlaceAhead = 16;
constexpr int64_t kPricesAhead = 4;

static inline int64_t end_of(const PriceWindowJob& job, int64_t row) {
  return job.wide_ends ? static_cast<const int64_t*>(job.ends)[row]
                       : static_cast<const int32_t*>(job.ends)[row];
}

// Prefetches the place and the divisors of a row, without which the prefetch of its prices would wait.
static inline void prefetch_place(const PriceWindowJob& job, int64_t row) {
  __builtin_prefetch(static_cast<const unsigned char*>(job.ends) + row * (job.wide_ends ? 8 : 4));
  for (int64_t f = 0; f < job.fields; ++f)
    __builtin_prefetch(job.divisors + job.divisor_of[f] * job.panel_rows + row);
}

// The first price of the window of a row, for field 0.
static inline const float* window_of(const PriceWindowJob& job, int64_t row) {
  return job.series + end_of(job, row) - job.window + 1;
}

// Both bounds are comparisons that are false for NaN, so NaN reaches the fill.
template <class Part>
QFAST_ALWAYS_INLINE Vector<float> apply_stage(Vector<float> x, const PriceStage& stage, int64_t column,
                                              Part part) {
  x = (x - load<float>(stage.shift + column, part)) / load<float>(stage.scale + column, part);
  const Vector<float> high = load<float>(stage.limit + column, part), low = -high;
  x = x < low ? low : x;
  x = x > high ? high : x;
  return x != x ? load<float>(stage.fill + column, part) : x;
}

// Columns [k, k + lanes) of one field.
template <class Part>
QFAST_ALWAYS_INLINE void window_vector(const PriceWindowJob& job, int64_t column, const float* from,
                                       Vector<float> divisor, float* to, Part part) {
  Vector<float> x = load<float>(from, part) / divisor;
  for (int64_t s = 0; s < job.stage_count; ++s) x = apply_stage(x, job.stages[s], column, part);
  store<float>(to, x, part);
}

}  // namespace

// Computes out[b] for begin <= b < end. A thread owns whole rows. The rows of a shuffled batch miss the
// caches. They are prefetched one cache line per vector, because a burst of prefetches would stall.
void price_windows(const PriceWindowJob& job, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kLanes<float>;
  constexpr int64_t line = 64 / sizeof(float);
  const int64_t window = job.window, columns = job.fields * window;
  for (int64_t b = begin; b < end; ++b) {
    if (b + kPlaceAhead < end && job.rows[b + kPlaceAhead] >= 0)
      prefetch_place(job, job.rows[b + kPlaceAhead]);
    const int64_t row = job.rows[b], later = b + kPricesAhead < end ? job.rows[b + kPricesAhead] : row;
    float* out = job.out + b * columns;
    if (row < 0) {
      for (int64_t c = 0; c < columns; ++c) out[c] = __builtin_nanf("");
      continue;
    }
    const float* first = window_of(job, row);
    const float* ahead = window_of(job, later < 0 ? row : later);
    for (int64_t f = 0; f < job.fields; ++f) {
      const int64_t column = f * window;
      const float* from = first + f * job.places;
      const float* next = ahead + f * job.places;
      const Vector<float> divisor = splat<float>(job.divisors[job.divisor_of[f] * job.panel_rows + row]);
      __builtin_prefetch(next);
      int64_t k = 0;
      for (; k + lanes <= window; k += lanes) {
        if (lanes == line || k % line == 0) __builtin_prefetch(next + k + line - 1);
        window_vector(job, column + k, from + k, divisor, out + column + k, AllLanes{});
      }
      if (k < window)
        window_vector(job, column + k, from + k, divisor, out + column + k, FirstLanes{window - k});
    }
  }
}
