// Arguments of the price-window kernel, shared by host code and all CPU instruction sets.
#pragma once

#include <cstdint>

namespace qfast {

// One step of normalization for every column: (x - shift) / scale, limited to [-limit, limit], with NaN
// replaced by `fill`. The neutral values are 0, 1, infinity and NaN.
struct PriceStage {
  const float* shift;  // [C]
  const float* scale;  // [C]
  const float* limit;  // [C]
  const float* fill;   // [C]
};

// out[b, f T + k] = stages(series[f, ends[r] - T + 1 + k] / divisors[divisor_of[f], r]), r = rows[b].
// A row -1 is NaN in every column.
struct PriceWindowJob {
  const float* series;  // [F, P]
  int64_t places;       // P
  const void* ends;     // [R], int64 if `wide_ends`, otherwise int32
  bool wide_ends;
  const float* divisors;      // [K, R]
  int64_t panel_rows;         // R
  const int64_t* divisor_of;  // [F]
  const int64_t* rows;        // [B]
  int64_t fields;             // F
  int64_t window;             // T
  const PriceStage* stages;
  int64_t stage_count;
  float* out;  // [B, F T]
};

}  // namespace qfast
