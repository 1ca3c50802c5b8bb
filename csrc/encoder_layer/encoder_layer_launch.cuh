// Launches and cuBLAS products of an encoder layer on CUDA, for a part of the windows at a time. Host only.
#pragma once

#include "encoder_layer/encoder_layer_checks.h"
#include "encoder_layer/encoder_layer_kernels_attention.cuh"
#include "encoder_layer/encoder_layer_kernels_norm.cuh"
#include "feed_forward/feed_forward_launch.cuh"

namespace qfast {
namespace {

constexpr int64_t kPartBytes = 256 << 20;  // intermediate values of a part
// Most queries computed together if keys and values stay in global memory.
constexpr int64_t kManyQueries = 32;
constexpr unsigned int kLongHeads = 512;  // thread blocks if the attention weights are in global memory
// Dropout counters of the sums before the two norms.
constexpr uint32_t kFirstPlace = 0, kSecondPlace = 2;

// Chooses how many queries a thread block computes together, and whether keys, values and attention weights
// are in shared memory. Prefers keys and values in shared memory. Returns false if nothing fits.
template <class T>
bool fit_attention(Attention<T>& job, bool backward, size_t limit) {
  const auto fits = [&] { return static_cast<size_t>(job.shared_elements(backward)) * sizeof(T) <= limit; };
  const int64_t all = rounded_up(job.results, kQuad);
  for (const bool keys_shared : {true, false}) {
    job.keys_shared = keys_shared;
    for (int64_t together = keys_shared ? all : std::min(all, kManyQueries);; together /= 2) {
      job.together = static_cast<int32_t>(rounded_up(together, kQuad));
      if (fits()) return true;
      if (job.together == kQuad) break;
    }
  }
  static T placeholder;  // not null means global memory; the caller replaces the address
  job.weights = &placeholder;
  return fits();
}

// Queries, keys and values, or their gradients. If all steps have results, one matrix [rows][3 D] contains
// all of them. For the last step only, queries are [windows][D], and keys and values are [rows][2 D].
template <class T>
struct Projected {
  Tensor query, pair;
  int64_t width, pair_width;

  Projected(const Tensor& like, int64_t windows, int64_t steps, int64_t D, bool last_step)
      : pair(room(like, {windows * steps, last_step ? 2 * D : 3 * D})),
        width(D),
        pair_width(last_step ? 2 * D : 3 * D) {
    query = last_step ? room(like, {windows, D}) : pair;
  }
  T* keys() const { return pair.mutable_data_ptr<T>() + pair_width - 2 * width; }
  HeadRows<T> query_rows() const { return {query.mutable_data_ptr<T>(), query.size(1)}; }
  HeadRows<T> key_rows() const { return {keys(), pair_width}; }
  HeadRows<T> value_rows() const { return {keys() + width, pair_width}; }
};

// The checked arguments of a call.
struct EncoderArguments {
  Tensor x;                     // contiguous
  std::vector<Tensor> weights;  // contiguous
  int64_t heads, results;       // results: T or 1
  Dropout dropout;

  EncoderArguments(const char* op, const Tensor& input, const std::vector<Tensor>& parameters,
                   int64_t head_count, double rate, const std::optional<Tensor>& seed, bool last_step)
      : heads(head_count) {
    check_encoder_layer(op, input, parameters, heads);
    dropout = device_dropout(op, "x", input, rate, seed);
    x = as_contiguous(input);
    for (const Tensor& weight : parameters) weights.push_back(as_contiguous(weight));
    results = last_step ? 1 : x.size(1);
  }
  int64_t batch() const { return x.size(0); }
  int64_t steps() const { return x.size(1); }
  int64_t width() const { return x.size(2); }
  bool last_step() const { return results < steps(); }
};

template <class T>
struct SavedNorms {
  T *normalised, *scales;  // [2][B][results][D], [2][B][results], or null if they are not saved
};

template <class T>
class EncoderLaunches {
 public:
  EncoderLaunches(const char* op, CudaDevice& device, const EncoderArguments& arguments, bool backward,
                  Precision precision)
      : op_(op),
        device_(device),
        arguments_(arguments),
        net_(device, arguments.weights[kLinear1Weight], arguments.weights[kLinear1Bias],
             arguments.weights[kLinear2Weight], arguments.dropout, backward, precision) {}

  // Calls body(first window, windows) for each part. `matrices` is the number of intermediate matrices
  // [rows][D].
  template <class Body>
  void for_parts(int64_t matrices, const Body& body) const {
    const int64_t window_bytes =
        matrices * arguments_.steps() * arguments_.width() * static_cast<int64_t>(sizeof(T));
    const int64_t most = std::max<int64_t>(kPartBytes / window_bytes / kQuad, 1) * kQuad;
    for (int64_t first = 0; first < arguments_.batch(); first += most)
      body(first, std::min(most, arguments_.batch() - first));
  }

  void forward(int64_t first, int64_t windows, double eps, T* output, const SavedNorms<T>& saved) {
    const Rows rows = rows_of(first, windows);
    const int64_t D = arguments_.width(), R = arguments_.results;
    const Projected<T> projected = project(first, windows);
    const Tensor mixed = matrix(rows), sums = matrix(rows), entering = matrix(rows);
    attend(attention(projected, first, windows, mixed), false);
    multiply(sums, mixed, turned(weight(kOutWeight)));
    Norm<T> norm{};
    norm.rows = rows;
    norm.width = D;
    norm.dropout = arguments_.dropout;
    norm.eps = static_cast<T>(eps);
    norm.place = kFirstPlace;
    norm.parts = 1;
    norm.sums = sums.const_data_ptr<T>();
    norm.sums_bias = data(kOutBias);
    norm.residual = arguments_.x.const_data_ptr<T>() + ((first + 1) * arguments_.steps() - R) * D;
    norm.residual_window = arguments_.steps() * D;
    norm.residual_step = D;
    norm.output = entering.mutable_data_ptr<T>();
    norm_into(norm, 0, first, saved);
    const SumsOfUnits net_sums = net_.forward(entering, rows);
    norm.place = kSecondPlace;
    norm.parts = net_sums.parts;
    norm.sums = net_sums.partial.const_data_ptr<T>();
    norm.sums_bias = data(kLinear2Bias);
    norm.residual = entering.const_data_ptr<T>();
    norm.residual_window = R * D;
    norm.output = output + first * R * D;
    norm_into(norm, 1, first, saved);
  }

  // Adds the weight gradients of the feed-forward block to net_sums, and those of the other weights, in their
  // order, to `sums`. Writes the gradient of x to grad_x unless it is null.
  void backward(int64_t first, int64_t windows, const Tensor& grad, const SavedNorms<T>& saved,
                const Tensor* grad_x, PartSums& sums, PartSums& net_sums) {
    const Rows rows = rows_of(first, windows);
    const std::vector<Tensor>& to = sums.open();
    const Tensor first_sum = matrix(rows), dropped = arguments_.dropout.active ? matrix(rows) : first_sum;
    norms_backward(rows, first, grad, saved, first_sum, dropped, to, net_sums);

    const Tensor mixed = matrix(rows), grad_mixed = matrix(rows);
    const Projected<T> projected = project(first, windows), grads = projection(windows);
    multiply(grad_mixed, dropped, weight(kOutWeight));
    Attention<T> job = attention(projected, first, windows, mixed);
    job.grad_mixed = grad_mixed.const_data_ptr<T>();
    job.grad_query = grads.query_rows();
    job.grad_key = grads.key_rows();
    job.grad_value = grads.value_rows();
    attend(job, true);
    multiply(to[kOutWeight], turned(dropped), mixed);
    sum_into(to[kOutBias], dropped);
    projection_backward(first, windows, grads, to);
    if (grad_x != nullptr) input_backward(first, windows, grads, first_sum, *grad_x);
    sums.close<T>();
  }

 private:
  const Tensor& weight(int number) const { return arguments_.weights[static_cast<size_t>(number)]; }
  const T* data(int number) const { return weight(number).template const_data_ptr<T>(); }
  Tensor matrix(const Rows& rows) const { return room(arguments_.x, {rows.count(), arguments_.width()}); }
  static void sum_into(const Tensor& out, const Tensor& matrix) {
    Tensor to = out;
    sum_rows(to, matrix);
  }
  static Tensor part_of(const Tensor& tensor, int64_t first, int64_t count) {
    Tensor source = tensor;
    return torch::stable::narrow(source, 0, first, count);
  }

  Rows rows_of(int64_t first, int64_t windows) const {
    return {windows, arguments_.results, first, arguments_.steps() - arguments_.results};
  }
  Tensor steps_of(int64_t first, int64_t windows) const {
    return as_matrix(part_of(arguments_.x, first, windows), windows * arguments_.steps(), arguments_.width());
  }
  Tensor last_steps_of(int64_t first, int64_t windows) const {
    return torch::stable::select(part_of(arguments_.x, first, windows), 1, arguments_.steps() - 1);
  }

  // Allocates queries, keys and values.
  Projected<T> projection(int64_t windows) const {
    return {arguments_.x, windows, arguments_.steps(), arguments_.width(), arguments_.last_step()};
  }

  // Computes queries, keys and values, without their bias. `separate` is D if the queries have a product of
  // their own, else 0.
  Projected<T> project(int64_t first, int64_t windows) const {
    const Projected<T> projected = projection(windows);
    const int64_t D = arguments_.width(), separate = 3 * D - projected.pair_width;
    multiply(projected.pair, steps_of(first, windows),
             turned(part_of(weight(kInWeight), separate, projected.pair_width)));
    if (separate > 0)
      multiply(projected.query, last_steps_of(first, windows), turned(part_of(weight(kInWeight), 0, D)));
    return projected;
  }

  void projection_backward(int64_t first, int64_t windows, const Projected<T>& grads,
                           const std::vector<Tensor>& to) const {
    const int64_t D = arguments_.width(), separate = 3 * D - grads.pair_width;
    multiply(part_of(to[kInWeight], separate, grads.pair_width), turned(grads.pair),
             steps_of(first, windows));
    sum_into(part_of(to[kInBias], separate, grads.pair_width), grads.pair);
    if (separate == 0) return;
    multiply(part_of(to[kInWeight], 0, D), turned(grads.query), last_steps_of(first, windows));
    sum_into(part_of(to[kInBias], 0, D), grads.query);
  }

  void input_backward(int64_t first, int64_t windows, const Projected<T>& grads, const Tensor& residual,
                      const Tensor& grad_x) const {
    const int64_t D = arguments_.width(), separate = 3 * D - grads.pair_width, steps = arguments_.steps();
    const Tensor grad_part = part_of(grad_x, first, windows);
    multiply(as_matrix(grad_part, windows * steps, D), grads.pair,
             part_of(weight(kInWeight), separate, grads.pair_width));
    const Tensor query_product = separate > 0 ? room(arguments_.x, {windows, D}) : residual;
    if (separate > 0) multiply(query_product, grads.query, part_of(weight(kInWeight), 0, D));
    device_.launch(encoder_input_kernel<T>, grid_for(windows * arguments_.results * D, kPlainThreads),
                   kPlainThreads, 0, grad_part.mutable_data_ptr<T>(), residual.const_data_ptr<T>(),
                   separate > 0 ? query_product.const_data_ptr<T>() : nullptr, windows, steps,
                   arguments_.results, D);
  }

  Attention<T> attention(const Projected<T>& projected, int64_t first, int64_t windows,
                         const Tensor& mixed) const {
    const auto constant = [](const HeadRows<T>& rows) { return HeadRows<const T>{rows.data, rows.stride}; };
    Attention<T> job{};
    job.windows = windows;
    job.steps = arguments_.steps();
    job.results = arguments_.results;
    job.first_window = first;
    job.heads = static_cast<int32_t>(arguments_.heads);
    job.width = static_cast<int32_t>(arguments_.width() / arguments_.heads);
    job.query = constant(projected.query_rows());
    job.key = constant(projected.key_rows());
    job.value = constant(projected.value_rows());
    job.bias = data(kInBias);
    job.scale = T(1) / std::sqrt(static_cast<T>(job.width));
    job.dropout = arguments_.dropout;
    job.mixed = mixed.mutable_data_ptr<T>();
    return job;
  }

  void attend(Attention<T> job, bool backward) const {
    QFAST_CHECK(fit_attention(job, backward, device_.shared_limit()), op_, ": heads of ", job.width,
                " features do not fit in the shared memory of this GPU, ", device_.shared_limit(),
                " bytes. Use more heads, or set QFAST_BACKEND=torch.");
    unsigned int blocks = grid_for(job.windows * job.heads, 1);
    Tensor weights;
    if (job.weights != nullptr) {
      blocks = std::min(blocks, kLongHeads);
      weights = room(arguments_.x, {blocks * job.weights_elements(backward)});
      job.weights = weights.mutable_data_ptr<T>();
    }
    device_.launch(attention_kernel<T>, blocks, kHeadThreads,
                   static_cast<size_t>(job.shared_elements(backward)) * sizeof(T), job, backward);
  }

  // First saved row of norm `number`.
  int64_t saved_row(int number, int64_t first) const {
    return (number * arguments_.batch() + first) * arguments_.results;
  }
  unsigned int quad_blocks(const Rows& rows) const { return grid_for(rows.quads(), kPlainThreads / kLanes); }

  void norm_into(Norm<T>& norm, int number, int64_t first, const SavedNorms<T>& saved) const {
    norm.weight = data(number == 0 ? kNorm1Weight : kNorm2Weight);
    norm.bias = data(number == 0 ? kNorm1Bias : kNorm2Bias);
    if (saved.normalised != nullptr) {
      norm.normalised = saved.normalised + saved_row(number, first) * arguments_.width();
      norm.scales = saved.scales + saved_row(number, first);
    }
    device_.launch(norm_kernel<T>, quad_blocks(norm.rows), kPlainThreads, 0, norm);
  }

  // Computes the gradient of the input of the first norm in first_sum, and this gradient after dropout in
  // `dropped`.
  void norms_backward(const Rows& rows, int64_t first, const Tensor& grad, const SavedNorms<T>& saved,
                      const Tensor& first_sum, const Tensor& dropped, const std::vector<Tensor>& to,
                      PartSums& net_sums) {
    const Tensor entering = matrix(rows), grad_entering = matrix(rows), weighted = matrix(rows);
    const Tensor second_sum = matrix(rows),
                 second_dropped = arguments_.dropout.active ? matrix(rows) : second_sum;
    const Tensor leaving = part_of(grad, first * arguments_.results, rows.count());
    const auto norm_job = [&](int number) {
      NormBackward<T> job{};
      job.rows = rows;
      job.width = arguments_.width();
      job.dropout = arguments_.dropout;
      job.place = number == 0 ? kFirstPlace : kSecondPlace;
      job.normalised = saved.normalised + saved_row(number, first) * arguments_.width();
      job.scales = saved.scales + saved_row(number, first);
      job.weight = data(number == 0 ? kNorm1Weight : kNorm2Weight);
      job.weighted = weighted.mutable_data_ptr<T>();
      return job;
    };
    NormBackward<T> second_norm = norm_job(1);
    second_norm.grad = leaving.const_data_ptr<T>();
    second_norm.before = second_sum.mutable_data_ptr<T>();
    if (arguments_.dropout.active) second_norm.dropped = second_dropped.mutable_data_ptr<T>();
    second_norm.first_normalised = saved.normalised + saved_row(0, first) * arguments_.width();
    second_norm.first_weight = data(kNorm1Weight);
    second_norm.first_bias = data(kNorm1Bias);
    second_norm.first = entering.mutable_data_ptr<T>();
    device_.launch(norm_backward_kernel<T>, quad_blocks(rows), kPlainThreads, 0, second_norm);
    sum_into(to[kNorm2Weight - 4], weighted);
    sum_into(to[kNorm2Bias - 4], leaving);
    net_.backward(entering, second_dropped, rows, &grad_entering, net_sums);
    NormBackward<T> first_norm = norm_job(0);
    first_norm.grad = second_sum.const_data_ptr<T>();
    first_norm.more = grad_entering.mutable_data_ptr<T>();
    first_norm.before = first_sum.mutable_data_ptr<T>();
    if (arguments_.dropout.active) first_norm.dropped = dropped.mutable_data_ptr<T>();
    device_.launch(norm_backward_kernel<T>, quad_blocks(rows), kPlainThreads, 0, first_norm);
    sum_into(to[kNorm1Weight - 4], weighted);
    sum_into(to[kNorm1Bias - 4], grad_entering);
  }

  const char* op_;
  CudaDevice& device_;
  const EncoderArguments& arguments_;
  FeedForwardLaunches<T> net_;
};

}  // namespace
}  // namespace qfast
