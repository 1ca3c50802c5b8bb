// Rolling statistics on the CPU: checks, scratch and threads. What is computed: rolling_kernels.h; for whom:
// qfast/data/rolling.py.
#include "rolling/rolling_checks.h"

#include <algorithm>
#include <array>
#include <utility>

#include "common.h"
#include "cpu_dispatch.h"

namespace qfast {
namespace {

constexpr std::array<std::pair<const char*, RollingKind>, 21> kKinds = {{
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
    {"corr", RollingKind::kCorr},
}};

}  // namespace

RollingKind rolling_kind(const std::string& name) {
  for (const auto& [known, kind] : kKinds)
    if (name == known) return kind;
  QFAST_CHECK(false, "rolling: there is no statistic '", name, "'.");
  return RollingKind::kCount;
}

void run_rolling(const RollingStatsJob& job, int64_t instruments) {
  const bool pair = job.kind == RollingKind::kCov || job.kind == RollingKind::kCorr;
  QFAST_CHECK(pair == (job.y != nullptr),
              "rolling: a second series is for cov and corr alone, and they need it.");
  QFAST_CHECK(job.window_count > 0, "rolling: windows: expected at least one.");
  QFAST_CHECK(job.kind != RollingKind::kEma || job.window_count == 1, "rolling: ema: expected one window.");
  for (int64_t w = 0; w < job.window_count; ++w)
    QFAST_CHECK(job.windows[w] > (w == 0 ? 0 : job.windows[w - 1]),
                "rolling: windows: expected them ascending from 1, got ", job.windows[w], " at place ", w,
                ".");
  int64_t longest = 0;
  for (int64_t i = 0; i < instruments; ++i) {
    const int64_t first = job.start[i], last = job.stop[i];
    QFAST_CHECK(first >= 0 && last <= job.rows, "rolling: instrument ", i, ": rows ", first, " to ", last,
                " do not lie within ", job.rows, ".");
    longest = std::max(longest, last - first);
  }
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
