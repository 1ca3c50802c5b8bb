// Statistics over the last rows of an instrument, for several window lengths at once. It is included
// inside the namespace of an instruction set.
//
// A thread owns whole instruments and computes blocks of kRollingBlock rows. Sums run back in time over the
// steps of the longest window, for a block of rows at once. Vectors extend along the rows, and the sums of a
// few vectors stay in registers. The sum up to the length of each window is that window's result, so all
// windows share the additions. No sum is updated by subtraction, so none drifts, and an infinity has no
// effect after its window. Values are summed as differences from a value of the window. Constant series are
// therefore exactly constant, and squares are close to the variance. Nothing is saved for a gradient.
//
// Bound by additions: the steps of the longest window per row. skew, kurt and mad need powers of deviations
// from the mean, so they need the steps of every window.
#pragma once

#include "matrix_tiles.h"

namespace {

#define QFAST_BLOCK_LOOP(first) for (int64_t r = (first); r < block.end; ++r)

// The series of an instrument. `valid` is 1 for rows with a value and 0 for others, where `value` is 0.
// `base` is the latest finite value, which is subtracted from the values of the window.
struct RollingSeries {
  double *value, *valid, *base;
};

// A block of rows of an instrument and its sums.
struct RollingBlock {
  int64_t begin, end;  // rows of the instrument
  double* sums[kRollingSums];

  double* sum(int which) const { return sums[which] - begin; }
};

// Fills the arrays of a RollingSeries.
static void prepare_rolling(const double* from, int64_t rows, bool infinite_is_missing, double* value,
                            double* valid, double* base) {
  double latest = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const double x = from[r];
    const bool is_valid = x == x && !(infinite_is_missing && (x - x != 0));
    value[r] = is_valid ? x : 0;
    valid[r] = is_valid ? 1 : 0;
    if (is_valid && x - x == 0) latest = x;
    base[r] = latest;
  }
}

// Calls step(k, first) for every number of steps back, where rows [first, end) of the block have k rows
// before them. After the steps of a window it calls finish(length of the window, index of the window).
template <class Step, class Finish>
QFAST_ALWAYS_INLINE void over_windows(const RollingStatsJob& job, const RollingBlock& block, const Step& step,
                                      const Finish& finish) {
  int64_t k = 0;
  for (int64_t w = 0; w < job.window_count; ++w) {
    for (; k < job.windows[w] && k < block.end; ++k) step(k, k > block.begin ? k : block.begin);
    finish(job.windows[w], w);
  }
}

// Adds steps [from, to) back to the sums of `Vectors` vectors of rows that begin at r. The last vector has
// `lanes` rows.
template <int Sums, int Vectors, class Row>
QFAST_ALWAYS_INLINE void add_steps(const RollingBlock& block, const Row& row, int64_t r, int64_t lanes,
                                   int64_t from, int64_t to) {
  constexpr int64_t wide = kLanes<double>;
  Vector<double> sums[Vectors][Sums];
  const auto width = [&](int v) __attribute__((always_inline)) { return v + 1 < Vectors ? wide : lanes; };
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v)
#pragma GCC unroll 12
    for (int i = 0; i < Sums; ++i) sums[v][i] = load<double>(block.sum(i) + r + v * wide, width(v));
  for (int64_t k = from; k < to; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) row(r + v * wide, k, width(v), sums[v]);
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v)
#pragma GCC unroll 12
    for (int i = 0; i < Sums; ++i) store<double>(block.sum(i) + r + v * wide, sums[v][i], width(v));
}

// Computes a statistic that needs sums only. row(r, k, lanes, sums) adds step k back to the sums of a vector
// of rows, and result(r, window, lanes, sums) returns the statistic of a window.
template <int Sums, class Row, class Result>
QFAST_ALWAYS_INLINE void sum_over_windows(const RollingStatsJob& job, const RollingBlock& block, double* out0,
                                          const Row& row, const Result& result) {
  constexpr int64_t wide = kLanes<double>;
  // Enough independent additions to hide their latency.
  constexpr int kVectors = Sums <= 3 ? 4 : Sums <= 6 ? 2 : 1;
  int64_t summed_steps = 0;
  for (int64_t w = 0; w < job.window_count; ++w) {
    const int64_t window = job.windows[w], steps = smaller(window, block.end);
    // The first rows of an instrument have fewer rows before them. For these, add one step at a time to the
    // rows that have it.
    const int64_t first_full = steps > block.begin ? steps : block.begin;
    for (int64_t k = summed_steps; k < steps; ++k)
      for (int64_t r = k > block.begin ? k : block.begin; r < first_full; r += wide)
        add_steps<Sums, 1>(block, row, r, smaller(wide, first_full - r), k, k + 1);
    int64_t r = first_full;
    for (; r + kVectors * wide <= block.end; r += kVectors * wide)
      add_steps<Sums, kVectors>(block, row, r, wide, summed_steps, steps);
    for (; r < block.end; r += wide)
      add_steps<Sums, 1>(block, row, r, smaller(wide, block.end - r), summed_steps, steps);
    summed_steps = steps;
    double* const out = out0 + w * job.rows;
    for (r = block.begin; r < block.end; r += wide) {
      const int64_t lanes = smaller(wide, block.end - r);
      Vector<double> sums[Sums];
#pragma GCC unroll 12
      for (int i = 0; i < Sums; ++i) sums[i] = load<double>(block.sum(i) + r, lanes);
      store<double>(out + r, result(r, window, lanes, sums), lanes);
    }
  }
}

QFAST_ALWAYS_INLINE Vector<double> root(Vector<double> x) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}

constexpr double kMissing = __builtin_nan("");

// `value` where the condition is true, else NaN.
QFAST_ALWAYS_INLINE Vector<double> where(Integers<double> condition, Vector<double> value) {
  return condition ? value : splat(kMissing);
}

QFAST_ALWAYS_INLINE double* rolling_out(const RollingStatsJob& job, int64_t window, int64_t first) {
  return job.out + window * job.rows + first;
}

// ---------------------------------------------------------------- sums
// Count, sum and mean, and with `Weighted` the linearly weighted mean, which also needs the sum of k times
// the value.
template <bool Weighted>
static void rolling_sums(const RollingStatsJob& job, const RollingBlock& block, const RollingSeries& x,
                         double* out) {
  constexpr int kSums = Weighted ? 3 : 2;
  sum_over_windows<kSums>(
      job, block, out,
      [&](int64_t r, int64_t k, int64_t lanes, Vector<double>* sums) __attribute__((always_inline)) {
        const Vector<double> value = load<double>(x.value + r - k, lanes);
        sums[0] += load<double>(x.valid + r - k, lanes);
        sums[1] += value;
        if constexpr (Weighted) sums[2] += static_cast<double>(k) * value;
      },
      [&](int64_t r, int64_t window, int64_t, const Vector<double>(&sums)[kSums])
          __attribute__((always_inline)) {
            const Vector<double> n = sums[0], sum = sums[1];
            if (job.kind == RollingKind::kCount) return n;
            if constexpr (Weighted) {
              Vector<double> length;
              for (int64_t i = 0; i < kLanes<double>; ++i)
                length[i] = static_cast<double>(smaller(window, r + i + 1));
              return where(n > 0, (length * sum - sums[2]) / (length * (length + 1) / 2) / n);
            }
            return where(n > 0, job.kind == RollingKind::kMean ? sum / n : sum);
          });
}

// ---------------------------------------------------------------- moments
// Returns `second` = squares - sum * sum / n where it is finite. Elsewhere sum * sum overflows, and the same
// quantity is computed in another order, or squares overflow, and the result is infinite.
QFAST_ALWAYS_INLINE Vector<double> without_overflow(Vector<double> second, Vector<double> squares,
                                                    Vector<double> sum, Vector<double> n) {
  const Vector<double> infinity = splat(__builtin_inf());
  const Vector<double> reordered = squares < infinity ? squares - sum * (sum / n) : infinity;
  return ((second < infinity) & (second > -infinity)) ? second : reordered;
}

// Variance and standard deviation. The base is a value of the window, so the sum of squared differences from
// it is at most n + 1 times the sum of squared deviations from the mean. The subtraction therefore loses only
// a factor of about n in float64 precision.
static void rolling_variances(const RollingStatsJob& job, const RollingBlock& block, const RollingSeries& x,
                              double* out) {
  sum_over_windows<3>(
      job, block, out,
      [&](int64_t r, int64_t k, int64_t lanes, Vector<double>* sums) __attribute__((always_inline)) {
        const Vector<double> is_valid = load<double>(x.valid + r - k, lanes);
        const Vector<double> difference =
            is_valid * (load<double>(x.value + r - k, lanes) - load<double>(x.base + r, lanes));
        sums[0] += is_valid;
        sums[1] += difference;
        sums[2] += difference * difference;
      },
      [&](int64_t, int64_t, int64_t, const Vector<double>(&sums)[3]) __attribute__((always_inline)) {
        const auto& [n, sum, squares] = sums;
        const Vector<double> second = without_overflow(squares - sum * sum / n, squares, sum, n);
        const Vector<double> variance = (second > 0 ? second : splat(0.)) / (n - 1);
        return where(n > 1, job.kind == RollingKind::kStd ? root(variance) : variance);
      });
}

// Skewness, kurtosis or mean absolute deviation from the number of values and the sums of powers of
// deviations.
QFAST_ALWAYS_INLINE double moment_result(RollingKind kind, double n, double second, double third,
                                         double fourth, double absolute) {
  if (kind == RollingKind::kMad) return n > 0 ? absolute / n : kMissing;
  const double variance = second / n;
  if (kind == RollingKind::kSkew) {
    if (n < 3 || !(second > 0)) return kMissing;
    return __builtin_sqrt(n * (n - 1)) * (third / n) / ((n - 2) * variance * __builtin_sqrt(variance));
  }
  if (n < 4 || !(second > 0)) return kMissing;
  const double ratio = fourth / n / (variance * variance);
  return ((n * n - 1) * ratio - 3 * (n - 1) * (n - 1)) / ((n - 2) * (n - 3));
}

// For each window, computes the mean first and then the sums of powers of the deviations from it.
static void rolling_moments(const RollingStatsJob& job, const RollingBlock& block, const RollingSeries& x,
                            double* out0) {
  double* __restrict n = block.sum(0), * __restrict sum = block.sum(1), * __restrict mean = block.sum(2);
  double *__restrict second = block.sum(3), *__restrict third = block.sum(4), *__restrict fourth = block.sum(5),
                     *__restrict absolute = block.sum(6);
  const double* __restrict value = x.value, * __restrict valid = x.valid, * __restrict base = x.base;
  over_windows(
      job, block,
      [&](int64_t k, int64_t first) __attribute__((always_inline)) {
        QFAST_BLOCK_LOOP(first) n[r] += valid[r - k], sum[r] += valid[r - k] * (value[r - k] - base[r]);
      },
      [&](int64_t window, int64_t w) __attribute__((always_inline)) {
        QFAST_BLOCK_LOOP(block.begin) {
          mean[r] = n[r] > 0 ? sum[r] / n[r] : 0;
          second[r] = third[r] = fourth[r] = absolute[r] = 0;
        }
        for (int64_t k = 0; k < window && k < block.end; ++k) {
          const int64_t first = k > block.begin ? k : block.begin;
          if (job.kind == RollingKind::kMad) {
            QFAST_BLOCK_LOOP(first) {
              absolute[r] += __builtin_fabs(valid[r - k] * (value[r - k] - base[r] - mean[r]));
            }
          } else {
            QFAST_BLOCK_LOOP(first) {
              const double deviation = valid[r - k] * (value[r - k] - base[r] - mean[r]),
                           square = deviation * deviation;
              second[r] += square;
              third[r] += square * deviation;
              fourth[r] += square * square;
            }
          }
        }
        double* const __restrict out = out0 + w * job.rows;
        QFAST_BLOCK_LOOP(block.begin) {
          out[r] = moment_result(job.kind, n[r], second[r], third[r], fourth[r], absolute[r]);
        }
      });
}

// ---------------------------------------------------------------- regression on time
constexpr double kFlat = 2e-5;  // Qlib treats a series with a standard deviation up to this as constant

// Slope, R-squared and residual of a regression on time, x = -k for the row k steps back.
static void rolling_regression(const RollingStatsJob& job, const RollingBlock& block, const RollingSeries& x,
                               double* out) {
  const double *const value = x.value, *const valid = x.valid, *const base = x.base;
  sum_over_windows<6>(
      job, block, out,
      [&](int64_t r, int64_t k, int64_t lanes, Vector<double>* sums) __attribute__((always_inline)) {
        const auto back = static_cast<double>(k);
        const Vector<double> is_valid = load<double>(valid + r - k, lanes);
        const Vector<double> difference =
            is_valid * (load<double>(value + r - k, lanes) - load<double>(base + r, lanes));
        sums[0] += is_valid;
        sums[1] -= back * is_valid;
        sums[2] += back * back * is_valid;
        sums[3] += difference;
        sums[4] -= back * difference;
        sums[5] += difference * difference;
      },
      [&](int64_t r, int64_t, int64_t lanes, const Vector<double>(&sums)[6]) __attribute__((always_inline)) {
        const auto& [n, sx, sxx, sy, sxy, syy] = sums;
        const Vector<double> xy = n * sxy - sx * sy, xx = n * sxx - sx * sx, yy = n * syy - sy * sy;
        const Vector<double> slope = where(n > 1, xy / xx);
        if (job.kind == RollingKind::kSlope) return slope;
        if (job.kind == RollingKind::kResi) {
          const Vector<double> difference = load<double>(value + r, lanes) - load<double>(base + r, lanes);
          return where(load<double>(valid + r, lanes) > 0, difference - (sy - slope * sx) / n);
        }
        const Integers<double> is_constant = root(yy / (n * (n - 1))) <= kFlat;
        return where(~is_constant & (n > 1), xy * xy / (xx * yy));
      });
}

// ---------------------------------------------------------------- pairs
// Whether the standard deviation is at most kFlat.
QFAST_ALWAYS_INLINE Integers<double> is_flat(Vector<double> n, Vector<double> sum, Vector<double> squares) {
  return (n > 1) & (root((squares - sum * sum / n) / (n - 1)) <= kFlat);
}

// Covariance and correlation of the rows where both series have a value. p and q are the differences from the
// base of each series. The last six sums use all values of one series, because Qlib tests the standard
// deviation of each series.
static void rolling_pairs(const RollingStatsJob& job, const RollingBlock& block, const RollingSeries& x,
                          const RollingSeries& y, double* out) {
  sum_over_windows<12>(
      job, block, out,
      [&](int64_t r, int64_t k, int64_t lanes, Vector<double>* sums) __attribute__((always_inline)) {
        const auto at = [&](const double* series)
                            __attribute__((always_inline)) { return load<double>(series, lanes); };
        const Vector<double> valid_x = at(x.valid + r - k), valid_y = at(y.valid + r - k),
                             valid_xy = valid_x * valid_y;
        const Vector<double> p = valid_x * (at(x.value + r - k) - at(x.base + r));
        const Vector<double> q = valid_y * (at(y.value + r - k) - at(y.base + r));
        sums[0] += valid_xy;
        sums[1] += valid_xy * p;
        sums[2] += valid_xy * q;
        sums[3] += valid_xy * p * p;
        sums[4] += valid_xy * q * q;
        sums[5] += p * q;
        sums[6] += valid_x;
        sums[7] += p;
        sums[8] += p * p;
        sums[9] += valid_y;
        sums[10] += q;
        sums[11] += q * q;
      },
      [&](int64_t, int64_t, int64_t, const Vector<double>(&sums)[12]) __attribute__((always_inline)) {
        const auto& [n, sx, sy, sxx, syy, sxy, xn, xs, xq, yn, ys, yq] = sums;
        const Vector<double> xy = sxy - sx * sy / n;
        if (job.kind == RollingKind::kCov) return where(n > 1, xy / (n - 1));
        const Vector<double> xx = sxx - sx * sx / n, yy = syy - sy * sy / n;
        const Integers<double> is_constant = is_flat(xn, xs, xq) | is_flat(yn, ys, yq);
        return where(~is_constant & (n > 1), xy / root(xx * yy));
      });
}

// ---------------------------------------------------------------- order
// The largest value (Sign 1) or the smallest (Sign -1), or its position in the window. Among
// equal values the position is that of the oldest, as in numpy.argmax. If values are missing, it is the
// position of the oldest missing value.
template <int Sign>
static void rolling_extremes(const RollingStatsJob& job, const RollingBlock& block, const RollingSeries& x,
                             double* out0) {
  double *__restrict n = block.sum(0), *__restrict best = block.sum(1), *__restrict position = block.sum(2),
                     *__restrict oldest_missing = block.sum(3);
  const double* __restrict value = x.value, * __restrict valid = x.valid;
  const bool wants_position = job.kind == RollingKind::kIdxMax || job.kind == RollingKind::kIdxMin;
  QFAST_BLOCK_LOOP(block.begin) best[r] = -__builtin_inf(), oldest_missing[r] = -1;
  over_windows(
      job, block,
      [&](int64_t k, int64_t first) __attribute__((always_inline)) {
        const auto back = static_cast<double>(k);
        QFAST_BLOCK_LOOP(first) {
          const bool is_valid = valid[r - k] > 0;
          const double candidate = is_valid ? Sign * value[r - k] : -__builtin_inf();
          position[r] = candidate >= best[r] ? back : position[r];
          best[r] = candidate >= best[r] ? candidate : best[r];
          oldest_missing[r] = is_valid ? oldest_missing[r] : back;
          n[r] += valid[r - k];
        }
      },
      [&](int64_t window, int64_t w) __attribute__((always_inline)) {
        double* const __restrict out = out0 + w * job.rows;
        QFAST_BLOCK_LOOP(block.begin) {
          const auto length = static_cast<double>(smaller(window, r + 1));
          const double back = oldest_missing[r] >= 0 ? oldest_missing[r] : position[r];
          out[r] = n[r] > 0 ? (wants_position ? length - back : Sign * best[r]) : kMissing;
        }
      });
}

// Percentile rank of the current value in its window. Equal values get their average rank.
static void rolling_ranks(const RollingStatsJob& job, const RollingBlock& block, const RollingSeries& x,
                          double* out0) {
  double* __restrict n = block.sum(0), * __restrict less = block.sum(1), * __restrict equal = block.sum(2);
  const double* __restrict value = x.value, * __restrict valid = x.valid;
  over_windows(
      job, block,
      [&](int64_t k, int64_t first) __attribute__((always_inline)) {
        QFAST_BLOCK_LOOP(first) {
          const double is_valid = valid[r - k], other = value[r - k];
          n[r] += is_valid;
          less[r] += other < value[r] ? is_valid : 0;
          equal[r] += other == value[r] ? is_valid : 0;
        }
      },
      [&](int64_t, int64_t w) __attribute__((always_inline)) {
        double* const __restrict out = out0 + w * job.rows;
        QFAST_BLOCK_LOOP(block.begin) {
          out[r] = valid[r] > 0 ? (less[r] + (equal[r] + 1) / 2) / n[r] : kMissing;
        }
      });
}

// Returns how many of sorted[0, count) are less than `value`. At least one vector of infinities follows the
// values.
QFAST_ALWAYS_INLINE int64_t sorted_place(const double* sorted, int64_t count, double value) {
  // Bisect without branches, which would be mispredicted. Counting the last few vectors is faster than more
  // bisection.
  const double* from = sorted;
  while (count > 8 * kLanes<double>) {
    const int64_t half = count / 2;
    from = from[half - 1] < value ? from + half : from;
    count -= half;
  }
  Integers<double> less = {};
  for (int64_t i = 0; i < count; i += kLanes<double>)
    less -= load<double>(from + i, kLanes<double>) < splat(value);
  int64_t total = 0;
  for (int64_t i = 0; i < kLanes<double>; ++i) total += less[i];
  return from - sorted + total;
}

// The sorted values of a window, followed by at least one vector of infinities.
struct SortedWindow {
  double* values;
  int64_t count;

  QFAST_INLINE_MEMBER void move(int64_t to, int64_t from, int64_t length) {
    __builtin_memmove(values + to, values + from, sizeof(double) * length);
  }

  // Removes the old value and inserts the new one, either of which may be missing. The gap of the old value,
  // or the end, moves to the position of the new value, or to the end.
  QFAST_INLINE_MEMBER void replace(bool removes, double old_value, bool inserts, double new_value) {
    int64_t gap = removes ? sorted_place(values, count, old_value) : count;
    const int64_t place = inserts ? sorted_place(values, count, new_value) : count;
    if (place > gap) {
      move(gap, gap + 1, place - gap - 1);
      gap = place - 1;
    } else {
      move(place + 1, place, gap - place);
      gap = place;
    }
    values[gap] = inserts ? new_value : __builtin_inf();
    count += static_cast<int64_t>(inserts) - static_cast<int64_t>(removes);
  }

  // Quantile with linear interpolation between two values.
  QFAST_INLINE_MEMBER double quantile(double fraction) const {
    if (count == 0) return kMissing;
    const double position = fraction * static_cast<double>(count - 1);
    const auto low = static_cast<int64_t>(position);
    const double high = low + 1 < count ? values[low + 1] : values[low];
    return values[low] + (high - values[low]) * (position - static_cast<double>(low));
  }
};

// Updates a few sorted windows for each row, so their latencies overlap.
static void rolling_quantiles(const RollingStatsJob& job, const RollingSeries& x, int64_t rows,
                              double* scratch, double* out) {
  static_assert(kSortedMargin >= kLanes<double>);
  for (int64_t first = 0; first < job.window_count; first += kSortedWindows) {
    const int64_t windows = smaller(kSortedWindows, job.window_count - first);
    SortedWindow sorted[kSortedWindows];
    double* next_free = scratch;
    for (int64_t w = 0; w < windows; ++w) {
      const int64_t length = smaller(job.windows[first + w], rows) + kSortedMargin;
      sorted[w] = {next_free, 0};
      for (int64_t i = 0; i < length; ++i) *next_free++ = __builtin_inf();
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t w = 0; w < windows; ++w) {
        const int64_t removed_row = r - job.windows[first + w];
        const bool removes = removed_row >= 0 && x.valid[removed_row] > 0;
        sorted[w].replace(removes, removes ? x.value[removed_row] : 0, x.valid[r] > 0, x.value[r]);
        out[(first + w) * job.rows + r] = sorted[w].quantile(job.parameter);
      }
    }
  }
}

// ---------------------------------------------------------------- exponential mean
// Exponentially weighted mean. The weights decrease by the factor 1 - parameter per row, also for missing
// values, and are normalized over the values that exist.
static void exponential_mean(const RollingStatsJob& job, const RollingSeries& x, int64_t rows, double* out) {
  double weight = 0, mean = kMissing;
  for (int64_t r = 0; r < rows; ++r) {
    weight *= 1 - job.parameter;
    if (x.valid[r] > 0) {
      mean = weight > 0 ? mean + (x.value[r] - mean) / (weight + 1) : x.value[r];
      weight += 1;
    }
    out[r] = mean;
  }
}

// ---------------------------------------------------------------- instruments
static void rolling_blocks(const RollingStatsJob& job, const RollingSeries& x, const RollingSeries& y,
                           int64_t rows, double* sums, double* out) {
  for (int64_t begin = 0; begin < rows; begin += kRollingBlock) {
    RollingBlock block{begin, smaller(begin + kRollingBlock, rows), {}};
    for (int64_t i = 0; i < kRollingSums * kRollingBlock; ++i) sums[i] = 0;
    for (int64_t i = 0; i < kRollingSums; ++i) block.sums[i] = sums + i * kRollingBlock;
    switch (job.kind) {
      case RollingKind::kMax:
      case RollingKind::kIdxMax:
        rolling_extremes<1>(job, block, x, out);
        break;
      case RollingKind::kMin:
      case RollingKind::kIdxMin:
        rolling_extremes<-1>(job, block, x, out);
        break;
      case RollingKind::kRank:
        rolling_ranks(job, block, x, out);
        break;
      case RollingKind::kSlope:
      case RollingKind::kRsquare:
      case RollingKind::kResi:
        rolling_regression(job, block, x, out);
        break;
      case RollingKind::kCov:
      case RollingKind::kCorr:
        rolling_pairs(job, block, x, y, out);
        break;
      case RollingKind::kCount:
      case RollingKind::kSum:
      case RollingKind::kMean:
        rolling_sums<false>(job, block, x, out);
        break;
      case RollingKind::kWma:
        rolling_sums<true>(job, block, x, out);
        break;
      case RollingKind::kVar:
      case RollingKind::kStd:
        rolling_variances(job, block, x, out);
        break;
      default:
        rolling_moments(job, block, x, out);
    }
  }
}

#undef QFAST_BLOCK_LOOP

}  // namespace

// Computes the statistic for instruments [begin, end).
void rolling(const RollingStatsJob& job, int64_t begin, int64_t end, int64_t longest, double* scratch) {
  double* const sums = scratch + 6 * longest;
  const RollingSeries x{scratch, scratch + longest, scratch + 2 * longest},
      y{scratch + 3 * longest, scratch + 4 * longest, scratch + 5 * longest};
  // Qlib's regressions use infinite values. pandas, which computes Qlib's other statistics, treats them as
  // missing.
  const bool infinite_is_missing =
      job.kind != RollingKind::kSlope && job.kind != RollingKind::kRsquare && job.kind != RollingKind::kResi;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = job.start[i], rows = job.stop[i] - first;
    if (rows <= 0) continue;
    prepare_rolling(job.x + first, rows, infinite_is_missing, x.value, x.valid, x.base);
    if (job.y != nullptr) prepare_rolling(job.y + first, rows, infinite_is_missing, y.value, y.valid, y.base);
    double* const out = rolling_out(job, 0, first);
    if (job.kind == RollingKind::kQuantile) {
      rolling_quantiles(job, x, rows, sums, out);
    } else if (job.kind == RollingKind::kEma) {
      exponential_mean(job, x, rows, out);
    } else {
      rolling_blocks(job, x, y, rows, sums, out);
    }
  }
}
