// CPU kernel of the price windows. It is compiled once per instruction set; cpu_isa_begin.h lists the
// language features that it may use.
//
// A thread owns a range of output rows. Nothing is saved for a backward pass, because prices have no
// gradient. Bound by bytes: F T floats read, F T floats written per row, with one division per element and
// one more for each stage, which a core of 2020 or later computes while it waits for the prices of a shuffled
// batch.
#pragma once

#include "price_windows/price_windows.h"

namespace {

// Rows between the current one and the row whose place, and then whose prices, are prefetched.
constexpr int64_t kPlaceAhead = 16;
constexpr int64_t kPricesAhead = 4;

static inline int64_t end_of(const PriceWindowJob& job, int64_t row) {
  return job.wide_ends ? static_cast<const int64_t*>(job.ends)[row]
                       : static_cast<const int32_t*>(job.ends)[row];
}

// Rows of a shuffled batch miss every cache. Without prefetching, each of its F windows would wait
// separately.
static inline void prefetch_rows(const PriceWindowJob& job, int64_t b, int64_t end) {
  if (b + kPlaceAhead < end && job.rows[b + kPlaceAhead] >= 0) {
    const int64_t row = job.rows[b + kPlaceAhead];
    __builtin_prefetch(static_cast<const unsigned char*>(job.ends) + row * (job.wide_ends ? 8 : 4));
    for (int64_t f = 0; f < job.fields; ++f)
      __builtin_prefetch(job.divisors + job.divisor_of[f] * job.panel_rows + row);
  }
  if (b + kPricesAhead < end && job.rows[b + kPricesAhead] >= 0) {
    const float* first = job.series + end_of(job, job.rows[b + kPricesAhead]) - job.window + 1;
    for (int64_t f = 0; f < job.fields; ++f)
      for (int64_t k = 0; k < job.window + 15; k += 16) __builtin_prefetch(first + f * job.places + k);
  }
}

static inline void divide(float* __restrict out, const float* __restrict from, float divisor, int64_t count) {
  for (int64_t k = 0; k < count; ++k) out[k] = from[k] / divisor;
}

static inline void apply_stage(float* __restrict out, const PriceStage& stage, int64_t columns) {
  const float* __restrict shift = stage.shift;
  const float* __restrict scale = stage.scale;
  const float* __restrict limit = stage.limit;
  const float* __restrict fill = stage.fill;
  for (int64_t c = 0; c < columns; ++c) {
    float x = (out[c] - shift[c]) / scale[c];
    x = x < -limit[c] ? -limit[c] : x;
    x = x > limit[c] ? limit[c] : x;
    out[c] = x != x ? fill[c] : x;
  }
}

}  // namespace

// Computes out[b] for begin <= b < end. A thread owns whole rows.
void price_windows(const PriceWindowJob& job, int64_t begin, int64_t end) {
  const int64_t columns = job.fields * job.window;
  for (int64_t b = begin; b < end; ++b) {
    prefetch_rows(job, b, end);
    float* out = job.out + b * columns;
    const int64_t row = job.rows[b];
    if (row < 0) {
      for (int64_t c = 0; c < columns; ++c) out[c] = __builtin_nanf("");
      continue;
    }
    const float* first = job.series + end_of(job, row) - job.window + 1;
    for (int64_t f = 0; f < job.fields; ++f)
      divide(out + f * job.window, first + f * job.places,
             job.divisors[job.divisor_of[f] * job.panel_rows + row], job.window);
    for (int64_t s = 0; s < job.stage_count; ++s) apply_stage(out, job.stages[s], columns);
  }
}
