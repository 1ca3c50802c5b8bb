// A linear layer with tanh on the CPU: checks, buffers and threads. qfast/ops/linear_tanh.py contains the
// schemas, linear_tanh_kernels.h the kernels.
#include "linear_tanh/linear_tanh.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include "cpu_dispatch.h"
#include "panel_store.h"

namespace qfast {
namespace {

constexpr int64_t kTileRows = 96;  // with 64 units, so many rows of the result fit in the first-level cache

struct LayerTensors {
  const char* op;
  const Tensor &x, &weight, &bias;
};

void check_layer(const LayerTensors& tensors) {
  const auto& [op, x, weight, bias] = tensors;
  check_floating(op, "x", x);
  check_dims(op, "x", x, 3, "[B, T, F]");
  check_dims(op, "weight", weight, 2, "[H, F]");
  check_dims(op, "bias", bias, 1, "[H]");
  QFAST_CHECK(x.size(2) > 0 && weight.size(1) == x.size(2) && weight.size(0) == bias.size(0), op,
              ": weight and bias: expected [H, ", x.size(2), "] and [H] with F of at least 1, got ",
              shape_text(weight), " and ", shape_text(bias), ".");
  for (const Tensor* tensor : {&weight, &bias}) {
    check_same_device(op, "weight or bias", *tensor, x, "x");
    QFAST_CHECK(tensor->scalar_type() == x.scalar_type(), op, ": weight and bias: expected the dtype of x, ",
                torch::headeronly::toString(x.scalar_type()), ", got ",
                torch::headeronly::toString(tensor->scalar_type()), ".");
  }
}

void check_result(const LayerTensors& tensors, const char* name, const Tensor& tensor) {
  const auto& [op, x, weight, bias] = tensors;
  const bool fits = tensor.dim() == 3 && tensor.size(0) == x.size(0) && tensor.size(1) == x.size(1) &&
                    tensor.size(2) == weight.size(0) && tensor.scalar_type() == x.scalar_type();
  QFAST_CHECK(fits, op, ": ", name, ": expected shape (", x.size(0), ", ", x.size(1), ", ", weight.size(0),
              ") and the dtype of x, ", torch::headeronly::toString(x.scalar_type()), ", got ",
              shape_text(tensor), " and ", torch::headeronly::toString(tensor.scalar_type()), ".");
  check_same_device(op, name, tensor, x, "x");
}

// The job of a call, without its results, and the packed weights.
template <class Element>
class Layer {
 public:
  LinearTanhJob<Element> job{};

  explicit Layer(const LayerTensors& tensors)
      : weight_(as_contiguous(tensors.weight)), bias_(as_contiguous(tensors.bias)), store_(tensors.x) {
    const Tensor& x = tensors.x;
    job.rows = x.size(0) * x.size(1);
    // Windows of one step, and windows that follow each other in memory, are a single window.
    const bool has_one_step = x.size(1) == 1;
    const bool is_matrix = has_one_step || x.size(0) <= 1 || x.stride(0) == x.size(1) * x.stride(1);
    job.steps = is_matrix ? job.rows : x.size(1);
    job.features = x.size(2);
    job.units = weight_.size(0);
    job.x = x.const_data_ptr<Element>();
    job.window_stride = x.stride(0);
    job.step_stride = x.stride(has_one_step ? 0 : 1);
    job.feature_stride = x.stride(2);
    job.weight = store_.linear(weight_, 0, job.units);
    job.bias = store_.vector(bias_.const_data_ptr<Element>(), job.units);
    // The size depends on the shapes only, so sums of gradients have the same order for any number of
    // threads.
    job.tile_rows = kTileRows;
  }

  void prepare_backward(bool input_grad) {
    if (input_grad) job.turned = store_.turned(weight_, 0, job.units);
  }

  int64_t tiles() const { return job.units == 0 ? 0 : (job.rows + job.tile_rows - 1) / job.tile_rows; }

 private:
  Tensor weight_, bias_;
  PanelStore<Element> store_;
};

Tensor linear_tanh_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias, bool keep) {
  const LayerTensors tensors{"linear_tanh", x, weight, bias};
  check_layer(tensors);
  const Tensor out = keep ? saved_tensor(x, {x.size(0), x.size(1), weight.size(0)})
                          : empty(x, {x.size(0), x.size(1), weight.size(0)});
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    Layer<Element> layer(tensors);
    layer.job.out = out.mutable_data_ptr<Element>();
    const auto kernel = cpu_kernels<Element>().linear_tanh;
    share(layer.tiles(), [&](int64_t begin, int64_t end) { kernel(layer.job, begin, end); });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_tanh_backward_cpu(const Tensor& grad, const Tensor& x,
                                                            const Tensor& weight, const Tensor& bias,
                                                            const Tensor& out, bool input_grad) {
  const LayerTensors tensors{"linear_tanh_backward", x, weight, bias};
  check_layer(tensors);
  check_result(tensors, "grad", grad);
  check_result(tensors, "out", out);
  const Tensor grad_x = saved_tensor(x, {input_grad ? x.size(0) : 0, x.size(1), x.size(2)});
  std::optional<std::tuple<Tensor, Tensor, Tensor>> gradients;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    Layer<Element> layer(tensors);
    layer.prepare_backward(input_grad);
    auto& job = layer.job;
    const Tensor contiguous_grad = as_contiguous(grad), contiguous_out = as_contiguous(out);
    job.grad = contiguous_grad.const_data_ptr<Element>();
    job.out = contiguous_out.mutable_data_ptr<Element>();
    if (input_grad) job.grad_x = grad_x.mutable_data_ptr<Element>();
    if (job.units == 0) std::fill_n(job.grad_x, grad_x.numel(), Element(0));
    const auto kernel = cpu_kernels<Element>().linear_tanh_backward;
    const Buffer<Element> sums = sum_in_parts<Element>(
        x, layer.tiles(), {LinearTanhSizes<Element>::scratch(job), true}, LinearTanhSizes<Element>::sums(job),
        [&](int64_t begin, int64_t end, Element* scratch, Element* part) {
          kernel(job, begin, end, scratch, part);
        });
    const int64_t padded = job.weight.padded();
    gradients = {grad_x, copied_transposed<Element>(x, sums.data(), job.features, job.units, padded),
                 copied_vector<Element>(x, sums.data() + job.features * padded, job.units)};
  });
  return *gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CPU, m) {
  m.impl("linear_tanh", TORCH_BOX(&linear_tanh_cpu));
  m.impl("linear_tanh_backward", TORCH_BOX(&linear_tanh_backward_cpu));
}

}  // namespace qfast
