// The fill rule of a rolling window, once, for host and device. Included inside the namespace of the
// instruction set (or of the device) that compiles it, so it uses nothing but the language.

// Writes the panel row of each of the T steps of the window that ends at row r; -1 = no row.
// Work: T writes, and one read of each table per stretch of rows without holes; no search.
QFAST_DEVICE_INLINE void resolve_window(const WindowTables& tables, int64_t r, int64_t* rows) {
  const int64_t end = r < 0 || r >= tables.panel_rows ? -1 : tables.position[r];
  const int64_t window_start = end - tables.step_len + 1;
  const int64_t first = window_start > tables.first_position ? window_start : tables.first_position;
  int64_t t = tables.step_len - 1;
  int64_t earliest = -1;
  // Each pass takes the next existing row back in time, the hole, if any, between it and the step above, and
  // the rows right before it. The bounds by t and r only matter for tables that build_window_index did not
  // make: they keep such input from reading or writing outside the arrays.
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

// First row of the window if its T rows lie side by side in the panel, else -1.
QFAST_DEVICE_INLINE int64_t contiguous_start(const WindowTables& tables, int64_t r) {
  if (r < 0 || r >= tables.panel_rows || tables.run[r] < tables.step_len - 1 || r < tables.step_len - 1)
    return -1;
  if (tables.first_position > 0 && tables.position[r] - tables.step_len + 1 < tables.first_position)
    return -1;
  // A dead row has run 0, which is enough for a window of one step.
  if (tables.step_len == 1 && tables.position[r] < tables.first_position) return -1;
  return r - tables.step_len + 1;
}
