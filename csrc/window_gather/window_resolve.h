// The fill rule of a rolling window, shared by CPU and CUDA. It is included inside the namespace of an
// instruction set or of the device, so it uses the language only and no library.
#pragma once

// Writes the panel row of each of the T steps of the window that ends at row r, -1 for steps without a row.
// It writes T numbers and reads each table once per run of rows without holes. No search is needed.
QFAST_DEVICE_INLINE void resolve_window(const WindowTables& tables, int64_t r, int64_t* rows) {
  const int64_t end = r < 0 || r >= tables.panel_rows ? -1 : tables.position[r];
  const int64_t window_start = end - tables.step_len + 1;
  const int64_t first = window_start > tables.first_position ? window_start : tables.first_position;
  int64_t t = tables.step_len - 1;
  int64_t earliest = -1;
  // Each iteration goes back in time by one hole: it fills the steps between row r and the step after it,
  // then writes r and the consecutive rows before r. The bounds by t and r have no effect on tables from
  // build_window_index. They prevent accesses outside the arrays for any other tables.
  for (int64_t at = end; end >= 0 && at >= first && t >= 0;) {
    for (; t > at - window_start; --t) rows[t] = tables.fill == Fill::none ? -1 : r;
    int64_t before = tables.run[r] < at - first ? tables.run[r] : at - first;
    if (before > t) before = t;
    if (before > r) before = r;
    for (earliest = r; before >= 0; --before, --t) rows[t] = earliest = r--;
    r = earliest;
    const int64_t distance = tables.back[r];
    if (distance <= 0 || distance > r) break;
    r -= distance;
    at = tables.position[r];
  }
  const int64_t leading = tables.fill == Fill::ffill_bfill ? earliest : -1;
  for (; t >= 0; --t) rows[t] = leading;
}

// Returns the first row of the window that ends at row r if its T rows are adjacent in the panel, else -1.
QFAST_DEVICE_INLINE int64_t contiguous_start(const WindowTables& tables, int64_t r) {
  if (r < 0 || r >= tables.panel_rows || tables.run[r] < tables.step_len - 1 || r < tables.step_len - 1)
    return -1;
  if (tables.first_position > 0 && tables.position[r] - tables.step_len + 1 < tables.first_position)
    return -1;
  // run is 0 for a dead row, so a window of one step passes the tests above and needs this one. The position
  // of a dead row is -1.
  if (tables.step_len == 1 && (tables.position[r] < 0 || tables.position[r] < tables.first_position))
    return -1;
  return r - tables.step_len + 1;
}
