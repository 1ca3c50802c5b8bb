// The feed-forward block on CUDA, forward and backward: linear, ReLU, dropout, linear.
// qfast/ops/feed_forward.py contains the schemas. The kernels have not run on a GPU; they are tested by
// emulation on the host.
//
// Forward is one launch. The hidden activations of a tile of rows pass through shared memory in slices
// (feed_forward_kernels.cuh). Nothing is saved for backward.
//
// Backward divides the rows into parts whose hidden activations occupy 32 MB, which stay in L2. One launch
// per part computes the hidden activations again, and their gradients. cuBLAS computes the products with them
// at the limit of the device, and the weight gradients of the parts are added in order. If a tile does not
// fit in shared memory (more than 128 results, or about as many inputs), cuBLAS computes the hidden
// activations too, in the same parts. The memory of intermediate values therefore does not depend on the size
// of the hidden layer.
//
// If the caller requests it, tensor cores multiply float32 in the two launches that compute the hidden
// activations (feed_forward_kernels_tensor_core.cuh). This does not change the products of cuBLAS.
//
// There are no atomics. Results are reproducible bit for bit whenever those of cuBLAS are (one stream, or
// CUBLAS_WORKSPACE_CONFIG set). A call does not synchronize with the host, does not copy from it, and uses
// only memory from torch, so a CUDA graph can capture it. Bound by multiply-adds: FFMA, or tensor cores if
// requested. Not measured.
#include <optional>
#include <tuple>

#include "feed_forward/feed_forward_checks.h"
#include "feed_forward/feed_forward_launch.cuh"

namespace qfast {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Block {
  Tensor x, weight_in, bias_in, weight_out;  // contiguous
  Dropout dropout;

  Block(const char* op, const Tensor& rows, const Tensor& w1, const Tensor& b1, const Tensor& w2, double rate,
        const std::optional<Tensor>& seed) {
    check_feed_forward(op, rows, w1, b1, w2);
    dropout = device_dropout(op, "x", rows, rate, seed);
    x = as_contiguous(rows);
    weight_in = as_contiguous(w1);
    bias_in = as_contiguous(b1);
    weight_out = as_contiguous(w2);
  }
  Rows rows() const { return {x.size(0), 1, 0, 0}; }
  int64_t outputs() const { return weight_out.size(0); }
};

Tensor feed_forward_cuda(const Tensor& x, const Tensor& weight_in, const Tensor& bias_in,
                         const Tensor& weight_out, const Tensor& bias_out, double dropout,
                         std::optional<Tensor> seed, int64_t precision) {
  const char* const op = "feed_forward";
  check_cuda(op, "x", x);
  CudaDevice device(x);
  const Block block(op, x, weight_in, bias_in, weight_out, dropout, seed);
  const Precision form = checked_precision(op, precision);
  const int64_t N = x.size(0), O = block.outputs();
  check_shaped(op, "bias_out", bias_out, x, {O});
  const Tensor output = room(x, {N, O}), bias = as_contiguous(bias_out);
  if (N == 0) return output;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    FeedForwardLaunches<T> net(device, block.weight_in, block.bias_in, block.weight_out, block.dropout, false,
                               form);
    const SumsOfUnits sums = net.forward(block.x, block.rows());
    device.launch(feed_forward_join_kernel<T>, grid_for(N * O, kPlainThreads), kPlainThreads, 0,
                  output.mutable_data_ptr<T>(), sums.partial.const_data_ptr<T>(), sums.parts,
                  bias.const_data_ptr<T>(), N, O);
  });
  return output;
}

Gradients feed_forward_backward_cuda(const Tensor& grad, const Tensor& x, const Tensor& weight_in,
                                     const Tensor& bias_in, const Tensor& weight_out, double dropout,
                                     std::optional<Tensor> seed, bool input_grad, int64_t precision) {
  const char* const op = "feed_forward_backward";
  check_cuda(op, "x", x);
  CudaDevice device(x);
  const Block block(op, x, weight_in, bias_in, weight_out, dropout, seed);
  const Precision form = checked_precision(op, precision);
  const int64_t N = x.size(0);
  check_shaped(op, "grad", grad, x, {N, block.outputs()});
  const Tensor contiguous_grad = as_contiguous(grad);
  const Tensor grad_x = room(x, {input_grad ? N : 0, x.size(1)});
  const std::vector<Tensor> grads{new_tensor_like(block.weight_in), new_tensor_like(block.bias_in),
                                  new_tensor_like(block.weight_out), room(x, {block.outputs()})};
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    PartSums sums(device, grads);
    if (N > 0) {
      FeedForwardLaunches<T> net(device, block.weight_in, block.bias_in, block.weight_out, block.dropout,
                                 true, form);
      net.backward(block.x, contiguous_grad, block.rows(), input_grad ? &grad_x : nullptr, sums);
    }
    sums.finish();
  });
  return {grad_x, grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CUDA, m) {
  m.impl("feed_forward", TORCH_BOX(&feed_forward_cuda));
  m.impl("feed_forward_backward", TORCH_BOX(&feed_forward_backward_cuda));
}

}  // namespace qfast
