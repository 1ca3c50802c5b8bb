// One post-norm encoder layer on CUDA, forward and backward, of all steps or of the last one. Has never run
// on a GPU: the kernels are checked by emulation on the host.
//
// Projections are cuBLAS'; attention is one launch, a block of threads a head of a window
// (encoder_layer_kernels_attention.cuh); dropout, residual and norm are one launch
// (encoder_layer_kernels_norm.cuh), which also joins what the feed-forward block (feed_forward.cu) leaves.
// For the last step alone there are keys and values of all steps, and everything else of one. Backward, all
// but the norms' results is computed again from x. Windows are taken in parts of about 256 MB of intermediate
// results; weight gradients of parts are added in order. Memory beside the results depends neither on the
// batch nor on the size of the hidden.
//
// No atomics; results repeat bit for bit as far as cuBLAS' do (one stream, or CUBLAS_WORKSPACE_CONFIG set).
// Nothing synchronises or copies from the host, and all memory is torch's, so a CUDA graph can capture a
// call. What bounds it: multiply-adds, above all of the feed-forward block, which may go to tensor cores.
// Unmeasured. Schemas: qfast/ops/encoder_layer.py.
#include <optional>
#include <tuple>

#include "encoder_layer/encoder_layer_launch.cuh"

namespace qfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> encoder_layer_cuda(const Tensor& x, std::vector<Tensor> weights,
                                                      int64_t heads, double eps, double dropout,
                                                      std::optional<Tensor> seed, bool last_step, bool keep,
                                                      int64_t precision) {
  const char* const op = "encoder_layer";
  check_cuda(op, "x", x);
  CudaDevice device(x);
  const EncoderGiven given(op, x, weights, heads, dropout, seed, last_step);
  const Precision form = checked_precision(op, precision);
  const int64_t B = given.batch(), D = given.width(), R = given.results, kept_batch = keep ? B : 0;
  const Tensor output = last_step ? room(x, {B, D}) : room(x, {B, R, D});
  const Tensor normalised = room(x, {2, kept_batch, R, D}), scales = room(x, {2, kept_batch, R});
  if (B == 0) return {output, normalised, scales};
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    EncoderLaunches<T> launches(op, device, given, false, form);
    EncoderKept<T> kept{};
    if (keep) kept = {normalised.mutable_data_ptr<T>(), scales.mutable_data_ptr<T>()};
    constexpr int64_t kMatrices = 8;  // [rows][D] of a part
    launches.for_parts(kMatrices, [&](int64_t first, int64_t windows) {
      launches.forward(first, windows, eps, output.mutable_data_ptr<T>(), kept);
    });
  });
  return {output, normalised, scales};
}

std::tuple<Tensor, std::vector<Tensor>> encoder_layer_backward_cuda(
    const Tensor& grad, const Tensor& x, std::vector<Tensor> weights, int64_t heads, double dropout,
    std::optional<Tensor> seed, bool last_step, const Tensor& normalised, const Tensor& scales,
    bool input_grad, int64_t precision) {
  const char* const op = "encoder_layer_backward";
  check_cuda(op, "x", x);
  CudaDevice device(x);
  const EncoderGiven given(op, x, weights, heads, dropout, seed, last_step);
  const Precision form = checked_precision(op, precision);
  const int64_t B = given.batch(), D = given.width(), R = given.results;
  if (last_step) {
    check_shaped(op, "grad", grad, x, {B, D});
  } else {
    check_shaped(op, "grad", grad, x, {B, R, D});
  }
  check_shaped(op, "normalised", normalised, x, {2, B, R, D});
  check_shaped(op, "scales", scales, x, {2, B, R});
  const Tensor entering = as_matrix(torch::stable::contiguous(grad), B * R, D);
  const Tensor held = torch::stable::contiguous(normalised), held_scales = torch::stable::contiguous(scales);
  const Tensor grad_x = room(x, {input_grad ? B : 0, given.steps(), D});
  std::vector<Tensor> grads, of_net, of_others;
  for (size_t i = 0; i < given.weights.size(); ++i) {
    grads.push_back(torch::stable::empty_like(given.weights[i]));
    (i >= kLinear1Weight && i <= kLinear2Bias ? of_net : of_others).push_back(grads[i]);
  }
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    PartSums sums(device, of_others), net_sums(device, of_net);
    if (B > 0) {
      EncoderLaunches<T> launches(op, device, given, true, form);
      const EncoderKept<T> kept{held.mutable_data_ptr<T>(), held_scales.mutable_data_ptr<T>()};
      constexpr int64_t kMatrices = 16;
      launches.for_parts(kMatrices, [&](int64_t first, int64_t windows) {
        launches.backward(first, windows, entering, kept, input_grad ? &grad_x : nullptr, sums, net_sums);
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
