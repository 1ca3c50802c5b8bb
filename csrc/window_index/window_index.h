// The tables of a WindowIndex, built on the CPU in time linear in the rows.
#pragma once

#include <cstdint>

namespace qfast {

// `position`, `back`, `run` [R] from codes sorted by (instrument, date); `live` may be null. Defined in
// qfast/ops/window_index.py. Throws std::invalid_argument naming the first row out of order.
void build_window_index(const int32_t* instruments, const int32_t* dates, const bool* live, int64_t rows,
                        int32_t* position, int32_t* back, int32_t* run);

}  // namespace qfast
