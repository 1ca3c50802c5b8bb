// A post-norm encoder layer on CUDA, forward and backward, for all steps or for the last step only.
// qfast/ops/encoder_layer.py contains the schemas. The kernels have not run on a GPU; they are tested by
// emulation on the host.
//
// cuBLAS computes the projections. Attention is one launch, where a thread block owns a head of a window
// (encoder_layer_kernels_attention.cuh). Dropout, residual and norm are one launch
// (encoder_layer_kernels_norm.cuh), which also adds the partial sums of the feed-forward block
// (feed_forward.cu). For the last step only, keys and values are computed for all steps and everything else
// for one step.
//
// Saved for backward: the results of the norms before their weights, and their scales. Backward computes all
// other intermediate values again from x. Windows are divided into parts with about 256 MB of intermediate
// values, and the weight gradients of the parts are added in order. The memory of intermediate values
// therefore depends neither on the batch nor on the size of the hidden layer.
//
// There are no atomics. Results are reproducible bit for bit whenever those of cuBLAS are (one stream, or
// CUBLAS_WORKSPACE_CONFIG set). A call does not synchronize with the host, does not copy from it, and uses
// only memory from torch, so a CUDA graph can capture it. Bound by multiply-adds, most of them in the
// feed-forward block, which can use tensor cores. Not measured.
#include <optional>
#include <tuple>

#include "encoder_layer/encoder_layer_launch.cuh"

namespace qfast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> encoder_layer_cuda(const Tensor& x, std::vector<Tensor> weights,
                                                              int64_t heads, double eps, double dropout,
                                                              std::optional<Tensor> seed, bool last_step,
                                                              bool keep, int64_t precision,
                                                              bool keep_hidden) {
  const char* const op = "encoder_layer";
  check_cuda(op, "x", x);
  QFAST_CHECK(!keep_hidden, op, ": keep_hidden: expected False on a GPU, got True.");
  CudaDevice device(x);
  const EncoderArguments arguments(op, x, weights, heads, dropout, seed, last_step);
  const Precision form = checked_precision(op, precision);
  const int64_t B = arguments.batch(), D = arguments.width(), R = arguments.results;
  const int64_t saved_batch = keep ? B : 0;
  const Tensor output = last_step ? room(x, {B, D}) : room(x, {B, R, D});
  const Tensor normalised = room(x, {2, saved_batch, R, D}), scales = room(x, {2, saved_batch, R});
  const Tensor hidden = room(x, {0, R, weights[kLinear1Weight].size(0)});
  if (B == 0) return {output, normalised, scales, hidden};
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    EncoderLaunches<T> launches(op, device, arguments, false, form);
    SavedNorms<T> saved{};
    if (keep) saved = {normalised.mutable_data_ptr<T>(), scales.mutable_data_ptr<T>()};
    constexpr int64_t kMatrices = 8;  // matrices [rows][D] of a part
    launches.for_parts(kMatrices, [&](int64_t first, int64_t windows) {
      launches.forward(first, windows, eps, output.mutable_data_ptr<T>(), saved);
    });
  });
  return {output, normalised, scales, hidden};
}

std::tuple<Tensor, std::vector<Tensor>> encoder_layer_backward_cuda(
    const Tensor& grad, const Tensor& x, std::vector<Tensor> weights, int64_t heads, double dropout,
    std::optional<Tensor> seed, bool last_step, const Tensor& normalised, const Tensor& scales,
    const Tensor& hidden, bool input_grad, int64_t precision) {
  const char* const op = "encoder_layer_backward";
  check_cuda(op, "x", x);
  CudaDevice device(x);
  const EncoderArguments arguments(op, x, weights, heads, dropout, seed, last_step);
  const Precision form = checked_precision(op, precision);
  const int64_t B = arguments.batch(), D = arguments.width(), R = arguments.results;
  if (last_step) {
    check_shaped(op, "grad", grad, x, {B, D});
  } else {
    check_shaped(op, "grad", grad, x, {B, R, D});
  }
  check_shaped(op, "normalised", normalised, x, {2, B, R, D});
  check_shaped(op, "scales", scales, x, {2, B, R});
  QFAST_CHECK(hidden.numel() == 0, op, ": hidden: expected no element on a GPU, got ", shape_text(hidden),
              ".");
  const Tensor contiguous_grad = as_matrix(as_contiguous(grad), B * R, D);
  const Tensor contiguous_normalised = as_contiguous(normalised), contiguous_scales = as_contiguous(scales);
  const Tensor grad_x = room(x, {input_grad ? B : 0, arguments.steps(), D});
  std::vector<Tensor> grads, net_grads, other_grads;
  for (size_t i = 0; i < arguments.weights.size(); ++i) {
    grads.push_back(new_tensor_like(arguments.weights[i]));
    (i >= kLinear1Weight && i <= kLinear2Bias ? net_grads : other_grads).push_back(grads[i]);
  }
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    PartSums sums(device, other_grads), net_sums(device, net_grads);
    if (B > 0) {
      EncoderLaunches<T> launches(op, device, arguments, true, form);
      const SavedNorms<T> saved{contiguous_normalised.mutable_data_ptr<T>(),
                                contiguous_scales.mutable_data_ptr<T>()};
      constexpr int64_t kMatrices = 16;
      launches.for_parts(kMatrices, [&](int64_t first, int64_t windows) {
        launches.backward(first, windows, contiguous_grad, saved, input_grad ? &grad_x : nullptr, sums,
                          net_sums);
      });
    }
    sums.finish();
    net_sums.finish();
  });
  return {grad_x, grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CUDA, m) {
  m.impl("encoder_layer", TORCH_BOX(&encoder_layer_cuda));
  m.impl("encoder_layer_backward", TORCH_BOX(&encoder_layer_backward_cuda));
}

}  // namespace qfast
