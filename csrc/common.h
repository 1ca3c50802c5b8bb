// Host utilities of all operators: argument checks whose messages name the argument, the expected value and
// the actual value; dtype dispatch; parallel_for. Host only: kernels receive plain pointers and sizes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <iomanip>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "message.h"

namespace qfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using TensorSizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline std::string sizes_text(const TensorSizes& sizes) {
  std::ostringstream text;
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  return text.str();
}

inline std::string shape_text(const TensorSizes& sizes) {
  return message('(', sizes_text(sizes), sizes.size() == 1 ? ",)" : ")");
}

inline std::string shape_text(const Tensor& tensor) { return shape_text(tensor.sizes()); }

inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return tensor.is_cuda() ? message("cuda:", tensor.get_device_index()) : "another device";
}

// For example "int64 of shape (1,) on cpu", or "None".
inline std::string tensor_text(const std::optional<Tensor>& tensor) {
  if (!tensor) return "None";
  return message(torch::headeronly::toString(tensor->scalar_type()), " of shape ", shape_text(*tensor),
                 " on ", device_text(*tensor));
}

inline void check_dims(const char* op, const char* name, const Tensor& tensor, int64_t dims,
                       const char* shape) {
  QFAST_CHECK(tensor.dim() == dims, op, ": ", name, ": expected shape ", shape, ", got ", shape_text(tensor),
              ".");
}

inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  QFAST_CHECK(type == ScalarType::Float || type == ScalarType::Double, op, ": ", name,
              ": expected dtype float32 or float64, got ", torch::headeronly::toString(type), ".");
}

inline void check_row_numbers(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  QFAST_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, ": ", name,
              ": expected dtype int32 or int64, got ", torch::headeronly::toString(type), ".");
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor, const Tensor& first,
                              const char* first_name) {
  const bool same = tensor.is_cuda() == first.is_cuda() && tensor.is_cpu() == first.is_cpu() &&
                    tensor.get_device_index() == first.get_device_index();
  QFAST_CHECK(same, op, ": ", name, ": expected the device of ", first_name, ", ", device_text(first),
              ", got ", device_text(tensor), ".");
}

// Checks that a tensor has this shape and the dtype and device of `x`.
inline void check_shaped(const char* op, const char* name, const Tensor& tensor, const Tensor& x,
                         std::initializer_list<int64_t> shape) {
  check_same_device(op, name, tensor, x, "x");
  QFAST_CHECK(tensor.scalar_type() == x.scalar_type(), op, ": ", name, ": expected the dtype of x, ",
              torch::headeronly::toString(x.scalar_type()), ", got ",
              torch::headeronly::toString(tensor.scalar_type()), ".");
  const TensorSizes expected(shape.begin(), shape.size());
  QFAST_CHECK(tensor.sizes().equals(expected), op, ": ", name, ": expected shape (", sizes_text(expected),
              "), got ", shape_text(tensor), ".");
}

// Calls body(float{}) or body(double{}). The caller has checked that the dtype is one of the two.
template <class Body>
void dispatch_floating(ScalarType type, const Body& body) {
  if (type == ScalarType::Float) {
    body(float{});
  } else {
    body(double{});
  }
}

// Insufficient memory. The dispatcher raises it as MemoryError in Python, and the operator's Python function
// converts that to torch.OutOfMemoryError (qfast/ops/_common.py). Torch's own error would lose its type and
// its text on the way through the stable ABI.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string text) : text_(std::move(text)) {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

inline std::string shortage_text(const Tensor& like, const TensorSizes& shape, ScalarType type) {
  const bool wide = type == ScalarType::Double || type == ScalarType::Long;
  double bytes = wide ? 8 : type == ScalarType::Byte ? 1 : 4;
  for (const int64_t size : shape) bytes *= static_cast<double>(size);
  return message("no memory for ", std::fixed, std::setprecision(1), bytes / (1 << 20), " MiB on ",
                 device_text(like), " (", torch::headeronly::toString(type), " of shape ", shape_text(shape),
                 ")");
}

// Returns allocate(), which makes tensors on the device of `like`, the largest with this shape and dtype. A
// failure means that there is not enough memory, because the arguments have been checked.
template <class Allocate>
auto with_memory(const Tensor& like, const TensorSizes& shape, ScalarType type, const Allocate& allocate) {
  try {
    return allocate();
  } catch (const std::runtime_error&) {
    throw OutOfMemory(shortage_text(like, shape, type));
  }
}

// A new tensor with the device and, unless `dtype` is set, the dtype of `like`. Its elements are not set.
inline Tensor new_tensor(const Tensor& like, const TensorSizes& shape,
                         std::optional<ScalarType> dtype = std::nullopt) {
  return with_memory(like, shape, dtype.value_or(like.scalar_type()),
                     [&] { return torch::stable::new_empty(like, shape, dtype); });
}

// The same with all elements 0.
inline Tensor new_zero_tensor(const Tensor& like, const TensorSizes& shape,
                              std::optional<ScalarType> dtype = std::nullopt) {
  return with_memory(like, shape, dtype.value_or(like.scalar_type()),
                     [&] { return torch::stable::new_zeros(like, shape, dtype); });
}

// A new tensor with the shape, dtype and device of `like`. Its elements are not set.
inline Tensor new_tensor_like(const Tensor& like) {
  return with_memory(like, like.sizes(), like.scalar_type(), [&] { return torch::stable::empty_like(like); });
}

// The tensor itself if it is contiguous, else a contiguous copy. The check saves the call of the dispatcher,
// which takes a microsecond.
inline Tensor as_contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  return with_memory(tensor, tensor.sizes(), tensor.scalar_type(),
                     [&] { return torch::stable::contiguous(tensor); });
}

inline int64_t rounded_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Runs body(begin, end) on torch's thread pool. The body must not throw, because it is called through a C
// interface.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count > 0) torch::stable::parallel_for(0, count, grain < 1 ? 1 : grain, body);
}

}  // namespace qfast
