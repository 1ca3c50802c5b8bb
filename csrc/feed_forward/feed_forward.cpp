// The feed-forward block on the CPU: checks, buffers and threads. qfast/ops/feed_forward.py contains the
// schemas, feed_forward_kernels.h the kernels.
#include "feed_forward/feed_forward.h"

#include <tuple>

#include "dropout_checks.h"
#include "feed_forward/feed_forward_checks.h"
#include "feed_forward/feed_forward_pack.h"

namespace qfast {
namespace {

constexpr int64_t kTileRows = 480;

// The checked, contiguous parameters of a call.
struct Block {
  const Tensor weight_in, bias_in, weight_out;

  Block(const char* op, const Tensor& x, const Tensor& entering, const Tensor& bias, const Tensor& leaving)
      : weight_in(as_contiguous(entering)), bias_in(as_contiguous(bias)), weight_out(as_contiguous(leaving)) {
    check_feed_forward(op, x, entering, bias, leaving);
  }
};

template <class Element>
FeedForwardJob<Element> job_of(const Tensor& x, const Block& block, PanelStore<Element>& store,
                               const DropoutRule& dropout, bool backward) {
  FeedForwardJob<Element> job{};
  job.rows = x.size(0);
  const int64_t group = group_windows(job.rows, 1, dropout.active, block.weight_in.numel());
  job.net = packed_feed_forward(store, block.weight_in, block.bias_in, block.weight_out, backward,
                                job.rows <= group);
  job.net.dropout = dropout;
  job.net.group_windows = group;
  job.tile_rows = tile_windows(kTileRows, job.rows, 1, dropout.active, block.weight_in.numel());
  job.padded_in = store.cut(x.size(1)).padded();
  job.padded_out = store.cut(block.weight_out.size(0)).padded();
  job.x = x.const_data_ptr<Element>();
  job.x_row = x.stride(0);
  job.x_column = x.stride(1);
  return job;
}

template <class Element>
int64_t tiles_of(const FeedForwardJob<Element>& job) {
  return (job.rows + job.tile_rows - 1) / job.tile_rows;
}

// Elements of scratch of a tile.
template <class Element>
int64_t scratch_of(const FeedForwardJob<Element>& job, bool backward) {
  Carving<Element> space{nullptr};
  FeedForwardTile<Element>::carve(job, backward, space);
  return space.used;
}

Tensor feed_forward_cpu(const Tensor& x, const Tensor& weight_in, const Tensor& bias_in,
                        const Tensor& weight_out, const Tensor& bias_out, double dropout,
                        std::optional<Tensor> seed, int64_t precision) {
  const char* const op = "feed_forward";
  const Block block(op, x, weight_in, bias_in, weight_out);
  const int64_t out = weight_out.size(0);
  check_shaped(op, "bias_out", bias_out, x, {out});
  const DropoutRule rule = dropout_rule(op, dropout, seed);
  const Tensor output = empty(x, {x.size(0), out}), bias = as_contiguous(bias_out);
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    PanelStore<Element> store(x);
    auto job = job_of<Element>(x, block, store, rule, false);
    job.net.leaving_bias = store.vector(bias.const_data_ptr<Element>(), out);
    job.output = output.mutable_data_ptr<Element>();
    const auto kernel = product_kernels<Element>(op, precision).feed_forward;
    share_with_scratch<Element>(
        x, tiles_of(job), {scratch_of(job, false), true},
        [&](int64_t begin, int64_t end, Element* scratch) { kernel(job, begin, end, scratch); });
  });
  return output;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients feed_forward_backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& weight_in,
                                    const Tensor& bias_in, const Tensor& weight_out, double dropout,
                                    std::optional<Tensor> seed, bool input_grad, int64_t precision) {
  const char* const op = "feed_forward_backward";
  const Block block(op, x, weight_in, bias_in, weight_out);
  const int64_t out = weight_out.size(0), hidden = weight_in.size(0);
  check_shaped(op, "grad", grad, x, {x.size(0), out});
  const DropoutRule rule = dropout_rule(op, dropout, seed);
  const Tensor grad_x = empty(x, {input_grad ? x.size(0) : 0, x.size(1)});
  const Tensor contiguous_grad = as_contiguous(grad);
  std::optional<Gradients> result;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    PanelStore<Element> store(x);
    auto job = job_of<Element>(x, block, store, rule, true);
    job.grad = contiguous_grad.const_data_ptr<Element>();
    if (input_grad) job.grad_x = grad_x.mutable_data_ptr<Element>();
    const Tensor entering = saved_tensor(x, {hidden, x.size(1)}), entering_bias = empty(x, {hidden}),
                 leaving = saved_tensor(x, {out, hidden}), leaving_bias = empty(x, {out});
    job.gradients = {entering.mutable_data_ptr<Element>(), entering_bias.mutable_data_ptr<Element>(),
                     leaving.mutable_data_ptr<Element>(), leaving_bias.mutable_data_ptr<Element>()};
    const auto kernel = product_kernels<Element>(op, precision).feed_forward_backward;
    sum_into<Element>({entering, entering_bias, leaving, leaving_bias}, tiles_of(job),
                      {scratch_of(job, true), true},
                      [&](int64_t begin, int64_t end, Element* scratch, Element* sums) {
                        kernel(job, begin, end, scratch, sums);
                      });
    result = {grad_x, entering, entering_bias, leaving, leaving_bias};
  });
  return *result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CPU, m) {
  m.impl("feed_forward", TORCH_BOX(&feed_forward_cpu));
  m.impl("feed_forward_backward", TORCH_BOX(&feed_forward_backward_cpu));
}

}  // namespace qfast
