// Convolution over the steps of each window on the CPU: checks, packed weights, buffers and threads.
// qfast/ops/window_conv.py contains the schemas, window_conv_kernels.h the kernels.
#include "window_conv/window_conv.h"

#include <tuple>

#include "panel_store.h"

namespace qfast {
namespace {

constexpr int64_t kTileRows = 240;  // steps of a tile, which contains whole windows

void check_window_conv(const char* op, const Tensor& x, const Tensor& weight) {
  check_floating(op, "x", x);
  check_dims(op, "x", x, 3, "[B, T, D]");
  check_dims(op, "weight", weight, 3, "[O, D, K]");
  QFAST_CHECK(weight.size(2) % 2 == 1, op, ": weight: expected an odd number of taps, got ", weight.size(2),
              ". Remedy: pad the weight with zeros to an odd number.");
  QFAST_CHECK(x.size(2) > 0 && weight.size(0) > 0, op,
              ": expected at least one feature and one channel, got x ", shape_text(x), " and weight ",
              shape_text(weight), ".");
  check_shaped(op, "weight", weight, x, {weight.size(0), x.size(2), weight.size(2)});
}

// Returns weight [O, D, K] as [K, padded rows, columns]. Rows and columns are D and O. If `turned`, they are
// O and D, and the taps are in reverse order, which is the right side of the product for the gradient of x.
template <class Element>
Tensor by_taps(const Tensor& weight, bool turned) {
  const Tensor source = as_contiguous(weight);
  const int64_t O = source.size(0), D = source.size(1), K = source.size(2);
  const int64_t rows = turned ? O : D, columns = turned ? D : O;
  const int64_t padded = PanelStore<Element>::cut(rows).padded();
  const Tensor out = empty(source, {K * padded, columns});
  Element* const to = out.mutable_data_ptr<Element>();
  std::fill(to, to + K * padded * columns, Element(0));
  const Element* const from = source.const_data_ptr<Element>();
  for (int64_t o = 0; o < O; ++o)
    for (int64_t d = 0; d < D; ++d)
      for (int64_t k = 0; k < K; ++k) {
        const int64_t row = turned ? (K - 1 - k) * padded + o : k * padded + d;
        to[row * columns + (turned ? d : o)] = from[(o * D + d) * K + k];
      }
  return out;
}

template <class Element>
WindowConvJob<Element> job_of(const Tensor& x, const Tensor& weight) {
  WindowConvJob<Element> job{};
  job.batch = x.size(0);
  job.steps = x.size(1);
  job.in = x.size(2);
  job.out = weight.size(0);
  job.taps = weight.size(2);
  job.padded_in = PanelStore<Element>::cut(job.in).padded();
  job.padded_out = PanelStore<Element>::cut(job.out).padded();
  job.tile_windows = std::max<int64_t>(1, kTileRows / std::max<int64_t>(job.steps, 1));
  job.x = x.const_data_ptr<Element>();
  job.x_window = x.stride(0);
  job.x_step = x.stride(1);
  job.x_column = x.stride(2);
  return job;
}

template <class Element>
int64_t tiles_of(const WindowConvJob<Element>& job) {
  return job.steps == 0 ? 0 : (job.batch + job.tile_windows - 1) / job.tile_windows;
}

template <class Element>
int64_t scratch_of(const WindowConvJob<Element>& job, bool backward) {
  Carving<Element> space{nullptr};
  WindowConvTile<Element>::carve(job, backward, space);
  return space.used;
}

Tensor window_conv_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const char* const op = "window_conv";
  check_window_conv(op, x, weight);
  const int64_t out = weight.size(0);
  check_shaped(op, "bias", bias, x, {out});
  const Tensor output = empty(x, {x.size(0), x.size(1), out}), contiguous_bias = as_contiguous(bias);
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    PanelStore<Element> store(x);
    auto job = job_of<Element>(x, weight);
    job.weight = store.turned(by_taps<Element>(weight, false), 0, job.taps * job.padded_in);
    job.bias = store.vector(contiguous_bias.const_data_ptr<Element>(), out);
    job.output = output.mutable_data_ptr<Element>();
    const auto kernel = cpu_kernels<Element>().window_conv;
    share_with_scratch<Element>(
        x, tiles_of(job), {scratch_of(job, false), true},
        [&](int64_t begin, int64_t end, Element* scratch) { kernel(job, begin, end, scratch); });
  });
  return output;
}

// Returns the gradient of the weight [O, D, K] from the sums [K][padded D][padded O].
template <class Element>
Tensor weight_gradient(const Tensor& like, const WindowConvJob<Element>& job, const Element* sums) {
  const Tensor out = empty(like, {job.out, job.in, job.taps});
  Element* const to = out.mutable_data_ptr<Element>();
  for (int64_t o = 0; o < job.out; ++o)
    for (int64_t d = 0; d < job.in; ++d)
      for (int64_t k = 0; k < job.taps; ++k)
        to[(o * job.in + d) * job.taps + k] = sums[(k * job.padded_in + d) * job.padded_out + o];
  return out;
}

std::tuple<Tensor, Tensor, Tensor> window_conv_backward_cpu(const Tensor& grad, const Tensor& x,
                                                            const Tensor& weight, bool input_grad) {
  const char* const op = "window_conv_backward";
  check_window_conv(op, x, weight);
  check_shaped(op, "grad", grad, x, {x.size(0), x.size(1), weight.size(0)});
  const Tensor grad_x = empty(x, {input_grad ? x.size(0) : 0, x.size(1), x.size(2)});
  const Tensor contiguous_grad = as_contiguous(grad);
  std::optional<std::tuple<Tensor, Tensor, Tensor>> gradients;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    PanelStore<Element> store(x);
    auto job = job_of<Element>(x, weight);
    job.weight_turned = store.turned(by_taps<Element>(weight, true), 0, job.taps * job.padded_out);
    job.grad = contiguous_grad.const_data_ptr<Element>();
    if (input_grad) job.grad_x = grad_x.mutable_data_ptr<Element>();
    using Sums = WindowConvSums<Element>;
    Carving<Element> counted{nullptr};
    Sums::carve(job, counted);
    const auto kernel = cpu_kernels<Element>().window_conv_backward;
    const Buffer<Element> total =
        sum_in_parts<Element>(x, tiles_of(job), {scratch_of(job, true), true}, counted.used,
                              [&](int64_t begin, int64_t end, Element* scratch, Element* sums) {
                                kernel(job, begin, end, scratch, sums);
                              });
    Carving<Element> space{total.data()};
    const Sums sums = Sums::carve(job, space);
    gradients = {grad_x, weight_gradient(x, job, sums.weight), copied_vector<Element>(x, sums.bias, job.out)};
  });
  return *gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CPU, m) {
  m.impl("window_conv", TORCH_BOX(&window_conv_cpu));
  m.impl("window_conv_backward", TORCH_BOX(&window_conv_backward_cpu));
}

}  // namespace qfast
