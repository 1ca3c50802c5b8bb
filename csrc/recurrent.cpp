// One LSTM or GRU layer over all time steps, and its gradients, on the CPU. The batch is walked in tiles of
// rows whose state, gates and GEMM operands stay in the second-level cache from step to step; a step is one
// torch GEMM (two for the GRU) and one cell kernel (recurrent_kernels.h). What a step of a tile contributes
// to the weights is collected and multiplied a few steps at a time. Schemas: qfast/ops/recurrent.py.
#include "recurrent.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"
#include "cpu_dispatch.h"
#include "huge_pages.h"

namespace qfast {
namespace {

using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kTileRows = 256;  // rows of a tile: the tile of a step is about half of a 1 MB cache
constexpr int64_t kChunkRows =
    2048;                           // rows (steps times rows of the tile) of one GEMM of the weight gradients
constexpr int64_t kBlockRows = 32;  // rows whose bias gradients are summed as one: fixed, so that sums repeat
constexpr int64_t kHugeBytes = 4 << 20;  // what is kept for the backward: from here huge pages pay
constexpr int64_t kGrainUnits = 4096;    // cells of one task: long enough to pay for waking a thread

struct Shape {
  int64_t steps, rows, features, hidden;
};

// Equal tiles; more threads get proportionally larger ones, as the GEMMs of a tile are split among them.
int64_t tile_rows(const Shape& shape) {
  const int64_t most = kTileRows * torch::stable::get_num_threads();
  const int64_t tiles = (shape.rows + most - 1) / most;
  return tiles == 0 ? 0 : (shape.rows + tiles - 1) / tiles;
}

// ---------------------------------------------------------------- tensors
Tensor matrix(const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t shape[] = {rows, columns};
  return torch::stable::new_empty(like, {shape, 2});
}

Tensor sequence(const Tensor& like, int64_t steps, int64_t rows, int64_t columns) {
  const int64_t shape[] = {steps, rows, columns};
  Tensor out = torch::stable::new_empty(like, {shape, 3});
  const int64_t bytes = out.numel() * (like.scalar_type() == ScalarType::Float ? 4 : 8);
  if (bytes >= kHugeBytes) advise_huge_pages(out.mutable_data_ptr(), bytes);
  return out;
}

Tensor part(Tensor whole, int64_t dim, int64_t begin, int64_t count) {
  return torch::stable::narrow(whole, dim, begin, count);
}

Tensor transposed(const Tensor& tensor) { return torch::stable::transpose(tensor, 0, 1); }

template <class Element>
Element* data(const Tensor& tensor) {
  return tensor.mutable_data_ptr<Element>();
}

template <class Element>
const Element* data(const MaybeTensor& tensor) {
  return tensor ? tensor->const_data_ptr<Element>() : nullptr;
}

MaybeTensor contiguous(const MaybeTensor& tensor) {
  return tensor ? MaybeTensor(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// out = left right. `out` may be columns of a wider matrix.
void multiply(const Tensor& out, const Tensor& left, const Tensor& right) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(left), from(right), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned reference over, to drop it
}

template <class Element>
void fill_zero(const Tensor& tensor) {
  std::memset(data<Element>(tensor), 0, sizeof(Element) * tensor.numel());
}

template <class Element>
struct Strided {
  Element* data;
  int64_t row, column;  // strides, elements
};

template <class Element>
void copy(Strided<Element> to, Strided<const Element> from, int64_t begin, int64_t end, int64_t columns) {
  for (int64_t r = begin; r < end; ++r) {
    Element* __restrict out = to.data + r * to.row;
    const Element* __restrict in = from.data + r * from.row;
    if (from.column == 1 && to.column == 1) {
      std::memcpy(out, in, sizeof(Element) * columns);
    } else {
      for (int64_t c = 0; c < columns; ++c) out[c * to.column] = in[c * from.column];
    }
  }
}

// x[t, first + r, :] of [T, B, F] with any strides.
template <class Element>
Strided<const Element> step_of(const Tensor& x, int64_t t, int64_t first) {
  return {x.const_data_ptr<Element>() + t * x.stride(0) + first * x.stride(1), x.stride(1), x.stride(2)};
}

// [W_ih | W_hh]: [G, F + H].
template <class Element>
Tensor joined(const Tensor& weight_ih, const Tensor& weight_hh) {
  const int64_t gates = weight_ih.size(0), features = weight_ih.size(1), hidden = weight_hh.size(1);
  Tensor out = matrix(weight_ih, gates, features + hidden);
  Element* to = data<Element>(out);
  copy<Element>({to, features + hidden, 1}, {data<Element>(weight_ih), features, 1}, 0, gates, features);
  copy<Element>({to + features, features + hidden, 1}, {data<Element>(weight_hh), hidden, 1}, 0, gates,
                hidden);
  return out;
}

// A contiguous matrix out of rows [begin, begin + count) of the transpose of `sums`.
template <class Element>
Tensor transposed_rows(const Tensor& sums, int64_t begin, int64_t count) {
  const int64_t columns = sums.size(1);
  Tensor out = matrix(sums, columns, count);
  copy<Element>({data<Element>(out), 1, count}, {data<Element>(sums) + begin * columns, columns, 1}, 0, count,
                columns);
  return out;
}

template <class Element>
void add(const Tensor& to, const Tensor& from) {
  Element* __restrict sum = data<Element>(to);
  const Element* __restrict term = data<Element>(from);
  const int64_t count = to.numel();
  for (int64_t i = 0; i < count; ++i) sum[i] += term[i];
}

// ---------------------------------------------------------------- checks
void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x,
                std::initializer_list<int64_t> shape) {
  QFAST_CHECK(tensor.is_cpu() && tensor.scalar_type() == x.scalar_type(), op, ": ", name,
              ": expected dtype and device of x.");
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  std::ostringstream wanted;
  int64_t axis = 0;
  for (const int64_t size : shape) {
    wanted << (axis ? ", " : "") << size;
    same = same && tensor.size(axis++) == size;
  }
  QFAST_CHECK(same, op, ": ", name, ": expected shape (", wanted.str(), "), got ", shape_text(tensor), ".");
}

Shape check_layer(const char* op, const Tensor& x, const Tensor& weight_ih, const Tensor& weight_hh,
                  int64_t gates) {
  check_floating(op, "x", x);
  check_dims(op, "x", x, 3, "[T, B, F]");
  check_dims(op, "weight_hh", weight_hh, 2, "[gates * H, H]");
  const Shape shape{x.size(0), x.size(1), x.size(2), weight_hh.size(1)};
  QFAST_CHECK(shape.steps > 0 && shape.features > 0 && shape.hidden > 0, op,
              ": x: expected at least one step and one feature, weight_hh at least one unit, got ",
              shape_text(x), " and ", shape_text(weight_hh), ".");
  check_like(op, "weight_ih", weight_ih, x, {gates * shape.hidden, shape.features});
  check_like(op, "weight_hh", weight_hh, x, {gates * shape.hidden, shape.hidden});
  return shape;
}

void check_grads(const char* op, const MaybeTensor& grad_output, const MaybeTensor& grad_last,
                 const Tensor& x, const Shape& s) {
  if (grad_output) check_like(op, "grad_output", *grad_output, x, {s.steps, s.rows, s.hidden});
  if (grad_last) check_like(op, "grad_last", *grad_last, x, {s.rows, s.hidden});
}

int64_t grain(const Shape& shape) { return kGrainUnits / shape.hidden; }

template <class Element>
Tensor last_of(const Tensor& output, const Shape& s) {
  Tensor last = matrix(output, s.rows, s.hidden);
  std::memcpy(data<Element>(last), data<Element>(output) + (s.steps - 1) * s.rows * s.hidden,
              sizeof(Element) * s.rows * s.hidden);
  return last;
}

// ---------------------------------------------------------------- kernels by type
#define QFAST_BY_TYPE(name)                                      \
  auto name##_kernel(float) { return cpu_kernels().name##_f32; } \
  auto name##_kernel(double) { return cpu_kernels().name##_f64; }
QFAST_BY_TYPE(lstm_forward)
QFAST_BY_TYPE(lstm_backward)
QFAST_BY_TYPE(gru_forward)
QFAST_BY_TYPE(gru_backward)
#undef QFAST_BY_TYPE

// ---------------------------------------------------------------- forward
// Rows [first, first + rows) of an LSTM layer. `gates` and `cells` are [T, B, .], or one step if not kept.
template <class Element>
void lstm_tile(const Tensor& x, const Tensor& weights, const Tensor& bias, const Tensor& output,
               const Tensor& gates, const Tensor& cells, bool keep, const Shape& s, int64_t first,
               int64_t rows) {
  const int64_t F = s.features, H = s.hidden;
  const Tensor operand = matrix(x, rows, F + H), pre = matrix(x, rows, 4 * H);
  const Tensor right = transposed(weights);
  Element* const joint = data<Element>(operand);
  const auto take_step = [&](int64_t t, int64_t begin, int64_t end) {
    copy<Element>({joint, F + H, 1}, step_of<Element>(x, t, first), begin, end, F);
  };
  take_step(0, 0, rows);
  const auto kernel = lstm_forward_kernel(Element{});
  for (int64_t t = 0; t < s.steps; ++t) {
    if (t == 0) {  // no h yet
      multiply(pre, part(operand, 1, 0, F), part(right, 0, 0, F));
    } else {
      multiply(pre, operand, right);
    }
    const int64_t at = (t * s.rows + first) * H, kept = keep ? at : first * H;
    Element* const cell = data<Element>(cells);
    const Element* const before = t == 0 ? nullptr : cell + (keep ? kept - s.rows * H : kept);
    const LstmForwardJob<Element> job{H,
                                      data<Element>(pre),
                                      data<Element>(bias),
                                      before,
                                      keep ? data<Element>(gates) + at * 4 : nullptr,
                                      cell + kept,
                                      data<Element>(output) + at,
                                      joint + F,
                                      F + H};
    parallel_for(rows, grain(s), [&](int64_t begin, int64_t end) {
      kernel(job, begin, end);
      if (t + 1 < s.steps) take_step(t + 1, begin, end);
    });
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_layer_cpu(const Tensor& x, const Tensor& weight_ih,
                                                          const Tensor& weight_hh, const Tensor& bias,
                                                          bool keep) {
  const char* op = "lstm_layer";
  const Shape s = check_layer(op, x, weight_ih, weight_hh, 4);
  check_like(op, "bias", bias, x, {4 * s.hidden});
  Tensor output = sequence(x, s.steps, s.rows, s.hidden), last;
  Tensor gates = sequence(x, keep ? s.steps : 0, s.rows, 4 * s.hidden);
  Tensor cells = sequence(x, keep ? s.steps : 0, s.rows, s.hidden);
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    const Tensor weights =
        joined<Element>(torch::stable::contiguous(weight_ih), torch::stable::contiguous(weight_hh));
    const Tensor sum = torch::stable::contiguous(bias);
    const Tensor states = keep ? cells : matrix(x, s.rows, s.hidden);
    const int64_t tile = tile_rows(s);
    for (int64_t first = 0; first < s.rows; first += tile) {
      lstm_tile<Element>(x, weights, sum, output, gates, states, keep, s, first,
                         std::min(tile, s.rows - first));
    }
    last = last_of<Element>(output, s);
  });
  return {output, last, gates, cells};
}

template <class Element>
void gru_tile(const Tensor& x, const Tensor& weight_ih, const Tensor& weight_hh, const Tensor& bias_ih,
              const Tensor& bias_hh, const Tensor& output, const Tensor& gates, bool keep, const Shape& s,
              int64_t first, int64_t rows) {
  const int64_t F = s.features, H = s.hidden;
  const Tensor input = matrix(x, rows, F), state = matrix(x, rows, H);
  const Tensor from_input = matrix(x, rows, 3 * H), from_hidden = matrix(x, rows, 3 * H);
  const Tensor right_ih = transposed(weight_ih), right_hh = transposed(weight_hh);
  const auto take_step = [&](int64_t t, int64_t begin, int64_t end) {
    copy<Element>({data<Element>(input), F, 1}, step_of<Element>(x, t, first), begin, end, F);
  };
  take_step(0, 0, rows);
  fill_zero<Element>(state);
  fill_zero<Element>(from_hidden);  // of the first step, where there is no h yet
  const auto kernel = gru_forward_kernel(Element{});
  for (int64_t t = 0; t < s.steps; ++t) {
    multiply(from_input, input, right_ih);
    if (t > 0) multiply(from_hidden, state, right_hh);
    const int64_t at = (t * s.rows + first) * H;
    const GruForwardJob<Element> job{H,
                                     data<Element>(from_input),
                                     data<Element>(from_hidden),
                                     data<Element>(bias_ih),
                                     data<Element>(bias_hh),
                                     keep ? data<Element>(gates) + at * 4 : nullptr,
                                     data<Element>(state),
                                     data<Element>(output) + at};
    parallel_for(rows, grain(s), [&](int64_t begin, int64_t end) {
      kernel(job, begin, end);
      if (t + 1 < s.steps) take_step(t + 1, begin, end);
    });
  }
}

std::tuple<Tensor, Tensor, Tensor> gru_layer_cpu(const Tensor& x, const Tensor& weight_ih,
                                                 const Tensor& weight_hh, const Tensor& bias_ih,
                                                 const Tensor& bias_hh, bool keep) {
  const char* op = "gru_layer";
  const Shape s = check_layer(op, x, weight_ih, weight_hh, 3);
  check_like(op, "bias_ih", bias_ih, x, {3 * s.hidden});
  check_like(op, "bias_hh", bias_hh, x, {3 * s.hidden});
  Tensor output = sequence(x, s.steps, s.rows, s.hidden), last;
  Tensor gates = sequence(x, keep ? s.steps : 0, s.rows, 4 * s.hidden);
  const Tensor held[] = {torch::stable::contiguous(weight_ih), torch::stable::contiguous(weight_hh),
                         torch::stable::contiguous(bias_ih), torch::stable::contiguous(bias_hh)};
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    const int64_t tile = tile_rows(s);
    for (int64_t first = 0; first < s.rows; first += tile) {
      gru_tile<Element>(x, held[0], held[1], held[2], held[3], output, gates, keep, s, first,
                        std::min(tile, s.rows - first));
    }
    last = last_of<Element>(output, s);
  });
  return {output, last, gates};
}

// ---------------------------------------------------------------- backward
// What the backward of a tile collects towards the gradients of weights and biases: gradients of the gates
// of several steps above each other, the GEMM operands they belong to, and sums of the gates' gradients.
template <class Element>
class Collected {
 public:
  Collected(const Tensor& x, const Shape& s, int64_t tile)
      : shape_(s),
        operands_(matrix(x, slots(s, tile) * tile, s.features + s.hidden)),
        grads_(matrix(x, slots(s, tile) * tile, 4 * s.hidden)),
        sums_(matrix(x, (tile + kBlockRows - 1) / kBlockRows, 4 * s.hidden)),
        bias_(matrix(x, 1, 4 * s.hidden)) {
    fill_zero<Element>(bias_);
  }

  static int64_t slots(const Shape& s, int64_t tile) {
    return std::clamp<int64_t>(tile == 0 ? 1 : kChunkRows / tile, 1, s.steps);
  }

  void begin_tile(int64_t first, int64_t rows) {
    first_ = first, rows_ = rows, used_ = 0;
    capacity_ = slots(shape_, rows);
    capacity_ = std::min(capacity_, operands_.size(0) / rows);
    fill_zero<Element>(sums_);
  }

  bool full() const { return used_ == capacity_; }
  int64_t filled_rows() const { return used_ * rows_; }
  Tensor filled_grads() const { return part(grads_, 0, 0, filled_rows()); }
  Tensor filled_operands() const { return part(operands_, 0, 0, filled_rows()); }
  void clear() { used_ = 0; }
  const Tensor& bias() const { return bias_; }

  // The gates' gradients of the step last taken.
  Tensor step_grads() const { return part(grads_, 0, (used_ - 1) * rows_, rows_); }

  // Makes room for a step, copies x and the h before it, runs kernel(job, begin, end, sums) over blocks of
  // rows.
  template <class Job, class Kernel>
  void take_step(Job job, const Kernel& kernel, const Tensor& x, const Tensor& output, int64_t t) {
    const int64_t F = shape_.features, H = shape_.hidden, width = F + H, slot = used_++ * rows_;
    job.grad_gates = data<Element>(grads_) + slot * 4 * H;
    Element* const operand = data<Element>(operands_) + slot * width;
    const int64_t blocks = (rows_ + kBlockRows - 1) / kBlockRows;
    parallel_for(blocks, grain(shape_) / kBlockRows, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t from = block * kBlockRows, to = std::min(from + kBlockRows, rows_);
        kernel(job, from, to, data<Element>(sums_) + block * 4 * H);
        copy<Element>({operand, width, 1}, step_of<Element>(x, t, first_), from, to, F);
        if (t > 0) {
          copy<Element>({operand + F, width, 1}, step_of<Element>(output, t - 1, first_), from, to, H);
        } else {
          for (int64_t r = from; r < to; ++r) std::memset(operand + r * width + F, 0, sizeof(Element) * H);
        }
      }
    });
  }

  void end_tile() {
    const int64_t blocks = (rows_ + kBlockRows - 1) / kBlockRows;
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t j = 0; j < 4 * shape_.hidden; ++j)
        data<Element>(bias_)[j] += data<Element>(sums_)[block * 4 * shape_.hidden + j];
    }
  }

 private:
  Shape shape_;
  Tensor operands_, grads_, sums_, bias_;
  int64_t first_ = 0, rows_ = 0, used_ = 0, capacity_ = 0;
};

// The part of a sum of outer products that is collected: sums += left^T right.
template <class Element>
void add_product(const Tensor& sums, const Tensor& left, const Tensor& right, const Tensor& scratch) {
  multiply(scratch, transposed(left), right);
  add<Element>(sums, scratch);
}

// What enters at step t of a tile: the gradient of that step's output, and at the last step that of `last`
// in the place of the gradient from the step after.
template <class Element>
struct Entering {
  const Element* grad_output;
  const Element* grad_last;
  const Shape shape;
  int64_t first;

  const Element* at(int64_t t) const {
    return grad_output == nullptr ? nullptr : grad_output + (t * shape.rows + first) * shape.hidden;
  }
  const Element* last() const { return grad_last == nullptr ? nullptr : grad_last + first * shape.hidden; }
};

template <class Element>
Tensor zero_matrix(const Tensor& like, int64_t rows, int64_t columns) {
  Tensor out = matrix(like, rows, columns);
  fill_zero<Element>(out);
  return out;
}

// weights is [W_ih | W_hh] where the gradient of x is wanted, W_hh otherwise.
template <class Element>
void lstm_tile_backward(const Entering<Element>& entering, const Tensor& x, const Tensor& weights,
                        const Tensor& output, const Tensor& gates, const Tensor& cells, const Tensor& grad_x,
                        const Tensor& weight_sums, const Tensor& scratch, Collected<Element>& collected,
                        int64_t rows) {
  const Shape& s = entering.shape;
  const int64_t H = s.hidden, F = s.features, first = entering.first;
  const bool input_grad = grad_x.numel() > 0;
  const int64_t before = input_grad ? F : 0;  // columns of the operand's gradient before those of h
  const Tensor grad_operand = matrix(x, rows, before + H), grad_cell = zero_matrix<Element>(x, rows, H);
  collected.begin_tile(first, rows);
  const auto kernel = lstm_backward_kernel(Element{});
  for (int64_t t = s.steps - 1; t >= 0; --t) {
    const int64_t at = (t * s.rows + first) * H;
    const Element* const cell = data<Element>(cells) + at;
    const bool at_end = t == s.steps - 1;
    const LstmBackwardJob<Element> job{H,
                                       data<Element>(gates) + at * 4,
                                       cell,
                                       t == 0 ? nullptr : cell - s.rows * H,
                                       entering.at(t),
                                       at_end ? entering.last() : data<Element>(grad_operand) + before,
                                       at_end ? H : before + H,
                                       data<Element>(grad_cell),
                                       nullptr};
    collected.take_step(job, kernel, x, output, t);
    if (t > 0 || input_grad) multiply(grad_operand, collected.step_grads(), weights);
    if (input_grad) {
      copy<Element>({data<Element>(grad_x) + (t * s.rows + first) * F, F, 1},
                    {data<Element>(grad_operand), F + H, 1}, 0, rows, F);
    }
    if (t > 0 && !collected.full()) continue;
    add_product<Element>(weight_sums, collected.filled_operands(), collected.filled_grads(), scratch);
    collected.clear();
  }
  collected.end_tile();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_layer_backward_cpu(const MaybeTensor& grad_output,
                                                                   const MaybeTensor& grad_last,
                                                                   const Tensor& x, const Tensor& weight_ih,
                                                                   const Tensor& weight_hh,
                                                                   const Tensor& output, const Tensor& gates,
                                                                   const Tensor& cells, bool input_grad) {
  const char* op = "lstm_layer_backward";
  const Shape s = check_layer(op, x, weight_ih, weight_hh, 4);
  check_grads(op, grad_output, grad_last, x, s);
  check_like(op, "output", output, x, {s.steps, s.rows, s.hidden});
  check_like(op, "gates", gates, x, {s.steps, s.rows, 4 * s.hidden});
  check_like(op, "cells", cells, x, {s.steps, s.rows, s.hidden});
  const MaybeTensor held_output = contiguous(grad_output), held_last = contiguous(grad_last);
  const Tensor kept[] = {torch::stable::contiguous(output), torch::stable::contiguous(gates),
                         torch::stable::contiguous(cells)};
  const Tensor w_ih = torch::stable::contiguous(weight_ih), w_hh = torch::stable::contiguous(weight_hh);
  Tensor grad_x = sequence(x, input_grad ? s.steps : 0, s.rows, s.features), grad_ih, grad_hh, grad_bias;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    const int64_t width = s.features + s.hidden, tile = tile_rows(s);
    const Tensor weights = input_grad ? joined<Element>(w_ih, w_hh) : w_hh;
    const Tensor sums = zero_matrix<Element>(x, width, 4 * s.hidden),
                 scratch = matrix(x, width, 4 * s.hidden);
    Collected<Element> collected(x, s, tile);
    for (int64_t first = 0; first < s.rows; first += tile) {
      const Entering<Element> entering{data<Element>(held_output), data<Element>(held_last), s, first};
      lstm_tile_backward<Element>(entering, x, weights, kept[0], kept[1], kept[2], grad_x, sums, scratch,
                                  collected, std::min(tile, s.rows - first));
    }
    grad_ih = transposed_rows<Element>(sums, 0, s.features);
    grad_hh = transposed_rows<Element>(sums, s.features, s.hidden);
    const int64_t shape[] = {4 * s.hidden};
    grad_bias = torch::stable::view(collected.bias(), {shape, 1});
  });
  return {grad_x, grad_ih, grad_hh, grad_bias};
}

// weight_ih has its rows in the order of the kept gates (new, reset, update); so have the columns of sums_ih.
template <class Element>
void gru_tile_backward(const Entering<Element>& entering, const Tensor& x, const Tensor& weight_ih,
                       const Tensor& weight_hh, const Tensor& output, const Tensor& gates,
                       const Tensor& grad_x, const Tensor& sums_ih, const Tensor& sums_hh,
                       const Tensor (&scratch)[2], Collected<Element>& collected, int64_t rows) {
  const Shape& s = entering.shape;
  const int64_t H = s.hidden, F = s.features, first = entering.first;
  const bool input_grad = grad_x.numel() > 0;
  const Tensor grad_operand = matrix(x, rows, H), grad_state = zero_matrix<Element>(x, rows, H);
  const Tensor grad_input = matrix(x, input_grad ? rows : 0, F);
  collected.begin_tile(first, rows);
  const auto kernel = gru_backward_kernel(Element{});
  for (int64_t t = s.steps - 1; t >= 0; --t) {
    const int64_t at = (t * s.rows + first) * H;
    const GruBackwardJob<Element> job{H,
                                      data<Element>(gates) + at * 4,
                                      t == 0 ? nullptr : data<Element>(output) + at - s.rows * H,
                                      entering.at(t),
                                      t == s.steps - 1 ? entering.last() : data<Element>(grad_operand),
                                      data<Element>(grad_state),
                                      nullptr};
    collected.take_step(job, kernel, x, output, t);
    const Tensor grads = collected.step_grads();
    if (t > 0) multiply(grad_operand, part(grads, 1, H, 3 * H), weight_hh);
    if (input_grad) {
      multiply(grad_input, part(grads, 1, 0, 3 * H), weight_ih);
      std::memcpy(data<Element>(grad_x) + (t * s.rows + first) * F, data<Element>(grad_input),
                  sizeof(Element) * rows * F);
    }
    if (t > 0 && !collected.full()) continue;
    const Tensor all = collected.filled_grads(), operands = collected.filled_operands();
    add_product<Element>(sums_ih, part(operands, 1, 0, F), part(all, 1, 0, 3 * H), scratch[0]);
    add_product<Element>(sums_hh, part(operands, 1, F, H), part(all, 1, H, 3 * H), scratch[1]);
    collected.clear();
  }
  collected.end_tile();
}

// Moves the first third behind the others: new, reset, update -> reset, update, new (forth), or back.
template <class Element>
Tensor rotated_thirds(const Tensor& rows, bool forth) {
  Tensor out = matrix(rows, rows.size(0), rows.size(1));
  const int64_t third = rows.size(0) / 3 * rows.size(1);
  const Element* from = data<Element>(rows);
  Element* to = data<Element>(out);
  const int64_t head = forth ? third : 2 * third;  // elements that change places with the rest
  std::memcpy(to, from + head, sizeof(Element) * (3 * third - head));
  std::memcpy(to + 3 * third - head, from, sizeof(Element) * head);
  return out;
}

template <class Element>
Tensor gru_bias(const Tensor& sums, int64_t hidden, bool of_input) {
  const int64_t shape[] = {3 * hidden}, bytes = sizeof(Element) * hidden;
  Tensor out = torch::stable::new_empty(sums, {shape, 1});
  const Element* from = data<Element>(sums);
  std::memcpy(data<Element>(out), from + hidden, 2 * bytes);
  std::memcpy(data<Element>(out) + 2 * hidden, from + (of_input ? 0 : 3 * hidden), bytes);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_layer_backward_cpu(
    const MaybeTensor& grad_output, const MaybeTensor& grad_last, const Tensor& x, const Tensor& weight_ih,
    const Tensor& weight_hh, const Tensor& output, const Tensor& gates, bool input_grad) {
  const char* op = "gru_layer_backward";
  const Shape s = check_layer(op, x, weight_ih, weight_hh, 3);
  check_grads(op, grad_output, grad_last, x, s);
  check_like(op, "output", output, x, {s.steps, s.rows, s.hidden});
  check_like(op, "gates", gates, x, {s.steps, s.rows, 4 * s.hidden});
  const MaybeTensor held_output = contiguous(grad_output), held_last = contiguous(grad_last);
  const Tensor kept[] = {torch::stable::contiguous(output), torch::stable::contiguous(gates)};
  const Tensor w_ih = torch::stable::contiguous(weight_ih), w_hh = torch::stable::contiguous(weight_hh);
  Tensor grad_x = sequence(x, input_grad ? s.steps : 0, s.rows, s.features);
  Tensor grad_ih, grad_hh, bias_ih, bias_hh;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    const int64_t F = s.features, H = s.hidden, tile = tile_rows(s);
    const Tensor turned = rotated_thirds<Element>(w_ih, false);
    const Tensor sums_ih = zero_matrix<Element>(x, F, 3 * H), sums_hh = zero_matrix<Element>(x, H, 3 * H);
    const Tensor scratch[] = {matrix(x, F, 3 * H), matrix(x, H, 3 * H)};
    Collected<Element> collected(x, s, tile);
    for (int64_t first = 0; first < s.rows; first += tile) {
      const Entering<Element> entering{data<Element>(held_output), data<Element>(held_last), s, first};
      gru_tile_backward<Element>(entering, x, turned, w_hh, kept[0], kept[1], grad_x, sums_ih, sums_hh,
                                 scratch, collected, std::min(tile, s.rows - first));
    }
    grad_ih = rotated_thirds<Element>(transposed_rows<Element>(sums_ih, 0, F), true);
    grad_hh = transposed_rows<Element>(sums_hh, 0, H);
    bias_ih = gru_bias<Element>(collected.bias(), H, true);
    bias_hh = gru_bias<Element>(collected.bias(), H, false);
  });
  return {grad_x, grad_ih, grad_hh, bias_ih, bias_hh};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CPU, m) {
  m.impl("lstm_layer", TORCH_BOX(&lstm_layer_cpu));
  m.impl("lstm_layer_backward", TORCH_BOX(&lstm_layer_backward_cpu));
  m.impl("gru_layer", TORCH_BOX(&gru_layer_cpu));
  m.impl("gru_layer_backward", TORCH_BOX(&gru_layer_backward_cpu));
}

}  // namespace qfast
