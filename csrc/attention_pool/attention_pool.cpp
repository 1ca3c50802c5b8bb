// Attention over time on the CPU: checks, buffers and threads. qfast/ops/attention_pool.py contains the
// schemas, attention_pool_kernels.h the kernels.
#include "attention_pool/attention_pool.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "attention_pool/attention_pool_checks.h"
#include "dropout_checks.h"
#include "panel_store.h"

namespace qfast {
namespace {

constexpr int64_t kPoolRows = 96;          // rows times steps of a tile, if the batch has as many
constexpr int64_t kPoolBytes = 256 << 10;  // buffers of a block, which fit easily in a cache of 1 MB
constexpr int64_t kLeastSteps = 8;         // fewest steps of a block

// The job of a call, without its results, and the packed weights.
template <class Element>
class Pool {
 public:
  PoolJob<Element> job{};

  Pool(const PoolTensors& tensors, double dropout, const std::optional<Tensor>& seed)
      : h_(tensors.h.stride(2) == 1 ? tensors.h : as_contiguous(tensors.h)),
        weight_(as_contiguous(tensors.weight)),
        store_(tensors.h) {
    job.batch = h_.size(0);
    job.steps = h_.size(1);
    job.hidden = h_.size(2);
    job.width = weight_.size(0);
    job.h = h_.const_data_ptr<Element>();
    job.row_stride = h_.stride(0);
    job.step_stride = h_.stride(1);
    job.entering = store_.linear(weight_, 0, job.width);
    job.bias = padded(tensors.bias);
    job.score = padded(tensors.score);
    job.dropout = dropout_rule(tensors.op, dropout, seed);
    // These sizes depend on the shapes only, so sums of gradients have the same order for any number of
    // threads.
    const int64_t rows = rounded_up((kPoolRows + job.steps - 1) / job.steps, 4);
    job.tile_rows = std::min(rows, rounded_up(std::max<int64_t>(job.batch, 1), 4));
    const int64_t step_bytes =
        job.tile_rows * (job.hidden + 2 * job.width) * static_cast<int64_t>(sizeof(Element));
    job.block_steps = std::min(job.steps, std::max(kLeastSteps, kPoolBytes / step_bytes));
  }

  void prepare_backward() { job.turned = store_.turned(weight_, 0, job.width); }

  int64_t tiles() const { return (job.batch + job.tile_rows - 1) / job.tile_rows; }

 private:
  const Element* padded(const Tensor& tensor) {
    const Tensor contiguous = as_contiguous(tensor);
    return store_.vector(contiguous.const_data_ptr<Element>(), job.width);
  }

  Tensor h_, weight_;
  PanelStore<Element> store_;
};

// ---------------------------------------------------------------- forward
std::tuple<Tensor, Tensor> attention_pool_cpu(const Tensor& h, const Tensor& weight, const Tensor& bias,
                                              const Tensor& score, double dropout, std::optional<Tensor> seed,
                                              int64_t precision) {
  const PoolTensors tensors{"attention_pool", h, weight, bias, score};
  check_pool(tensors);
  const Tensor pooled = empty(h, {h.size(0), h.size(2)}), attention = empty(h, {h.size(0), h.size(1)});
  dispatch_floating(h.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    Pool<Element> pool(tensors, dropout, seed);
    auto& job = pool.job;
    job.pooled = pooled.mutable_data_ptr<Element>();
    job.attention = attention.mutable_data_ptr<Element>();
    const auto kernel = product_kernels<Element>(tensors.op, precision).attention_pool_forward;
    share_with_scratch<Element>(
        h, pool.tiles(), {PoolSizes<Element>::forward(job), true},
        [&](int64_t begin, int64_t end, Element* scratch) { kernel(job, begin, end, scratch); });
  });
  return {pooled, attention};
}

// ---------------------------------------------------------------- backward
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_pool_backward_cpu(
    const Tensor& grad, const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& score,
    double dropout, std::optional<Tensor> seed, const Tensor& attention, const Tensor& pooled,
    int64_t precision) {
  const PoolTensors tensors{"attention_pool_backward", h, weight, bias, score};
  check_pool(tensors);
  check_pool_result(tensors.op, "grad", grad, h, h.size(2));
  check_pool_result(tensors.op, "pooled", pooled, h, h.size(2));
  check_pool_result(tensors.op, "attention", attention, h, h.size(1));
  const int64_t width = weight.size(0);
  const Tensor grad_h = saved_tensor(h, {h.size(0), h.size(1), h.size(2)});
  std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor>> gradients;
  dispatch_floating(h.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    Pool<Element> pool(tensors, dropout, seed);
    pool.prepare_backward();
    auto& job = pool.job;
    const Tensor contiguous_grad = as_contiguous(grad), contiguous_attention = as_contiguous(attention),
                 contiguous_pooled = as_contiguous(pooled);
    job.grad = contiguous_grad.const_data_ptr<Element>();
    job.attention = contiguous_attention.mutable_data_ptr<Element>();
    job.pooled = contiguous_pooled.mutable_data_ptr<Element>();
    job.grad_h = grad_h.mutable_data_ptr<Element>();
    const auto kernel = product_kernels<Element>(tensors.op, precision).attention_pool_backward;
    const Buffer<Element> sums = sum_in_parts<Element>(
        h, pool.tiles(), {PoolSizes<Element>::backward(job), true}, PoolSizes<Element>::sums(job),
        [&](int64_t begin, int64_t end, Element* scratch, Element* part) {
          kernel(job, begin, end, scratch, part);
        });
    const Element* const total = sums.data();
    const int64_t wide = job.turned.padded(), narrow = job.entering.padded();
    gradients = {grad_h, copied<Element>(h, total, width, job.hidden, wide),
                 copied_vector<Element>(h, total + width * wide, width),
                 copied_vector<Element>(h, total + width * wide + narrow, width)};
  });
  return *gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CPU, m) {
  m.impl("attention_pool", TORCH_BOX(&attention_pool_cpu));
  m.impl("attention_pool_backward", TORCH_BOX(&attention_pool_backward_cpu));
}

}  // namespace qfast
