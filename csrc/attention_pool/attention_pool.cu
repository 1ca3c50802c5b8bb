// Attention over time on CUDA, forward and backward. qfast/ops/attention_pool.py contains the schemas. The
// kernels have not run on a GPU; they are tested by emulation on the host.
//
// Forward: cuBLAS multiplies all steps with the weight. One launch, where a warp owns a window, then computes
// the tanh, the softmax over the steps and the weighted mean. Backward: cuBLAS computes the product again,
// and one launch its gradients. cuBLAS then computes the gradients of the weights and of h, and one more
// launch adds the gradient of h through the mean.
//
// There are no atomics. Results are reproducible bit for bit whenever those of cuBLAS are. A call does not
// synchronize with the host, does not copy from it, and uses only memory from torch, so a CUDA graph can
// capture it. Intermediate values are [B, T, A] in forward and twice that in backward. Forward saves only its
// results. Not measured.
#include <optional>
#include <tuple>

#include "attention_pool/attention_pool_checks.h"
#include "attention_pool/attention_pool_kernels.cuh"
#include "cuda_device.cuh"
#include "cuda_matrix.cuh"

namespace qfast {
namespace {

// Contiguous arguments, and the products of all steps with the weight.
struct Pool {
  Tensor h, weight, bias, score, products;

  explicit Pool(const PoolTensors& arguments)
      : h(as_contiguous(arguments.h)),
        weight(as_contiguous(arguments.weight)),
        bias(as_contiguous(arguments.bias)),
        score(as_contiguous(arguments.score)),
        products(room(h, {h.size(0) * h.size(1), weight.size(0)})) {
    multiply(products, rows(), turned(weight));
  }

  Tensor rows() const { return as_matrix(h, h.size(0) * h.size(1), h.size(2)); }

  template <class T>
  PoolData<T> data(const Dropout& dropout, const Tensor& attention, const Tensor& pooled) const {
    PoolData<T> data{};
    data.batch = h.size(0);
    data.steps = h.size(1);
    data.hidden = h.size(2);
    data.width = weight.size(0);
    data.h = h.const_data_ptr<T>();
    data.products = products.mutable_data_ptr<T>();
    data.bias = bias.const_data_ptr<T>();
    data.score = score.const_data_ptr<T>();
    data.attention = attention.mutable_data_ptr<T>();
    data.pooled = pooled.mutable_data_ptr<T>();
    data.dropout = dropout;
    return data;
  }
};

std::tuple<Tensor, Tensor> attention_pool_cuda(const Tensor& h, const Tensor& weight, const Tensor& bias,
                                               const Tensor& score, double dropout,
                                               std::optional<Tensor> seed, int64_t /*precision*/) {
  const PoolTensors arguments{"attention_pool", h, weight, bias, score};
  check_cuda(arguments.op, "h", h);
  CudaDevice device(h);
  check_pool(arguments);
  const Dropout rule = device_dropout(arguments.op, "h", h, dropout, seed);
  const Tensor pooled = room(h, {h.size(0), h.size(2)}), attention = room(h, {h.size(0), h.size(1)});
  if (h.size(0) == 0) return {pooled, attention};
  const Pool pool(arguments);
  dispatch_floating(h.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    device.launch(attention_pool_kernel<T>, grid_for(h.size(0), kWindows), kThreads, 0,
                  pool.data<T>(rule, attention, pooled));
  });
  return {pooled, attention};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_pool_backward_cuda(
    const Tensor& grad, const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& score,
    double dropout, std::optional<Tensor> seed, const Tensor& attention, const Tensor& pooled,
    int64_t /*precision*/) {
  const PoolTensors arguments{"attention_pool_backward", h, weight, bias, score};
  check_cuda(arguments.op, "h", h);
  CudaDevice device(h);
  check_pool(arguments);
  const int64_t batch = h.size(0), steps = h.size(1), hidden = h.size(2), width = weight.size(0);
  check_pool_result(arguments.op, "grad", grad, h, hidden);
  check_pool_result(arguments.op, "attention", attention, h, steps);
  check_pool_result(arguments.op, "pooled", pooled, h, hidden);
  const Dropout rule = device_dropout(arguments.op, "h", h, dropout, seed);
  const Tensor contiguous_grad = as_contiguous(grad), contiguous_attention = as_contiguous(attention);
  const Tensor contiguous_pooled = as_contiguous(pooled);
  const Pool pool(arguments);
  const Tensor grad_h = room(h, {batch, steps, hidden}), grad_weight = room(h, {width, hidden});
  Tensor grad_bias = room(h, {width}), grad_score = room(h, {width});
  const Tensor along = room(h, {batch, steps}), weighted = room(h, {batch * steps, width});
  dispatch_floating(h.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    PoolData<T> job = pool.data<T>(rule, contiguous_attention, contiguous_pooled);
    job.grad = contiguous_grad.const_data_ptr<T>();
    job.along = along.mutable_data_ptr<T>();
    job.weighted = weighted.mutable_data_ptr<T>();
    job.grad_h = grad_h.mutable_data_ptr<T>();
    if (batch > 0)
      device.launch(attention_pool_backward_kernel<T>, grid_for(batch, kWindows), kThreads, 0, job);
    multiply(grad_weight, turned(pool.products), pool.rows());
    sum_rows(grad_bias, pool.products);
    sum_rows(grad_score, weighted);
    multiply(as_matrix(grad_h, batch * steps, hidden), pool.products, pool.weight);
    if (batch > 0)
      device.launch(attention_pool_mean_backward_kernel<T>, grid_for(batch * steps * hidden, kThreads),
                    kThreads, 0, job);
  });
  return {grad_h, grad_weight, grad_bias, grad_score};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CUDA, m) {
  m.impl("attention_pool", TORCH_BOX(&attention_pool_cuda));
  m.impl("attention_pool_backward", TORCH_BOX(&attention_pool_backward_cuda));
}

}  // namespace qfast
