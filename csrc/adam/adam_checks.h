// Host code of Adam on both devices: argument checks, and copies of tensors whose memory layouts differ.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <vector>

#include "adam/adam.h"
#include "common.h"

namespace qfast {

constexpr const char* kAdam = "clipped_adam";

struct AdamLists {
  std::vector<Tensor> parameters, gradients, exp_avg, exp_avg_sq, steps;

  // The four lists whose elements a step writes, in the order of AdamTensor.
  std::array<const std::vector<Tensor>*, 4> written() const {
    return {&parameters, &gradients, &exp_avg, &exp_avg_sq};
  }
};

constexpr std::array<const char*, 4> kAdamNames = {"parameters", "gradients", "exp_avg", "exp_avg_sq"};

struct AdamNumbers {
  double lr, beta1, beta2, eps, weight_decay, limit;

  template <class Element>
  AdamSettings<Element> settings() const {
    const auto rounded = [](double value) { return static_cast<Element>(value); };
    return {
        .limit = rounded(limit),
        .weight_decay = rounded(weight_decay),
        .eps = rounded(eps),
        .beta1 = rounded(beta1),
        .beta2 = rounded(beta2),
        .rest1 = rounded(1 - beta1),
        .rest2 = rounded(1 - beta2),
        .log1 = rounded(std::log(beta1)),
        .log2 = rounded(std::log(beta2)),
    };
  }
};

// Returns whether two tensors have the same shape and, if `strides`, the same strides.
inline bool same_list(const Tensor& a, const Tensor& b, bool strides) {
  if (a.dim() != b.dim()) return false;
  for (int64_t axis = 0; axis < a.dim(); ++axis) {
    if (a.size(axis) != b.size(axis)) return false;
    // The stride of an axis with one element has no meaning.
    if (strides && a.size(axis) > 1 && a.stride(axis) != b.stride(axis)) return false;
  }
  return true;
}

// Returns whether the elements fill a contiguous range of memory, each once, in any order of the axes.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  std::vector<std::array<int64_t, 2>> axes;  // (stride, size)
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    if (tensor.size(axis) > 1) axes.push_back({tensor.stride(axis), tensor.size(axis)});
  }
  std::sort(axes.begin(), axes.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline void check_adam(const AdamLists& lists, const AdamNumbers& numbers) {
  const size_t count = lists.parameters.size();
  QFAST_CHECK(lists.steps.size() == count, kAdam, ": steps: expected ", count,
              " tensors as in parameters, got ", lists.steps.size(), ".");
  for (size_t list = 0; list < kAdamNames.size(); ++list) {
    const std::vector<Tensor>& tensors = *lists.written()[list];
    const char* const name = kAdamNames[list];
    QFAST_CHECK(tensors.size() == count, kAdam, ": ", name, ": expected ", count,
                " tensors as in parameters, got ", tensors.size(), ".");
    for (size_t i = 0; i < count; ++i) {
      const Tensor &tensor = tensors[i], &first = lists.parameters[0], &parameter = lists.parameters[i];
      check_floating(kAdam, name, tensor);
      QFAST_CHECK(tensor.scalar_type() == first.scalar_type(), kAdam, ": ", name, "[", i,
                  "]: expected the dtype of parameters[0], got ",
                  torch::headeronly::toString(tensor.scalar_type()), ". Remedy: one call for each dtype.");
      check_same_device(kAdam, name, tensor, first, "parameters[0]");
      QFAST_CHECK(same_list(tensor, parameter, false), kAdam, ": ", name, "[", i,
                  "]: expected the shape of parameters[", i, "], ", shape_text(parameter), ", got ",
                  shape_text(tensor), ".");
      for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
        QFAST_CHECK(tensor.stride(axis) > 0 || tensor.size(axis) <= 1 || tensor.numel() == 0, kAdam, ": ",
                    name, "[", i, "]: several elements share memory (axis ", axis, " of size ",
                    tensor.size(axis), " has stride ", tensor.stride(axis), "). Remedy: .clone() it.");
      }
    }
  }
  for (size_t i = 0; i < count; ++i) {
    const Tensor& step = lists.steps[i];
    QFAST_CHECK(step.scalar_type() == ScalarType::Float && step.numel() == 1, kAdam, ": steps[", i,
                "]: expected one float32 number, got shape ", shape_text(step), " of ",
                torch::headeronly::toString(step.scalar_type()), ".");
    check_same_device(kAdam, "steps", step, lists.parameters[0], "parameters[0]");
  }
  QFAST_CHECK(numbers.limit > 0, kAdam, ": limit: expected a number above 0, got ", numbers.limit,
              ". Remedy: pass inf for no limit.");
}

// The four tensors of one parameter in the layout that the kernels expect. If their strides differ, the
// kernels work on contiguous copies, and give_back() copies the results to the original tensors.
class AdamQuartet {
 public:
  AdamQuartet(const AdamLists& lists, size_t i) {
    const auto written = lists.written();
    alike_ = is_dense(lists.parameters[i]);
    for (size_t list = 0; list < written.size(); ++list) {
      own_[list] = &(*written[list])[i];
      alike_ = alike_ && same_list(*own_[list], lists.parameters[i], true);
    }
    if (!alike_) {
      for (size_t list = 0; list < own_.size(); ++list) copies_[list] = as_contiguous(*own_[list]);
    }
  }

  template <class Element>
  AdamTensor<Element> pointers() const {
    const auto at = [&](size_t list) { return tensor(list).template mutable_data_ptr<Element>(); };
    return {at(0), at(1), at(2), at(3), own_[0]->numel()};
  }

  void give_back() const {
    for (size_t list = 0; !alike_ && list < own_.size(); ++list) {
      Tensor to = *own_[list];
      if (!to.is_contiguous()) torch::stable::copy_(to, *copies_[list]);
    }
  }

 private:
  const Tensor& tensor(size_t list) const { return alike_ ? *own_[list] : *copies_[list]; }

  std::array<const Tensor*, 4> own_{};
  std::array<std::optional<Tensor>, 4> copies_;
  bool alike_;
};

}  // namespace qfast
