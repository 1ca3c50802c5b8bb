// Arguments of the window kernels, shared by host code, the CPU instruction sets and CUDA.
#pragma once

#include <cstdint>

namespace qfast {

enum class Fill : int64_t { none = 0, ffill = 1, ffill_bfill = 2 };

// The three tables of a WindowIndex and what turns a row into a window.
struct WindowTables {
  const int32_t* position;
  const int32_t* back;
  const int32_t* run;
  int64_t panel_rows;
  int64_t step_len;
  int64_t first_position;
  Fill fill;
};

// Row numbers as they came: int32 or int64.
struct RowNumbers {
  const void* data;
  bool wide;
};

// out[b, t, :] = panel[row(b, t), columns] for the windows of a batch. `index` is [B, T] explicit rows, or
// [B] last rows if `tables` is set. Sizes are in bytes: the copy does not care for the element type.
struct GatherJob {
  const unsigned char* panel;  // first wanted column of row 0
  int64_t row_stride;          // bytes from one panel row to the next
  int64_t width;               // bytes of the wanted columns
  int64_t element;             // bytes of one element, 4 or 8
  int64_t panel_rows;
  int64_t step_len;
  RowNumbers index;
  const WindowTables* tables;    // null: explicit rows
  const unsigned char* missing;  // `width` bytes of NaN, read where there is no row
  unsigned char* out;
  bool transposed;  // [B, D, T] instead of [B, T, D]
  bool stream;      // write around the caches
};

// rows[b, t] of the windows of a batch.
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
  void* grad_panel;  // [R, D], contiguous, uninitialised
  bool transposed;
};

}  // namespace qfast
