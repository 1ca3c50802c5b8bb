// Temporal convolution stack on the CPU: checks, buffers and threads. qfast/ops/temporal_conv.py contains the
// schemas, temporal_conv_kernels.h and temporal_conv_kernels_backward.h the kernels.
#include "temporal_conv/temporal_conv.h"

#include <cstring>
#include <tuple>
#include <utility>

#include "cpu_bf16.h"
#include "cpu_workers.h"
#include "temporal_conv/temporal_conv_pack.h"
#include "temporal_conv/temporal_conv_pack_rolling.h"

namespace qfast {
namespace {

template <class Element>
Activation<Element> output_view(const Tensor& output, bool all_steps) {
  const int64_t channels = output.size(output.dim() - 1);
  Element* const data = output.mutable_data_ptr<Element>();
  if (!all_steps) return {data, 0, channels, 1};
  return {data, channels, output.size(1) * channels, 1};
}

// ---------------------------------------------------------------- forward
template <class Job, class Element>
void run_tiles(void (*kernel)(const Job&, int64_t, int64_t, Element*), const Job& job, int64_t tiles,
               int64_t scratch_elements, const Tensor& like, int64_t most) {
  share_with_scratch<Element>(
      like, tiles, {scratch_elements},
      [&](int64_t begin, int64_t end, Element* scratch) { kernel(job, begin, end, scratch); }, most);
}

std::tuple<Tensor, Tensor, Tensor> temporal_conv_net_cpu(const Tensor& x, std::vector<Tensor> weights,
                                                         std::vector<int64_t> dilations, double dropout,
                                                         std::optional<Tensor> seed, bool all_steps,
                                                         bool keep, int64_t precision) {
  const char* op = "temporal_conv_net";
  Tensor output, activations, signs;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    const auto kernel = product_kernels<Element>(op, precision).temporal_conv_forward;
    Network<Element> network(op, x, weights, dilations, dropout, seed, all_steps, keep, precision == kBf16);
    auto& job = network.job;
    const int64_t batch = job.batch, saved_rows = keep ? batch : 0,
                  channels = network.tensors.back().channels;
    output = all_steps ? empty(x, {batch, x.size(1), channels}) : empty(x, {batch, channels});
    activations = saved_tensor(x, {saved_rows * job.row_elements});
    signs = saved_tensor(x, {saved_rows * job.row_signs}, ScalarType::Byte);
    job.output = output_view<Element>(output, all_steps);
    if (keep) {
      job.activations = activations.mutable_data_ptr<Element>();
      job.signs = signs.mutable_data_ptr<unsigned char>();
    }
    if (network.shares_rows) {
      RollingNetwork<Element> rolling(network);
      run_tiles(cpu_kernels<Element>().temporal_conv_rolling, rolling.job, rolling.chunks(),
                rolling.scratch_elements, x, 0);
    } else {
      network.prepare_forward(keep);
      // With bfloat16 operands, each piece packs the weights.
      const int64_t tiles = network.tiles(), workers = worker_count(tiles),
                    most = precision == kBf16 ? (tiles + workers - 1) / workers : 0;
      run_tiles(kernel, job, tiles, network.scratch_elements, x, most);
    }
  });
  return {output, activations, signs};
}

// ---------------------------------------------------------------- backward
// The gradient of a weight [channel, feature, tap] and its sums [tap][feature][channel], which may be padded.
template <class Element>
struct WeightGradient {
  Element* to;
  int64_t channels, features, kernel;
  const Element* sums;
  int64_t sum_features, sum_channels;

  // Copies the sums of one feature.
  void copy_feature(int64_t feature) const {
    for (int64_t tap = 0; tap < kernel; ++tap) {
      const Element* const from = sums + (tap * sum_features + feature) * sum_channels;
      for (int64_t c = 0; c < channels; ++c) to[(c * features + feature) * kernel + tap] = from[c];
    }
  }
};

template <class Element>
Tensor bias_gradient(const Tensor& like, const Element* sums, int64_t channels) {
  Tensor out = empty(like, {channels});
  std::memcpy(out.mutable_data_ptr<Element>(), sums, sizeof(Element) * channels);
  return out;
}

template <class Element>
std::vector<Tensor> weight_gradients(const Network<Element>& network, const Element* sums) {
  std::vector<Tensor> grads;
  std::vector<WeightGradient<Element>> weights;
  std::vector<int64_t> first_feature{0};
  int64_t longest = 1;
  for (std::size_t i = 0; i < network.tensors.size(); ++i) {
    const BlockTensors& block = network.tensors[i];
    const BlockJob<Element>& at = network.job.blocks[i];
    const auto add = [&](const Tensor& weight, int64_t sum, int64_t features, int64_t bias_sum) {
      const int64_t channels = weight.size(0), columns = weight.size(1), kernel = weight.size(2);
      grads.push_back(empty(weight, {channels, columns, kernel}));
      weights.push_back({grads.back().template mutable_data_ptr<Element>(), channels, columns, kernel,
                         sums + sum, features, at.sum_channels});
      first_feature.push_back(first_feature.back() + columns);
      longest = std::max(longest, channels * kernel);
      grads.push_back(bias_gradient(weight, sums + bias_sum, block.channels));
    };
    add(block.first_weight, at.first_sum, at.sum_features, at.first_bias_sum);
    add(block.second_weight, at.second_sum, at.sum_channels, at.second_bias_sum);
    if (at.downsample) add(*block.residual_weight, at.residual_sum, at.sum_features, at.residual_bias_sum);
  }
  share_units(first_feature, std::max<int64_t>(1, kPackGrain / longest),
              [&](std::size_t item, int64_t begin, int64_t end) {
                for (int64_t feature = begin; feature < end; ++feature) weights[item].copy_feature(feature);
              });
  return grads;
}

template <class Element>
std::vector<Tensor> run_backward(Network<Element>& network, const Tensor& like, int64_t precision) {
  const auto kernel =
      product_kernels<Element>("temporal_conv_net_backward", precision).temporal_conv_backward;
  const Buffer<Element> sums =
      sum_in_parts<Element>(like, network.tiles(), {network.scratch_elements}, network.sum_elements,
                            [&](int64_t begin, int64_t end, Element* scratch, Element* part) {
                              kernel(network.job, begin, end, scratch, part);
                            });
  return weight_gradients(network, sums.data());
}

std::tuple<Tensor, std::vector<Tensor>> temporal_conv_net_backward_cpu(
    const Tensor& grad, const Tensor& x, std::vector<Tensor> weights, std::vector<int64_t> dilations,
    double dropout, std::optional<Tensor> seed, bool all_steps, const Tensor& output,
    const Tensor& activations, const Tensor& signs, bool input_grad, int64_t precision) {
  const char* op = "temporal_conv_net_backward";
  Tensor grad_x = empty(x, {input_grad ? x.size(0) : 0, x.size(1), x.size(2)});
  std::vector<Tensor> grads;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    Network<Element> network(op, x, weights, dilations, dropout, seed, all_steps, true, precision == kBf16);
    network.prepare_backward(input_grad);
    auto& job = network.job;
    const int64_t channels = network.tensors.back().channels;
    for (const auto& [name, tensor] : {std::pair("grad", &grad), std::pair("output", &output)})
      if (all_steps)
        check_shaped(op, name, *tensor, x, {job.batch, x.size(1), channels});
      else
        check_shaped(op, name, *tensor, x, {job.batch, channels});
    check_shaped(op, "activations", activations, x, {job.batch * job.row_elements});
    QFAST_CHECK(signs.dim() == 1 && signs.numel() == job.batch * job.row_signs &&
                    signs.scalar_type() == ScalarType::Byte && signs.is_cpu(),
                op, ": signs: expected ", job.batch * job.row_signs, " bytes, got ", shape_text(signs),
                " of ", torch::headeronly::toString(signs.scalar_type()), ".");
    const Tensor contiguous_grad = as_contiguous(grad), contiguous_output = as_contiguous(output);
    const Tensor states = as_contiguous(activations), sign_bits = as_contiguous(signs);
    const auto grad_view = output_view<Element>(contiguous_grad, all_steps);
    job.grad = {grad_view.data, grad_view.slot_stride, grad_view.row_stride, 1};
    job.output = output_view<Element>(contiguous_output, all_steps);
    job.activations = states.mutable_data_ptr<Element>();
    job.signs = sign_bits.mutable_data_ptr<unsigned char>();
    if (input_grad) job.grad_x = {grad_x.mutable_data_ptr<Element>(), x.size(2), x.size(1) * x.size(2), 1};
    grads = run_backward(network, x, precision);
  });
  return {grad_x, grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CPU, m) {
  m.impl("temporal_conv_net", TORCH_BOX(&temporal_conv_net_cpu));
  m.impl("temporal_conv_net_backward", TORCH_BOX(&temporal_conv_net_backward_cpu));
}

}  // namespace qfast
