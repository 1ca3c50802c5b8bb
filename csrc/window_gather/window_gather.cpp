// Gathers rolling windows from an instrument-major panel on the CPU. This is the worked example for
// operators: it checks the arguments, allocates the result, fills the job struct, runs parallel_for over the
// units that a thread owns, and registers the operator. qfast/ops/window_gather.py contains the schemas,
// window_gather_kernels.h the kernels.
#include "window_gather/window_gather.h"

#include <limits>
#include <vector>

#include "common.h"
#include "cpu_dispatch.h"
#include "huge_pages.h"
#include "window_gather/window_gather_checks.h"

namespace qfast {
namespace {

constexpr int64_t kGrainBytes = 64 << 10;   // output of one task; a smaller one is not worth waking a thread
constexpr int64_t kHugeBytes = 32LL << 20;  // from this size on, malloc maps fresh pages for every result
constexpr int64_t kStreamBytes = 16LL << 20;  // from this size on, non-temporal stores measure faster

void check_cpu(const char* op, const char* name, const Tensor& tensor) {
  QFAST_CHECK(tensor.is_cpu(), op, ": ", name, ": expected a CPU tensor, got a tensor on ",
              tensor.is_cuda() ? "CUDA" : "another device", ". Remedy: ", name, ".cpu().");
}

template <class Integer>
int64_t first_outside(const Integer* rows, int64_t count, int64_t panel_rows) {
  bool any = false;  // without an early exit the loop is vectorized, and errors are rare
  for (int64_t i = 0; i < count; ++i) any |= rows[i] < -1 || rows[i] >= panel_rows;
  for (int64_t i = 0; any && i < count; ++i) {
    if (rows[i] < -1 || rows[i] >= panel_rows) return i;
  }
  return -1;
}

void check_bounds(const char* op, const char* name, const Tensor& rows, int64_t panel_rows) {
  const int64_t count = rows.numel();
  const RowNumbers numbers = row_numbers(rows);
  const int64_t invalid = numbers.wide
                              ? first_outside(static_cast<const int64_t*>(numbers.data), count, panel_rows)
                              : first_outside(static_cast<const int32_t*>(numbers.data), count, panel_rows);
  if (invalid < 0) return;
  const int64_t value = numbers.wide ? static_cast<const int64_t*>(numbers.data)[invalid]
                                     : static_cast<const int32_t*>(numbers.data)[invalid];
  const int64_t steps = rows.dim() == 2 ? rows.size(1) : 1;
  const std::string where = rows.dim() == 2 ? message("[", invalid / steps, ", ", invalid % steps, "]")
                                            : message("[", invalid, "]");
  throw std::out_of_range(message(op, ": ", name, where, " is ", value, ", outside the panel's rows 0..",
                                  panel_rows - 1, " (-1 means no row)."));
}

Tensor gather(const Tensor& panel, const Tensor& index, const WindowTables* tables, int64_t windows,
              int64_t steps, int64_t column_begin, int64_t column_end, bool transposed) {
  const int64_t width = column_end - column_begin;
  Tensor out = empty_windows(panel, windows, steps, width, transposed);
  if (out.numel() == 0) return out;
  dispatch_floating(panel.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    constexpr int64_t size = sizeof(Element);
    if (const int64_t bytes = out.numel() * size; bytes >= kHugeBytes) {
      advise_huge_pages(out.mutable_data_ptr(), bytes);
    }
    const std::vector<Element> missing(width, std::numeric_limits<Element>::quiet_NaN());
    const GatherJob job{static_cast<const unsigned char*>(panel.const_data_ptr()) + column_begin * size,
                        panel.stride(0) * size,
                        width * size,
                        size,
                        panel.size(0),
                        steps,
                        row_numbers(index),
                        tables,
                        reinterpret_cast<const unsigned char*>(missing.data()),
                        static_cast<unsigned char*>(out.mutable_data_ptr()),
                        transposed,
                        out.numel() * size >= kStreamBytes};
    const CpuKernels& kernels = cpu_kernels();
    parallel_for(windows, kGrainBytes / (steps * width * size), [&](int64_t begin, int64_t end) {
      std::vector<unsigned char> scratch(steps * (sizeof(int64_t) + sizeof(void*) + width * size));
      kernels.gather_windows(job, begin, end, scratch.data());
    });
  });
  return out;
}

Tensor window_rows_cpu(const Tensor& position, const Tensor& back, const Tensor& run, const Tensor& last_row,
                       int64_t step_len, int64_t fill, int64_t first_position) {
  const char* op = "window_rows";
  check_dims(op, "index.position", position, 1, "[R]");
  check_cpu(op, "index.position", position);
  const IndexTables window_index = check_tables(op, position, "index.position", position, back, run, last_row,
                                                step_len, fill, first_position);
  check_bounds(op, "last_row", window_index.last_row, window_index.tables.panel_rows);
  const int64_t windows = last_row.size(0);
  const int64_t shape[] = {windows, step_len};
  Tensor rows = new_tensor(position, {shape, 2}, ScalarType::Long);
  const ResolveJob job{window_index.tables, row_numbers(window_index.last_row),
                       rows.mutable_data_ptr<int64_t>()};
  const CpuKernels& kernels = cpu_kernels();
  parallel_for(windows, kGrainBytes / (step_len * 8),
               [&](int64_t begin, int64_t end) { kernels.resolve_windows(job, begin, end); });
  return rows;
}

Tensor gather_windows_cpu(const Tensor& panel, const Tensor& rows, int64_t column_begin, int64_t column_end,
                          bool transposed) {
  const char* op = "gather_windows";
  check_panel(op, panel, column_begin, column_end);
  check_cpu(op, "panel", panel);
  check_row_numbers(op, "index", rows);
  check_dims(op, "index", rows, 2, "[B, T]");
  check_same_device(op, "index", rows, panel, "panel");
  const Tensor index = as_contiguous(rows);
  check_bounds(op, "index", index, panel.size(0));
  return gather(adjacent_columns(panel), index, nullptr, rows.size(0), rows.size(1), column_begin, column_end,
                transposed);
}

Tensor gather_rolling_windows_cpu(const Tensor& panel, const Tensor& position, const Tensor& back,
                                  const Tensor& run, const Tensor& last_row, int64_t step_len, int64_t fill,
                                  int64_t first_position, int64_t column_begin, int64_t column_end,
                                  bool transposed) {
  const char* op = "gather_rolling_windows";
  check_panel(op, panel, column_begin, column_end);
  check_cpu(op, "panel", panel);
  const IndexTables window_index =
      check_tables(op, panel, "panel", position, back, run, last_row, step_len, fill, first_position);
  check_bounds(op, "last_row", window_index.last_row, panel.size(0));
  return gather(adjacent_columns(panel), window_index.last_row, &window_index.tables, last_row.size(0),
                step_len, column_begin, column_end, transposed);
}

Tensor gather_windows_backward_cpu(const Tensor& grad, const Tensor& rows, int64_t n_rows, int64_t n_columns,
                                   int64_t column_begin, bool transposed) {
  const char* op = "gather_windows_backward";
  check_backward(op, grad, rows, n_rows, n_columns, column_begin, transposed);
  check_cpu(op, "grad", grad);
  const Tensor steps = as_contiguous(grad);
  const Tensor index = as_contiguous(rows);
  const int64_t shape[] = {n_rows, n_columns};
  Tensor out = new_tensor(grad, {shape, 2});
  if (out.numel() == 0) return out;  // its pointer may be null, which memset does not accept
  const int64_t bytes = out.numel() * static_cast<int64_t>(grad.element_size());
  if (bytes >= kHugeBytes) advise_huge_pages(out.mutable_data_ptr(), bytes);
  const ScatterJob job{steps.const_data_ptr(),
                       row_numbers(index),
                       rows.size(0),
                       rows.size(1),
                       grad.size(transposed ? 1 : 2),
                       n_columns,
                       column_begin,
                       out.mutable_data_ptr(),
                       transposed};
  // One task per thread, as each task reads all rows.
  const int64_t threads = torch::stable::get_num_threads();
  dispatch_floating(grad.scalar_type(), [&](auto zero) {
    const auto kernel = cpu_kernels<decltype(zero)>().scatter_windows;
    parallel_for(n_rows, (n_rows + threads - 1) / threads,
                 [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CPU, m) {
  m.impl("window_rows", TORCH_BOX(&window_rows_cpu));
  m.impl("gather_windows", TORCH_BOX(&gather_windows_cpu));
  m.impl("gather_rolling_windows", TORCH_BOX(&gather_rolling_windows_cpu));
  m.impl("gather_windows_backward", TORCH_BOX(&gather_windows_backward_cpu));
}

}  // namespace qfast
