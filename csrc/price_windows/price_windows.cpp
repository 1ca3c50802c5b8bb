// Windows of prices divided by the current price, with the maps of processors, on the CPU: checks, allocation
// and threads. qfast/ops/price_windows.py contains the schema, price_windows_kernels.h the kernel.
#include "price_windows/price_windows.h"

#include <vector>

#include "common.h"
#include "cpu_dispatch.h"

namespace qfast {
namespace {

constexpr const char* kOp = "price_windows";
constexpr int64_t kGrainBytes = 64 << 10;  // output of one task; a smaller one is not worth waking a thread
constexpr int64_t kStageParts = 4;         // shift, scale, limit, fill

void check_float32(const char* name, const Tensor& tensor, int64_t dims, const char* shape) {
  check_dims(kOp, name, tensor, dims, shape);
  QFAST_CHECK(tensor.scalar_type() == ScalarType::Float, kOp, ": ", name, ": expected dtype float32, got ",
              torch::headeronly::toString(tensor.scalar_type()), ".");
  QFAST_CHECK(tensor.is_cpu(), kOp, ": ", name, ": expected a CPU tensor, got one on ", device_text(tensor),
              ".");
}

// Checks that every requested row exists and that its windows are inside the series.
template <class Place>
void check_rows(const int64_t* rows, int64_t count, const Place* ends, int64_t panel_rows, int64_t window,
                int64_t places) {
  for (int64_t b = 0; b < count; ++b) {
    const int64_t row = rows[b];
    if (row < -1 || row >= panel_rows)
      throw std::out_of_range(message(kOp, ": rows[", b, "] is ", row, ", outside the rows 0..",
                                      panel_rows - 1, " (-1 means no row)."));
    if (row >= 0 && (ends[row] < window - 1 || ends[row] >= places))
      throw std::out_of_range(message(kOp, ": ends[", row, "] is ", ends[row], ", outside ", window - 1, "..",
                                      places - 1, " (places whose window of ", window,
                                      " steps is inside the series)."));
  }
}

void check_arguments(const Tensor& series, const Tensor& ends, const Tensor& divisors,
                     const Tensor& divisor_of, const Tensor& rows, const Tensor& stages, int64_t window) {
  check_float32("series", series, 2, "[F, P]");
  check_float32("divisors", divisors, 2, "[K, R]");
  check_float32("stages", stages, 3, "[M, 4, F * T]");
  check_dims(kOp, "ends", ends, 1, "[R]");
  check_row_numbers(kOp, "ends", ends);
  check_dims(kOp, "divisor_of", divisor_of, 1, "[F]");
  check_dims(kOp, "rows", rows, 1, "[B]");
  const int64_t fields = series.size(0), panel_rows = ends.size(0);
  QFAST_CHECK(window >= 1, kOp, ": window: expected at least 1, got ", window, ".");
  QFAST_CHECK(divisors.size(1) == panel_rows, kOp, ": divisors: expected one value for each of the ",
              panel_rows, " rows of ends, got shape ", shape_text(divisors), ".");
  QFAST_CHECK(divisor_of.size(0) == fields && divisor_of.scalar_type() == ScalarType::Long, kOp,
              ": divisor_of: expected int64 (", fields, ",), got ", tensor_text(divisor_of), ".");
  QFAST_CHECK(rows.scalar_type() == ScalarType::Long, kOp, ": rows: expected dtype int64, got ",
              torch::headeronly::toString(rows.scalar_type()), ".");
  QFAST_CHECK(stages.size(1) == kStageParts && stages.size(2) == fields * window, kOp,
              ": stages: expected shape (M, 4, ", fields * window, "), got ", shape_text(stages), ".");
  check_same_device(kOp, "ends", ends, series, "series");
  check_same_device(kOp, "divisor_of", divisor_of, series, "series");
  check_same_device(kOp, "rows", rows, series, "series");
}

// The constants of each stage in stages [M, 4, columns].
std::vector<PriceStage> stages_of(const Tensor& stages, int64_t columns) {
  std::vector<PriceStage> parts;
  for (int64_t s = 0; s < stages.size(0); ++s) {
    const float* first = stages.const_data_ptr<float>() + s * kStageParts * columns;
    parts.push_back({.shift = first,
                     .scale = first + columns,
                     .limit = first + 2 * columns,
                     .fill = first + 3 * columns});
  }
  return parts;
}

Tensor price_windows_cpu(const Tensor& series, const Tensor& ends, const Tensor& divisors,
                         const Tensor& divisor_of, const Tensor& rows, const Tensor& stages, int64_t window) {
  check_arguments(series, ends, divisors, divisor_of, rows, stages, window);
  const int64_t fields = series.size(0), panel_rows = ends.size(0), count = rows.size(0);
  const Tensor own_series = as_contiguous(series), own_ends = as_contiguous(ends);
  const Tensor own_divisors = as_contiguous(divisors), own_rows = as_contiguous(rows);
  const Tensor own_divisor_of = as_contiguous(divisor_of);
  const Tensor own_stages = as_contiguous(stages);
  const int64_t* divisor_numbers = own_divisor_of.const_data_ptr<int64_t>();
  for (int64_t f = 0; f < fields; ++f)
    QFAST_CHECK(divisor_numbers[f] >= 0 && divisor_numbers[f] < divisors.size(0), kOp, ": divisor_of[", f,
                "]: expected 0..", divisors.size(0) - 1, ", got ", divisor_numbers[f], ".");

  PriceWindowJob job{.series = own_series.const_data_ptr<float>(),
                     .places = series.size(1),
                     .ends = own_ends.const_data_ptr(),
                     .wide_ends = ends.scalar_type() == ScalarType::Long,
                     .divisors = own_divisors.const_data_ptr<float>(),
                     .panel_rows = panel_rows,
                     .divisor_of = divisor_numbers,
                     .rows = own_rows.const_data_ptr<int64_t>(),
                     .fields = fields,
                     .window = window,
                     .stages = nullptr,
                     .stage_count = stages.size(0),
                     .out = nullptr};
  if (job.wide_ends) {
    check_rows(job.rows, count, static_cast<const int64_t*>(job.ends), panel_rows, window, job.places);
  } else {
    check_rows(job.rows, count, static_cast<const int32_t*>(job.ends), panel_rows, window, job.places);
  }
  const int64_t columns = fields * window;
  const std::vector<PriceStage> parts = stages_of(own_stages, columns);
  job.stages = parts.data();
  Tensor out = new_tensor(series, {count, columns});
  job.out = out.mutable_data_ptr<float>();
  const auto kernel = cpu_kernels().price_windows;
  const int64_t grain = kGrainBytes / (columns > 0 ? columns * 4 : 1);
  parallel_for(count, grain, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CPU, m) { m.impl("price_windows", TORCH_BOX(&price_windows_cpu)); }

}  // namespace qfast
