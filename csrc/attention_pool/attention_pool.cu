// Attention over time on CUDA, forward and backward. Has never run on a GPU: the kernels are checked by
// emulation on the host.
//
// Forward: one matrix product of all steps with the weight (cuBLAS), then one launch, a warp a window, for
// the tanh, the softmax over the steps and the weighted mean. Backward: the product again, one launch for its
// gradients, products and sums with these over all windows for the weights and for h, and one launch for what
// came through the mean. No atomics; results repeat bit for bit as far as cuBLAS' do. Nothing synchronises or
// copies from the host, and all memory is torch's, so a CUDA graph can capture a call. Beside the results a
// call holds [B, T, A], backward twice. Unmeasured. Schemas: qfast/ops/attention_pool.py.
#include <optional>
#include <tuple>

#include "attention_pool/attention_pool_checks.h"
#include "attention_pool/attention_pool_kernels.cuh"
#include "cuda_device.cuh"
#include "cuda_matrix.cuh"

namespace qfast {
namespace {

// Contiguous, and the product of every step with the weight.
struct Pool {
  Tensor h, weight, bias, score, products;

  explicit Pool(const PoolTensors& given)
      : h(torch::stable::contiguous(given.h)),
        weight(torch::stable::contiguous(given.weight)),
        bias(torch::stable::contiguous(given.bias)),
        score(torch::stable::contiguous(given.score)),
        products(room(h, {h.size(0) * h.size(1), weight.size(0)})) {
    multiply(products, rows(), turned(weight));
  }

  Tensor rows() const { return as_matrix(h, h.size(0) * h.size(1), h.size(2)); }

  template <class T>
  PoolData<T> data(const Dropout& dropout, const Tensor& attention, const Tensor& pooled) const {
    PoolData<T> made{};
    made.batch = h.size(0);
    made.steps = h.size(1);
    made.hidden = h.size(2);
    made.width = weight.size(0);
    made.h = h.const_data_ptr<T>();
    made.products = products.mutable_data_ptr<T>();
    made.bias = bias.const_data_ptr<T>();
    made.score = score.const_data_ptr<T>();
    made.attention = attention.mutable_data_ptr<T>();
    made.pooled = pooled.mutable_data_ptr<T>();
    made.dropout = dropout;
    return made;
  }
};

std::tuple<Tensor, Tensor> attention_pool_cuda(const Tensor& h, const Tensor& weight, const Tensor& bias,
                                               const Tensor& score, double dropout,
                                               std::optional<Tensor> seed) {
  const PoolTensors given{"attention_pool", h, weight, bias, score};
  check_cuda(given.op, "h", h);
  CudaDevice device(h);
  check_pool(given);
  const Dropout rule = device_dropout(given.op, "h", h, dropout, seed);
  const Tensor pooled = room(h, {h.size(0), h.size(2)}), attention = room(h, {h.size(0), h.size(1)});
  if (h.size(0) == 0) return {pooled, attention};
  const Pool pool(given);
  dispatch_floating(h.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    device.launch(attention_pool_kernel<T>, grid_for(h.size(0), kWindows), kThreads, 0,
                  pool.data<T>(rule, attention, pooled));
  });
  return {pooled, attention};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_pool_backward_cuda(
    const Tensor& grad, const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& score,
    double dropout, std::optional<Tensor> seed, const Tensor& attention, const Tensor& pooled) {
  const PoolTensors given{"attention_pool_backward", h, weight, bias, score};
  check_cuda(given.op, "h", h);
  CudaDevice device(h);
  check_pool(given);
  const int64_t batch = h.size(0), steps = h.size(1), hidden = h.size(2), width = weight.size(0);
  check_pool_result(given.op, "grad", grad, h, hidden);
  check_pool_result(given.op, "attention", attention, h, steps);
  check_pool_result(given.op, "pooled", pooled, h, hidden);
  const Dropout rule = device_dropout(given.op, "h", h, dropout, seed);
  const Tensor held_grad = torch::stable::contiguous(grad), shares = torch::stable::contiguous(attention);
  const Tensor means = torch::stable::contiguous(pooled);
  const Pool pool(given);
  const Tensor grad_h = room(h, {batch, steps, hidden}), grad_weight = room(h, {width, hidden});
  Tensor grad_bias = room(h, {width}), grad_score = room(h, {width});
  const Tensor along = room(h, {batch, steps}), weighted = room(h, {batch * steps, width});
  dispatch_floating(h.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    PoolData<T> job = pool.data<T>(rule, shares, means);
    job.grad = held_grad.const_data_ptr<T>();
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
