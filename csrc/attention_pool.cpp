// Attention over time on the CPU: buffers and threads. Schemas: qfast/ops/attention_pool.py; what is
// computed: attention_pool_kernels.h.
#include "attention_pool.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "attention_pool_arguments.h"
#include "cpu_dispatch.h"
#include "cpu_workers.h"
#include "dropout_host.h"

namespace qfast {
namespace {

constexpr int64_t kPoolRows = 96;              // rows and steps of a tile, as far as the batch has them
constexpr int64_t kPoolBytes = 256 << 10;      // what a block holds: well within a 1 MB cache
constexpr int64_t kLeastSteps = 8;             // of a block
constexpr int64_t kPoolParts = 16;             // sums of weight gradients, each of a fixed part of the tiles
constexpr int64_t kPoolPartBytes = 128 << 20;  // that they may take together

auto forward_kernel(float) { return cpu_kernels().attention_pool_forward_f32; }
auto forward_kernel(double) { return cpu_kernels().attention_pool_forward_f64; }
auto backward_kernel(float) { return cpu_kernels().attention_pool_backward_f32; }
auto backward_kernel(double) { return cpu_kernels().attention_pool_backward_f64; }

// Everything but the results of a call.
template <class Element>
class Pool {
 public:
  PoolJob<Element> job{};

  Pool(const PoolTensors& given, double dropout, const std::optional<Tensor>& seed)
      : h_(given.h.stride(2) == 1 ? given.h : torch::stable::contiguous(given.h)),
        weight_(torch::stable::contiguous(given.weight)) {
    job.batch = h_.size(0), job.steps = h_.size(1), job.hidden = h_.size(2), job.width = weight_.size(0);
    job.h = h_.const_data_ptr<Element>();
    job.row_stride = h_.stride(0), job.step_stride = h_.stride(1);
    job.entering = packed(job.hidden, job.width, 1, job.hidden);
    job.bias = padded(given.bias), job.score = padded(given.score);
    job.dropout = dropout_rule(given.op, dropout, seed);
    // Fixed by the sizes, so that sums of gradients have the same order with any number of threads.
    const int64_t wanted = rounded_up((kPoolRows + job.steps - 1) / job.steps, 4);
    job.tile_rows = std::min(wanted, rounded_up(std::max<int64_t>(job.batch, 1), 4));
    const int64_t step_bytes =
        job.tile_rows * (job.hidden + 2 * job.width) * static_cast<int64_t>(sizeof(Element));
    job.block_steps = std::min(job.steps, std::max(kLeastSteps, kPoolBytes / step_bytes));
  }

  void prepare_backward() { job.turned = packed(job.width, job.hidden, job.hidden, 1); }

  int64_t tiles() const { return (job.batch + job.tile_rows - 1) / job.tile_rows; }

 private:
  // Element (row, column) from weight[row * row_stride + column * column_stride].
  PackedWeight<Element> packed(int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
    const int64_t bytes = cpu_kernels().vector_bytes, lanes = bytes / static_cast<int64_t>(sizeof(Element));
    const int64_t most = (bytes == 64 ? 4 : 2) * lanes, count = (columns + most - 1) / most;
    const int64_t width = count == 0 ? 0 : rounded_up((columns + count - 1) / count, lanes);
    const Element* const from = weight_.const_data_ptr<Element>();
    Element* const to = zeros(rows * width * count);
    for (int64_t column = 0; column < columns; ++column)
      for (int64_t row = 0; row < rows; ++row)
        to[(column / width * rows + row) * width + column % width] =
            from[row * row_stride + column * column_stride];
    return {rows, columns, width, count, to};
  }

  const Element* padded(const Tensor& tensor) {
    const Tensor held = torch::stable::contiguous(tensor);
    Element* const to = zeros(job.entering.padded());
    if (job.width > 0) std::memcpy(to, held.const_data_ptr<Element>(), sizeof(Element) * job.width);
    return to;
  }

  Element* zeros(int64_t elements) {
    held_.emplace_back(elements, Element(0));
    return held_.back().data();
  }

  Tensor h_, weight_;
  std::vector<std::vector<Element>> held_;
};

// ---------------------------------------------------------------- forward
std::tuple<Tensor, Tensor> attention_pool_cpu(const Tensor& h, const Tensor& weight, const Tensor& bias,
                                              const Tensor& score, double dropout,
                                              std::optional<Tensor> seed) {
  const PoolTensors given{"attention_pool", h, weight, bias, score};
  check_pool(given);
  const Tensor pooled = empty(h, {h.size(0), h.size(2)}), attention = empty(h, {h.size(0), h.size(1)});
  dispatch_floating(h.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    Pool<Element> pool(given, dropout, seed);
    auto& job = pool.job;
    job.pooled = pooled.mutable_data_ptr<Element>(), job.attention = attention.mutable_data_ptr<Element>();
    const int64_t each = rounded_up(PoolSizes<Element>::forward(job), 16);
    const Tensor scratch = empty(h, {worker_count(pool.tiles()) * each});
    Element* const space = scratch.mutable_data_ptr<Element>();
    const auto kernel = forward_kernel(Element{});
    share(pool.tiles(), [&](int64_t worker, int64_t begin, int64_t end) {
      kernel(job, begin, end, space + worker * each);
    });
  });
  return {pooled, attention};
}

// ---------------------------------------------------------------- backward
// Runs the tiles in a fixed number of parts, whatever the number of threads, and adds their sums in order.
template <class Element>
void run_backward(const Pool<Element>& pool, const Tensor& like, const Tensor& sums_of_parts, int64_t parts,
                  int64_t elements) {
  const int64_t each = rounded_up(PoolSizes<Element>::backward(pool.job), 16);
  const Tensor scratch = empty(like, {worker_count(parts) * each});
  Element* const space = scratch.mutable_data_ptr<Element>();
  Element* const total = sums_of_parts.mutable_data_ptr<Element>();
  const auto kernel = backward_kernel(Element{});
  share(parts, [&](int64_t worker, int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      Element* const sum = total + part * elements;
      std::fill(sum, sum + elements, Element(0));
      kernel(pool.job, pool.tiles() * part / parts, pool.tiles() * (part + 1) / parts, space + worker * each,
             sum);
    }
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < elements; ++i) total[i] += total[part * elements + i];
}

template <class Element>
void copy_rows(const Tensor& to, const Element* from, int64_t rows, int64_t columns, int64_t stride) {
  if (columns == 0) return;
  Element* const out = to.mutable_data_ptr<Element>();
  for (int64_t row = 0; row < rows; ++row)
    std::memcpy(out + row * columns, from + row * stride, sizeof(Element) * columns);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_pool_backward_cpu(
    const Tensor& grad, const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& score,
    double dropout, std::optional<Tensor> seed, const Tensor& attention, const Tensor& pooled) {
  const PoolTensors given{"attention_pool_backward", h, weight, bias, score};
  check_pool(given);
  check_pool_result(given.op, "grad", grad, h, h.size(2));
  check_pool_result(given.op, "pooled", pooled, h, h.size(2));
  check_pool_result(given.op, "attention", attention, h, h.size(1));
  const int64_t width = weight.size(0);
  Tensor grad_h = empty(h, {h.size(0), h.size(1), h.size(2)}), grad_weight = empty(h, {width, h.size(2)}),
         grad_bias = empty(h, {width}), grad_score = empty(h, {width});
  dispatch_floating(h.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    Pool<Element> pool(given, dropout, seed);
    pool.prepare_backward();
    auto& job = pool.job;
    const Tensor entering = torch::stable::contiguous(grad), kept = torch::stable::contiguous(attention),
                 result = torch::stable::contiguous(pooled);
    job.grad = entering.const_data_ptr<Element>();
    job.attention = kept.mutable_data_ptr<Element>(), job.pooled = result.mutable_data_ptr<Element>();
    job.grad_h = grad_h.mutable_data_ptr<Element>();
    const int64_t elements = std::max<int64_t>(16, rounded_up(PoolSizes<Element>::sums(job), 16));
    const int64_t fitting = kPoolPartBytes / static_cast<int64_t>(sizeof(Element)) / elements;
    const int64_t parts = std::max<int64_t>(1, std::min({pool.tiles(), kPoolParts, fitting}));
    const Tensor sums = empty(h, {parts * elements});
    run_backward(pool, h, sums, parts, elements);
    const Element* const total = sums.const_data_ptr<Element>();
    const int64_t wide = job.turned.padded(), narrow = job.entering.padded();
    copy_rows(grad_weight, total, width, job.hidden, wide);
    copy_rows(grad_bias, total + width * wide, 1, width, narrow);
    copy_rows(grad_score, total + width * wide + narrow, 1, width, narrow);
  });
  return {grad_h, grad_weight, grad_bias, grad_score};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CPU, m) {
  m.impl("attention_pool", TORCH_BOX(&attention_pool_cpu));
  m.impl("attention_pool_backward", TORCH_BOX(&attention_pool_backward_cpu));
}

}  // namespace qfast
