// Temporal convolution stacks on CUDA, forward and backward, at the positions that the requested steps depend
// on (docs/tcn.md, temporal_conv_plan.h).
//
// If a tile of 4 to 16 rows with the activations of a block fits into shared memory, and each convolution's
// weights fit into L1 at the same time (T = 20, kernel 7, 5 x 32 channels: 95 KB for 16 rows, 28 KB of
// weights), one launch computes the whole stack and a thread block owns a tile. Otherwise every convolution
// is a launch over (tile of 64 rows, slot, channels), and activations go through L2. Both use the same
// kernels (temporal_conv_kernels.cuh).
//
// Forward: tables and packed weights, which are normalized when they are packed, then the stack. Bias, ReLU,
// dropout, the 1x1 convolution and the residual are part of the convolution that they follow. Backward: the
// gradients of the activations from block to block, with the taps reversed. This is a gather, in which one
// thread sums each gradient. Then one launch computes all weight gradients as sums over fixed parts of the
// (slot, row) pairs, and another adds the parts in order in float64 and computes the gradients of the
// normalization. There are no atomics, and results repeat bit for bit. Nothing synchronizes or copies from
// the host (tables are kernel arguments), and torch allocates all memory, so a CUDA graph can capture a call.
//
// Saved for backward: outputs of convolutions at positions of the cone (8 KB per row for the sizes above; 87
// KB for kernel 3, T = 60, 5 x 128 channels), and one bit per element of the output of the second
// convolutions. Backward also needs gradients at the same positions and about 16 MB of sums in float32. Bound
// by FFMA multiply-adds, one per tap and pair of channels in the forward pass and two more in the backward
// pass, closely followed by loads through L1. These are estimates: the kernels have run on the CPU through an
// emulation only, not on a GPU.
//
// qfast/ops/temporal_conv.py contains the schemas. Every function has the same order: checks, device guard,
// allocation, dispatch, launches.
#include <optional>
#include <tuple>
#include <vector>

#include "cuda_device.cuh"
#include "temporal_conv/temporal_conv_launch.cuh"
#include "temporal_conv/temporal_conv_pack.h"

namespace qfast {
namespace {

Tensor room(const Tensor& like, std::initializer_list<int64_t> shape,
            std::optional<ScalarType> dtype = std::nullopt) {
  return new_tensor(like, {shape.begin(), shape.size()}, dtype);
}

template <class T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// Returns the addresses of the parameters of a convolution.
template <class T>
Convolution<T> parameters(const std::optional<Tensor>& weight, const std::optional<Tensor>& gain,
                          const std::optional<Tensor>& bias) {
  return {data<T>(weight), data<T>(gain), data<T>(bias), nullptr, nullptr, nullptr};
}

// Location of a result [B, T, C], or [B, C] for the last step only.
template <class T>
Place<T> result_place(const Tensor& tensor, bool all_steps) {
  const int64_t channels = tensor.size(tensor.dim() - 1), steps = all_steps ? tensor.size(1) : 1;
  return in_memory(tensor.mutable_data_ptr<T>(), channels, steps * channels);
}

// Returns the network without its buffers.
template <class T>
NetworkData<T> network_data(const char* op, const Tensor& x, const std::vector<BlockTensors>& tensors,
                            const std::vector<int64_t>& dilations, double dropout,
                            const std::optional<Tensor>& seed, bool all_steps) {
  NetworkData<T> network{};
  std::vector<int64_t> kernels;
  for (const BlockTensors& block : tensors) {
    kernels.push_back(block.kernel);
    BlockData<T> data_of_block{};
    data_of_block.first = parameters<T>(block.first_weight, block.first_gain, block.first_bias);
    data_of_block.second = parameters<T>(block.second_weight, block.second_gain, block.second_bias);
    data_of_block.residual = parameters<T>(block.residual_weight, {}, block.residual_bias);
    data_of_block.features = block.features;
    data_of_block.channels = block.channels;
    data_of_block.kernel = block.kernel;
    network.blocks.push_back(data_of_block);
  }
  network.plans = plan_blocks(x.size(1), kernels, dilations, all_steps);
  network.batch = x.size(0);
  network.steps = x.size(1);
  // The kernels do not write x, so the const_cast is safe.
  network.x = in_memory(const_cast<T*>(x.const_data_ptr<T>()), x.stride(1), x.stride(0), x.stride(2));
  network.dropout = device_dropout(op, "x", x, dropout, seed);
  return network;
}

std::tuple<Tensor, Tensor, Tensor> temporal_conv_net_cuda(const Tensor& x, std::vector<Tensor> weights,
                                                          std::vector<int64_t> dilations, double dropout,
                                                          std::optional<Tensor> seed, bool all_steps,
                                                          bool keep, int64_t /*precision*/) {
  const char* op = "temporal_conv_net";
  check_cuda(op, "x", x);
  CudaDevice device(x);
  const std::vector<BlockTensors> tensors = cut_blocks(op, x, weights, dilations);
  const int64_t batch = x.size(0), saved_rows = keep ? batch : 0, channels = tensors.back().channels;
  const Tensor output = all_steps ? room(x, {batch, x.size(1), channels}) : room(x, {batch, channels});
  Tensor activations, signs;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    NetworkData<T> network = network_data<T>(op, x, tensors, dilations, dropout, seed, all_steps);
    const auto [row_elements, row_signs] = saved_sizes(network);
    activations = room(x, {saved_rows * row_elements});
    signs = room(x, {saved_rows * row_signs}, ScalarType::Byte);
    if (batch == 0) return;
    network.output = result_place<T>(output, all_steps);
    network.activations = activations.mutable_data_ptr<T>();
    network.signs = signs.mutable_data_ptr<unsigned char>();
    Call<T, CudaDevice>(device, network).forward(keep);
  });
  return {output, activations, signs};
}

// Allocates the gradients of all weights and stores their addresses in the blocks.
template <class T>
std::vector<Tensor> weight_gradients(const std::vector<BlockTensors>& tensors,
                                     std::vector<BlockData<T>>& blocks) {
  std::vector<Tensor> grads;
  const auto next = [&](const Tensor& like) {
    grads.push_back(new_tensor_like(like));
    return grads.back().mutable_data_ptr<T>();
  };
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const BlockTensors& block = tensors[i];
    blocks[i].first.of_weight = next(block.first_weight);
    blocks[i].first.of_bias = next(block.first_bias);
    blocks[i].second.of_weight = next(block.second_weight);
    blocks[i].second.of_bias = next(block.second_bias);
    if (!block.residual_weight) continue;
    blocks[i].residual.of_weight = next(*block.residual_weight);
    blocks[i].residual.of_bias = next(*block.residual_bias);
  }
  for (std::size_t i = 0; i < tensors.size() && tensors[i].first_gain; ++i) {
    blocks[i].first.of_gain = next(*tensors[i].first_gain);
    blocks[i].second.of_gain = next(*tensors[i].second_gain);
  }
  return grads;
}

std::tuple<Tensor, std::vector<Tensor>> temporal_conv_net_backward_cuda(
    const Tensor& grad, const Tensor& x, std::vector<Tensor> weights, std::vector<int64_t> dilations,
    double dropout, std::optional<Tensor> seed, bool all_steps, const Tensor& output,
    const Tensor& activations, const Tensor& signs, bool input_grad, int64_t /*precision*/) {
  const char* op = "temporal_conv_net_backward";
  check_cuda(op, "x", x);
  CudaDevice device(x);
  const std::vector<BlockTensors> tensors = cut_blocks(op, x, weights, dilations);
  const int64_t batch = x.size(0), channels = tensors.back().channels;
  const auto check = [&](const char* name, const Tensor& tensor) {
    bool fits = tensor.dim() == (all_steps ? 3 : 2) && tensor.scalar_type() == x.scalar_type() &&
                tensor.size(0) == batch && tensor.size(tensor.dim() - 1) == channels;
    fits = fits && (!all_steps || tensor.size(1) == x.size(1));
    QFAST_CHECK(fits, op, ": ", name, ": expected the shape and dtype of the output, (", batch,
                all_steps ? ", T, " : ", ", channels, ") and the dtype of x, got ", shape_text(tensor),
                " of ", torch::headeronly::toString(tensor.scalar_type()), ".");
    check_same_device(op, name, tensor, x, "x");
  };
  check("grad", grad);
  check("output", output);
  const Tensor contiguous_grad = as_contiguous(grad), contiguous_output = as_contiguous(output);
  const Tensor states = as_contiguous(activations), sign_bits = as_contiguous(signs);
  const Tensor grad_x = room(x, {input_grad ? batch : 0, x.size(1), x.size(2)});
  std::vector<Tensor> grads;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    NetworkData<T> network = network_data<T>(op, x, tensors, dilations, dropout, seed, all_steps);
    const auto [row_elements, row_signs] = saved_sizes(network);
    const bool fits = states.numel() == batch * row_elements && sign_bits.numel() == batch * row_signs &&
                      states.scalar_type() == x.scalar_type() && sign_bits.scalar_type() == ScalarType::Byte;
    QFAST_CHECK(fits, op, ": activations: expected those of a forward pass with keep, of shape (",
                batch * row_elements, ",) and signs of shape (", batch * row_signs, ",), got ",
                shape_text(activations), " and ", shape_text(signs), ".");
    check_same_device(op, "activations", states, x, "x");
    check_same_device(op, "signs", sign_bits, x, "x");
    network.output = result_place<T>(contiguous_output, all_steps);
    network.grad = result_place<T>(contiguous_grad, all_steps);
    network.activations = states.mutable_data_ptr<T>();
    network.signs = sign_bits.mutable_data_ptr<unsigned char>();
    if (input_grad)
      network.grad_x = in_memory(grad_x.mutable_data_ptr<T>(), x.size(2), x.size(1) * x.size(2));
    grads = weight_gradients<T>(tensors, network.blocks);
    Call<T, CudaDevice>(device, network).backward();
  });
  return {grad_x, grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CUDA, m) {
  m.impl("temporal_conv_net", TORCH_BOX(&temporal_conv_net_cuda));
  m.impl("temporal_conv_net_backward", TORCH_BOX(&temporal_conv_net_backward_cuda));
}

}  // namespace qfast
