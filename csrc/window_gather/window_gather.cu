// Gathers rolling windows from an instrument-major panel on CUDA, and computes the gradient of the panel.
//
// Forward: a warp owns a window and writes it in output order, so writes are coalesced. Backward: the row
// numbers are sorted, and a warp owns all steps of one panel row, so the sums need no atomics. Both
// directions are bound by bytes: B T W elements read and written once, plus the sort in the backward pass.
// Backward needs only the row numbers.
//
// Row numbers outside the panel read as NaN, because reporting them would need a synchronization. The CPU
// raises IndexError. Every function has the same order: checks, device guard, allocation, return for empty
// results, dispatch, launch, launch check.
#include <array>
#include <limits>
#include <optional>

#include "cuda_common.cuh"
#include "window_gather/window_gather.h"
#include "window_gather/window_gather_checks.h"

#define QFAST_DEVICE_INLINE __device__ __forceinline__

namespace qfast {
namespace {

#include "window_gather/window_resolve.h"

constexpr int kWarpsPerBlock = 4;
constexpr int kBlock = kWarp * kWarpsPerBlock;
constexpr int64_t kSharedSteps = 1024;  // 4 warps x 1,024 row numbers x 8 bytes = 32 KB of shared memory

__device__ __forceinline__ int64_t row_number(const RowNumbers& rows, int64_t i) {
  return rows.wide ? static_cast<const int64_t*>(rows.data)[i] : static_cast<const int32_t*>(rows.data)[i];
}

// Computes rows[b, :] with resolve_window. A thread owns whole windows. Bound by bytes: up to 3 table entries
// read and 8 bytes written per step.
__global__ void window_rows_kernel(const ResolveJob job, int64_t windows) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; b < windows; b += stride) {
    resolve_window(job.tables, row_number(job.last_row, b), job.rows + b * job.tables.step_len);
  }
}

// Arguments of the gather kernel. All sizes are in words of 4, 8 or 16 bytes.
template <class Word>
struct DeviceGather {
  const Word* panel;  // first requested column of row 0
  int64_t row_stride;
  int64_t width;
  int64_t panel_rows;
  int64_t step_len;
  int64_t windows;
  RowNumbers index;
  WindowTables tables;
  bool rolling;  // index has the last row of each window [B], else the row of each step [B, T]
  Word missing;
  Word* out;
};

// Returns the panel row of step t of window b, or -1. A window with `start` >= 0 is contiguous. Otherwise the
// row comes from `numbers` for rolling windows and from the index for explicit rows.
template <class Word>
__device__ __forceinline__ int64_t step_row(const DeviceGather<Word>& job, int64_t b, int64_t t,
                                            int64_t start, const int64_t* numbers) {
  if (start >= 0) return start + t;
  const int64_t r = job.rolling ? numbers[t] : row_number(job.index, b * job.step_len + t);
  return r < job.panel_rows ? r : -1;
}

// out[i] = word(i) for the elements i < count of this lane, in ascending order. Four loads are in flight at a
// time.
template <class Word, class Source>
__device__ __forceinline__ void copy_words(Word* out, int64_t count, int lane, Source&& word) {
  constexpr int kLoadsInFlight = 4;
  for (int64_t begin = lane; begin < count; begin += kWarp * kLoadsInFlight) {
    Word loaded[kLoadsInFlight];
#pragma unroll
    for (int k = 0; k < kLoadsInFlight; ++k)
      if (const int64_t i = begin + k * kWarp; i < count) loaded[k] = word(i);
#pragma unroll
    for (int k = 0; k < kLoadsInFlight; ++k)
      if (const int64_t i = begin + k * kWarp; i < count) out[i] = loaded[k];
  }
}

// Computes out[b]. A warp owns a window. Lane 0 resolves the rows if the window has holes. The lanes then
// copy T W words in output order ([W, T] if transposed), so writes are coalesced. A window without holes
// whose rows are contiguous is copied as one block. Bound by bytes: B T W words read and written once.
template <class Word, bool kTransposed>
__global__ void __launch_bounds__(kBlock) gather_windows_kernel(const DeviceGather<Word> job) {
  extern __shared__ int64_t shared_rows[];
  const int lane = threadIdx.x % kWarp;
  int64_t* numbers = shared_rows + (threadIdx.x / kWarp) * (job.rolling ? job.step_len : 0);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  const int64_t inner = kTransposed ? job.step_len : job.width;
  const int64_t total = job.step_len * job.width;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp; b < job.windows;
       b += warps) {
    const int64_t last = job.rolling ? row_number(job.index, b) : -1;
    const int64_t start = job.rolling ? contiguous_start(job.tables, last) : -1;
    Word* const out = job.out + b * total;
    if (!kTransposed && start >= 0 && job.row_stride == job.width) {
      const Word* const from = job.panel + start * job.row_stride;
      copy_words(out, total, lane, [&](int64_t i) { return from[i]; });
      continue;
    }
    if (job.rolling && start < 0) {
      __syncwarp();  // other lanes may still read the numbers of the previous window
      if (lane == 0) resolve_window(job.tables, last, numbers);
      __syncwarp();
    }
    int64_t outer = lane / inner, position = lane % inner;  // one division per window instead of one per word
    copy_words(out, total, lane, [&](int64_t) {
      const int64_t t = kTransposed ? position : outer;
      const int64_t d = kTransposed ? outer : position;
      const int64_t r = step_row(job, b, t, start, numbers);
      for (position += kWarp; position >= inner; position -= inner) ++outer;
      return r < 0 ? job.missing : job.panel[r * job.row_stride + d];
    });
  }
}

// Sums the gradients of all steps with the same row number into one panel row. `sorted` contains the row
// numbers in ascending order, `order` their positions in the batch. A warp owns the run of equal numbers that
// begins at its position, a lane owns columns. The sort is stable, so each sum runs in ascending (b, t)
// without atomics and has the same bits every time. Bound by bytes: 16 bytes and W elements read for each of
// B T steps.
template <class Element>
__global__ void __launch_bounds__(kBlock)
    scatter_windows_kernel(const ScatterJob job, const int64_t* sorted, const int64_t* order, int64_t count,
                           int64_t panel_rows) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  const Element* grad = static_cast<const Element*>(job.grad);
  const int64_t column = job.transposed ? job.step_len : 1;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp; i < count;
       i += warps) {
    const int64_t r = sorted[i];
    if (r < 0 || r >= panel_rows || (i > 0 && sorted[i - 1] == r)) continue;
    Element* to = static_cast<Element*>(job.grad_panel) + r * job.panel_columns + job.column_begin;
    for (int64_t d = lane; d < job.width; d += kWarp) {
      Element sum = 0;
      for (int64_t j = i; j < count && sorted[j] == r; ++j) {
        const int64_t b = order[j] / job.step_len, t = order[j] % job.step_len;
        const int64_t base = b * job.step_len * job.width + (job.transposed ? t : t * job.width);
        sum += grad[base + d * column];
      }
      to[d] = sum;
    }
  }
}

Tensor resolve_rows(const IndexTables& window_index, const Tensor& like, cudaStream_t stream) {
  const int64_t windows = window_index.last_row.size(0);
  const int64_t shape[] = {windows, window_index.tables.step_len};
  Tensor rows = new_tensor(like, {shape, 2}, ScalarType::Long);
  if (windows == 0) return rows;
  const ResolveJob job{window_index.tables, row_numbers(window_index.last_row),
                       rows.mutable_data_ptr<int64_t>()};
  window_rows_kernel<<<grid_for(windows, kBlock), kBlock, 0, stream>>>(job, windows);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return rows;
}

template <class Word>
Word nan_word(int64_t element) {
  union {
    Word word;
    float single[4];
    double twice[2];
  } value{};  // the word is the first bytes of the array
  for (int i = 0; i < 4 && element == 4; ++i) value.single[i] = std::numeric_limits<float>::quiet_NaN();
  for (int i = 0; i < 2 && element == 8; ++i) value.twice[i] = std::numeric_limits<double>::quiet_NaN();
  return value.word;
}

template <class Word>
void launch_gather(const GatherJob& job, int64_t windows, cudaStream_t stream) {
  constexpr int64_t size = sizeof(Word);
  const bool rolling = job.tables != nullptr;
  const DeviceGather<Word> device{reinterpret_cast<const Word*>(job.panel),
                                  job.row_stride / size,
                                  job.width / size,
                                  job.panel_rows,
                                  job.step_len,
                                  windows,
                                  job.index,
                                  rolling ? *job.tables : WindowTables{},
                                  rolling,
                                  nan_word<Word>(job.element),
                                  reinterpret_cast<Word*>(job.out)};
  const size_t shared = rolling ? sizeof(int64_t) * kWarpsPerBlock * static_cast<size_t>(job.step_len) : 0;
  const unsigned int grid = grid_for(windows, kWarpsPerBlock);
  if (job.transposed) {
    gather_windows_kernel<Word, true><<<grid, kBlock, shared, stream>>>(device);
  } else {
    gather_windows_kernel<Word, false><<<grid, kBlock, shared, stream>>>(device);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Returns whether every row begins at a multiple of `bytes`, so it can be copied in words of that size.
// Transposed output is written element by element, so wider words do not fit.
bool fits_words(const GatherJob& job, int64_t bytes) {
  const auto divides = [&](int64_t value) { return value % bytes == 0; };
  return !job.transposed && divides(job.width) && divides(job.row_stride) &&
         divides(static_cast<int64_t>(reinterpret_cast<uintptr_t>(job.panel))) &&
         divides(static_cast<int64_t>(reinterpret_cast<uintptr_t>(job.out)));
}

Tensor gather(const Tensor& panel, const Tensor& index, const WindowTables* tables, int64_t windows,
              int64_t steps, int64_t column_begin, int64_t column_end, bool transposed, cudaStream_t stream) {
  const int64_t width = column_end - column_begin;
  Tensor out = empty_windows(panel, windows, steps, width, transposed);
  if (out.numel() == 0) return out;
  const int64_t size = static_cast<int64_t>(panel.element_size());
  const GatherJob job{static_cast<const unsigned char*>(panel.const_data_ptr()) + column_begin * size,
                      panel.stride(0) * size,
                      width * size,
                      size,
                      panel.size(0),
                      steps,
                      row_numbers(index),
                      tables,
                      nullptr,
                      static_cast<unsigned char*>(out.mutable_data_ptr()),
                      transposed,
                      false};
  if (fits_words(job, 16)) {
    launch_gather<uint4>(job, windows, stream);
  } else if (size == 8 || fits_words(job, 8)) {
    launch_gather<uint2>(job, windows, stream);
  } else {
    launch_gather<uint32_t>(job, windows, stream);
  }
  return out;
}

Tensor window_rows_cuda(const Tensor& position, const Tensor& back, const Tensor& run, const Tensor& last_row,
                        int64_t step_len, int64_t fill, int64_t first_position) {
  const char* op = "window_rows";
  check_dims(op, "index.position", position, 1, "[R]");
  check_cuda(op, "index.position", position);
  const IndexTables window_index = check_tables(op, position, "index.position", position, back, run, last_row,
                                                step_len, fill, first_position);
  const CudaScope scope(position);
  return resolve_rows(window_index, position, scope.stream());
}

Tensor gather_windows_cuda(const Tensor& panel, const Tensor& rows, int64_t column_begin, int64_t column_end,
                           bool transposed) {
  const char* op = "gather_windows";
  check_panel(op, panel, column_begin, column_end);
  check_cuda(op, "panel", panel);
  check_row_numbers(op, "index", rows);
  check_dims(op, "index", rows, 2, "[B, T]");
  check_same_device(op, "index", rows, panel, "panel");
  const CudaScope scope(panel);
  return gather(adjacent_columns(panel), as_contiguous(rows), nullptr, rows.size(0), rows.size(1),
                column_begin, column_end, transposed, scope.stream());
}

Tensor gather_rolling_windows_cuda(const Tensor& panel, const Tensor& position, const Tensor& back,
                                   const Tensor& run, const Tensor& last_row, int64_t step_len, int64_t fill,
                                   int64_t first_position, int64_t column_begin, int64_t column_end,
                                   bool transposed) {
  const char* op = "gather_rolling_windows";
  check_panel(op, panel, column_begin, column_end);
  check_cuda(op, "panel", panel);
  const IndexTables window_index =
      check_tables(op, panel, "panel", position, back, run, last_row, step_len, fill, first_position);
  const CudaScope scope(panel);
  const Tensor source = adjacent_columns(panel);
  const int64_t windows = last_row.size(0);
  if (step_len >
      kSharedSteps) {  // the row numbers do not fit into shared memory: write them to global memory
    return gather(source, resolve_rows(window_index, position, scope.stream()), nullptr, windows, step_len,
                  column_begin, column_end, transposed, scope.stream());
  }
  return gather(source, window_index.last_row, &window_index.tables, windows, step_len, column_begin,
                column_end, transposed, scope.stream());
}

// aten::sort.stable along the last axis. Returns values and indices.
std::array<Tensor, 2> stable_sort(const Tensor& keys) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(keys), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t{-1}), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

Tensor gather_windows_backward_cuda(const Tensor& grad, const Tensor& rows, int64_t n_rows, int64_t n_columns,
                                    int64_t column_begin, bool transposed) {
  const char* op = "gather_windows_backward";
  check_backward(op, grad, rows, n_rows, n_columns, column_begin, transposed);
  check_cuda(op, "grad", grad);
  const CudaScope scope(grad);
  const Tensor steps = as_contiguous(grad);
  const int64_t shape[] = {n_rows, n_columns};
  Tensor out = new_zero_tensor(grad, {shape, 2});
  const int64_t count = rows.numel();
  if (count == 0 || out.numel() == 0 || grad.numel() == 0) return out;
  const int64_t flat[] = {count};
  const auto [sorted, order] = with_memory(rows, {flat, 1}, ScalarType::Long, [&] {
    return stable_sort(torch::stable::reshape(torch::stable::to(rows, ScalarType::Long), {flat, 1}));
  });
  const ScatterJob job{steps.const_data_ptr(),
                       {nullptr, false},
                       rows.size(0),
                       rows.size(1),
                       grad.size(transposed ? 1 : 2),
                       n_columns,
                       column_begin,
                       out.mutable_data_ptr(),
                       transposed};
  const int64_t* key = sorted.const_data_ptr<int64_t>();
  const int64_t* from = order.const_data_ptr<int64_t>();
  dispatch_floating(grad.scalar_type(), [&](auto zero) {
    scatter_windows_kernel<decltype(zero)>
        <<<grid_for(count, kWarpsPerBlock), kBlock, 0, scope.stream()>>>(job, key, from, count, n_rows);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CUDA, m) {
  m.impl("window_rows", TORCH_BOX(&window_rows_cuda));
  m.impl("gather_windows", TORCH_BOX(&gather_windows_cuda));
  m.impl("gather_rolling_windows", TORCH_BOX(&gather_rolling_windows_cuda));
  m.impl("gather_windows_backward", TORCH_BOX(&gather_windows_backward_cuda));
}

}  // namespace qfast
