// Additive and graph attention over the stocks of each day, on CUDA: out_i = sum over j of
// softmax_j(LeakyReLU(query_i + key_j)) value_j, forward and backward, in N log N time and N H memory.
// qfast/ops/additive_attention.py contains the schemas and describes the saved tensors.
//
// A few short days are computed pair by pair (additive_attention_kernels_dense.cuh). Otherwise the keys and
// queries of a day are sorted and merged into one list, and two running sums over the list serve every row
// (additive_attention_kernels.cuh). A thread block owns a day if all days fit in shared memory, up to 2,048
// rows. If one day of the call is longer, every pass is a launch over chunks of 128 items of all days
// (additive_attention_kernels_days.cuh, in the order of additive_attention_launch.cuh).
//
// Saved for backward: the two sort orders, the smaller part of each row's sum, and its weight. With many rows
// the operators are bound by bytes: they read [N, H] three times and write it once, 16 H bytes per row in
// float32, and twice that in backward. With few rows they are bound by the latency of the passes.
//
// There are no atomics, and every sum has a fixed order. A call does not synchronize with the host and uses
// only memory from torch, so a CUDA graph can capture it. For the same reason the host does not check the
// numbers in `offsets`, as Python does. If they are wrong, no other memory is accessed, but results are NaN
// or undefined.
//
// The gradients of the scores are computed relative to a center of each day, and those of the keys of a day
// sum to 0 before the slope of LeakyReLU, as on the CPU (additive_attention_kernels_gradients.cuh). This
// needs one pass over the chunks, one over the rows, 16 bytes of memory per row and, in float32, 4 bytes per
// row for each 32 columns.
//
// All functions have the same order: checks, device guard, allocation, return if empty, dispatch, launches.
#include <cub/device/device_radix_sort.cuh>
#include <optional>
#include <tuple>
#include <vector>

#include "additive_attention/additive_attention_launch.cuh"
#include "cuda_common.cuh"
#include "cuda_device.cuh"

namespace qfast {
namespace {

using MaybeTensor = std::optional<Tensor>;

// ---------------------------------------------------------------- device
// A CudaDevice that can also sort.
class SortingDevice : public CudaDevice {
 public:
  using CudaDevice::CudaDevice;

  // Sorts words and numbers by the lowest `bits` bits of the words. The sort is stable. The second array of
  // each pair is scratch of the same size. Returns the array that contains the sorted numbers.
  template <class Word>
  const uint32_t* sort(Word* (&words)[2], uint32_t* (&numbers)[2], int64_t count, int bits) {
    cub::DoubleBuffer<Word> keys(words[0], words[1]);
    cub::DoubleBuffer<uint32_t> values(numbers[0], numbers[1]);
    size_t bytes = 0;
    const auto run = [&](void* room) {
      return cub::DeviceRadixSort::SortPairs(room, bytes, keys, values, count, 0, bits, stream());
    };
    STD_CUDA_CHECK(cleared(run(nullptr)));
    STD_CUDA_CHECK(cleared(run(take<char>(static_cast<int64_t>(bytes)))));
    return values.Current();
  }
};

// ---------------------------------------------------------------- arguments
void check_shape(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                 std::initializer_list<int64_t> shape) {
  QFAST_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, ": expected dtype ",
              torch::headeronly::toString(like.scalar_type()), ", got ",
              torch::headeronly::toString(tensor.scalar_type()), ".");
  check_same_device(op, name, tensor, like, "value or hidden");
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  std::ostringstream expected;
  int axis = 0;
  for (const int64_t size : shape) {
    expected << (axis ? ", " : "") << size;
    fits = fits && tensor.size(axis) == size;
    ++axis;
  }
  QFAST_CHECK(fits, op, ": ", name, ": expected shape (", expected.str(), "), got ", shape_text(tensor), ".");
}

Shape check_days(const char* op, const Tensor& like, const MaybeTensor& offsets, int64_t longest,
                 double slope, int64_t heads, int64_t rows, int64_t width) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  check_floating(op, "value", like);
  check_cuda(op, "value", like);
  QFAST_CHECK(slope >= 0 && slope <= 1, op, ": negative_slope: expected 0 to 1, got ", slope, ".");
  QFAST_CHECK(width > 0 && width <= kLimit / 4, op, ": value: expected H from 1 to ", kLimit / 4, ", got ",
              width, ".");
  QFAST_CHECK(rows < kLimit, op, ": value: expected fewer than ", kLimit, " rows, got ", rows, ".");
  QFAST_CHECK(longest >= 0 && longest <= rows && (longest > 0 || rows == 0), op,
              ": longest: expected the rows of the longest day, 1 to ", rows, ", got ", longest, ".");
  Shape shape{{nullptr, 1, rows, nullptr}, heads, static_cast<int>(width)};
  if (!offsets) return shape;
  check_dims(op, "offsets", *offsets, 1, "[D + 1]");
  check_same_device(op, "offsets", *offsets, like, "value");
  const int64_t days = offsets->size(0) - 1;
  QFAST_CHECK(offsets->scalar_type() == ScalarType::Long && days >= 0 && days < kLimit, op,
              ": offsets: expected 1 to ", kLimit, " numbers of dtype int64, got ", offsets->size(0), " of ",
              torch::headeronly::toString(offsets->scalar_type()), ".");
  QFAST_CHECK(days > 0 || rows == 0, op, ": offsets: must run from 0 to N = ", rows,
              ", got only one number.");
  shape.days.count = days;
  return shape;
}

const int64_t* offsets_data(const MaybeTensor& offsets) {
  return offsets ? offsets->const_data_ptr<int64_t>() : nullptr;
}

MaybeTensor dense_offsets(const MaybeTensor& offsets) {
  return offsets ? MaybeTensor(as_contiguous(*offsets)) : std::nullopt;
}

template <class T>
const T* data(const Tensor& tensor) {
  return tensor.const_data_ptr<T>();
}

Tensor room(const Tensor& like, std::initializer_list<int64_t> shape) {
  return new_tensor(like, {shape.begin(), shape.size()});
}

// The tensors that forward saves for backward.
struct Saved {
  Tensor share, share_weight, orders;
};

Saved empty_saved(const Tensor& like, const Shape& shape, bool keep) {
  const int64_t rows = keep ? shape.days.rows : 0, orders[] = {2, shape.heads, rows};
  return {room(like, {shape.heads, rows, shape.width}), room(like, {shape.heads, rows}),
          new_tensor(like, {orders, 3}, ScalarType::Int)};
}

void check_saved(const char* op, const Tensor& like, const Shape& shape, const Saved& saved) {
  const int64_t heads = shape.heads, rows = shape.days.rows;
  check_shape(op, "share", saved.share, like, {heads, rows, shape.width});
  check_shape(op, "share_weight", saved.share_weight, like, {heads, rows});
  QFAST_CHECK(saved.orders.scalar_type() == ScalarType::Int && saved.orders.numel() == 2 * heads * rows, op,
              ": orders: expected int32 [2, heads, N], got ", shape_text(saved.orders), " of ",
              torch::headeronly::toString(saved.orders.scalar_type()), ".");
  check_same_device(op, "orders", saved.orders, like, "value");
}

Saved contiguous(const Saved& saved) {
  return {as_contiguous(saved.share), as_contiguous(saved.share_weight), as_contiguous(saved.orders)};
}

template <class T>
Forward<T> forward_io(const T* query, const T* key, const Tensor& value, const Tensor* residual,
                      const Tensor& out, const Saved& saved, bool keep) {
  return {data<T>(value),
          residual != nullptr ? data<T>(*residual) : nullptr,
          out.mutable_data_ptr<T>(),
          keep ? saved.share.mutable_data_ptr<T>() : nullptr,
          keep ? saved.share_weight.mutable_data_ptr<T>() : nullptr,
          keep ? saved.orders.mutable_data_ptr<int32_t>() : nullptr,
          query,
          key};
}

// ---------------------------------------------------------------- additive attention
std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_cuda(const Tensor& query, const Tensor& key,
                                                                   const Tensor& value, MaybeTensor offsets,
                                                                   int64_t longest, double negative_slope,
                                                                   bool keep) {
  const char* op = "additive_attention";
  check_dims(op, "value", value, 3, "[heads, N, H]");
  Shape shape =
      check_days(op, value, offsets, longest, negative_slope, value.size(0), value.size(1), value.size(2));
  check_shape(op, "query", query, value, {value.size(0), value.size(1)});
  check_shape(op, "key", key, value, {value.size(0), value.size(1)});
  SortingDevice device(value);
  const Tensor contiguous_query = as_contiguous(query), contiguous_key = as_contiguous(key);
  const Tensor rows = as_contiguous(value);
  const MaybeTensor days = dense_offsets(offsets);
  shape.days.offsets = offsets_data(days);
  const Tensor out = room(value, {value.size(0), value.size(1), value.size(2)});
  const Saved saved = empty_saved(value, shape, keep);
  if (out.numel() > 0) {
    dispatch_floating(value.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const auto io =
          forward_io<T>(data<T>(contiguous_query), data<T>(contiguous_key), rows, nullptr, out, saved, keep);
      attend(device, shape, longest, static_cast<T>(negative_slope), io);
    });
  }
  return {out, saved.share, saved.share_weight, saved.orders};
}

std::tuple<Tensor, Tensor, Tensor> additive_attention_backward_cuda(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, MaybeTensor offsets,
    int64_t longest, double negative_slope, const Tensor& out, const Tensor& share,
    const Tensor& share_weight, const Tensor& orders) {
  const char* op = "additive_attention_backward";
  check_dims(op, "value", value, 3, "[heads, N, H]");
  const int64_t heads = value.size(0), n = value.size(1), width = value.size(2);
  Shape shape = check_days(op, value, offsets, longest, negative_slope, heads, n, width);
  for (const auto& [name, scores] : {std::pair{"query", &query}, std::pair{"key", &key}})
    check_shape(op, name, *scores, value, {heads, n});
  for (const auto& [name, like] : {std::pair{"grad", &grad}, std::pair{"out", &out}})
    check_shape(op, name, *like, value, {heads, n, width});
  check_saved(op, value, shape, {share, share_weight, orders});
  SortingDevice device(value);
  const Tensor contiguous_grad = as_contiguous(grad), contiguous_query = as_contiguous(query);
  const Tensor contiguous_key = as_contiguous(key), contiguous_value = as_contiguous(value);
  const Tensor contiguous_out = as_contiguous(out);
  const Saved saved = contiguous({share, share_weight, orders});
  const MaybeTensor days = dense_offsets(offsets);
  shape.days.offsets = offsets_data(days);
  const Tensor grad_query = room(value, {heads, n}), grad_key = room(value, {heads, n});
  const Tensor grad_value = room(value, {heads, n, width});
  if (grad_value.numel() > 0) {
    dispatch_floating(value.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      Backward<T> io{data<T>(contiguous_grad),       data<T>(contiguous_value),
                     data<T>(contiguous_out),        nullptr,
                     data<T>(saved.share),           data<T>(saved.share_weight),
                     data<int32_t>(saved.orders),    data<T>(contiguous_query),
                     data<T>(contiguous_key),        grad_query.mutable_data_ptr<T>(),
                     grad_key.mutable_data_ptr<T>(), grad_value.mutable_data_ptr<T>(),
                     static_cast<T>(negative_slope)};
      attend_backward(device, shape, longest, io);
    });
  }
  return {grad_query, grad_key, grad_value};
}

// ---------------------------------------------------------------- graph attention
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> graph_attention_cuda(const Tensor& hidden,
                                                                        const Tensor& weight,
                                                                        const Tensor& bias,
                                                                        MaybeTensor offsets, int64_t longest,
                                                                        double negative_slope, bool keep) {
  const char* op = "graph_attention";
  check_dims(op, "hidden", hidden, 2, "[N, H]");
  const int64_t n = hidden.size(0), width = hidden.size(1);
  Shape shape = check_days(op, hidden, offsets, longest, negative_slope, 1, n, width);
  check_shape(op, "weight", weight, hidden, {2, width});
  check_shape(op, "bias", bias, hidden, {2});
  SortingDevice device(hidden);
  const Tensor rows = as_contiguous(hidden), contiguous_weight = as_contiguous(weight);
  const Tensor contiguous_bias = as_contiguous(bias);
  const MaybeTensor days = dense_offsets(offsets);
  shape.days.offsets = offsets_data(days);
  const Tensor out = room(hidden, {n, width}), scores = room(hidden, {2, n});
  const Saved saved = empty_saved(hidden, shape, keep);
  if (out.numel() > 0) {
    dispatch_floating(hidden.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      T* const score_data = scores.mutable_data_ptr<T>();
      score_hidden(device, Scoring<T>{data<T>(rows), data<T>(contiguous_weight), n, shape.width},
                   data<T>(contiguous_bias), score_data);
      const auto io = forward_io<T>(score_data, score_data + n, rows, &rows, out, saved, keep);
      attend(device, shape, longest, static_cast<T>(negative_slope), io);
    });
  }
  return {out, scores, saved.share, saved.share_weight, saved.orders};
}

std::tuple<Tensor, Tensor, Tensor> graph_attention_backward_cuda(
    const Tensor& grad, const Tensor& hidden, const Tensor& weight, MaybeTensor offsets, int64_t longest,
    double negative_slope, const Tensor& out, const Tensor& scores, const Tensor& share,
    const Tensor& share_weight, const Tensor& orders) {
  const char* op = "graph_attention_backward";
  check_dims(op, "hidden", hidden, 2, "[N, H]");
  const int64_t n = hidden.size(0), width = hidden.size(1);
  Shape shape = check_days(op, hidden, offsets, longest, negative_slope, 1, n, width);
  check_shape(op, "weight", weight, hidden, {2, width});
  check_shape(op, "scores", scores, hidden, {2, n});
  for (const auto& [name, like] : {std::pair{"grad", &grad}, std::pair{"out", &out}})
    check_shape(op, name, *like, hidden, {n, width});
  check_saved(op, hidden, shape, {share, share_weight, orders});
  const int64_t weight_shape[] = {2, width}, bias_shape[] = {2};
  Tensor grad_hidden = room(hidden, {n, width});
  if (n == 0) {
    return {grad_hidden, new_zero_tensor(hidden, {weight_shape, 2}),
            new_zero_tensor(hidden, {bias_shape, 1})};
  }
  SortingDevice device(hidden);
  const Tensor contiguous_grad = as_contiguous(grad), rows = as_contiguous(hidden);
  const Tensor contiguous_weight = as_contiguous(weight), contiguous_out = as_contiguous(out);
  const Tensor contiguous_scores = as_contiguous(scores);
  const Saved saved = contiguous({share, share_weight, orders});
  const MaybeTensor days = dense_offsets(offsets);
  shape.days.offsets = offsets_data(days);
  const Tensor grad_weight = room(hidden, {2, width}), grad_bias = room(hidden, {2}),
               grad_scores = room(hidden, {2, n});
  dispatch_floating(hidden.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* query = data<T>(contiguous_scores);
    T* const grad_query = grad_scores.mutable_data_ptr<T>();
    Backward<T> io{data<T>(contiguous_grad),
                   data<T>(rows),
                   data<T>(contiguous_out),
                   data<T>(rows),
                   data<T>(saved.share),
                   data<T>(saved.share_weight),
                   data<int32_t>(saved.orders),
                   query,
                   query + n,
                   grad_query,
                   grad_query + n,
                   grad_hidden.mutable_data_ptr<T>(),
                   static_cast<T>(negative_slope)};
    attend_backward(device, shape, longest, io);
    finish_hidden(device, Scoring<T>{data<T>(rows), data<T>(contiguous_weight), n, shape.width}, io.grad,
                  static_cast<const T*>(grad_query), static_cast<const T*>(grad_query + n), io.grad_value,
                  grad_weight.mutable_data_ptr<T>(), grad_bias.mutable_data_ptr<T>());
  });
  return {grad_hidden, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CUDA, m) {
  m.impl("additive_attention", TORCH_BOX(&additive_attention_cuda));
  m.impl("additive_attention_backward", TORCH_BOX(&additive_attention_backward_cuda));
  m.impl("graph_attention", TORCH_BOX(&graph_attention_cuda));
  m.impl("graph_attention_backward", TORCH_BOX(&graph_attention_backward_cuda));
}

}  // namespace qfast
