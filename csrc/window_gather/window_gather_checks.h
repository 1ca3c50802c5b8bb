// Argument checks of the window operators, shared by CPU and CUDA. Every message names the argument, the
// expected value and the actual one.
#pragma once

#include "common.h"
#include "window_gather/window_gather.h"

namespace qfast {

constexpr int64_t kMostSteps = int64_t{1} << 31;  // positions are 32-bit numbers, so no window is longer

inline void check_panel(const char* op, const Tensor& panel, int64_t column_begin, int64_t column_end) {
  check_floating(op, "panel", panel);
  check_dims(op, "panel", panel, 2, "[R, D]");
  QFAST_CHECK(0 <= column_begin && column_begin <= column_end && column_end <= panel.size(1), op,
              ": columns: expected 0 <= begin <= end <= ", panel.size(1), ", got (", column_begin, ", ",
              column_end, ").");
}

inline void check_table(const char* op, const char* name, const Tensor& table, const Tensor& first,
                        const char* first_name, int64_t rows) {
  QFAST_CHECK(table.scalar_type() == ScalarType::Int, op, ": index.", name, ": expected dtype int32, got ",
              torch::headeronly::toString(table.scalar_type()), ".");
  QFAST_CHECK(table.dim() == 1 && table.size(0) == rows, op, ": index.", name, ": expected shape (", rows,
              ",), got ", shape_text(table), ".");
  check_same_device(op, name, table, first, first_name);
}

// Contiguous tables of a WindowIndex, and the pointers to them. The tensors own the memory of the pointers.
struct IndexTables {
  Tensor position, back, run, last_row;
  WindowTables tables;
};

inline IndexTables check_tables(const char* op, const Tensor& first, const char* first_name,
                                const Tensor& position, const Tensor& back, const Tensor& run,
                                const Tensor& last_row, int64_t step_len, int64_t fill,
                                int64_t first_position) {
  const int64_t rows = first.size(0);
  check_table(op, "position", position, first, first_name, rows);
  check_table(op, "back", back, first, first_name, rows);
  check_table(op, "run", run, first, first_name, rows);
  check_row_numbers(op, "last_row", last_row);
  check_dims(op, "last_row", last_row, 1, "[B]");
  check_same_device(op, "last_row", last_row, first, first_name);
  QFAST_CHECK(step_len >= 1 && step_len < kMostSteps, op, ": step_len: expected 1 to 2^31 - 1, got ",
              step_len, ".");
  QFAST_CHECK(fill >= 0 && fill <= 2, op, ": fill: expected 0 (none), 1 (ffill) or 2 (ffill and bfill), got ",
              fill, ".");
  IndexTables window_index{
      as_contiguous(position), as_contiguous(back), as_contiguous(run), as_contiguous(last_row), {}};
  window_index.tables = {window_index.position.const_data_ptr<int32_t>(),
                         window_index.back.const_data_ptr<int32_t>(),
                         window_index.run.const_data_ptr<int32_t>(),
                         rows,
                         step_len,
                         first_position,
                         static_cast<Fill>(fill)};
  return window_index;
}

inline RowNumbers row_numbers(const Tensor& rows) {
  return {rows.const_data_ptr(), rows.scalar_type() == ScalarType::Long};
}

// Returns the panel with adjacent columns. The rows may have any stride.
inline Tensor adjacent_columns(const Tensor& panel) {
  return panel.size(1) > 1 && panel.stride(1) != 1 ? as_contiguous(panel) : panel;
}

inline Tensor empty_windows(const Tensor& panel, int64_t windows, int64_t steps, int64_t width,
                            bool transposed) {
  const int64_t shape[] = {windows, transposed ? width : steps, transposed ? steps : width};
  return new_tensor(panel, {shape, 3});
}

inline void check_backward(const char* op, const Tensor& grad, const Tensor& rows, int64_t n_rows,
                           int64_t n_columns, int64_t column_begin, bool transposed) {
  check_floating(op, "grad", grad);
  check_dims(op, "grad", grad, 3, transposed ? "[B, D, T]" : "[B, T, D]");
  check_row_numbers(op, "rows", rows);
  check_dims(op, "rows", rows, 2, "[B, T]");
  check_same_device(op, "rows", rows, grad, "grad");
  const int64_t width = grad.size(transposed ? 1 : 2);
  QFAST_CHECK(rows.size(0) == grad.size(0) && rows.size(1) == grad.size(transposed ? 2 : 1), op,
              ": rows: expected one row number for each step of grad ", shape_text(grad), ", got ",
              shape_text(rows), ".");
  QFAST_CHECK(n_rows >= 0 && n_columns >= 0, op, ": expected a panel of at least 0 rows and columns, got ",
              n_rows, " and ", n_columns, ".");
  // column_begin + width may overflow.
  QFAST_CHECK(column_begin >= 0 && column_begin <= n_columns - width, op, ": column_begin: expected ", width,
              " columns to fit in ", n_columns, ", got column_begin ", column_begin, ".");
}

}  // namespace qfast
