// One step of Adam over clipped gradients on CUDA, for all tensors of a network. Has never run on a GPU: the
// kernel is checked by emulation on the host.
//
// One launch for up to kMostTensors tensors, a further one for each as many more. Pointers, sizes and the
// table that gives each block its tensor travel as kernel parameters, so nothing is copied to the device. A
// block owns kChunk elements of one tensor and reads, computes and writes each of them once; gradients are
// written only where one of their 16 bytes passes the limit.
//
// The number of steps lies on the device, one float a tensor. A block reads it, adds 1 for itself and then
// takes a ticket; the block that takes the last one knows that all have read, and writes the numbers, each
// plus 1. The counter of tickets is 0 again after a launch. So nothing synchronises, no two blocks race, and
// a CUDA graph can capture the call: each replay is a further step.
//
// Order of operations as torch's fused Adam on CUDA (fused_adam_utils.cuh), with its beta^step in the type of
// the parameters. Bytes bound it: 16 read and 12 written for each float32 parameter; about 15 operations, of
// which two divisions and a root, and two powers a block. Below some 100,000 parameters the launch itself.
// Unmeasured. Schema: qfast/ops/adam.py.
#include "adam/adam_checks.h"
#include "cuda_device.cuh"

namespace qfast {
namespace {

constexpr int kThreads = 256;
constexpr int kRounds = 2;        // packs of 16 bytes a thread
constexpr int kMostTensors = 76;  // whose table fits beside the settings into 4 KB of kernel parameters

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
  unsigned int first_block[kMostTensors + 1];  // of each tensor; the last: blocks of the launch
  int count;
  Element lr;
  AdamSettings<Element> settings;
  unsigned int* ticket;
};
static_assert(sizeof(AdamTable<double>) <= 4096, "what every architecture takes as kernel parameters");

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

// The pack from element i on; of those from `here` on nothing is read. `wide`: whole and on 16 bytes.
template <class Element>
__device__ __forceinline__ Pack<Element> read_pack(const Element* from, int64_t i, int64_t here, bool wide) {
  if (wide) return *reinterpret_cast<const Pack<Element>*>(from + i);
  Pack<Element> pack{};
#pragma unroll
  for (int lane = 0; lane < Pack<Element>::kCount; ++lane) {
    if (lane < here) pack.lane[lane] = from[i + lane];
  }
  return pack;
}

template <class Element>
__device__ __forceinline__ void write_pack(Element* to, int64_t i, int64_t here, bool wide,
                                           const Pack<Element>& pack) {
  if (wide) {
    *reinterpret_cast<Pack<Element>*>(to + i) = pack;
    return;
  }
#pragma unroll
  for (int lane = 0; lane < Pack<Element>::kCount; ++lane) {
    if (lane < here) to[i + lane] = pack.lane[lane];
  }
}

// Whether the limit was passed. NaN compares with nothing, so it stays.
template <class Element>
__device__ __forceinline__ bool clip(Pack<Element>& gradient, Element limit) {
  bool passed = false;
#pragma unroll
  for (int lane = 0; lane < Pack<Element>::kCount; ++lane) {
    Element& g = gradient.lane[lane];
    passed |= g > limit || g < -limit;
    g = g > limit ? limit : g < -limit ? -limit : g;
  }
  return passed;
}

template <class Element>
__device__ __forceinline__ void adam_element(Element& parameter, Element gradient, Element& mean,
                                             Element& square, const AdamSettings<Element>& settings,
                                             const AdamCorrection<Element>& correction) {
  if (settings.weight_decay != 0) gradient += parameter * settings.weight_decay;
  mean = fma(settings.beta1, mean, fma(-settings.beta1, gradient, gradient));
  square = fma(settings.beta2, square, fma(-settings.beta2, gradient * gradient, gradient * gradient));
  const Element denominator = sqrt(square) / correction.root + settings.eps;
  parameter -= correction.step_size * mean / denominator;
}

template <class Element>
__global__ void __launch_bounds__(kThreads, 4) clipped_adam_kernel(const AdamTable<Element> table) {
  __shared__ AdamCorrection<Element> shared_correction;
  __shared__ bool last;
  const int number = tensor_of_block(table, blockIdx.x);
  const AdamSettings<Element>& settings = table.settings;
  if (threadIdx.x == 0) {
    const Element step = static_cast<Element>(*static_cast<volatile const float*>(table.steps[number]) + 1);
    __threadfence();  // the number is read before the ticket is taken
    last = atomicInc(table.ticket, gridDim.x - 1) == gridDim.x - 1;
    shared_correction.step_size = table.lr / (1 - pow(settings.beta1, step));
    shared_correction.root = sqrt(1 - pow(settings.beta2, step));
  }
  __syncthreads();
  if (last) {
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
    const int64_t here = tensor.count - i;
    if (here <= 0) break;
    const bool wide = addresses % 16 == 0 && here >= kLanes;
    Pack<Element> parameter = read_pack(tensor.parameter, i, here, wide);
    Pack<Element> gradient = read_pack(tensor.gradient, i, here, wide);
    Pack<Element> mean = read_pack(tensor.exp_avg, i, here, wide);
    Pack<Element> square = read_pack(tensor.exp_avg_sq, i, here, wide);
    if (clip(gradient, settings.limit)) write_pack(tensor.gradient, i, here, wide, gradient);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      adam_element(parameter.lane[lane], gradient.lane[lane], mean.lane[lane], square.lane[lane], settings,
                   correction);
    }
    write_pack(tensor.exp_avg, i, here, wide, mean);
    write_pack(tensor.exp_avg_sq, i, here, wide, square);
    write_pack(tensor.parameter, i, here, wide, parameter);
  }
}

// The tensors [first, first + table.count), all with elements or without: each has a block at least, so that
// there always is one that counts the step.
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
  QFAST_CHECK(blocks < int64_t{1} << 31, kAdam, ": parameters: more elements than one launch can take.");
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
                torch::headeronly::toString(ticket->scalar_type()), ".");
  }
  CudaDevice device(like);
  const int64_t shape[] = {1};
  const Tensor counter = ticket ? *ticket : torch::stable::new_zeros(like, {shape, 1}, ScalarType::Int);
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
