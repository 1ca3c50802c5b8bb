// Matrix products and sums over rows by torch's kernels (cuBLAS), into existing memory. Autocast does not
// change functions with an `out` argument. Products use IEEE float32 unless torch.backends.cuda.matmul allows
// TF32.
#pragma once

#include <array>
#include <initializer_list>

#include "common.h"

namespace qfast {
namespace {

// A new tensor with the dtype and device of `like`. Its elements are not set.
inline Tensor room(const Tensor& like, std::initializer_list<int64_t> shape) {
  return new_tensor(like, {shape.begin(), shape.size()});
}

// The tensor as a matrix: a view if the strides allow it, else a copy.
inline Tensor as_matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  const int64_t shape[] = {rows, columns};
  return torch::stable::reshape(tensor, {shape, 2});
}

// The transposed matrix, a view.
inline Tensor turned(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// out = a b
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // another handle to out
}

// out[j] = sum over i of matrix[i, j]
inline void sum_rows(Tensor& out, const Tensor& matrix) {
  const int64_t rows[] = {0};
  torch::stable::sum_out(out, matrix, torch::headeronly::IntHeaderOnlyArrayRef(rows, 1));
}

}  // namespace
}  // namespace qfast
