// Rolling statistics over the rows of instruments.
#pragma once

#include <string>
#include <vector>

#include "rolling/rolling.h"

namespace qfast {

// Throws std::invalid_argument for a name that is none.
RollingKind rolling_kind(const std::string& name);

// Fills job.out at the instruments' rows. Throws std::invalid_argument for windows that do not ascend from 1,
// rows beyond the series and a second series where there is none, or none where there is one.
void run_rolling(const RollingStatsJob& job, int64_t instruments);

}  // namespace qfast
