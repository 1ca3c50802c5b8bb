// Rolling statistics over the rows of instruments.
#pragma once

#include <string>
#include <vector>

#include "rolling/rolling.h"

namespace qfast {

// Returns the statistic of that name. Throws std::invalid_argument if there is none.
RollingKind rolling_kind(const std::string& name);

// Computes job.out for the rows of all instruments. Throws std::invalid_argument if the windows do not ascend
// from at least 1, an instrument has rows outside the series, or a second series is missing or not used.
void run_rolling(const RollingStatsJob& job, int64_t instruments);

}  // namespace qfast
