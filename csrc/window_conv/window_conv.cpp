// Convolution over the steps of each window on the CPU: checks, packed weights, buffers and threads.
// qfast/ops/window_conv.py contains the schemas, window_conv_kernels.h the kernels.
#include "window_conv/window_conv.h"

#include <tuple>
#include <vector>

#include "panel_store.h"

namespace qfast {
namespace {

constexpr int64_t kTileRows = 240;  // steps of a tile, which contains whole windows
// Up to this many steps, a weight of at least kLargeWeight elements is not packed.
constexpr int64_t kFewSteps = 64;
constexpr int64_t kLargeWeight = 1 << 15;

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

constexpr int64_t kTapRows = 48;  // rows of a block between the orders [D, K] and [K, D]

// Calls body(first feature, features) for blocks of features with about kTapRows inputs, taps times features.
template <class Body>
void for_feature_blocks(int64_t features, int64_t taps, const Body& body) {
  const int64_t most = std::max<int64_t>(1, kTapRows / taps);
  for (int64_t d = 0; d < features; d += most) body(d, std::min(most, features - d));
}

// Sets the rows beyond the last one of each tap to 0.
template <class Element>
void clear_between_taps(Element* to, int64_t taps, int64_t rows, int64_t padded, int64_t width) {
  for (int64_t k = 0; k < taps; ++k)
    std::fill(to + (k * padded + rows) * width, to + (k + 1) * padded * width, Element(0));
}

// Packs weight [O, D, K] as [K * padded D, O], the right side of the product with x.
template <class Element>
PanelMatrix<Element> packed_by_taps(PanelStore<Element>& store, const Tensor& weight, int64_t padded) {
  const int64_t D = weight.size(1), K = weight.size(2);
  const Element* const from = weight.const_data_ptr<Element>();
  std::vector<Element> block(std::max(kTapRows, K) * kMostPanelWidth);
  return store.pack(K * padded, weight.size(0), [&](int64_t o, int64_t count, int64_t width, Element* to) {
    clear_between_taps(to, K, D, padded, width);
    for_feature_blocks(D, K, [&](int64_t first, int64_t features) {
      cpu_kernels<Element>().transpose(from + (o * D + first) * K, D * K, count, features * K, block.data(),
                                       width);
      for (int64_t d = 0; d < features; ++d)
        for (int64_t k = 0; k < K; ++k)
          std::memcpy(to + (k * padded + first + d) * width, block.data() + (d * K + k) * width,
                      sizeof(Element) * count);
    });
  });
}

// Packs weight [O, D, K] as [K * padded O, D] with the taps in reverse order, the right side of the product
// for the gradient of x.
template <class Element>
PanelMatrix<Element> packed_by_reversed_taps(PanelStore<Element>& store, const Tensor& weight,
                                             int64_t padded) {
  const int64_t O = weight.size(0), D = weight.size(1), K = weight.size(2);
  const Element* const from = weight.const_data_ptr<Element>();
  return store.pack(K * padded, D, [&](int64_t first, int64_t count, int64_t width, Element* to) {
    clear_between_taps(to, K, O, padded, width);
    for (int64_t o = 0; o < O; ++o)
      for (int64_t k = 0; k < K; ++k) {
        Element* const row = to + ((K - 1 - k) * padded + o) * width;
        const Element* const source = from + (o * D + first) * K + k;
        for (int64_t d = 0; d < count; ++d) row[d] = source[d * K];
      }
  });
}

// `weight` is contiguous and lives as long as the job.
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
  const int64_t most = std::max<int64_t>(1, kTileRows / std::max<int64_t>(job.steps, 1));
  job.tile_windows = std::min(most, std::max<int64_t>(job.batch, 1));
  job.x = x.const_data_ptr<Element>();
  job.x_window = x.stride(0);
  job.x_step = x.stride(1);
  job.x_column = x.stride(2);
  const int64_t steps = job.batch * job.steps;
  if (steps > 0 && steps <= kFewSteps && weight.numel() >= kLargeWeight)
    job.unpacked = weight.const_data_ptr<Element>();
  job.padded_inputs = PanelStore<Element>::cut(job.in * job.taps).padded();
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

Tensor window_conv_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t precision) {
  const char* const op = "window_conv";
  check_window_conv(op, x, weight);
  const int64_t out = weight.size(0);
  check_shaped(op, "bias", bias, x, {out});
  const Tensor output = empty(x, {x.size(0), x.size(1), out}), contiguous_bias = as_contiguous(bias),
               contiguous_weight = as_contiguous(weight);
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    PanelStore<Element> store(x);
    auto job = job_of<Element>(x, contiguous_weight);
    if (job.unpacked == nullptr) job.weight = packed_by_taps(store, contiguous_weight, job.padded_in);
    job.bias = store.vector(contiguous_bias.const_data_ptr<Element>(), out);
    job.output = output.mutable_data_ptr<Element>();
    const auto kernel = product_kernels<Element>(op, precision).window_conv;
    share_with_scratch<Element>(
        x, tiles_of(job), {scratch_of(job, false), true},
        [&](int64_t begin, int64_t end, Element* scratch) { kernel(job, begin, end, scratch); });
  });
  return output;
}

// Returns the gradient of the weight [O, D, K] from the sums [K][padded D][padded O].
template <class Element>
Tensor weight_gradient(const Tensor& like, const WindowConvJob<Element>& job, const Element* sums) {
  const Tensor out = saved_tensor(like, {job.out, job.in, job.taps});
  Element* const to = out.mutable_data_ptr<Element>();
  const int64_t K = job.taps;
  std::vector<Element> block(std::max(kTapRows, K) * kMostPanelWidth);
  for (int64_t o = 0; o < job.out; o += kMostPanelWidth) {
    const int64_t count = std::min(kMostPanelWidth, job.out - o);
    for_feature_blocks(job.in, K, [&](int64_t first, int64_t features) {
      for (int64_t d = 0; d < features; ++d)
        for (int64_t k = 0; k < K; ++k)
          std::memcpy(block.data() + (d * K + k) * kMostPanelWidth,
                      sums + (k * job.padded_in + first + d) * job.padded_out + o, sizeof(Element) * count);
      cpu_kernels<Element>().transpose(block.data(), kMostPanelWidth, features * K, count,
                                       to + (o * job.in + first) * K, job.in * K);
    });
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> window_conv_backward_cpu(const Tensor& grad, const Tensor& x,
                                                            const Tensor& weight, bool input_grad,
                                                            int64_t precision) {
  const char* const op = "window_conv_backward";
  check_window_conv(op, x, weight);
  check_shaped(op, "grad", grad, x, {x.size(0), x.size(1), weight.size(0)});
  const Tensor grad_x = empty(x, {input_grad ? x.size(0) : 0, x.size(1), x.size(2)});
  const Tensor contiguous_grad = as_contiguous(grad), contiguous_weight = as_contiguous(weight);
  std::optional<std::tuple<Tensor, Tensor, Tensor>> gradients;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    PanelStore<Element> store(x);
    auto job = job_of<Element>(x, contiguous_weight);
    if (input_grad && job.unpacked == nullptr)
      job.weight_turned = packed_by_reversed_taps(store, contiguous_weight, job.padded_out);
    job.grad = contiguous_grad.const_data_ptr<Element>();
    if (input_grad) job.grad_x = grad_x.mutable_data_ptr<Element>();
    using Sums = WindowConvSums<Element>;
    Carving<Element> counted{nullptr};
    Sums::carve(job, counted);
    const auto kernel = product_kernels<Element>(op, precision).window_conv_backward;
    if (job.unpacked != nullptr) {
      const Tensor grad_weight = saved_tensor(x, {job.out, job.in, job.taps}),
                   grad_bias = empty(x, {job.out});
      job.grad_weight = grad_weight.mutable_data_ptr<Element>();
      job.grad_bias = grad_bias.mutable_data_ptr<Element>();
      share_with_scratch<Element>(
          x, 1, {scratch_of(job, true), true},
          [&](int64_t begin, int64_t end, Element* scratch) { kernel(job, begin, end, scratch, nullptr); });
      gradients = {grad_x, grad_weight, grad_bias};
      return;
    }
    const Buffer<Element> total = sum_in_parts<Element>(
        x, tiles_of(job), {scratch_of(job, true), true}, counted.used,
        [&](int64_t begin, int64_t end, Element* scratch, Element* sums) {
          kernel(job, begin, end, scratch, sums);
        },
        true);
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
