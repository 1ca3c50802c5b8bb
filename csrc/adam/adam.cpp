// One step of Adam with clipped gradients on the CPU: checks, step counters and threads. qfast/ops/adam.py
// contains the schema, adam_kernels.h the kernel.
#include "adam/adam_checks.h"
#include "cpu_dispatch.h"
#include "cpu_units.h"

namespace qfast {
namespace {

constexpr int64_t kUnit = 64;  // elements; a multiple of the vectors of every instruction set and of torch
constexpr int64_t kGrainElements = 32768;  // of one task; fewer do not pay for waking a thread

// Computed in double like in torch, because 1 - beta^step loses most of its digits in float32.
template <class Element>
AdamCorrection<Element> correction_after(double step, const AdamNumbers& numbers) {
  const double first = 1 - std::pow(numbers.beta1, step), second = 1 - std::pow(numbers.beta2, step);
  return {static_cast<Element>(numbers.lr / first), static_cast<Element>(std::sqrt(second))};
}

// Numbers the units of kUnit elements through all tensors. A thread owns a range of units, which may contain
// parts of several tensors. Every element is computed independently, so the result does not depend on the
// number of threads.
template <class Element>
void run_adam(const AdamLists& lists, const AdamNumbers& numbers) {
  const size_t count = lists.parameters.size();
  std::vector<AdamQuartet> quartets;
  std::vector<AdamTensor<Element>> tensors;
  std::vector<AdamCorrection<Element>> corrections;
  std::vector<int64_t> first_unit{0};
  quartets.reserve(count);
  tensors.reserve(count);
  corrections.reserve(count);
  first_unit.reserve(count + 1);
  // Make the copies first. If they run out of memory, no tensor has been changed yet.
  for (size_t i = 0; i < count; ++i) quartets.emplace_back(lists, i);
  double last_step = -1;
  for (size_t i = 0; i < count; ++i) {
    tensors.push_back(quartets[i].template pointers<Element>());
    first_unit.push_back(first_unit[i] + (tensors[i].count + kUnit - 1) / kUnit);
    const double step = *lists.steps[i].mutable_data_ptr<float>() += 1;
    corrections.push_back(i > 0 && step == last_step ? corrections[i - 1]
                                                     : correction_after<Element>(step, numbers));
    last_step = step;
  }
  const AdamSettings<Element> settings = numbers.settings<Element>();
  const auto kernel = cpu_kernels<Element>().clipped_adam;
  share_units(first_unit, kGrainElements / kUnit, [&](std::size_t i, int64_t begin, int64_t end) {
    kernel(tensors[i], settings, corrections[i], begin * kUnit, std::min(end * kUnit, tensors[i].count));
  });
  for (const AdamQuartet& quartet : quartets) quartet.give_back();
}

void clipped_adam_cpu(std::vector<Tensor> parameters, std::vector<Tensor> gradients,
                      std::vector<Tensor> exp_avg, std::vector<Tensor> exp_avg_sq, std::vector<Tensor> steps,
                      std::optional<Tensor>, double lr, double beta1, double beta2, double eps,
                      double weight_decay, double limit) {
  const AdamLists lists{std::move(parameters), std::move(gradients), std::move(exp_avg),
                        std::move(exp_avg_sq), std::move(steps)};
  const AdamNumbers numbers{lr, beta1, beta2, eps, weight_decay, limit};
  check_adam(lists, numbers);
  if (lists.parameters.empty()) return;
  dispatch_floating(lists.parameters[0].scalar_type(),
                    [&](auto zero) { run_adam<decltype(zero)>(lists, numbers); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CPU, m) { m.impl("clipped_adam_", TORCH_BOX(&clipped_adam_cpu)); }

}  // namespace qfast
