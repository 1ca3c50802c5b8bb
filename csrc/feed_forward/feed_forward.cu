// Linear, relu, dropout, linear on CUDA, forward and backward. Has never run on a GPU: the kernels are
// checked by emulation on the host.
//
// Forward, one launch: the hidden of a tile of rows goes through shared memory slice by slice
// (feed_forward_kernels.cuh). Backward, in parts of the rows whose hidden is 32 MB, so that it stays in L2:
// one launch computes it again, with its gradient; products with these are cuBLAS', which runs them at the
// machine's limit, and the parts' weight gradients are added in order. Blocks whose tile does not fit into
// shared memory (more than 128 results, or about that many inputs) take their hidden by cuBLAS too, in the
// same parts. So memory beside the results does not depend on the size of the hidden.
//
// float32 may be multiplied by tensor cores instead, as the caller says
// (feed_forward_kernels_tensor_core.cuh): the two launches that make the hidden then do. cuBLAS' products are
// not touched by that.
//
// No atomics; results repeat bit for bit as far as cuBLAS' do (one stream, or CUBLAS_WORKSPACE_CONFIG set).
// Nothing synchronises or copies from the host, and all memory is torch's, so a CUDA graph can capture a
// call. What bounds it: multiply-adds, by FFMA unless told otherwise. Unmeasured. Schemas:
// qfast/ops/feed_forward.py.
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

  Block(const char* op, const Tensor& given, const Tensor& w1, const Tensor& b1, const Tensor& w2,
        double rate, const std::optional<Tensor>& seed) {
    check_feed_forward(op, given, w1, b1, w2);
    dropout = device_dropout(op, "x", given, rate, seed);
    x = torch::stable::contiguous(given);
    weight_in = torch::stable::contiguous(w1);
    bias_in = torch::stable::contiguous(b1);
    weight_out = torch::stable::contiguous(w2);
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
  const Tensor output = room(x, {N, O}), bias = torch::stable::contiguous(bias_out);
  if (N == 0) return output;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    FeedForwardLaunches<T> net(device, block.weight_in, block.bias_in, block.weight_out, block.dropout, false,
                               form);
    const SumsOfUnits sums = net.forward(block.x, block.rows());
    device.launch(feed_forward_join_kernel<T>, grid_for(N * O, kPlainThreads), kPlainThreads, 0,
                  output.mutable_data_ptr<T>(), sums.held.const_data_ptr<T>(), sums.parts,
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
  const Tensor entering = torch::stable::contiguous(grad);
  const Tensor grad_x = room(x, {input_grad ? N : 0, x.size(1)});
  const std::vector<Tensor> grads{torch::stable::empty_like(block.weight_in),
                                  torch::stable::empty_like(block.bias_in),
                                  torch::stable::empty_like(block.weight_out), room(x, {block.outputs()})};
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    PartSums sums(device, grads);
    if (N > 0) {
      FeedForwardLaunches<T> net(device, block.weight_in, block.bias_in, block.weight_out, block.dropout,
                                 true, form);
      net.backward(block.x, entering, block.rows(), input_grad ? &grad_x : nullptr, sums);
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
