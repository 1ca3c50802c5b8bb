// Arguments of the window kernels. Shared by host code, all CPU instruction sets and CUDA.
#pragma once

#include <cstdint>

namespace qfast {

enum class Fill : int64_t { none = 0, ffill = 1, ffill_bfill = 2 };

// The three tables of a WindowIndex and the parameters that define the window of a row.
struct WindowTables {
  const int32_t* position;
  const int32_t* back;
  const int32_t* run;
  int64_t panel_rows;
  int64_t step_len;
  int64_t first_position;
  Fill fill;
};

// Row numbers in the caller's dtype, which avoids a converted copy: int64 if `wide`, else int32.
struct RowNumbers {
  const void* data;
  bool wide;
};

// out[b, t, :] = panel[row(b, t), columns] for the windows of a batch. `index` contains the row of every step
// [B, T], or, if `tables` is set, the last row of every window [B]. Sizes are in bytes because the kernels
// copy elements without interpreting them.
struct GatherJob {
  const unsigned char* panel;  // first requested column of row 0
  int64_t row_stride;          // bytes from one panel row to the next
  int64_t width;               // bytes of the requested columns
  int64_t element;             // bytes of one element, 4 or 8
  int64_t panel_rows;
  int64_t step_len;
  RowNumbers index;
  const WindowTables* tables;    // null if `index` has explicit rows
  const unsigned char* missing;  // `width` bytes of NaN, copied for steps without a row
  unsigned char* out;
  bool transposed;  // [B, D, T] instead of [B, T, D]
  bool stream;      // write with non-temporal stores, past the caches
};

// rows[b, t] = panel row of step t of window b, -1 for a step without a row.
struct ResolveJob {
  WindowTables tables;
  RowNumbers last_row;
  int64_t* rows;
};

// grad_panel[r, begin + d] = sum over (b, t) with rows[b, t] == r of grad[b, t, d], in ascending (b, t).
struct ScatterJob {
  const void* grad;  // [B, T, W] or [B, W, T], contiguous
  RowNumbers rows;   // [B, T]
  int64_t windows;
  int64_t step_len;
  int64_t width;          // W, elements
  int64_t panel_columns;  // D, elements
  int64_t column_begin;
  void* grad_panel;  // [R, D], contiguous, uninitialized
  bool transposed;
};

}  // namespace qfast
