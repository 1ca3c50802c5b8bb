// Temporal convolution stacks on CUDA, forward and backward, over the positions that the wanted steps can see
// (docs/tcn.md, temporal_conv_plan.h). Has never run on a GPU: the kernels are checked by emulation on the
// host.
//
// Where a tile of 4 to 16 rows fits into shared memory with the activations of a block, and each
// convolution's weights into L1 beside it (T = 20, kernel 7, 5 x 32 channels: 95 KB for 16 rows, 28 KB of
// weights), a block of threads takes its tile through the whole stack in one launch. Otherwise every
// convolution is a launch over (tile of 64 rows, slot, channels), and activations pass through L2. The
// kernels are the same (temporal_conv_kernels.cuh).
//
// Forward: tables and packed weights, then the stack; bias, ReLU, dropout, the 1x1 convolution and the
// residual are part of the convolution that they follow. Backward: the gradients from block to block, as the
// forward by the taps turned round (a gather: each gradient is summed by one thread), then all weights'
// gradients in one launch, as sums over fixed parts of the (slot, row) pairs, and one that adds the parts in
// order in float64. No atomics; results repeat bit for bit. Nothing synchronises or copies from the host
// (tables are arguments of launches), and all memory is torch's, so a CUDA graph can capture a call.
//
// Kept for the backward: outputs of convolutions at cone positions (8 KB a row there; 87 KB for kernel 3, T =
// 60, 5 x 128 channels), and one bit an element of the second convolutions' outputs. The backward takes the
// gradients at the same positions beside it, and about 16 MB for sums in float32. What bounds it:
// multiply-adds by FFMA, one a tap and pair of channels in the forward, two more in the backward; loads
// through L1 come close behind. Unmeasured.
//
// Schemas: qfast/ops/temporal_conv.py. Order: checks, device guard, allocation, dispatch, launches.
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
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, dtype);
}

template <class T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// [B, T, C], or [B, C] for the last step alone.
template <class T>
Place<T> result_place(const Tensor& tensor, bool all_steps) {
  const int64_t channels = tensor.size(tensor.dim() - 1), steps = all_steps ? tensor.size(1) : 1;
  return in_memory(tensor.mutable_data_ptr<T>(), channels, steps * channels);
}

template <class T>
NetworkData<T> network_data(const char* op, const Tensor& x, const std::vector<BlockTensors>& tensors,
                            const std::vector<int64_t>& dilations, double dropout,
                            const std::optional<Tensor>& seed, bool all_steps) {
  NetworkData<T> network{};
  std::vector<int64_t> kernels;
  for (const BlockTensors& block : tensors) {
    kernels.push_back(block.kernel);
    BlockData<T> of{};
    of.first_weight = data<T>(block.first_weight);
    of.first_bias = data<T>(block.first_bias);
    of.second_weight = data<T>(block.second_weight);
    of.second_bias = data<T>(block.second_bias);
    of.beside_weight = data<T>(block.beside_weight);
    of.beside_bias = data<T>(block.beside_bias);
    of.features = block.features;
    of.channels = block.channels;
    of.kernel = block.kernel;
    network.blocks.push_back(of);
  }
  network.plans = plan_blocks(x.size(1), kernels, dilations, all_steps);
  network.batch = x.size(0);
  network.steps = x.size(1);
  // The kernels only read it.
  network.x = in_memory(const_cast<T*>(x.const_data_ptr<T>()), x.stride(1), x.stride(0), x.stride(2));
  network.dropout = device_dropout(op, "x", x, dropout, seed);
  return network;
}

std::tuple<Tensor, Tensor, Tensor> temporal_conv_net_cuda(const Tensor& x, std::vector<Tensor> weights,
                                                          std::vector<int64_t> dilations, double dropout,
                                                          std::optional<Tensor> seed, bool all_steps,
                                                          bool keep) {
  const char* op = "temporal_conv_net";
  check_cuda(op, "x", x);
  CudaDevice device(x);
  const std::vector<BlockTensors> tensors = cut_blocks(op, x, weights, dilations);
  const int64_t batch = x.size(0), kept = keep ? batch : 0, channels = tensors.back().channels;
  const Tensor output = all_steps ? room(x, {batch, x.size(1), channels}) : room(x, {batch, channels});
  Tensor activations, signs;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    NetworkData<T> network = network_data<T>(op, x, tensors, dilations, dropout, seed, all_steps);
    const auto [row_elements, row_signs] = kept_sizes(network);
    activations = room(x, {kept * row_elements});
    signs = room(x, {kept * row_signs}, ScalarType::Byte);
    if (batch == 0) return;
    network.output = result_place<T>(output, all_steps);
    network.activations = activations.mutable_data_ptr<T>();
    network.signs = signs.mutable_data_ptr<unsigned char>();
    Call<T, CudaDevice>(device, network).forward(keep);
  });
  return {output, activations, signs};
}

template <class T>
std::vector<Tensor> weight_gradients(const std::vector<BlockTensors>& tensors,
                                     std::vector<BlockData<T>>& blocks) {
  std::vector<Tensor> grads;
  const auto next = [&](const Tensor& like) {
    grads.push_back(torch::stable::empty_like(like));
    return grads.back().mutable_data_ptr<T>();
  };
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const BlockTensors& given = tensors[i];
    blocks[i].of_first_weight = next(given.first_weight);
    blocks[i].of_first_bias = next(given.first_bias);
    blocks[i].of_second_weight = next(given.second_weight);
    blocks[i].of_second_bias = next(given.second_bias);
    if (!given.beside_weight) continue;
    blocks[i].of_beside_weight = next(*given.beside_weight);
    blocks[i].of_beside_bias = next(*given.beside_bias);
  }
  return grads;
}

std::tuple<Tensor, std::vector<Tensor>> temporal_conv_net_backward_cuda(
    const Tensor& grad, const Tensor& x, std::vector<Tensor> weights, std::vector<int64_t> dilations,
    double dropout, std::optional<Tensor> seed, bool all_steps, const Tensor& output,
    const Tensor& activations, const Tensor& signs, bool input_grad) {
  const char* op = "temporal_conv_net_backward";
  check_cuda(op, "x", x);
  CudaDevice device(x);
  const std::vector<BlockTensors> tensors = cut_blocks(op, x, weights, dilations);
  const int64_t batch = x.size(0), channels = tensors.back().channels;
  const auto check = [&](const char* name, const Tensor& tensor) {
    bool fits = tensor.dim() == (all_steps ? 3 : 2) && tensor.scalar_type() == x.scalar_type() &&
                tensor.size(0) == batch && tensor.size(tensor.dim() - 1) == channels;
    fits = fits && (!all_steps || tensor.size(1) == x.size(1));
    QFAST_CHECK(fits, op, ": ", name, ": expected the shape and dtype of the output, got ",
                shape_text(tensor), ".");
    check_same_device(op, name, tensor, x, "x");
  };
  check("grad", grad);
  check("output", output);
  const Tensor held = torch::stable::contiguous(grad), result = torch::stable::contiguous(output);
  const Tensor states = torch::stable::contiguous(activations), bits = torch::stable::contiguous(signs);
  const Tensor grad_x = room(x, {input_grad ? batch : 0, x.size(1), x.size(2)});
  std::vector<Tensor> grads;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    NetworkData<T> network = network_data<T>(op, x, tensors, dilations, dropout, seed, all_steps);
    const auto [row_elements, row_signs] = kept_sizes(network);
    const bool fits = states.numel() == batch * row_elements && bits.numel() == batch * row_signs &&
                      states.scalar_type() == x.scalar_type() && bits.scalar_type() == ScalarType::Byte;
    QFAST_CHECK(fits, op, ": activations: expected those of a forward pass with keep, got ",
                shape_text(activations), ".");
    check_same_device(op, "activations", states, x, "x");
    check_same_device(op, "signs", bits, x, "x");
    network.output = result_place<T>(result, all_steps);
    network.grad = result_place<T>(held, all_steps);
    network.activations = states.mutable_data_ptr<T>();
    network.signs = bits.mutable_data_ptr<unsigned char>();
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
