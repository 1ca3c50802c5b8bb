// Attention over time on the CPU: buffers and threads. Schemas: qfast/ops/attention_pool.py; what is
// computed: attention_pool_kernels.h.
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

constexpr int64_t kPoolRows = 96;          // rows and steps of a tile, as far as the batch has them
constexpr int64_t kPoolBytes = 256 << 10;  // what a block holds: well within a 1 MB cache
constexpr int64_t kLeastSteps = 8;         // of a block

// Everything but the results of a call.
template <class Element>
class Pool {
 public:
  PoolJob<Element> job{};

  Pool(const PoolTensors& given, double dropout, const std::optional<Tensor>& seed)
      : h_(given.h.stride(2) == 1 ? given.h : torch::stable::contiguous(given.h)),
        weight_(torch::stable::contiguous(given.weight)),
        store_(given.h) {
    job.batch = h_.size(0);
    job.steps = h_.size(1);
    job.hidden = h_.size(2);
    job.width = weight_.size(0);
    job.h = h_.const_data_ptr<Element>();
    job.row_stride = h_.stride(0);
    job.step_stride = h_.stride(1);
    job.entering = store_.linear(weight_, 0, job.width);
    job.bias = padded(given.bias);
    job.score = padded(given.score);
    job.dropout = dropout_rule(given.op, dropout, seed);
    // Fixed by the sizes, so that sums of gradients have the same order with any number of threads.
    const int64_t wanted = rounded_up((kPoolRows + job.steps - 1) / job.steps, 4);
    job.tile_rows = std::min(wanted, rounded_up(std::max<int64_t>(job.batch, 1), 4));
    const int64_t step_bytes =
        job.tile_rows * (job.hidden + 2 * job.width) * static_cast<int64_t>(sizeof(Element));
    job.block_steps = std::min(job.steps, std::max(kLeastSteps, kPoolBytes / step_bytes));
  }

  void prepare_backward() { job.turned = store_.turned(weight_, 0, job.width); }

  int64_t tiles() const { return (job.batch + job.tile_rows - 1) / job.tile_rows; }

 private:
  const Element* padded(const Tensor& tensor) {
    const Tensor held = torch::stable::contiguous(tensor);
    return store_.vector(held.const_data_ptr<Element>(), job.width);
  }

  Tensor h_, weight_;
  PanelStore<Element> store_;
};

// ---------------------------------------------------------------- forward
std::tuple<Tensor, Tensor> attention_pool_cpu(const Tensor& h, const Tensor& weight, const Tensor& bias,
                                              const Tensor& score, double dropout,
                                              std::optional<Tensor> seed) {
  const PoolTensors given{"attention_pool", h, weight, bias, score};
  check_pool(given);
  const Tensor pooled = empty(h, {h.size(0), h.size(2)}), attention = empty(h, {h.size(0), h.size(1)});
  dispatch_floating(h.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    Pool<Element> pool(given, dropout, seed);
    auto& job = pool.job;
    job.pooled = pooled.mutable_data_ptr<Element>();
    job.attention = attention.mutable_data_ptr<Element>();
    const auto kernel = cpu_kernels<Element>().attention_pool_forward;
    share_with_scratch<Element>(
        h, pool.tiles(), {PoolSizes<Element>::forward(job), true},
        [&](int64_t begin, int64_t end, Element* scratch) { kernel(job, begin, end, scratch); });
  });
  return {pooled, attention};
}

// ---------------------------------------------------------------- backward
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_pool_backward_cpu(
    const Tensor& grad, const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& score,
    double dropout, std::optional<Tensor> seed, const Tensor& attention, const Tensor& pooled) {
  const PoolTensors given{"attention_pool_backward", h, weight, bias, score};
  check_pool(given);
  check_pool_result(given.op, "grad", grad, h, h.size(2));
  check_pool_result(given.op, "pooled", pooled, h, h.size(2));
  check_pool_result(given.op, "attention", attention, h, h.size(1));
  const int64_t width = weight.size(0);
  const Tensor grad_h = empty(h, {h.size(0), h.size(1), h.size(2)});
  std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor>> gradients;
  dispatch_floating(h.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    Pool<Element> pool(given, dropout, seed);
    pool.prepare_backward();
    auto& job = pool.job;
    const Tensor entering = torch::stable::contiguous(grad), kept = torch::stable::contiguous(attention),
                 result = torch::stable::contiguous(pooled);
    job.grad = entering.const_data_ptr<Element>();
    job.attention = kept.mutable_data_ptr<Element>();
    job.pooled = result.mutable_data_ptr<Element>();
    job.grad_h = grad_h.mutable_data_ptr<Element>();
    const auto kernel = cpu_kernels<Element>().attention_pool_backward;
    const Tensor sums = sum_in_parts<Element>(h, pool.tiles(), {PoolSizes<Element>::backward(job), true},
                                              PoolSizes<Element>::sums(job),
                                              [&](int64_t begin, int64_t end, Element* scratch,
                                                  Element* part) { kernel(job, begin, end, scratch, part); });
    const Element* const total = sums.const_data_ptr<Element>();
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
