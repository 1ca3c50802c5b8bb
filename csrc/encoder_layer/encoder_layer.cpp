// A post-norm encoder layer on the CPU: checks, buffers and threads. qfast/ops/encoder_layer.py contains the
// schemas, encoder_layer_kernels.h the kernels.
#include "encoder_layer/encoder_layer.h"

#include <tuple>

#include "dropout_checks.h"
#include "encoder_layer/encoder_layer_checks.h"
#include "feed_forward/feed_forward_pack.h"

namespace qfast {
namespace {

constexpr int64_t kTileRows = 480;

// The job of a call, without its results, and the packed weights.
template <class Element>
class Encoder {
 public:
  EncoderJob<Element> job{};

  Encoder(const Tensor& x, const std::vector<Tensor>& weights, int64_t heads, const DropoutRule& dropout,
          bool last_step, bool backward)
      : store_(x) {
    for (const Tensor& weight : weights) weights_.push_back(as_contiguous(weight));
    job.batch = x.size(0);
    job.steps = x.size(1);
    job.width = x.size(2);
    job.heads = heads;
    job.results = last_step ? 1 : job.steps;
    job.x = x.const_data_ptr<Element>();
    job.x_window = x.stride(0);
    job.x_step = x.stride(1);
    job.x_column = x.stride(2);
    job.dropout = dropout;
    cut();
    pack(backward);
  }

  int64_t tiles() const { return (job.batch + job.tile_windows - 1) / job.tile_windows; }

  int64_t scratch(bool backward) const {
    Carving<Element> space{nullptr};
    EncoderTile<Element>::carve(job, backward, space);
    return space.used;
  }

  // Returns new tensors for the gradients of all parameters, in which the job sums them.
  std::vector<Tensor> new_gradients() {
    std::vector<Tensor> tensors;
    for (const Tensor& weight : weights_)
      tensors.push_back(weight.dim() == 1 ? empty(weight, {weight.size(0)})
                                          : saved_tensor(weight, {weight.size(0), weight.size(1)}));
    const auto at = [&](EncoderWeight which) { return tensors[which].template mutable_data_ptr<Element>(); };
    job.gradients = {at(kInWeight),
                     at(kInBias),
                     at(kOutWeight),
                     at(kOutBias),
                     {at(kLinear1Weight), at(kLinear1Bias), at(kLinear2Weight), at(kLinear2Bias)},
                     at(kNorm1Weight),
                     at(kNorm1Bias),
                     at(kNorm2Weight),
                     at(kNorm2Bias)};
    return tensors;
  }

 private:
  // Chooses the sizes of tiles and groups. They depend on the shapes and the instruction set, not on the
  // number of threads.
  void cut() {
    const bool drops = job.dropout.active;
    job.padded = store_.cut(job.width).padded();
    job.padded_pair = store_.cut(2 * job.width).padded();
    job.padded_steps = store_.cut(job.steps).padded();
    job.padded_head = store_.cut(job.width / job.heads).padded();
    job.group_windows = group_windows(job.batch, job.steps, drops, hidden_weights());
    job.tile_windows = tile_windows(kTileRows, job.batch, job.results, drops, hidden_weights());
  }

  void pack(bool backward) {
    const int64_t D = job.width;
    const Tensor &in = weights_[kInWeight], &out = weights_[kOutWeight];
    const Element* const in_bias = data(kInBias);
    const bool once = job.batch <= job.group_windows;  // then each weight is read by one product only
    job.query = store_.linear(in, 0, D, once);
    job.key_value = store_.linear(in, D, 2 * D, once);
    job.query_bias = store_.vector(in_bias, D);
    job.key_value_bias = store_.vector(in_bias + D, 2 * D);
    if (backward) {
      job.query_turned = store_.turned(in, 0, D, once);
      job.key_value_turned = store_.turned(in, D, 2 * D, once);
      job.out_turned = store_.turned(out, 0, D, once);
    } else {
      job.out = store_.linear(out, 0, D, once);
      job.out_bias = store_.vector(data(kOutBias), D);
    }
    job.norm1_weight = store_.vector(data(kNorm1Weight), D);
    job.norm1_bias = store_.vector(data(kNorm1Bias), D);
    job.norm2_weight = store_.vector(data(kNorm2Weight), D);
    job.norm2_bias = store_.vector(data(kNorm2Bias), D);
    const int64_t net_group = group_windows(job.batch, job.results, job.dropout.active, hidden_weights());
    job.net = packed_feed_forward(store_, weights_[kLinear1Weight], weights_[kLinear1Bias],
                                  weights_[kLinear2Weight], backward, job.batch <= net_group);
    job.net.leaving_bias = store_.vector(data(kLinear2Bias), D);
    job.net.dropout = job.dropout;
    job.net.group_windows = net_group;
  }

  int64_t hidden_weights() const { return weights_[kLinear1Weight].numel(); }

  const Element* data(EncoderWeight which) const {
    return weights_[which].template const_data_ptr<Element>();
  }

  PanelStore<Element> store_;
  std::vector<Tensor> weights_;
};

// The kept hidden activations consist of full slices.
void check_kept(const char* op, int64_t hidden) {
  QFAST_CHECK(hidden % kSliceColumns == 0, op, ": keep_hidden: expected a multiple of ", kSliceColumns,
              " hidden units, got ", hidden, ". Remedy: keep_hidden=False.");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> encoder_layer_cpu(const Tensor& x, std::vector<Tensor> weights,
                                                             int64_t heads, double eps, double dropout,
                                                             std::optional<Tensor> seed, bool last_step,
                                                             bool keep, int64_t precision, bool keep_hidden) {
  const char* const op = "encoder_layer";
  check_encoder_layer(op, x, weights, heads);
  const DropoutRule rule = dropout_rule(op, dropout, seed);
  const int64_t B = x.size(0), D = x.size(2), results = last_step ? 1 : x.size(1), saved_batch = keep ? B : 0;
  const Tensor output = last_step ? empty(x, {B, D}) : empty(x, {B, results, D});
  const Tensor normalised = saved_tensor(x, {2, saved_batch, results, D}),
               scales = saved_tensor(x, {2, saved_batch, results});
  const int64_t M = weights[kLinear1Weight].size(0);
  if (keep_hidden) check_kept(op, M);
  const Tensor hidden = saved_tensor(x, {keep_hidden ? B : 0, results, M});
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    Encoder<Element> encoder(x, weights, heads, rule, last_step, false);
    auto& job = encoder.job;
    job.eps = eps;
    job.output = output.mutable_data_ptr<Element>();
    if (keep) {
      job.normalised = normalised.mutable_data_ptr<Element>();
      job.scales = scales.mutable_data_ptr<Element>();
    }
    if (keep_hidden) job.net.kept = hidden.mutable_data_ptr<Element>();
    const auto kernel = product_kernels<Element>(op, precision).encoder_layer;
    share_with_scratch<Element>(
        x, encoder.tiles(), {encoder.scratch(false), true},
        [&](int64_t begin, int64_t end, Element* scratch) { kernel(job, begin, end, scratch); });
  });
  return {output, normalised, scales, hidden};
}

std::tuple<Tensor, std::vector<Tensor>> encoder_layer_backward_cpu(const Tensor& grad, const Tensor& x,
                                                                   std::vector<Tensor> weights, int64_t heads,
                                                                   double dropout, std::optional<Tensor> seed,
                                                                   bool last_step, const Tensor& normalised,
                                                                   const Tensor& scales, const Tensor& hidden,
                                                                   bool input_grad, int64_t precision) {
  const char* const op = "encoder_layer_backward";
  check_encoder_layer(op, x, weights, heads);
  const DropoutRule rule = dropout_rule(op, dropout, seed);
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2), results = last_step ? 1 : T;
  if (last_step) {
    check_shaped(op, "grad", grad, x, {B, D});
  } else {
    check_shaped(op, "grad", grad, x, {B, T, D});
  }
  check_shaped(op, "normalised", normalised, x, {2, B, results, D});
  check_shaped(op, "scales", scales, x, {2, B, results});
  const int64_t M = weights[kLinear1Weight].size(0);
  const bool kept = hidden.numel() > 0;
  if (kept) {
    check_kept(op, M);
    check_shaped(op, "hidden", hidden, x, {B, results, M});
  }
  const Tensor grad_x = empty(x, {input_grad ? B : 0, T, D});
  const Tensor contiguous_grad = as_contiguous(grad), contiguous_normalised = as_contiguous(normalised),
               contiguous_scales = as_contiguous(scales), contiguous_hidden = as_contiguous(hidden);
  std::vector<Tensor> gradients;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    Encoder<Element> encoder(x, weights, heads, rule, last_step, true);
    auto& job = encoder.job;
    job.grad = contiguous_grad.const_data_ptr<Element>();
    job.normalised = contiguous_normalised.mutable_data_ptr<Element>();
    job.scales = contiguous_scales.mutable_data_ptr<Element>();
    if (kept) job.net.kept = contiguous_hidden.mutable_data_ptr<Element>();
    if (input_grad) job.grad_x = grad_x.mutable_data_ptr<Element>();
    gradients = encoder.new_gradients();
    const auto kernel = product_kernels<Element>(op, precision).encoder_layer_backward;
    sum_into<Element>(gradients, encoder.tiles(), {encoder.scratch(true), true},
                      [&](int64_t begin, int64_t end, Element* scratch, Element* sums) {
                        kernel(job, begin, end, scratch, sums);
                      });
  });
  return {grad_x, gradients};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CPU, m) {
  m.impl("encoder_layer", TORCH_BOX(&encoder_layer_cpu));
  m.impl("encoder_layer_backward", TORCH_BOX(&encoder_layer_backward_cpu));
}

}  // namespace qfast
