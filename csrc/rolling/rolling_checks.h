// Rolling statistics over the rows of instruments.
#pragma once

#include <string>
#include <vector>

#include "rolling/rolling.h"

namespace qfast {

// Returns the statistic of that name. Throws std::invalid_argument if there is none.
RollingKind rolling_kind(const std::string& name);

// Returns the number of rows of the longest instrument. Throws std::invalid_argument if the windows do not
// ascend from at least `least`, an instrument has rows outside the series, or a second series is missing or
// not used.
int64_t check_rolling(const RollingStatsJob& job, int64_t instruments, int64_t least);

// Computes job.out for the rows of all instruments, every window anew.
void run_rolling(const RollingStatsJob& job, int64_t instruments);

// Computes job.out with the row-by-row updates of pandas and Qlib, see rolling_online.h. Window 0 means all
// rows so far. For kEma the parameter is the center of mass. kCount, kIdxMax, kIdxMin and kRank have no
// updates.
void run_rolling_online(const RollingStatsJob& job, int64_t instruments);

}  // namespace qfast
