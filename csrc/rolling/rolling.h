// Arguments of the kernels of rolling statistics, shared by host code and the CPU instruction sets.
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
};

// Series of all instruments one after the other. Rows outside the instruments' are not touched.
struct RollingStatsJob {
  RollingKind kind;
  const double *x, *y;          // y: the other series of a pair, or null
  const int64_t *start, *stop;  // rows of each instrument
  const int64_t* windows;       // ascending, at least 1
  int64_t window_count;
  double parameter;  // the quantile, or the weight of the newest value of kEma
  double* out;       // [window][row]
  int64_t rows;
};

constexpr int64_t kRollingBlock = 512;  // rows whose sums are taken together
constexpr int64_t kRollingSums = 14;    // at most

constexpr int64_t kSortedWindows = 8;  // windows kept in order together
constexpr int64_t kSortedMargin = 8;   // infinities behind each, a vector of them at least

// Doubles of scratch for instruments of at most `longest` rows: two series, and sums or sorted windows.
inline int64_t rolling_scratch(int64_t longest) {
  const int64_t sums = kRollingSums * kRollingBlock, sorted = kSortedWindows * (longest + kSortedMargin);
  return 6 * longest + (sums > sorted ? sums : sorted);
}

}  // namespace qfast
