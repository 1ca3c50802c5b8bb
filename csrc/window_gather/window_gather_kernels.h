// CPU kernels of the rolling-window gather and its backward pass. It is compiled once per instruction set;
// cpu_isa_begin.h lists the language features that it may use.
//
// Forward: a thread owns a range of windows and writes contiguous output. Backward: a thread owns a range of
// panel rows and reads the row numbers of the whole batch, so the sums need no atomics. Backward needs only
// the row numbers; nothing else is saved. Both directions are bound by bytes: B T D elements are read and
// written once, without arithmetic in the forward pass and with one addition per element in the backward
// pass.
#pragma once

#include "simd.h"
#include "window_gather/window_resolve.h"

namespace {

static inline int64_t row_number(const RowNumbers& rows, int64_t i) {
  return rows.wide ? static_cast<const int64_t*>(rows.data)[i] : static_cast<const int32_t*>(rows.data)[i];
}

// Prefetch distances: entries of the run table first, then panel rows. The windows of a shuffled batch miss
// every cache in a large panel. Without prefetching, each window would wait for memory separately.
constexpr int64_t kTableAhead = 16;       // windows
constexpr int64_t kPanelAhead = 4 << 10;  // bytes

// Prefetches table entries for the windows after b and returns the start of window b + ahead, assuming that
// it has no holes, as most windows do not. A wrong guess, and `missing` at the end of the batch, only costs a
// useless prefetch.
static inline const unsigned char* upcoming_window(const GatherJob& job, int64_t b, int64_t ahead,
                                                   int64_t end) {
  const bool rolling = job.tables != nullptr;
  if (rolling && b + kTableAhead < end) {
    const int64_t r = row_number(job.index, b + kTableAhead);
    if (r >= 0) {
      __builtin_prefetch(job.tables->run + r);
      if (job.tables->first_position > 0) __builtin_prefetch(job.tables->position + r);
    }
  }
  if (rolling && b + kTableAhead / 2 < end) {
    const int64_t r = row_number(job.index, b + kTableAhead / 2);
    const int64_t head = r < 0 ? -1 : r - job.tables->run[r];  // the first row after the last hole
    if (head > 0 && head > r - job.step_len + 1) {
      __builtin_prefetch(job.tables->position + r);
      __builtin_prefetch(job.tables->back + head);
      __builtin_prefetch(job.tables->position + head - 1);
      __builtin_prefetch(job.tables->run + head - 1);
    }
  }
  if (b + ahead >= end) return job.missing;
  const int64_t next = b + ahead;
  const int64_t last = row_number(job.index, rolling ? next : (next + 1) * job.step_len - 1);
  const int64_t start = last - job.step_len + 1;
  return start < 0 ? job.missing : job.panel + start * job.row_stride;
}

// out[d, t] = rows[t][d] for one window of T rows. Writes are sequential; the T rows stay in the L1 cache.
template <class Element>
static inline void transpose_window(Element* out, const unsigned char* const* rows, int64_t steps,
                                    int64_t width) {
  for (int64_t d = 0; d < width; ++d) {
    for (int64_t t = 0; t < steps; ++t) out[d * steps + t] = reinterpret_cast<const Element*>(rows[t])[d];
  }
}

// Sets rows[t] to the address of step t of window b. `numbers` is scratch for T row numbers.
static inline void window_pointers(const GatherJob& job, int64_t b, int64_t start, int64_t* numbers,
                                   const unsigned char** rows) {
  if (start >= 0) {
    for (int64_t t = 0; t < job.step_len; ++t) rows[t] = job.panel + (start + t) * job.row_stride;
    return;
  }
  if (job.tables != nullptr) {
    resolve_window(*job.tables, row_number(job.index, b), numbers);
  } else {
    for (int64_t t = 0; t < job.step_len; ++t) numbers[t] = row_number(job.index, b * job.step_len + t);
  }
  for (int64_t t = 0; t < job.step_len; ++t) {
    rows[t] = numbers[t] < 0 ? job.missing : job.panel + numbers[t] * job.row_stride;
  }
}

}  // namespace

// Computes rows[b, :] for begin <= b < end. A thread owns whole windows. Bound by bytes: up to 3 cache lines
// of tables read and 8 bytes written per step.
void resolve_windows(const ResolveJob& job, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    resolve_window(job.tables, row_number(job.last_row, b), job.rows + b * job.tables.step_len);
  }
}

// Computes out[b] for begin <= b < end. A thread owns whole windows, so its output is contiguous. `scratch`
// has room for T row numbers, T pointers and one window. Bound by bytes: B T D elements read and written
// once. A window without holes is T adjacent panel rows, so if all columns are requested it is one long copy.
void gather_windows(const GatherJob& job, int64_t begin, int64_t end, unsigned char* scratch) {
  const int64_t window = job.step_len * job.width;
  const bool whole_rows = job.width == job.row_stride && !job.transposed;
  const int64_t windows_ahead = 1 + kPanelAhead / window;
  int64_t* numbers = reinterpret_cast<int64_t*>(scratch);
  const unsigned char** rows = reinterpret_cast<const unsigned char**>(numbers + job.step_len);
  unsigned char* staging = reinterpret_cast<unsigned char*>(rows + job.step_len);
  for (int64_t b = begin; b < end; ++b) {
    const unsigned char* ahead = upcoming_window(job, b, windows_ahead, end);
    unsigned char* out = job.out + b * window;
    const int64_t start =
        job.tables == nullptr ? -1 : contiguous_start(*job.tables, row_number(job.index, b));
    if (start >= 0 && whole_rows) {
      const unsigned char* from = job.panel + start * job.row_stride;
      job.stream ? stream_bytes(out, from, window, ahead) : copy_bytes(out, from, window, ahead);
      continue;
    }
    window_pointers(job, b, start, numbers, rows);
    unsigned char* to = job.stream ? staging : out;
    if (!job.transposed) {
      for (int64_t t = 0, count = 1; t < job.step_len; t += count, count = 1) {
        if (whole_rows) {  // copy adjacent rows together
          while (t + count < job.step_len && rows[t + count] == rows[t] + count * job.width) ++count;
        }
        copy_bytes(to + t * job.width, rows[t], count * job.width, ahead + t * job.row_stride);
      }
    } else {
      for (int64_t t = 0; t < job.step_len; ++t) {
        for (int64_t i = 0; i < job.width; i += 64) will_read(ahead + t * job.row_stride + i);
      }
      if (job.element == 4) {
        transpose_window(reinterpret_cast<word32*>(to), rows, job.step_len, job.width / 4);
      } else {
        transpose_window(reinterpret_cast<word64*>(to), rows, job.step_len, job.width / 8);
      }
    }
    if (job.stream) stream_bytes(out, staging, window, staging);
  }
  if (job.stream) finish_stream();
}

// Computes grad_panel[r] for begin <= r < end. A thread owns panel rows and reads the whole batch in
// ascending (b, t). This needs no atomics, and the order of each sum does not depend on the number of
// threads. Bound by bytes: R D elements written, B T row numbers and B T W elements read, and the row numbers
// once more for every thread.
template <class Element>
void scatter_windows(const ScatterJob& job, int64_t begin, int64_t end) {
  Element* panel = static_cast<Element*>(job.grad_panel);
  __builtin_memset(panel + begin * job.panel_columns, 0, sizeof(Element) * (end - begin) * job.panel_columns);
  const int64_t step = job.transposed ? 1 : job.width;
  const int64_t column = job.transposed ? job.step_len : 1;
  for (int64_t b = 0; b < job.windows; ++b) {
    const Element* window = static_cast<const Element*>(job.grad) + b * job.step_len * job.width;
    for (int64_t t = 0; t < job.step_len; ++t) {
      const int64_t r = row_number(job.rows, b * job.step_len + t);
      if (r < begin || r >= end) continue;
      Element* __restrict to = panel + r * job.panel_columns + job.column_begin;
      const Element* __restrict from = window + t * step;
      if (column == 1) {
        for (int64_t d = 0; d < job.width; ++d) to[d] += from[d];
      } else {
        for (int64_t d = 0; d < job.width; ++d) to[d] += from[d * column];
      }
    }
  }
}
