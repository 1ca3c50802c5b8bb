// Stacked LSTM and GRU on CUDA, forward and backward.
//
// The forward pass runs layer by layer. One matrix product with W_ih covers all steps of all rows (torch's,
// cuBLAS). One launch then computes the steps: a thread block owns a tile of 4 to 16 rows, with its h in
// shared memory and W_hh in registers or shared memory if it fits (recurrent_kernels.cuh). The batch is
// processed in parts whose products fit into the L2 cache. In the first layer, windows of consecutive rows
// share their products.
//
// The backward pass runs from the last layer to the first. One launch computes the gradients of all gates
// [B, T, gates * H]. Products with these are the gradients of the weights and of the layer's input. Sums over
// rows use cuBLAS and torch's reductions, and our kernels use no atomics, so every sum has a fixed order.
// Results are reproducible bit for bit whenever those of cuBLAS are (one stream, or CUBLAS_WORKSPACE_CONFIG
// set).
//
// Nothing synchronizes or copies from the host, and torch allocates all memory, so a CUDA graph can capture a
// call. Bound by FFMA multiply-adds, or by the latency of a step if there are few rows (up to 4 per
// multiprocessor). These are estimates: the kernels have run on the CPU through an emulation only, not on a
// GPU. qfast/ops/recurrent.py contains the schemas.
#include <tuple>

#include "cuda_device.cuh"
#include "cuda_matrix.cuh"
#include "recurrent/recurrent_checks.h"
#include "recurrent/recurrent_launch.cuh"

namespace qfast {
namespace {

// Most bytes of the products of a part of the batch, small enough for the L2 cache of 50 MB of an H100. This
// comes from counting bytes, not from a measurement.
constexpr int64_t kProductBytes = 32 << 20;
// A multiple of all tile heights and of the groups of rows that share dropout words.
constexpr int64_t kPartStep = 16;

const MaybeTensor kNone;

template <class T>
const T* data(const MaybeTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// Returns a contiguous copy [L, B, H], or nothing.
MaybeTensor state(const char* op, const char* name, const MaybeTensor& tensor, const Tensor& x,
                  int64_t layers, int64_t hidden) {
  if (!tensor) return tensor;
  check_shaped(op, name, *tensor, x, {layers, x.size(0), hidden});
  return as_contiguous(*tensor);
}

// Returns the [B, H] of a layer, or null.
template <class T>
const T* of_layer(const MaybeTensor& states, int64_t layer) {
  return states ? states->const_data_ptr<T>() + layer * states->size(1) * states->size(2) : nullptr;
}

// Returns the data of a layer, or null for an empty tensor.
template <class T>
T* of_layer(const Tensor& states, int64_t layer) {
  return states.numel() == 0 ? nullptr
                             : states.mutable_data_ptr<T>() + layer * (states.numel() / states.size(0));
}

struct Network {
  std::vector<Tensor> weights;  // contiguous
  int64_t layers, batch, steps, hidden;
  Dropout dropout;
};

// Checks the arguments that both directions share.
template <class Cell>
Network checked(const char* op, const Tensor& x, const std::vector<Tensor>& weights, double dropout,
                const MaybeTensor& seed) {
  check_layers(op, x, weights, Cell::kGates);
  Network network{{}, static_cast<int64_t>(weights.size()) / 4, x.size(0), x.size(1), weights[1].size(1), {}};
  for (const Tensor& weight : weights) network.weights.push_back(as_contiguous(weight));
  network.dropout = device_dropout(op, "x", x, network.layers > 1 ? dropout : 0, seed);
  return network;
}

// ---------------------------------------------------------------- forward
struct Forward {
  Tensor output, last_h, last_c, gates, carried;
};

// Products of inputs with W_ih, and the tensor that owns their memory.
template <class T>
struct Products {
  Tensor saved;
  Steps<const T> steps;
};

// Returns whether the windows are consecutive rows, each shifted by one row.
bool rolls(const Tensor& x, int64_t rows) { return rows > 1 && x.size(1) > 1 && x.stride(0) == x.stride(1); }

// Multiplies all steps of the input with W_ih.
template <class T>
Products<T> input_products(const Tensor& input, const Tensor& weight) {
  const int64_t rows = input.size(0), steps = input.size(1), features = input.size(2), width = weight.size(0);
  const Tensor columns = turned(weight);
  if (!rolls(input, rows)) {
    const Tensor result = room(input, {rows * steps, width});
    multiply(result, as_matrix(input, rows * steps, features), columns);
    return {result, {result.const_data_ptr<T>(), steps * width, width}};
  }
  // Multiply each row once: the first step of every window, then the other steps of the last window.
  Tensor result = room(input, {rows + steps - 1, width}), last = torch::stable::select(input, 0, rows - 1);
  multiply(torch::stable::narrow(result, 0, 0, rows), torch::stable::select(input, 1, 0), columns);
  multiply(torch::stable::narrow(result, 0, rows, steps - 1), torch::stable::narrow(last, 0, 1, steps - 1),
           columns);
  return {result, {result.const_data_ptr<T>(), width, width}};
}

// Returns the number of rows of a part of the batch. A part is a whole number of waves, at least one, because
// multiprocessors that wait cost more than products that do not fit into L2.
template <class T>
int64_t part_rows(const Network& network, int64_t gates, int64_t rows_of_wave) {
  const int64_t row =
      std::max<int64_t>(1, network.steps) * gates * network.hidden * static_cast<int64_t>(sizeof(T));
  const int64_t wave = std::max(kPartStep, rows_of_wave / kPartStep * kPartStep);
  const int64_t waves = std::max<int64_t>(1, kProductBytes / row / wave);
  return rounded_up(std::min(waves * wave, network.batch), kPartStep);
}

template <class Cell, class T>
void run_forward(const char* op, CudaDevice& device, const Tensor& x, const Network& network,
                 const MaybeTensor& h0, const MaybeTensor& c0, bool all_steps, bool keep,
                 const Forward& out) {
  const int64_t L = network.layers, B = network.batch, steps = network.steps, H = network.hidden;
  if (B == 0) return;
  RecurrentLaunches<Cell, T, CudaDevice> launches(op, device, H, B);
  const int64_t part = part_rows<T>(network, Cell::kGates, launches.rows_of_wave());
  // The output of one layer and input of the next.
  Tensor between = room(x, {L > 1 ? std::min(part, B) : 0, steps, H});
  for (int64_t first = 0; first < B; first += part) {
    const int64_t rows = std::min(part, B - first);
    Tensor source = x;
    Tensor input = torch::stable::narrow(source, 0, first, rows);
    for (int64_t l = 0; l < L; ++l) {
      const Tensor* const weights = &network.weights[4 * l];
      const Products<T> products = input_products<T>(input, weights[0]);
      const bool last = l + 1 == L;
      ForwardLayer<T> layer{};
      layer.first_row = first;
      layer.end_row = first + rows;
      layer.batch = B;
      layer.steps = steps;
      layer.first_h = of_layer<T>(h0, l);
      layer.first_c = of_layer<T>(c0, l);
      layer.last_h = of_layer<T>(out.last_h, l);
      layer.last_c = of_layer<T>(out.last_c, l);
      if (keep) {
        layer.gates = of_layer<T>(out.gates, l);
        layer.carried = of_layer<T>(out.carried, l);
      }
      layer.products = products.steps;
      layer.number = static_cast<int32_t>(l);
      if (!last) {
        layer.dropout = network.dropout;
        layer.output = {between.mutable_data_ptr<T>(), steps * H, H};
        layer.output_row = first;
      } else if (all_steps) {
        layer.output = {out.output.mutable_data_ptr<T>(), steps * H, H};
      } else {
        layer.last_output = out.output.mutable_data_ptr<T>();
      }
      launches.forward(layer, weights[1].const_data_ptr<T>(), weights[2].const_data_ptr<T>(),
                       weights[3].const_data_ptr<T>());
      if (!last) input = torch::stable::narrow(between, 0, 0, rows);
    }
  }
}

template <class Cell>
Forward forward(const char* op, const Tensor& x, const std::vector<Tensor>& weights, const MaybeTensor& h0,
                const MaybeTensor& c0, double dropout, const MaybeTensor& seed, bool all_steps, bool keep) {
  check_cuda(op, "x", x);
  CudaDevice device(x);
  const Network network = checked<Cell>(op, x, weights, dropout, seed);
  const int64_t L = network.layers, B = network.batch, T = network.steps, H = network.hidden;
  const MaybeTensor first_h = state(op, "h0", h0, x, L, H), first_c = state(op, "c0", c0, x, L, H);
  const int64_t saved_steps = keep ? T : 0;
  const Forward out{all_steps ? room(x, {B, T, H}) : room(x, {B, H}), room(x, {L, B, H}),
                    room(x, {Cell::kStates == 2 ? L : 0, B, H}), room(x, {L, saved_steps, B, 4, H}),
                    room(x, {L, saved_steps, B, H})};
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    run_forward<Cell, decltype(zero)>(op, device, x, network, first_h, first_c, all_steps, keep, out);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_cuda(const Tensor& x, std::vector<Tensor> weights,
                                                             MaybeTensor h0, MaybeTensor c0, double dropout,
                                                             MaybeTensor seed, bool all_steps, bool keep,
                                                             int64_t /*precision*/) {
  const Forward out = forward<LstmCell>("lstm", x, weights, h0, c0, dropout, seed, all_steps, keep);
  return {out.output, out.last_h, out.last_c, out.gates, out.carried};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gru_cuda(const Tensor& x, std::vector<Tensor> weights,
                                                    MaybeTensor h0, double dropout, MaybeTensor seed,
                                                    bool all_steps, bool keep, int64_t /*precision*/) {
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

// Contiguous inputs of the backward pass. `output` is the gradient of the output, [B, T, H] if all_steps,
// else [B, H].
struct SavedInputs {
  Tensor gates, carried;
  MaybeTensor first_h, first_c, output, grad_h, grad_c;
  bool all_steps;
};

// Buffers for the gradients of one layer, and for the values between the layers.
struct Buffers {
  Tensor of_input, of_hidden;  // [B * T, gates * H], gradients of the products with W_ih and W_hh
  Tensor before, layer_input;  // [B * T, H], h of the previous step and input of the layer
  Tensor grad_output;          // [B * T, H], gradient of the layer's output
};

template <class Cell>
Buffers backward_buffers(const Tensor& x, const Network& network) {
  const int64_t rows = network.batch * network.steps, width = Cell::kGates * network.hidden;
  const int64_t between = network.layers > 1 ? rows : 0;
  Buffers buffers;
  buffers.of_input = room(x, {rows, width});
  buffers.of_hidden = Cell::kGates < 4 ? room(x, {rows, width}) : buffers.of_input;
  buffers.before = room(x, {rows, network.hidden});
  buffers.layer_input = room(x, {between, network.hidden});
  buffers.grad_output = room(x, {between, network.hidden});
  return buffers;
}

template <class Cell, class T>
BackwardLayer<T> backward_layer(const Network& network, const SavedInputs& saved, const Buffers& buffers,
                                const Backward& out, int64_t l) {
  const int64_t steps = network.steps, H = network.hidden;
  BackwardLayer<T> layer{};
  layer.end_row = layer.batch = network.batch;
  layer.steps = steps;
  layer.first_h = of_layer<T>(saved.first_h, l);
  layer.first_c = of_layer<T>(saved.first_c, l);
  layer.gates = of_layer<T>(saved.gates, l);
  layer.carried = of_layer<T>(saved.carried, l);
  layer.grad_h = of_layer<T>(saved.grad_h, l);
  layer.grad_c = of_layer<T>(saved.grad_c, l);
  layer.number = static_cast<int32_t>(l);
  if (l + 1 < network.layers) {
    layer.dropout = network.dropout;
    layer.grad_output = {buffers.grad_output.const_data_ptr<T>(), steps * H, H};
  } else if (saved.output && saved.all_steps) {
    layer.grad_output = {saved.output->const_data_ptr<T>(), steps * H, H};
  } else {
    layer.grad_last = data<T>(saved.output);
  }
  layer.of_input = buffers.of_input.mutable_data_ptr<T>();
  layer.of_hidden = buffers.of_hidden.mutable_data_ptr<T>();
  layer.before = buffers.before.mutable_data_ptr<T>();
  layer.of_first_h = of_layer<T>(out.grad_h, l);
  layer.of_first_c = of_layer<T>(out.grad_c, l);
  return layer;
}

template <class Cell, class T>
void run_backward(const char* op, CudaDevice& device, const Tensor& x, const Network& network,
                  const SavedInputs& saved, bool input_grad, Backward& out) {
  const int64_t B = network.batch, H = network.hidden, rows = B * network.steps;
  RecurrentLaunches<Cell, T, CudaDevice> launches(op, device, H, B);
  const Buffers buffers = backward_buffers<Cell>(x, network);
  for (const Tensor& weight : network.weights) out.weights.push_back(new_tensor_like(weight));
  for (int64_t l = network.layers - 1; l >= 0; --l) {
    const Tensor *const weights = &network.weights[4 * l], *const grads = &out.weights[4 * l];
    if (B > 0)
      launches.backward(backward_layer<Cell, T>(network, saved, buffers, out, l),
                        weights[1].const_data_ptr<T>());
    if (l > 0 && rows > 0)
      launches.output({of_layer<T>(saved.gates, l - 1), of_layer<T>(saved.carried, l - 1),
                       buffers.layer_input.mutable_data_ptr<T>(), B, network.steps, H, network.dropout,
                       static_cast<int32_t>(l - 1)});
    multiply(grads[0], turned(buffers.of_input), l > 0 ? buffers.layer_input : as_matrix(x, rows, x.size(2)));
    multiply(grads[1], turned(buffers.of_hidden), buffers.before);
    Tensor of_bias_ih = grads[2], of_bias_hh = grads[3];
    sum_rows(of_bias_ih, buffers.of_input);
    if constexpr (Cell::kGates < 4) {
      sum_rows(of_bias_hh, buffers.of_hidden);
    } else {  // of_hidden is of_input
      torch::stable::copy_(of_bias_hh, of_bias_ih);
    }
    if (l > 0) multiply(buffers.grad_output, buffers.of_input, weights[0]);
  }
  if (input_grad) multiply(as_matrix(out.grad_x, rows, x.size(2)), buffers.of_input, network.weights[0]);
}

template <class Cell>
Backward backward(const char* op, const OutputGradients& grads, const Tensor& x,
                  const std::vector<Tensor>& weights, const MaybeTensor& h0, const MaybeTensor& c0,
                  double dropout, const MaybeTensor& seed, bool all_steps, const Tensor& gates,
                  const Tensor& carried, bool input_grad, bool state_grad) {
  check_cuda(op, "x", x);
  CudaDevice device(x);
  const Network network = checked<Cell>(op, x, weights, dropout, seed);
  const int64_t L = network.layers, B = network.batch, T = network.steps, H = network.hidden;
  check_shaped(op, "gates", gates, x, {L, T, B, 4, H});
  check_shaped(op, "kept", carried, x, {L, T, B, H});
  SavedInputs saved{as_contiguous(gates),
                    as_contiguous(carried),
                    state(op, "h0", h0, x, L, H),
                    state(op, "c0", c0, x, L, H),
                    std::nullopt,
                    state(op, "grad_h", grads.h, x, L, H),
                    state(op, "grad_c", grads.c, x, L, H),
                    all_steps};
  if (grads.output && all_steps) check_shaped(op, "grad_output", *grads.output, x, {B, T, H});
  if (grads.output && !all_steps) check_shaped(op, "grad_output", *grads.output, x, {B, H});
  if (grads.output) saved.output = as_contiguous(*grads.output);
  Backward out{room(x, {input_grad ? B : 0, T, x.size(2)}),
               room(x, {state_grad ? L : 0, B, H}),
               room(x, {state_grad && Cell::kStates == 2 ? L : 0, B, H}),
               {}};
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    run_backward<Cell, decltype(zero)>(op, device, x, network, saved, input_grad, out);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> lstm_backward_cuda(
    MaybeTensor grad_output, MaybeTensor grad_h, MaybeTensor grad_c, const Tensor& x,
    std::vector<Tensor> weights, MaybeTensor h0, MaybeTensor c0, double dropout, MaybeTensor seed,
    bool all_steps, const Tensor& gates, const Tensor& kept, bool input_grad, bool state_grad,
    int64_t /*precision*/) {
  const Backward out = backward<LstmCell>("lstm_backward", {grad_output, grad_h, grad_c}, x, weights, h0, c0,
                                          dropout, seed, all_steps, gates, kept, input_grad, state_grad);
  return {out.grad_x, out.grad_h, out.grad_c, out.weights};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> gru_backward_cuda(
    MaybeTensor grad_output, MaybeTensor grad_h, const Tensor& x, std::vector<Tensor> weights, MaybeTensor h0,
    double dropout, MaybeTensor seed, bool all_steps, const Tensor& gates, const Tensor& kept,
    bool input_grad, bool state_grad, int64_t /*precision*/) {
  const Backward out = backward<GruCell>("gru_backward", {grad_output, grad_h, kNone}, x, weights, h0, kNone,
                                         dropout, seed, all_steps, gates, kept, input_grad, state_grad);
  return {out.grad_x, out.grad_h, out.weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CUDA, m) {
  m.impl("lstm", TORCH_BOX(&lstm_cuda));
  m.impl("gru", TORCH_BOX(&gru_cuda));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward_cuda));
  m.impl("gru_backward", TORCH_BOX(&gru_backward_cuda));
}

}  // namespace qfast
