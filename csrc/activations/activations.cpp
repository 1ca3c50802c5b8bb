// Hyperbolic tangent of every element on the CPU. Schema: qfast/ops/activations.py; the kernel:
// activations.h.
#include "cpu_dispatch.h"
#include "cpu_workers.h"

namespace qfast {
namespace {

constexpr int64_t kGrainElements = 16384;  // of one task: long enough to pay for waking a thread

Tensor tanh_cpu(const Tensor& x) {
  check_floating("tanh", "x", x);
  const Tensor held = torch::stable::contiguous(x);
  Tensor out = empty(held, {held.numel()});
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    const Element* const from = held.const_data_ptr<Element>();
    Element* const to = out.mutable_data_ptr<Element>();
    parallel_for(held.numel(), kGrainElements, [&](int64_t begin, int64_t end) {
      if constexpr (sizeof(Element) == 4) {
        cpu_kernels().tanh_f32(from, to, begin, end);
      } else {
        cpu_kernels().tanh_f64(from, to, begin, end);
      }
    });
  });
  return torch::stable::reshape(out, held.sizes());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CPU, m) { m.impl("tanh", TORCH_BOX(&tanh_cpu)); }

}  // namespace qfast
