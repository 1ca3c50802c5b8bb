// Stacked LSTM and GRU on the CPU: checks, buffers and threads. qfast/ops/recurrent.py contains the schemas,
// recurrent_cell.h the cells, recurrent_kernels.h and recurrent_kernels_backward.h the kernels.
#include "recurrent/recurrent.h"

#include <cstring>
#include <tuple>

#include "cpu_bf16.h"
#include "cpu_workers.h"
#include "recurrent/recurrent_pack.h"

namespace qfast {
namespace {

using host::GruCell;
using host::LstmCell;

// Saved values of this size evict everything else from the caches.
constexpr int64_t kStreamedBytes = 8 << 20;

template <class Cell>
constexpr bool kIsLstm = std::is_same_v<Cell, LstmCell>;

const MaybeTensor kNone;

// The arguments that the forward and the backward pass share. A GRU has no c0.
struct Inputs {
  const char* op;
  const Tensor& x;
  const std::vector<Tensor>& weights;
  const MaybeTensor &h0, &c0;
  double dropout;
  const MaybeTensor& seed;
  bool all_steps;
  int64_t precision;

  template <class Cell, class Element>
  RecurrentNetwork<Cell, Element> network() const {
    return {op, x, weights, h0, c0, dropout, seed};
  }
};

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

// Divides the batch into equal shares for the threads, and each share into tiles. A piece is a tile, or
// several if there are many. With bfloat16 operands it is a whole share, because each piece packs the
// weights.
template <class Cell, class Element>
void run_forward(RecurrentNetwork<Cell, Element>& network, const Tensor& like, bool rolling,
                 const Inputs& inputs) {
  const auto& kernels = product_kernels<Element>(inputs.op, inputs.precision);
  auto& job = network.job;
  const int64_t units = (job.batch + kRecurrentRowStep - 1) / kRecurrentRowStep,
                workers = worker_count(units);
  const int64_t share = (units + workers - 1) / workers;
  job.tile_rows = even_tile_rows(share * kRecurrentRowStep);
  network.prepare_forward(rolling, inputs.precision == kBf16);
  const int64_t tile = job.tile_rows / kRecurrentRowStep;
  const int64_t piece =
      inputs.precision == kBf16 ? share : std::max<int64_t>(1, share / tile / kPieces) * tile;
  const auto kernel = kIsLstm<Cell> ? kernels.lstm_forward : kernels.gru_forward;
  share_with_scratch<Element>(
      like, units, {network.scratch_elements},
      [&](int64_t begin, int64_t end, Element* scratch) {
        kernel(job, begin * kRecurrentRowStep, std::min(end * kRecurrentRowStep, job.batch), scratch);
      },
      piece);
}

template <class Cell>
Forward forward(const Inputs& inputs, bool keep) {
  const Tensor& x = inputs.x;
  check_floating(inputs.op, "x", x);
  Forward out;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    auto network = inputs.network<Cell, Element>();
    auto& job = network.job;
    const int64_t L = job.layer_count, B = job.batch, T = job.steps, H = job.hidden,
                  saved_steps = keep ? T : 0;
    out.last_h = empty(x, {L, B, H});
    out.last_c = empty(x, {Cell::kStates == 2 ? L : 0, B, H});
    out.gates = saved_tensor(x, {L, saved_steps, B, 4, H});
    out.carried = saved_tensor(x, {L, saved_steps, B, H});
    out.output = !inputs.all_steps ? empty(x, {B, H})
                 : keep            ? saved_tensor(x, {B, T, H})
                                   : empty(x, {B, T, H});
    job.last_h = out.last_h.template mutable_data_ptr<Element>();
    job.last_c = out.last_c.template mutable_data_ptr<Element>();
    if (inputs.all_steps) job.output = sequence_of<Element>(out.output);
    if (keep) {
      job.gates = out.gates.template mutable_data_ptr<Element>();
      job.carried = out.carried.template mutable_data_ptr<Element>();
      job.streamed = streams(job);
    }
    run_forward(network, x, rolls(x, keep, job.dropout.active), inputs);
    if (!inputs.all_steps && B > 0)
      std::memcpy(out.output.mutable_data_ptr(), job.last_h + (L - 1) * B * H, sizeof(Element) * B * H);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_cpu(const Tensor& x, std::vector<Tensor> weights,
                                                            MaybeTensor h0, MaybeTensor c0, double dropout,
                                                            MaybeTensor seed, bool all_steps, bool keep,
                                                            int64_t precision) {
  const Forward out =
      forward<LstmCell>({"lstm", x, weights, h0, c0, dropout, seed, all_steps, precision}, keep);
  return {out.output, out.last_h, out.last_c, out.gates, out.carried};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gru_cpu(const Tensor& x, std::vector<Tensor> weights,
                                                   MaybeTensor h0, double dropout, MaybeTensor seed,
                                                   bool all_steps, bool keep, int64_t precision) {
  const Forward out =
      forward<GruCell>({"gru", x, weights, h0, kNone, dropout, seed, all_steps, precision}, keep);
  return {out.output, out.last_h, out.gates, out.carried};
}

// ---------------------------------------------------------------- backward
// The other arguments of the backward pass: the gradients of the results, what the forward pass saved, and
// which gradients are requested in addition to the gradients of the weights.
struct Results {
  const MaybeTensor &grad_output, &grad_h, &grad_c;
  const Tensor &gates, &carried;
  bool input_grad, state_grad;
};

struct Backward {
  Tensor grad_x, grad_h, grad_c;
  std::vector<Tensor> weights;
};

template <class Cell, class Element>
std::vector<Tensor> run_backward(RecurrentNetwork<Cell, Element>& network, const Tensor& like,
                                 const ProductKernels<Element>& kernels) {
  const auto& job = network.job;
  const int64_t parts = gradient_parts(job.batch);
  const auto kernel = kIsLstm<Cell> ? kernels.lstm_backward : kernels.gru_backward;
  const Buffer<Element> sums = sum_in_parts<Element>(
      like, job.batch == 0 ? 0 : parts, {network.scratch_elements}, network.sum_elements,
      [&](int64_t begin, int64_t end, Element* scratch, Element* part) {
        kernel(job, part_begin(job.batch, begin, parts), part_begin(job.batch, end, parts), scratch, part);
      },
      job.steps > 0);
  return network.weight_gradients(sums.data());
}

template <class Cell>
Backward backward(const Inputs& inputs, const Results& results) {
  const char* const op = inputs.op;
  const Tensor& x = inputs.x;
  check_floating(op, "x", x);
  Backward out;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    auto network = inputs.network<Cell, Element>();
    network.prepare_backward(results.input_grad, results.state_grad, inputs.precision == kBf16);
    auto& job = network.job;
    const int64_t L = job.layer_count, B = job.batch, T = job.steps, H = job.hidden;
    check_shaped(op, "gates", results.gates, x, {L, T, B, 4, H});
    check_shaped(op, "kept", results.carried, x, {L, T, B, H});
    const Tensor contiguous_gates = as_contiguous(results.gates),
                 contiguous_carried = as_contiguous(results.carried);
    job.gates = contiguous_gates.mutable_data_ptr<Element>();
    job.carried = contiguous_carried.mutable_data_ptr<Element>();
    job.grad_h = network.state(op, "grad_h", results.grad_h, x);
    job.grad_c = network.state(op, "grad_c", results.grad_c, x);
    Tensor grad_output;
    if (results.grad_output && inputs.all_steps) {
      check_shaped(op, "grad_output", *results.grad_output, x, {B, T, H});
      grad_output = as_contiguous(*results.grad_output);
      job.grad_output = {grad_output.const_data_ptr<Element>(), grad_output.stride(0), grad_output.stride(1),
                         1};
    } else if (results.grad_output) {
      check_shaped(op, "grad_output", *results.grad_output, x, {B, H});
      grad_output = as_contiguous(*results.grad_output);
      job.grad_last = grad_output.const_data_ptr<Element>();
    }
    out.grad_x = saved_tensor(x, {results.input_grad ? B : 0, T, x.size(2)});
    out.grad_h = empty(x, {results.state_grad ? L : 0, B, H});
    out.grad_c = empty(x, {results.state_grad && Cell::kStates == 2 ? L : 0, B, H});
    if (results.input_grad) job.grad_x = out.grad_x.template mutable_data_ptr<Element>();
    if (results.state_grad) {
      job.grad_first_h = out.grad_h.template mutable_data_ptr<Element>();
      job.grad_first_c = out.grad_c.template mutable_data_ptr<Element>();
    }
    out.weights = run_backward(network, x, product_kernels<Element>(inputs.op, inputs.precision));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> lstm_backward_cpu(
    MaybeTensor grad_output, MaybeTensor grad_h, MaybeTensor grad_c, const Tensor& x,
    std::vector<Tensor> weights, MaybeTensor h0, MaybeTensor c0, double dropout, MaybeTensor seed,
    bool all_steps, const Tensor& gates, const Tensor& kept, bool input_grad, bool state_grad,
    int64_t precision) {
  const Backward out =
      backward<LstmCell>({"lstm_backward", x, weights, h0, c0, dropout, seed, all_steps, precision},
                         {grad_output, grad_h, grad_c, gates, kept, input_grad, state_grad});
  return {out.grad_x, out.grad_h, out.grad_c, out.weights};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> gru_backward_cpu(
    MaybeTensor grad_output, MaybeTensor grad_h, const Tensor& x, std::vector<Tensor> weights, MaybeTensor h0,
    double dropout, MaybeTensor seed, bool all_steps, const Tensor& gates, const Tensor& kept,
    bool input_grad, bool state_grad, int64_t precision) {
  const Backward out =
      backward<GruCell>({"gru_backward", x, weights, h0, kNone, dropout, seed, all_steps, precision},
                        {grad_output, grad_h, kNone, gates, kept, input_grad, state_grad});
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
