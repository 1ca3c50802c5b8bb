// Arguments of the kernels of rolling statistics. Shared by host code and all CPU instruction sets.
#pragma once

#include <cstdint>

namespace qfast {

enum class RollingKind : int32_t {
  kCount,
  kSum,
  kMean,
  kVar,
  kStd,
  kSkew,
  kKurt,
  kMad,
  kMax,
  kMin,
  kIdxMax,
  kIdxMin,
  kRank,
  kQuantile,
  kSlope,
  kRsquare,
  kResi,
  kWma,
  kEma,
  kCov,
  kCorr,
  kMedian,  // of row-by-row updates only; otherwise the quantile 0.5
};

// The series of all instruments, concatenated. Rows that belong to no instrument are not written.
struct RollingStatsJob {
  RollingKind kind;
  const double *x, *y;          // y is the second series of cov and corr, otherwise null
  const int64_t *start, *stop;  // rows of each instrument
  const int64_t* windows;       // lengths in rows, ascending, at least 1
  int64_t window_count;
  double parameter;  // the quantile, or for kEma the weight of the newest value
  double* out;       // [window][row]
  int64_t rows;
};

constexpr int64_t kRollingBlock = 512;  // rows whose sums are computed together
constexpr int64_t kRollingSums = 14;    // largest number of sums of a statistic

constexpr int64_t kSortedWindows = 8;  // sorted windows that are updated together
constexpr int64_t kSortedMargin = 8;   // infinities after each sorted window, at least one vector

// Number of doubles of scratch for instruments of at most `longest` rows: two series, and sums or sorted
// windows.
inline int64_t rolling_scratch(int64_t longest) {
  const int64_t sums = kRollingSums * kRollingBlock, sorted = kSortedWindows * (longest + kSortedMargin);
  return 6 * longest + (sums > sorted ? sums : sorted);
}

}  // namespace qfast
