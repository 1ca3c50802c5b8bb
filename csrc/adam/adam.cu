// One step of Adam with clipped gradients on CUDA, for all tensors of a network.
//
// One launch updates up to kMostTensors tensors. Pointers, sizes and the table that maps blocks to tensors
// are kernel parameters, so nothing is copied to the device. A block owns kChunk elements of one tensor and
// reads, computes and writes each of them once. A gradient is written only if it was clipped, in units of 16
// bytes. Nothing is saved.
//
// The step counters are on the device, one float per tensor. A block reads its counter, adds 1 for
// itself and then draws a ticket. The block with the last ticket knows that all blocks have read their
// counters, and increments them. The ticket counter is 0 again after a launch. No synchronization is needed,
// no two blocks race, and a CUDA graph can capture the call: each replay is another step.
//
// The order of operations matches torch's fused Adam on CUDA (fused_adam_utils.cuh), which computes the bias
// corrections 1 - beta^step in double. Here the host passes log(beta) and 1 - beta, each rounded once, and
// the corrections are -expm1(step log(beta)), which loses no digits in float32. Bound by bytes: 16 read and
// 12 written per float32 parameter, with about 15 operations, two of them divisions and one a square root,
// and two exponentials per block. Networks with fewer than about 100,000 parameters are bound by the launch.
// These are estimates: the kernel has run on the CPU through an emulation only, not on a GPU.
#include "adam/adam_checks.h"
#include "cuda_device.cuh"

namespace qfast {
namespace {

constexpr int kThreads = 256;
constexpr int kRounds = 2;        // packs of 16 bytes per thread
constexpr int kMostTensors = 76;  // so the table and the settings fit into 4 KB of kernel parameters

template <class Element>
struct alignas(16) Pack {
  static constexpr int kCount = 16 / sizeof(Element);
  Element lane[kCount];
};

template <class Element>
constexpr int64_t kChunk = int64_t{kThreads} * kRounds * Pack<Element>::kCount;

template <class Element>
struct AdamTable {
  AdamTensor<Element> tensors[kMostTensors];
  float* steps[kMostTensors];
  unsigned int
      first_block[kMostTensors + 1];  // of each tensor; the last entry is the number of blocks of the launch
  int count;
  Element lr;
  AdamSettings<Element> settings;
  unsigned int* ticket;
};
static_assert(sizeof(AdamTable<double>) <= 4096, "every architecture accepts 4 KB of kernel parameters");

// Returns the tensor that a block updates.
template <class Element>
__device__ __forceinline__ int tensor_of_block(const AdamTable<Element>& table, unsigned int block) {
  int low = 0, high = table.count;  // first_block[low] <= block < first_block[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Reads the pack that begins at element i, of which `remaining` elements exist. `wide` means that all of them
// exist and the address is a multiple of 16 bytes.
template <class Element>
__device__ __forceinline__ Pack<Element> read_pack(const Element* from, int64_t i, int64_t remaining,
                                                   bool wide) {
  if (wide) return *reinterpret_cast<const Pack<Element>*>(from + i);
  Pack<Element> pack{};
#pragma unroll
  for (int lane = 0; lane < Pack<Element>::kCount; ++lane) {
    if (lane < remaining) pack.lane[lane] = from[i + lane];
  }
  return pack;
}

// Writes the pack that begins at element i.
template <class Element>
__device__ __forceinline__ void write_pack(Element* to, int64_t i, int64_t remaining, bool wide,
                                           const Pack<Element>& pack) {
  if (wide) {
    *reinterpret_cast<Pack<Element>*>(to + i) = pack;
    return;
  }
#pragma unroll
  for (int lane = 0; lane < Pack<Element>::kCount; ++lane) {
    if (lane < remaining) to[i + lane] = pack.lane[lane];
  }
}

// Limits the gradient to [-limit, limit] and returns whether any element changed. NaN is kept, because
// comparisons with it are false.
template <class Element>
__device__ __forceinline__ bool clip(Pack<Element>& gradient, Element limit) {
  bool clipped = false;
#pragma unroll
  for (int lane = 0; lane < Pack<Element>::kCount; ++lane) {
    Element& g = gradient.lane[lane];
    clipped |= g > limit || g < -limit;
    g = g > limit ? limit : g < -limit ? -limit : g;
  }
  return clipped;
}

// Updates one element, in torch's order of operations.
template <class Element>
__device__ __forceinline__ void adam_element(Element& parameter, Element gradient, Element& mean,
                                             Element& square, const AdamSettings<Element>& settings,
                                             const AdamCorrection<Element>& correction) {
  if (settings.weight_decay != 0) gradient += parameter * settings.weight_decay;
  mean = fma(settings.beta1, mean, settings.rest1 * gradient);
  square = fma(settings.beta2, square, settings.rest2 * gradient * gradient);
  const Element denominator = sqrt(square) / correction.root + settings.eps;
  parameter -= correction.step_size * mean / denominator;
}

// A block updates kChunk elements of one tensor, a thread kRounds packs of them.
template <class Element>
__global__ void __launch_bounds__(kThreads, 4) clipped_adam_kernel(const AdamTable<Element> table) {
  __shared__ AdamCorrection<Element> shared_correction;
  __shared__ bool is_last_block;
  const int number = tensor_of_block(table, blockIdx.x);
  const AdamSettings<Element>& settings = table.settings;
  if (threadIdx.x == 0) {
    const Element step = static_cast<Element>(*static_cast<volatile const float*>(table.steps[number]) + 1);
    __threadfence();  // read the counter before taking the ticket
    is_last_block = atomicInc(table.ticket, gridDim.x - 1) == gridDim.x - 1;
    shared_correction.step_size = table.lr / -expm1(step * settings.log1);
    shared_correction.root = sqrt(-expm1(step * settings.log2));
  }
  __syncthreads();
  if (is_last_block) {
    for (int i = threadIdx.x; i < table.count; i += kThreads) *table.steps[i] += 1;
  }
  const AdamCorrection<Element> correction = shared_correction;
  const AdamTensor<Element> tensor = table.tensors[number];
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(tensor.parameter) | reinterpret_cast<uintptr_t>(tensor.gradient) |
      reinterpret_cast<uintptr_t>(tensor.exp_avg) | reinterpret_cast<uintptr_t>(tensor.exp_avg_sq);
  constexpr int kLanes = Pack<Element>::kCount;
  const int64_t begin = (blockIdx.x - table.first_block[number]) * kChunk<Element>;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t i = begin + (round * kThreads + static_cast<int>(threadIdx.x)) * kLanes;
    const int64_t remaining = tensor.count - i;
    if (remaining <= 0) break;
    const bool wide = addresses % 16 == 0 && remaining >= kLanes;
    Pack<Element> parameter = read_pack(tensor.parameter, i, remaining, wide);
    Pack<Element> gradient = read_pack(tensor.gradient, i, remaining, wide);
    Pack<Element> mean = read_pack(tensor.exp_avg, i, remaining, wide);
    Pack<Element> square = read_pack(tensor.exp_avg_sq, i, remaining, wide);
    if (clip(gradient, settings.limit)) write_pack(tensor.gradient, i, remaining, wide, gradient);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      adam_element(parameter.lane[lane], gradient.lane[lane], mean.lane[lane], square.lane[lane], settings,
                   correction);
    }
    write_pack(tensor.exp_avg, i, remaining, wide, mean);
    write_pack(tensor.exp_avg_sq, i, remaining, wide, square);
    write_pack(tensor.parameter, i, remaining, wide, parameter);
  }
}

// Updates the tensors [first, first + table.count). A tensor without elements also gets a block, so a launch
// always has a block that increments the step counters.
template <class Element>
void launch_adam(CudaDevice& device, const AdamLists& lists, size_t first, AdamTable<Element>& table) {
  std::vector<AdamQuartet> quartets;
  quartets.reserve(static_cast<size_t>(table.count));
  int64_t blocks = 0;
  for (int i = 0; i < table.count; ++i) {
    quartets.emplace_back(lists, first + static_cast<size_t>(i));
    table.tensors[i] = quartets.back().template pointers<Element>();
    table.steps[i] = lists.steps[first + static_cast<size_t>(i)].mutable_data_ptr<float>();
    table.first_block[i] = static_cast<unsigned int>(blocks);
    blocks += std::max<int64_t>(1, (table.tensors[i].count + kChunk<Element> - 1) / kChunk<Element>);
  }
  QFAST_CHECK(blocks < int64_t{1} << 31, kAdam, ": parameters: expected at most ",
              ((int64_t{1} << 31) - 1) * kChunk<Element>, " elements in one launch, got ", blocks,
              " blocks of ", kChunk<Element>, ". Remedy: several parameter groups.");
  table.first_block[table.count] = static_cast<unsigned int>(blocks);
  device.launch(clipped_adam_kernel<Element>, static_cast<unsigned int>(blocks), kThreads, 0, table);
  for (const AdamQuartet& quartet : quartets) quartet.give_back();
}

void clipped_adam_cuda(std::vector<Tensor> parameters, std::vector<Tensor> gradients,
                       std::vector<Tensor> exp_avg, std::vector<Tensor> exp_avg_sq, std::vector<Tensor> steps,
                       std::optional<Tensor> ticket, double lr, double beta1, double beta2, double eps,
                       double weight_decay, double limit) {
  const AdamLists lists{std::move(parameters), std::move(gradients), std::move(exp_avg),
                        std::move(exp_avg_sq), std::move(steps)};
  const AdamNumbers numbers{lr, beta1, beta2, eps, weight_decay, limit};
  check_adam(lists, numbers);
  if (lists.parameters.empty()) return;
  const Tensor& like = lists.parameters[0];
  check_cuda(kAdam, "parameters[0]", like);
  if (ticket) {
    check_same_device(kAdam, "ticket", *ticket, like, "parameters[0]");
    QFAST_CHECK(ticket->scalar_type() == ScalarType::Int && ticket->numel() == 1, kAdam,
                ": ticket: expected one int32 number, got shape ", shape_text(*ticket), " of ",
                torch::headeronly::toString(ticket->scalar_type()),
                ". Remedy: torch.zeros(1, dtype=torch.int32).");
  }
  CudaDevice device(like);
  const int64_t shape[] = {1};
  const Tensor counter = ticket ? *ticket : new_zero_tensor(like, {shape, 1}, ScalarType::Int);
  dispatch_floating(like.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    AdamTable<Element> table{};
    table.lr = static_cast<Element>(lr);
    table.settings = numbers.settings<Element>();
    table.ticket = reinterpret_cast<unsigned int*>(counter.mutable_data_ptr<int32_t>());
    for (size_t first = 0; first < lists.parameters.size(); first += kMostTensors) {
      table.count = static_cast<int>(std::min<size_t>(kMostTensors, lists.parameters.size() - first));
      launch_adam(device, lists, first, table);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CUDA, m) { m.impl("clipped_adam_", TORCH_BOX(&clipped_adam_cuda)); }

}  // namespace qfast
