// An encoder layer on CUDA: its products and launches, for some whole windows at a time. Host only.
#pragma once

#include "encoder_layer/encoder_layer_checks.h"
#include "encoder_layer/encoder_layer_kernels_attention.cuh"
#include "encoder_layer/encoder_layer_kernels_norm.cuh"
#include "feed_forward/feed_forward_launch.cuh"

namespace qfast {
namespace {

constexpr int64_t kPartBytes = 256 << 20;  // of a part's intermediate results
constexpr int64_t kManyQueries = 32;       // that are worth leaving keys in memory for
constexpr unsigned int kLongHeads = 512;   // blocks, where weights of a head are in memory
constexpr uint32_t kFirstPlace = 0,
                   kSecondPlace = 2;  // of the sums before the norms, in the dropout's counters

// How many queries are taken at a time, and what goes to shared memory; false: nothing fits.
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
  static T elsewhere;  // any address: the caller gives the memory
  job.weights = &elsewhere;
  return fits();
}

// What the projections give, or their gradients: in one matrix [rows][3 D], or, where only the last step
// asks, queries [windows][D] beside keys and values [rows][2 D].
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

struct EncoderGiven {
  Tensor x;                     // contiguous
  std::vector<Tensor> weights;  // likewise
  int64_t heads, results;       // T or 1
  Dropout dropout;

  EncoderGiven(const char* op, const Tensor& given, const std::vector<Tensor>& weights_given,
               int64_t heads_given, double rate, const std::optional<Tensor>& seed, bool last_step)
      : heads(heads_given) {
    check_encoder_layer(op, given, weights_given, heads);
    dropout = device_dropout(op, "x", given, rate, seed);
    x = torch::stable::contiguous(given);
    for (const Tensor& weight : weights_given) weights.push_back(torch::stable::contiguous(weight));
    results = last_step ? 1 : x.size(1);
  }
  int64_t batch() const { return x.size(0); }
  int64_t steps() const { return x.size(1); }
  int64_t width() const { return x.size(2); }
  bool last_step() const { return results < steps(); }
};

template <class T>
struct EncoderKept {
  T *normalised, *scales;  // [2][B][results][D], [2][B][results]; null: not kept
};

template <class T>
class EncoderLaunches {
 public:
  EncoderLaunches(const char* op, CudaDevice& device, const EncoderGiven& given, bool backward,
                  Precision precision)
      : op_(op),
        device_(device),
        given_(given),
        net_(device, given.weights[kLinear1Weight], given.weights[kLinear1Bias],
             given.weights[kLinear2Weight], given.dropout, backward, precision) {}

  // body(first window, windows), by parts.
  template <class Body>
  void for_parts(int64_t matrices, const Body& body) const {
    const int64_t window_bytes = matrices * given_.steps() * given_.width() * static_cast<int64_t>(sizeof(T));
    const int64_t most = std::max<int64_t>(kPartBytes / window_bytes / kQuad, 1) * kQuad;
    for (int64_t first = 0; first < given_.batch(); first += most)
      body(first, std::min(most, given_.batch() - first));
  }

  void forward(int64_t first, int64_t windows, double eps, T* output, const EncoderKept<T>& kept) {
    const Rows rows = rows_of(first, windows);
    const int64_t D = given_.width(), R = given_.results;
    const Projected<T> projected = project(first, windows);
    const Tensor mixed = matrix(rows), sums = matrix(rows), entering = matrix(rows);
    attend(attention(projected, first, windows, mixed), false);
    multiply(sums, mixed, turned(weight(kOutWeight)));
    Norm<T> norm{};
    norm.rows = rows;
    norm.width = D;
    norm.dropout = given_.dropout;
    norm.eps = static_cast<T>(eps);
    norm.place = kFirstPlace;
    norm.parts = 1;
    norm.sums = sums.const_data_ptr<T>();
    norm.sums_bias = data(kOutBias);
    norm.residual = given_.x.const_data_ptr<T>() + ((first + 1) * given_.steps() - R) * D;
    norm.residual_window = given_.steps() * D;
    norm.residual_step = D;
    norm.output = entering.mutable_data_ptr<T>();
    norm_into(norm, 0, first, kept);
    const SumsOfUnits second = net_.forward(entering, rows);
    norm.place = kSecondPlace;
    norm.parts = second.parts;
    norm.sums = second.partial.const_data_ptr<T>();
    norm.sums_bias = data(kLinear2Bias);
    norm.residual = entering.const_data_ptr<T>();
    norm.residual_window = R * D;
    norm.output = output + first * R * D;
    norm_into(norm, 1, first, kept);
  }

  // Sums: of all weights but the feed-forward block's, in their order, and of these.
  void backward(int64_t first, int64_t windows, const Tensor& grad, const EncoderKept<T>& kept,
                const Tensor* grad_x, PartSums& sums, PartSums& net_sums) {
    const Rows rows = rows_of(first, windows);
    const std::vector<Tensor>& to = sums.open();
    const Tensor first_sum = matrix(rows), dropped = given_.dropout.active ? matrix(rows) : first_sum;
    norms_backward(rows, first, grad, kept, first_sum, dropped, to, net_sums);

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
  const Tensor& weight(int number) const { return given_.weights[static_cast<size_t>(number)]; }
  const T* data(int number) const { return weight(number).template const_data_ptr<T>(); }
  Tensor matrix(const Rows& rows) const { return room(given_.x, {rows.count(), given_.width()}); }
  static void sum_into(const Tensor& out, const Tensor& matrix) {
    Tensor to = out;
    sum_rows(to, matrix);
  }
  static Tensor part_of(const Tensor& tensor, int64_t first, int64_t count) {
    Tensor source = tensor;
    return torch::stable::narrow(source, 0, first, count);
  }

  Rows rows_of(int64_t first, int64_t windows) const {
    return {windows, given_.results, first, given_.steps() - given_.results};
  }
  Tensor steps_of(int64_t first, int64_t windows) const {
    return as_matrix(part_of(given_.x, first, windows), windows * given_.steps(), given_.width());
  }
  Tensor last_steps_of(int64_t first, int64_t windows) const {
    return torch::stable::select(part_of(given_.x, first, windows), 1, given_.steps() - 1);
  }

  Projected<T> projection(int64_t windows) const {
    return {given_.x, windows, given_.steps(), given_.width(), given_.last_step()};
  }

  Projected<T> project(int64_t first, int64_t windows) const {
    const Projected<T> made = projection(windows);
    const int64_t D = given_.width(), own = 3 * D - made.pair_width;
    multiply(made.pair, steps_of(first, windows), turned(part_of(weight(kInWeight), own, made.pair_width)));
    if (own > 0)
      multiply(made.query, last_steps_of(first, windows), turned(part_of(weight(kInWeight), 0, D)));
    return made;
  }

  void projection_backward(int64_t first, int64_t windows, const Projected<T>& grads,
                           const std::vector<Tensor>& to) const {
    const int64_t D = given_.width(), own = 3 * D - grads.pair_width;
    multiply(part_of(to[kInWeight], own, grads.pair_width), turned(grads.pair), steps_of(first, windows));
    sum_into(part_of(to[kInBias], own, grads.pair_width), grads.pair);
    if (own == 0) return;
    multiply(part_of(to[kInWeight], 0, D), turned(grads.query), last_steps_of(first, windows));
    sum_into(part_of(to[kInBias], 0, D), grads.query);
  }

  void input_backward(int64_t first, int64_t windows, const Projected<T>& grads, const Tensor& residual,
                      const Tensor& grad_x) const {
    const int64_t D = given_.width(), own = 3 * D - grads.pair_width, steps = given_.steps();
    const Tensor of_part = part_of(grad_x, first, windows);
    multiply(as_matrix(of_part, windows * steps, D), grads.pair,
             part_of(weight(kInWeight), own, grads.pair_width));
    const Tensor of_query = own > 0 ? room(given_.x, {windows, D}) : residual;
    if (own > 0) multiply(of_query, grads.query, part_of(weight(kInWeight), 0, D));
    device_.launch(encoder_input_kernel<T>, grid_for(windows * given_.results * D, kPlainThreads),
                   kPlainThreads, 0, of_part.mutable_data_ptr<T>(), residual.const_data_ptr<T>(),
                   own > 0 ? of_query.const_data_ptr<T>() : nullptr, windows, steps, given_.results, D);
  }

  Attention<T> attention(const Projected<T>& projected, int64_t first, int64_t windows,
                         const Tensor& mixed) const {
    const auto constant = [](const HeadRows<T>& rows) { return HeadRows<const T>{rows.data, rows.stride}; };
    Attention<T> job{};
    job.windows = windows;
    job.steps = given_.steps();
    job.results = given_.results;
    job.first_window = first;
    job.heads = static_cast<int32_t>(given_.heads);
    job.width = static_cast<int32_t>(given_.width() / given_.heads);
    job.query = constant(projected.query_rows());
    job.key = constant(projected.key_rows());
    job.value = constant(projected.value_rows());
    job.bias = data(kInBias);
    job.scale = T(1) / std::sqrt(static_cast<T>(job.width));
    job.dropout = given_.dropout;
    job.mixed = mixed.mutable_data_ptr<T>();
    return job;
  }

  void attend(Attention<T> job, bool backward) const {
    QFAST_CHECK(
        fit_attention(job, backward, device_.shared_limit()), op_, ": heads of ", job.width,
        " features do not fit into this GPU's shared memory. Remedy: more heads, or QFAST_BACKEND=torch.");
    unsigned int blocks = grid_for(job.windows * job.heads, 1);
    Tensor weights;
    if (job.weights != nullptr) {
      blocks = std::min(blocks, kLongHeads);
      weights = room(given_.x, {blocks * job.weights_elements(backward)});
      job.weights = weights.mutable_data_ptr<T>();
    }
    device_.launch(attention_kernel<T>, blocks, kHeadThreads,
                   static_cast<size_t>(job.shared_elements(backward)) * sizeof(T), job, backward);
  }

  int64_t kept_at(int number, int64_t first) const {
    return (number * given_.batch() + first) * given_.results;
  }
  unsigned int quad_blocks(const Rows& rows) const { return grid_for(rows.quads(), kPlainThreads / kLanes); }

  void norm_into(Norm<T>& norm, int number, int64_t first, const EncoderKept<T>& kept) const {
    norm.weight = data(number == 0 ? kNorm1Weight : kNorm2Weight);
    norm.bias = data(number == 0 ? kNorm1Bias : kNorm2Bias);
    if (kept.normalised != nullptr) {
      norm.normalised = kept.normalised + kept_at(number, first) * given_.width();
      norm.scales = kept.scales + kept_at(number, first);
    }
    device_.launch(norm_kernel<T>, quad_blocks(norm.rows), kPlainThreads, 0, norm);
  }

  // From the gradient of the result to that of the first sum, and that after its dropout.
  void norms_backward(const Rows& rows, int64_t first, const Tensor& grad, const EncoderKept<T>& kept,
                      const Tensor& first_sum, const Tensor& dropped, const std::vector<Tensor>& to,
                      PartSums& net_sums) {
    const Tensor entering = matrix(rows), of_entering = matrix(rows), weighted = matrix(rows);
    const Tensor second_sum = matrix(rows),
                 second_dropped = given_.dropout.active ? matrix(rows) : second_sum;
    const Tensor leaving = part_of(grad, first * given_.results, rows.count());
    const auto both = [&](int number) {
      NormBackward<T> job{};
      job.rows = rows;
      job.width = given_.width();
      job.dropout = given_.dropout;
      job.place = number == 0 ? kFirstPlace : kSecondPlace;
      job.normalised = kept.normalised + kept_at(number, first) * given_.width();
      job.scales = kept.scales + kept_at(number, first);
      job.weight = data(number == 0 ? kNorm1Weight : kNorm2Weight);
      job.weighted = weighted.mutable_data_ptr<T>();
      return job;
    };
    NormBackward<T> second = both(1);
    second.grad = leaving.const_data_ptr<T>();
    second.before = second_sum.mutable_data_ptr<T>();
    if (given_.dropout.active) second.dropped = second_dropped.mutable_data_ptr<T>();
    second.first_normalised = kept.normalised + kept_at(0, first) * given_.width();
    second.first_weight = data(kNorm1Weight);
    second.first_bias = data(kNorm1Bias);
    second.first = entering.mutable_data_ptr<T>();
    device_.launch(norm_backward_kernel<T>, quad_blocks(rows), kPlainThreads, 0, second);
    sum_into(to[kNorm2Weight - 4], weighted);
    sum_into(to[kNorm2Bias - 4], leaving);
    net_.backward(entering, second_dropped, rows, &of_entering, net_sums);
    NormBackward<T> one = both(0);
    one.grad = second_sum.const_data_ptr<T>();
    one.more = of_entering.mutable_data_ptr<T>();
    one.before = first_sum.mutable_data_ptr<T>();
    if (given_.dropout.active) one.dropped = dropped.mutable_data_ptr<T>();
    device_.launch(norm_backward_kernel<T>, quad_blocks(rows), kPlainThreads, 0, one);
    sum_into(to[kNorm1Weight - 4], weighted);
    sum_into(to[kNorm1Bias - 4], of_entering);
  }

  const char* op_;
  CudaDevice& device_;
  const EncoderGiven& given_;
  FeedForwardLaunches<T> net_;
};

}  // namespace
}  // namespace qfast
