// Tables of a WindowIndex, which map a panel row to the rows of its window.
#pragma once

#include <cstdint>

namespace qfast {

// Fills `position`, `back` and `run` [R] from codes that are sorted by (instrument, date). `live` [R] may be
// null if all rows are live. qfast/ops/window_index.py defines the tables. Throws std::invalid_argument with
// the first row that is out of order.
void build_window_index(const int32_t* instruments, const int32_t* dates, const bool* live, int64_t rows,
                        int32_t* position, int32_t* back, int32_t* run);

}  // namespace qfast
