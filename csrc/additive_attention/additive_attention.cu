// Additive and graph attention over the stocks of each day, on CUDA: out_i = sum over j of
// softmax_j(LeakyReLU(query_i + key_j)) value_j, forward and backward, in N log N time and N H memory.
//
// Few short days go pair by pair (additive_attention_kernels_dense.cuh). Otherwise keys and queries of a day
// are sorted and merged into one list; two running sums over the list serve every row
// (additive_attention_kernels.cuh). A block owns a day that fits into its shared memory, up to 2,048 rows;
// with a longer day in the call, every pass is a launch over chunks of 128 items of all days
// (additive_attention_kernels_days.cuh, in the order of additive_attention_launch.cuh). Saved for the
// backward: the two sort orders, the smaller part of each row's sum and its weight. What bounds it: reading
// [N, H] three times and writing it once, 16 H bytes a row in float32 (twice that in the backward), where
// there are many rows, and the latency of the passes where there are few. No atomics; every sum has one fixed
// order; nothing synchronises, and all memory is torch's, so a CUDA graph can capture a call. Nothing waits
// to look at the numbers in `offsets` either, as Python does: where they are wrong no other memory is
// touched, but results are NaN or undefined.
//
// Backward of the scores: around a center of each day, and the gradients of a day's keys sum to 0 before the
// bend's slope, as on the CPU (additive_attention_kernels_gradients.cuh); a pass over the chunks and one over
// the rows for it, 16 bytes of memory a row and, in float32, 4 for each 32 columns.
//
// Schemas and what is kept: qfast/ops/additive_attention.py. Same order everywhere: checks, device guard,
// allocation, empty return, dispatch, launches, each with its check.
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

// ---------------------------------------------------------------- the device, as the launches need it
class SortingDevice : public CudaDevice {
 public:
  using CudaDevice::CudaDevice;

  // Stable, by the lowest `bits`. Both arrays come with as much room again; returns where the numbers end up.
  template <class Word>
  const uint32_t* sort(Word* (&words)[2], uint32_t* (&numbers)[2], int64_t count, int bits) {
    cub::DoubleBuffer<Word> keys(words[0], words[1]);
    cub::DoubleBuffer<uint32_t> values(numbers[0], numbers[1]);
    size_t bytes = 0;
    const auto run = [&](void* room) {
      return cub::DeviceRadixSort::SortPairs(room, bytes, keys, values, count, 0, bits, stream());
    };
    STD_CUDA_CHECK(run(nullptr));
    STD_CUDA_CHECK(run(take<char>(static_cast<int64_t>(bytes))));
    return values.Current();
  }
};

// ---------------------------------------------------------------- arguments
void check_shape(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                 std::initializer_list<int64_t> shape) {
  QFAST_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, ": expected dtype ",
              torch::headeronly::toString(like.scalar_type()), ", got ",
              torch::headeronly::toString(tensor.scalar_type()), ".");
  check_same_device(op, name, tensor, like, "the first argument");
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  std::ostringstream wanted;
  int axis = 0;
  for (const int64_t size : shape) {
    wanted << (axis ? ", " : "") << size;
    fits = fits && tensor.size(axis) == size;
    ++axis;
  }
  QFAST_CHECK(fits, op, ": ", name, ": expected shape (", wanted.str(), "), got ", shape_text(tensor), ".");
}

Shape check_days(const char* op, const Tensor& like, const MaybeTensor& offsets, int64_t longest,
                 double slope, int64_t heads, int64_t rows, int64_t width) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check_floating(op, "value", like);
  check_cuda(op, "value", like);
  QFAST_CHECK(slope >= 0 && slope <= 1, op, ": negative_slope: expected 0 to 1, got ", slope, ".");
  QFAST_CHECK(width > 0 && width <= kMost / 4, op, ": value: expected H from 1 to ", kMost / 4, ", got ",
              width, ".");
  QFAST_CHECK(rows < kMost, op, ": value: expected fewer than ", kMost, " rows, got ", rows, ".");
  QFAST_CHECK(longest >= 0 && longest <= rows && (longest > 0 || rows == 0), op,
              ": longest: expected the rows of the longest day, 1 to ", rows, ", got ", longest, ".");
  Shape shape{{nullptr, 1, rows, nullptr}, heads, static_cast<int>(width)};
  if (!offsets) return shape;
  check_dims(op, "offsets", *offsets, 1, "[D + 1]");
  check_same_device(op, "offsets", *offsets, like, "value");
  const int64_t days = offsets->size(0) - 1;
  QFAST_CHECK(offsets->scalar_type() == ScalarType::Long && days >= 0 && days < kMost, op,
              ": offsets: expected int64, 1 to ", kMost, " of them, got ", offsets->size(0), " of ",
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
  return offsets ? MaybeTensor(torch::stable::contiguous(*offsets)) : std::nullopt;
}

template <class T>
const T* data(const Tensor& tensor) {
  return tensor.const_data_ptr<T>();
}

Tensor room(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()});
}

struct Kept {
  Tensor share, share_weight, orders;
};

Kept empty_kept(const Tensor& like, const Shape& shape, bool keep) {
  const int64_t rows = keep ? shape.days.rows : 0, orders[] = {2, shape.heads, rows};
  return {room(like, {shape.heads, rows, shape.width}), room(like, {shape.heads, rows}),
          torch::stable::new_empty(like, {orders, 3}, ScalarType::Int)};
}

void check_kept(const char* op, const Tensor& like, const Shape& shape, const Kept& kept) {
  const int64_t heads = shape.heads, rows = shape.days.rows;
  check_shape(op, "share", kept.share, like, {heads, rows, shape.width});
  check_shape(op, "share_weight", kept.share_weight, like, {heads, rows});
  QFAST_CHECK(kept.orders.scalar_type() == ScalarType::Int && kept.orders.numel() == 2 * heads * rows, op,
              ": orders: expected int32 [2, heads, N], got ", shape_text(kept.orders), ".");
  check_same_device(op, "orders", kept.orders, like, "value");
}

Kept contiguous(const Kept& kept) {
  return {torch::stable::contiguous(kept.share), torch::stable::contiguous(kept.share_weight),
          torch::stable::contiguous(kept.orders)};
}

template <class T>
Forward<T> forward_io(const T* query, const T* key, const Tensor& value, const Tensor* residual,
                      const Tensor& out, const Kept& kept, bool keep) {
  return {data<T>(value),
          residual != nullptr ? data<T>(*residual) : nullptr,
          out.mutable_data_ptr<T>(),
          keep ? kept.share.mutable_data_ptr<T>() : nullptr,
          keep ? kept.share_weight.mutable_data_ptr<T>() : nullptr,
          keep ? kept.orders.mutable_data_ptr<int32_t>() : nullptr,
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
  const Tensor s = torch::stable::contiguous(query), t = torch::stable::contiguous(key);
  const Tensor rows = torch::stable::contiguous(value);
  const MaybeTensor days = dense_offsets(offsets);
  shape.days.offsets = offsets_data(days);
  const Tensor out = room(value, {value.size(0), value.size(1), value.size(2)});
  const Kept kept = empty_kept(value, shape, keep);
  if (out.numel() > 0) {
    dispatch_floating(value.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const auto io = forward_io<T>(data<T>(s), data<T>(t), rows, nullptr, out, kept, keep);
      attend(device, shape, longest, static_cast<T>(negative_slope), io);
    });
  }
  return {out, kept.share, kept.share_weight, kept.orders};
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
  check_kept(op, value, shape, {share, share_weight, orders});
  SortingDevice device(value);
  const Tensor g = torch::stable::contiguous(grad), s = torch::stable::contiguous(query);
  const Tensor t = torch::stable::contiguous(key), v = torch::stable::contiguous(value);
  const Tensor result = torch::stable::contiguous(out);
  const Kept kept = contiguous({share, share_weight, orders});
  const MaybeTensor days = dense_offsets(offsets);
  shape.days.offsets = offsets_data(days);
  const Tensor of_query = room(value, {heads, n}), of_key = room(value, {heads, n});
  const Tensor of_value = room(value, {heads, n, width});
  if (of_value.numel() > 0) {
    dispatch_floating(value.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      Backward<T> io{data<T>(g),
                     data<T>(v),
                     data<T>(result),
                     nullptr,
                     data<T>(kept.share),
                     data<T>(kept.share_weight),
                     data<int32_t>(kept.orders),
                     data<T>(s),
                     data<T>(t),
                     of_query.mutable_data_ptr<T>(),
                     of_key.mutable_data_ptr<T>(),
                     of_value.mutable_data_ptr<T>(),
                     static_cast<T>(negative_slope)};
      attend_backward(device, shape, longest, io);
    });
  }
  return {of_query, of_key, of_value};
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
  const Tensor rows = torch::stable::contiguous(hidden), both = torch::stable::contiguous(weight);
  const Tensor shift = torch::stable::contiguous(bias);
  const MaybeTensor days = dense_offsets(offsets);
  shape.days.offsets = offsets_data(days);
  const Tensor out = room(hidden, {n, width}), scores = room(hidden, {2, n});
  const Kept kept = empty_kept(hidden, shape, keep);
  if (out.numel() > 0) {
    dispatch_floating(hidden.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      T* const found = scores.mutable_data_ptr<T>();
      score_hidden(device, Scoring<T>{data<T>(rows), data<T>(both), n, shape.width}, data<T>(shift), found);
      const auto io = forward_io<T>(found, found + n, rows, &rows, out, kept, keep);
      attend(device, shape, longest, static_cast<T>(negative_slope), io);
    });
  }
  return {out, scores, kept.share, kept.share_weight, kept.orders};
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
  check_kept(op, hidden, shape, {share, share_weight, orders});
  const int64_t weight_shape[] = {2, width}, bias_shape[] = {2};
  Tensor of_hidden = room(hidden, {n, width});
  if (n == 0) {
    return {of_hidden, torch::stable::new_zeros(hidden, {weight_shape, 2}),
            torch::stable::new_zeros(hidden, {bias_shape, 1})};
  }
  SortingDevice device(hidden);
  const Tensor g = torch::stable::contiguous(grad), rows = torch::stable::contiguous(hidden);
  const Tensor both = torch::stable::contiguous(weight), result = torch::stable::contiguous(out);
  const Tensor st = torch::stable::contiguous(scores);
  const Kept kept = contiguous({share, share_weight, orders});
  const MaybeTensor days = dense_offsets(offsets);
  shape.days.offsets = offsets_data(days);
  const Tensor of_weight = room(hidden, {2, width}), of_bias = room(hidden, {2}),
               of_scores = room(hidden, {2, n});
  dispatch_floating(hidden.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* query = data<T>(st);
    T* const of_query = of_scores.mutable_data_ptr<T>();
    Backward<T> io{data<T>(g),
                   data<T>(rows),
                   data<T>(result),
                   data<T>(rows),
                   data<T>(kept.share),
                   data<T>(kept.share_weight),
                   data<int32_t>(kept.orders),
                   query,
                   query + n,
                   of_query,
                   of_query + n,
                   of_hidden.mutable_data_ptr<T>(),
                   static_cast<T>(negative_slope)};
    attend_backward(device, shape, longest, io);
    finish_hidden(device, Scoring<T>{data<T>(rows), data<T>(both), n, shape.width}, io.grad,
                  static_cast<const T*>(of_query), static_cast<const T*>(of_query + n), io.grad_value,
                  of_weight.mutable_data_ptr<T>(), of_bias.mutable_data_ptr<T>());
  });
  return {of_hidden, of_weight, of_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CUDA, m) {
  m.impl("additive_attention", TORCH_BOX(&additive_attention_cuda));
  m.impl("additive_attention_backward", TORCH_BOX(&additive_attention_backward_cuda));
  m.impl("graph_attention", TORCH_BOX(&graph_attention_cuda));
  m.impl("graph_attention_backward", TORCH_BOX(&graph_attention_backward_cuda));
}

}  // namespace qfast
