// Matrix products and sums over rows by torch's own kernels (cuBLAS), into given memory. Forms with an `out`
// are not for autocast to cast. In float32 they are exact unless torch.backends.cuda.matmul allows TF32.
#pragma once

#include <array>
#include <initializer_list>

#include "common.h"

namespace qfast {
namespace {

inline Tensor room(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()});
}

// A view wherever the strides allow one.
inline Tensor as_matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  const int64_t shape[] = {rows, columns};
  return torch::stable::reshape(tensor, {shape, 2});
}

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
