// Rolling statistics on the CPU: checks, scratch and threads. rolling_kernels.h contains the kernels,
// qfast/data/rolling.py calls them.
#include "rolling/rolling_checks.h"

#include <algorithm>
#include <array>
#include <utility>

#include "common.h"
#include "cpu_dispatch.h"

namespace qfast {
namespace {

constexpr std::array<std::pair<const char*, RollingKind>, 22> kKinds = {{
    {"count", RollingKind::kCount},   {"sum", RollingKind::kSum},
    {"mean", RollingKind::kMean},     {"var", RollingKind::kVar},
    {"std", RollingKind::kStd},       {"skew", RollingKind::kSkew},
    {"kurt", RollingKind::kKurt},     {"mad", RollingKind::kMad},
    {"max", RollingKind::kMax},       {"min", RollingKind::kMin},
    {"idxmax", RollingKind::kIdxMax}, {"idxmin", RollingKind::kIdxMin},
    {"rank", RollingKind::kRank},     {"quantile", RollingKind::kQuantile},
    {"slope", RollingKind::kSlope},   {"rsquare", RollingKind::kRsquare},
    {"resi", RollingKind::kResi},     {"wma", RollingKind::kWma},
    {"ema", RollingKind::kEma},       {"cov", RollingKind::kCov},
    {"corr", RollingKind::kCorr},     {"median", RollingKind::kMedian},
}};

}  // namespace

RollingKind rolling_kind(const std::string& name) {
  std::string names;
  for (const auto& [kind_name, kind] : kKinds) {
    if (name == kind_name) return kind;
    names += (names.empty() ? "" : ", ") + std::string(kind_name);
  }
  QFAST_CHECK(false, "rolling: kind: expected one of ", names, ", got '", name, "'.");
  return RollingKind::kCount;
}

int64_t check_rolling(const RollingStatsJob& job, int64_t instruments, int64_t least) {
  const bool is_pair = job.kind == RollingKind::kCov || job.kind == RollingKind::kCorr;
  QFAST_CHECK(
      is_pair == (job.y != nullptr), "rolling: y: expected ",
      is_pair ? "a second series for cov and corr, got none." : "none except for cov and corr, got one.");
  QFAST_CHECK(job.window_count > 0, "rolling: windows: expected at least one, got ", job.window_count, ".");
  QFAST_CHECK(job.kind != RollingKind::kEma || job.window_count == 1,
              "rolling: windows: expected one window for ema, got ", job.window_count, ".");
  for (int64_t w = 0; w < job.window_count; ++w)
    QFAST_CHECK(job.windows[w] > (w == 0 ? least - 1 : job.windows[w - 1]),
                "rolling: windows: expected ascending lengths of at least ", least, ", got ", job.windows[w],
                " at index ", w, ".");
  int64_t longest = 0;
  for (int64_t i = 0; i < instruments; ++i) {
    const int64_t first = job.start[i], last = job.stop[i];
    QFAST_CHECK(first >= 0 && last <= job.rows, "rolling: instrument ", i, ": expected rows within 0 to ",
                job.rows, ", got ", first, " to ", last, ".");
    longest = std::max(longest, last - first);
  }
  return longest;
}

void run_rolling(const RollingStatsJob& job, int64_t instruments) {
  const int64_t longest = check_rolling(job, instruments, 1);
  QFAST_CHECK(job.kind != RollingKind::kMedian,
              "rolling: kind: expected quantile with parameter 0.5 in place of 'median'.");
  if (longest == 0) return;
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), instruments);
  std::vector<double> scratch(workers * rolling_scratch(longest));
  const auto kernel = cpu_kernels().rolling;
  parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w)
      kernel(job, instruments * w / workers, instruments * (w + 1) / workers, longest,
             scratch.data() + w * rolling_scratch(longest));
  });
}

}  // namespace qfast
