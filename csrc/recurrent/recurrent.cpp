// Stacked LSTM and GRU on the CPU: checks, buffers and threads. qfast/ops/recurrent.py contains the schemas,
// recurrent_cell.h the cells, recurrent_kernels.h and recurrent_kernels_backward.h the kernels.
#include "recurrent/recurrent.h"

#include <cstring>
#include <tuple>

#include "cpu_workers.h"
#include "recurrent/recurrent_pack.h"

namespace qfast {
namespace {

using host::GruCell;
using host::LstmCell;

// Saved values of this size evict everything else from the caches.
constexpr int64_t kParts = 16;  // parts of the tiles, each with its own sums of weight gradients
constexpr int64_t kStreamedBytes = 8 << 20;
constexpr int64_t kPartBytes = 128 << 20;  // limit on the memory of all sums

template <class Cell, class Element>
auto forward_kernel() {
  constexpr bool is_lstm = std::is_same_v<Cell, LstmCell>;
  return is_lstm ? cpu_kernels<Element>().lstm_forward : cpu_kernels<Element>().gru_forward;
}

template <class Cell, class Element>
auto backward_kernel() {
  constexpr bool is_lstm = std::is_same_v<Cell, LstmCell>;
  return is_lstm ? cpu_kernels<Element>().lstm_backward : cpu_kernels<Element>().gru_backward;
}

const MaybeTensor kNone;

// ---------------------------------------------------------------- forward
struct Forward {
  Tensor output, last_h, last_c, gates, carried;
};

// Returns whether the windows are consecutive rows, each shifted by one row. They then share the products of
// their rows with the weights of the first layer.
bool rolls(const Tensor& x, bool keep, bool drops) {
  return !keep && !drops && x.size(0) > 1 && x.size(1) > 1 && x.stride(0) == x.stride(1);
}

// Returns whether saved values are written with non-temporal stores. This pays if they would evict everything
// else from the caches, and needs aligned rows.
template <class Element>
bool streams(const RecurrentJob<Element>& job) {
  const int64_t units = job.layer_count * job.steps * job.batch * job.hidden;
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 64 == 0; };
  return units * 5 * static_cast<int64_t>(sizeof(Element)) >= kStreamedBytes && job.hidden == job.stride &&
         aligned(job.gates) && aligned(job.carried);
}

template <class Element>
Sequence<Element> sequence_of(const Tensor& output) {
  return {output.mutable_data_ptr<Element>(), output.stride(0), output.stride(1), 1};
}

// Divides the batch into equal shares for the threads, and each share into equal tiles.
template <class Cell, class Element>
void run_forward(RecurrentNetwork<Cell, Element>& network, const Tensor& like, bool rolling) {
  auto& job = network.job;
  const int64_t units = (job.batch + kRecurrentRowStep - 1) / kRecurrentRowStep,
                workers = worker_count(units);
  job.tile_rows = even_tile_rows((units + workers - 1) / workers * kRecurrentRowStep);
  network.prepare_forward(rolling);
  const int64_t each = rounded_up(network.scratch_elements, 16);
  const Tensor scratch = empty(like, {workers * each});
  Element* const space = scratch.mutable_data_ptr<Element>();
  const auto kernel = forward_kernel<Cell, Element>();
  share(units, [&](int64_t worker, int64_t begin, int64_t end) {
    kernel(job, begin * kRecurrentRowStep, std::min(end * kRecurrentRowStep, job.batch),
           space + worker * each);
  });
}

template <class Cell>
Forward forward(const char* op, const Tensor& x, const std::vector<Tensor>& weights, const MaybeTensor& h0,
                const MaybeTensor& c0, double dropout, const MaybeTensor& seed, bool all_steps, bool keep) {
  check_floating(op, "x", x);
  Forward out;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    RecurrentNetwork<Cell, Element> network(op, x, weights, h0, c0, dropout, seed);
    auto& job = network.job;
    const int64_t L = job.layer_count, B = job.batch, T = job.steps, H = job.hidden,
                  saved_steps = keep ? T : 0;
    out.last_h = empty(x, {L, B, H}), out.last_c = empty(x, {Cell::kStates == 2 ? L : 0, B, H});
    out.gates = empty(x, {L, saved_steps, B, 4, H}), out.carried = empty(x, {L, saved_steps, B, H});
    out.output = all_steps ? empty(x, {B, T, H}) : empty(x, {B, H});
    job.last_h = out.last_h.template mutable_data_ptr<Element>();
    job.last_c = out.last_c.template mutable_data_ptr<Element>();
    if (all_steps) job.output = sequence_of<Element>(out.output);
    if (keep) {
      job.gates = out.gates.template mutable_data_ptr<Element>();
      job.carried = out.carried.template mutable_data_ptr<Element>();
      job.streamed = streams(job);
    }
    run_forward(network, x, rolls(x, keep, job.dropout.active));
    if (!all_steps && B > 0)
      std::memcpy(out.output.mutable_data_ptr(), job.last_h + (L - 1) * B * H, sizeof(Element) * B * H);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_cpu(const Tensor& x, std::vector<Tensor> weights,
                                                            MaybeTensor h0, MaybeTensor c0, double dropout,
                                                            MaybeTensor seed, bool all_steps, bool keep) {
  const Forward out = forward<LstmCell>("lstm", x, weights, h0, c0, dropout, seed, all_steps, keep);
  return {out.output, out.last_h, out.last_c, out.gates, out.carried};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gru_cpu(const Tensor& x, std::vector<Tensor> weights,
                                                   MaybeTensor h0, double dropout, MaybeTensor seed,
                                                   bool all_steps, bool keep) {
  const Forward out = forward<GruCell>("gru", x, weights, h0, kNone, dropout, seed, all_steps, keep);
  return {out.output, out.last_h, out.gates, out.carried};
}

// ---------------------------------------------------------------- backward
struct OutputGradients {
  const MaybeTensor &output, &h, &c;
};

struct Backward {
  Tensor grad_x, grad_h, grad_c;
  std::vector<Tensor> weights;
};

// Divides the tiles into a fixed number of parts and adds the sums of the parts in order. The result
// therefore does not depend on the number of threads.
template <class Cell, class Element>
std::vector<Tensor> run_backward(RecurrentNetwork<Cell, Element>& network, const Tensor& like) {
  const auto& job = network.job;
  const int64_t tiles = (job.batch + job.tile_rows - 1) / job.tile_rows;
  const int64_t elements = rounded_up(network.sum_elements, 16);
  const int64_t fitting = kPartBytes / static_cast<int64_t>(sizeof(Element)) / elements;
  const int64_t parts = std::max<int64_t>(1, std::min({tiles, kParts, fitting}));
  const int64_t each = rounded_up(network.scratch_elements, 16);
  const Tensor scratch = empty(like, {worker_count(parts) * each}), sums = empty(like, {parts * elements});
  Element* const space = scratch.mutable_data_ptr<Element>();
  Element* const total = sums.mutable_data_ptr<Element>();
  const auto kernel = backward_kernel<Cell, Element>();
  share(parts, [&](int64_t worker, int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      Element* const sum = total + part * elements;
      std::fill(sum, sum + elements, Element(0));
      const int64_t first = tiles * part / parts * job.tile_rows;
      const int64_t last = std::min(tiles * (part + 1) / parts * job.tile_rows, job.batch);
      kernel(job, first, last, space + worker * each, sum);
    }
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < elements; ++i) total[i] += total[part * elements + i];
  return network.weight_gradients(total);
}

template <class Cell>
Backward backward(const char* op, const OutputGradients& grads, const Tensor& x,
                  const std::vector<Tensor>& weights, const MaybeTensor& h0, const MaybeTensor& c0,
                  double dropout, const MaybeTensor& seed, bool all_steps, const Tensor& gates,
                  const Tensor& carried, bool input_grad, bool state_grad) {
  check_floating(op, "x", x);
  Backward out;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    RecurrentNetwork<Cell, Element> network(op, x, weights, h0, c0, dropout, seed);
    network.prepare_backward(input_grad);
    auto& job = network.job;
    const int64_t L = job.layer_count, B = job.batch, T = job.steps, H = job.hidden;
    check_shaped(op, "gates", gates, x, {L, T, B, 4, H});
    check_shaped(op, "kept", carried, x, {L, T, B, H});
    const Tensor contiguous_gates = torch::stable::contiguous(gates),
                 contiguous_carried = torch::stable::contiguous(carried);
    job.gates = contiguous_gates.mutable_data_ptr<Element>(),
    job.carried = contiguous_carried.mutable_data_ptr<Element>();
    job.grad_h = network.state(op, "grad_h", grads.h, x),
    job.grad_c = network.state(op, "grad_c", grads.c, x);
    Tensor grad_output;
    if (grads.output && all_steps) {
      check_shaped(op, "grad_output", *grads.output, x, {B, T, H});
      grad_output = torch::stable::contiguous(*grads.output);
      job.grad_output = {grad_output.const_data_ptr<Element>(), grad_output.stride(0), grad_output.stride(1),
                         1};
    } else if (grads.output) {
      check_shaped(op, "grad_output", *grads.output, x, {B, H});
      grad_output = torch::stable::contiguous(*grads.output);
      job.grad_last = grad_output.const_data_ptr<Element>();
    }
    out.grad_x = empty(x, {input_grad ? B : 0, T, x.size(2)});
    out.grad_h = empty(x, {state_grad ? L : 0, B, H});
    out.grad_c = empty(x, {state_grad && Cell::kStates == 2 ? L : 0, B, H});
    if (input_grad) job.grad_x = out.grad_x.template mutable_data_ptr<Element>();
    if (state_grad) {
      job.grad_first_h = out.grad_h.template mutable_data_ptr<Element>();
      job.grad_first_c = out.grad_c.template mutable_data_ptr<Element>();
    }
    out.weights = run_backward(network, x);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> lstm_backward_cpu(
    MaybeTensor grad_output, MaybeTensor grad_h, MaybeTensor grad_c, const Tensor& x,
    std::vector<Tensor> weights, MaybeTensor h0, MaybeTensor c0, double dropout, MaybeTensor seed,
    bool all_steps, const Tensor& gates, const Tensor& kept, bool input_grad, bool state_grad) {
  const Backward out = backward<LstmCell>("lstm_backward", {grad_output, grad_h, grad_c}, x, weights, h0, c0,
                                          dropout, seed, all_steps, gates, kept, input_grad, state_grad);
  return {out.grad_x, out.grad_h, out.grad_c, out.weights};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> gru_backward_cpu(MaybeTensor grad_output, MaybeTensor grad_h,
                                                                 const Tensor& x, std::vector<Tensor> weights,
                                                                 MaybeTensor h0, double dropout,
                                                                 MaybeTensor seed, bool all_steps,
                                                                 const Tensor& gates, const Tensor& kept,
                                                                 bool input_grad, bool state_grad) {
  const Backward out = backward<GruCell>("gru_backward", {grad_output, grad_h, kNone}, x, weights, h0, kNone,
                                         dropout, seed, all_steps, gates, kept, input_grad, state_grad);
  return {out.grad_x, out.grad_h, out.weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CPU, m) {
  m.impl("lstm", TORCH_BOX(&lstm_cpu));
  m.impl("gru", TORCH_BOX(&gru_cpu));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward_cpu));
  m.impl("gru_backward", TORCH_BOX(&gru_backward_cpu));
}

}  // namespace qfast
