// Rolling statistics by the row-by-row updates of pandas 3.1 and Qlib, with their rounding errors
// (compat="qlib"). rolling_online.h contains the updates, this file runs them over the rows of instruments.
//
// Each row costs the removal of one value and the addition of another for every window, 10 to 40 flops,
// whatever the window's length; order statistics cost a binary search and a move of half the window. A row
// reads and writes 8 bytes per window. The bound is the latency of the chain of updates, a few dozen cycles
// per row, so the windows of a series advance together and their chains overlap.
//
// This unit is compiled once, for the default target, and without fused multiplication and addition. The
// results are therefore the same on every CPU.
#include "rolling/rolling_checks.h"

#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include <algorithm>
#include <vector>

#include "common.h"
#include "rolling/rolling_online.h"

namespace qfast {
namespace {

constexpr double kFlat = 2e-5;  // Qlib treats a series with a standard deviation up to this as constant
constexpr int64_t kWindowsTogether = 4;

// One instrument of a job. Infinite values of x and y are NaN, as in pandas; `raw` is the series itself.
struct Instrument {
  const RollingStatsJob& job;
  int64_t rows;
  const double *raw, *x, *y;
  double* out;      // the first row of the first window
  double* scratch;  // one value per row
};

// Number of rows of a window that ends at `row`; window 0 means all rows so far.
int64_t rows_in_window(int64_t window, int64_t row) { return window == 0 || window > row ? row + 1 : window; }

double second_of(const Instrument& series, int64_t row) { return series.y == nullptr ? 0 : series.y[row]; }

template <class State>
void restart_at(State& state, const Instrument& series, int64_t first, int64_t last) {
  state.restart(series.x[first], second_of(series, first));
  for (int64_t r = first; r <= last; ++r) state.add(series.x[r], second_of(series, r));
}

template <class State>
inline void update(State& state, const Instrument& series, int64_t window, int64_t row) {
  const int64_t first = row + 1 - rows_in_window(window, row);
  if (first == row) {  // the window shares no row with the one before
    restart_at(state, series, first, row);
  } else {
    if (first > 0 && window > 0) state.remove(series.x[first - 1], second_of(series, first - 1));
    state.add(series.x[row], second_of(series, row));
    if (state.unstable) restart_at(state, series, first, row);
  }
  if constexpr (requires { state.unstable = false; }) state.unstable = false;
}

// Computes windows [begin, end) of the job.
template <class State>
void run_windows(const Instrument& series, int64_t begin, int64_t end, double* out, int64_t stride) {
  State states[kWindowsTogether];
  for (int64_t r = 0; r < series.rows; ++r)
    for (int64_t w = begin; w < end; ++w) {
      State& state = states[w - begin];
      update(state, series, series.job.windows[w], r);
      out[(w - begin) * stride + r] = state.result();
    }
}

template <class State>
void run_updates(const Instrument& series) {
  for (int64_t w = 0; w < series.job.window_count; w += kWindowsTogether)
    run_windows<State>(series, w, std::min(w + kWindowsTogether, series.job.window_count),
                       series.out + w * series.job.rows, series.job.rows);
}

template <online::Line Kind>
void run_regression(const Instrument& series) {
  for (int64_t w = 0; w < series.job.window_count; ++w) {
    const int64_t window = series.job.windows[w];
    double* const out = series.out + w * series.job.rows;
    online::Regression<Kind> line;
    for (int64_t r = 0; r < series.rows; ++r) {
      if (window > 0) {
        line.advance();
        if (r >= window) line.remove(series.raw[r - window]);
      }
      line.add(series.raw[r], static_cast<double>(window > 0 ? window : r + 1));
      out[r] = line.result();
    }
  }
}

// Replaces results by NaN where the standard deviation of a series is at most kFlat. Qlib does not test
// windows of all rows so far.
void remove_flat(const Instrument& series, const double* values) {
  const Instrument single{series.job, series.rows, nullptr, values, nullptr, series.out, series.scratch};
  for (int64_t w = 0; w < series.job.window_count; ++w) {
    if (series.job.windows[w] == 0) continue;
    run_windows<online::Variance<true>>(single, w, w + 1, series.scratch, 0);
    double* const out = series.out + w * series.job.rows;
    for (int64_t r = 0; r < series.rows; ++r)
      if (series.scratch[r] <= kFlat) out[r] = online::kNoValue;
  }
}

// The largest value (Sign 1) or the smallest (Sign -1). Of equal values the newest is returned, which matters
// for the sign of zero.
template <int Sign>
void run_extreme(const Instrument& series) {
  std::vector<int64_t> candidates(series.rows);
  for (int64_t w = 0; w < series.job.window_count; ++w) {
    double* const out = series.out + w * series.job.rows;
    int64_t begin = 0, end = 0;  // of the candidates, whose values decrease (Sign 1) or increase
    for (int64_t r = 0; r < series.rows; ++r) {
      const double value = series.x[r];
      const int64_t first = r + 1 - rows_in_window(series.job.windows[w], r);
      while (begin < end && candidates[begin] < first) ++begin;
      if (!online::is_missing(value)) {
        while (begin < end && Sign * value >= Sign * series.x[candidates[end - 1]]) --end;
        candidates[end++] = r;
      }
      out[r] = begin < end ? series.x[candidates[begin]] : online::kNoValue;
    }
  }
}

// Quantile of sorted values. Median is the mean of the two values in the middle, which rounds differently.
double quantile_of(const std::vector<double>& sorted, double fraction, bool is_median) {
  const auto n = static_cast<int64_t>(sorted.size());
  if (n == 0) return online::kNoValue;
  if (n == 1) return sorted[0];
  if (is_median) return n % 2 == 1 ? sorted[n / 2] : (sorted[n / 2 - 1] + sorted[n / 2]) / 2;
  const double position = fraction * static_cast<double>(n - 1);
  const auto low = static_cast<int64_t>(position);
  const double beyond = position - static_cast<double>(low);
  return beyond == 0 ? sorted[low] : sorted[low] + (sorted[low + 1] - sorted[low]) * beyond;
}

// A new value is placed after equal ones, and the oldest of equal values is removed first.
void run_quantile(const Instrument& series, bool is_median) {
  std::vector<double> sorted;
  for (int64_t w = 0; w < series.job.window_count; ++w) {
    double* const out = series.out + w * series.job.rows;
    sorted.clear();
    for (int64_t r = 0; r < series.rows; ++r) {
      const int64_t first = r + 1 - rows_in_window(series.job.windows[w], r);
      if (first == r) sorted.clear();
      const double value = series.x[r];
      if (!online::is_missing(value))
        sorted.insert(std::upper_bound(sorted.begin(), sorted.end(), value), value);
      if (first > 0 && first < r && !online::is_missing(series.x[first - 1]))
        sorted.erase(std::lower_bound(sorted.begin(), sorted.end(), series.x[first - 1]));
      out[r] = quantile_of(sorted, series.job.parameter, is_median);
    }
  }
}

// NumPy's sum: eight partial sums, and halves of at most 128 values.
double pairwise_sum(const double* values, int64_t n) {
  if (n > 128) {
    const int64_t half = n / 2 - n / 2 % 8;
    return pairwise_sum(values, half) + pairwise_sum(values + half, n - half);
  }
  double sum = -0.0;
  int64_t i = 0;
  if (n >= 8) {
    double parts[8];
    std::copy(values, values + 8, parts);
    for (i = 8; i + 8 <= n; i += 8)
      for (int64_t k = 0; k < 8; ++k) parts[k] += values[i + k];
    sum = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
  }
  for (; i < n; ++i) sum += values[i];
  return sum;
}

// Mean absolute deviation of the values of a window, or their linearly weighted mean, in which weights of
// missing values count as if their values were 0. `part` has room for the window.
double applied(RollingKind kind, const double* values, int64_t length, double* part) {
  int64_t n = 0;
  for (int64_t i = 0; i < length; ++i) n += !online::is_missing(values[i]);
  const auto count = static_cast<double>(n);
  if (n == 0) return online::kNoValue;
  if (kind == RollingKind::kMad) {
    std::copy_if(values, values + length, part, [](double x) { return !online::is_missing(x); });
    const double mean = pairwise_sum(part, n) / count;
    for (int64_t i = 0; i < n; ++i) part[i] = std::fabs(part[i] - mean);
    return pairwise_sum(part, n) / count;
  }
  const double weights = static_cast<double>(length * (length + 1) / 2);
  for (int64_t i = 0; i < length; ++i)
    part[i] = online::is_missing(values[i]) ? 0 : static_cast<double>(i + 1) / weights * values[i];
  return (0.0 + pairwise_sum(part, length)) / count;  // NumPy starts from 0, which has no negative sign
}

void run_applied(const Instrument& series) {
  for (int64_t w = 0; w < series.job.window_count; ++w)
    for (int64_t r = 0; r < series.rows; ++r) {
      const int64_t length = rows_in_window(series.job.windows[w], r);
      series.out[w * series.job.rows + r] =
          applied(series.job.kind, series.x + r + 1 - length, length, series.scratch);
    }
}

// Exponentially weighted mean. The parameter is pandas' center of mass.
void run_exponential(const Instrument& series) {
  const double fading = 1 - 1 / (1 + series.job.parameter);
  double mean = online::kNoValue, weight = 1;
  for (int64_t r = 0; r < series.rows; ++r) {
    const double value = series.x[r];
    if (online::is_missing(mean)) {
      mean = value;
    } else {
      weight *= fading;
      if (!online::is_missing(value)) {
        if (mean != value) mean = (weight * mean + value) / (weight + 1);
        weight += 1;
      }
    }
    series.out[r] = mean;
  }
}

void run_kind(const Instrument& series) {
  switch (series.job.kind) {
    case RollingKind::kSum:
      return run_updates<online::Sum<false>>(series);
    case RollingKind::kMean:
      return run_updates<online::Sum<true>>(series);
    case RollingKind::kVar:
      return run_updates<online::Variance<false>>(series);
    case RollingKind::kStd:
      return run_updates<online::Variance<true>>(series);
    case RollingKind::kSkew:
      return run_updates<online::Moments<3>>(series);
    case RollingKind::kKurt:
      return run_updates<online::Moments<4>>(series);
    case RollingKind::kCov:
      return run_updates<online::Pair<false>>(series);
    case RollingKind::kCorr:
      run_updates<online::Pair<true>>(series);
      remove_flat(series, series.x);
      return remove_flat(series, series.y);
    case RollingKind::kSlope:
      return run_regression<online::Line::kSlope>(series);
    case RollingKind::kResi:
      return run_regression<online::Line::kResi>(series);
    case RollingKind::kRsquare:
      run_regression<online::Line::kRsquare>(series);
      return remove_flat(series, series.x);
    case RollingKind::kMax:
      return run_extreme<1>(series);
    case RollingKind::kMin:
      return run_extreme<-1>(series);
    case RollingKind::kMedian:
      return run_quantile(series, true);
    case RollingKind::kQuantile:
      if (series.job.parameter == 0) return run_extreme<-1>(series);
      if (series.job.parameter == 1) return run_extreme<1>(series);
      return run_quantile(series, false);
    case RollingKind::kMad:
    case RollingKind::kWma:
      return run_applied(series);
    case RollingKind::kEma:
      return run_exponential(series);
    default:  // run_rolling_online refuses the others
      return;
  }
}

void finite_or_nan(const double* from, int64_t rows, double* to) {
  for (int64_t r = 0; r < rows; ++r) to[r] = from[r] - from[r] == 0 ? from[r] : online::kNoValue;
}

}  // namespace

void run_rolling_online(const RollingStatsJob& job, int64_t instruments) {
  const int64_t longest = check_rolling(job, instruments, 0);
  const bool has_updates = job.kind != RollingKind::kCount && job.kind != RollingKind::kRank &&
                           job.kind != RollingKind::kIdxMax && job.kind != RollingKind::kIdxMin;
  QFAST_CHECK(has_updates, "rolling: kind: expected a statistic that has row-by-row updates, got number ",
              static_cast<int32_t>(job.kind), ". Call rolling(), whose value is exact.");
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), instruments);
  if (longest == 0) return;
  parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> x(longest), y(job.y == nullptr ? 0 : longest), scratch(longest);
    for (int64_t i = instruments * begin / workers; i < instruments * end / workers; ++i) {
      const int64_t first = job.start[i], rows = job.stop[i] - first;
      if (rows <= 0) continue;
      finite_or_nan(job.x + first, rows, x.data());
      if (job.y != nullptr) finite_or_nan(job.y + first, rows, y.data());
      run_kind({job, rows, job.x + first, x.data(), job.y == nullptr ? nullptr : y.data(), job.out + first,
                scratch.data()});
    }
  });
}

}  // namespace qfast
