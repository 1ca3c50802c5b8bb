// Hyperbolic tangent of every element on the CPU. qfast/ops/activations.py contains the schema, activations.h
// the kernel.
#include "cpu_dispatch.h"
#include "cpu_workers.h"

namespace qfast {
namespace {

constexpr int64_t kGrainElements = 16384;  // of one task; fewer do not pay for waking a thread

Tensor tanh_cpu(const Tensor& x) {
  check_floating("tanh", "x", x);
  const Tensor input = as_contiguous(x);
  const Tensor out = empty(input, input.sizes());
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    const Element* const from = input.const_data_ptr<Element>();
    Element* const to = out.mutable_data_ptr<Element>();
    const auto kernel = cpu_kernels<Element>().tanh_elements;
    parallel_for(input.numel(), kGrainElements,
                 [&](int64_t begin, int64_t end) { kernel(from, to, begin, end); });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CPU, m) { m.impl("tanh", TORCH_BOX(&tanh_cpu)); }

}  // namespace qfast
