// Runs CUDA kernels as host code. tools/cuda_on_host.py compiles them with this file in place of the CUDA
// toolkit's header.
//
// Every thread of a block is a fiber with its own stack. The fibers of a block run in an order that changes
// at random, some warps ahead of others, until each has reached a barrier. An error from a missing barrier
// therefore appears after enough runs. Blocks run one after another, in random order. Shared memory has the
// size that the launch requests and initially contains NaN. These errors end the process with a message: a
// barrier that not all threads reach, a shuffle from a lane outside the mask, and a mask with lanes outside
// the block.
//
// Not simulated: times, caches, the order of writes between blocks, and the device compiler.
#pragma once

#include <math.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 : uint3 {};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

using std::max;
using std::min;

namespace cuda_on_host {

constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = 128 << 10;

inline uint3 thread_index, block_index;
inline dim3 block_size, grid_size;

[[noreturn]] inline void give_up(const char* why) {
  std::fprintf(stderr, "cuda_on_host: %s (block %u, thread %u)\n", why, block_index.x, thread_index.x);
  std::abort();
}

inline long setting(const char* name, long otherwise) {
  const char* const text = std::getenv(name);
  return text == nullptr ? otherwise : std::atol(text);
}

inline std::mt19937& random_source() {
  static std::mt19937 source(static_cast<unsigned>(setting("QFAST_HOST_SEED", 1)));
  return source;
}

// ---------------------------------------------------------------- fibers
enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  void* stack_pointer = nullptr;
  std::unique_ptr<char[]> stack;
  State state = State::kDone;
  unsigned mask = 0;            // of the warp barrier where it waits
  unsigned long long word = 0;  // value that other lanes of the warp read in a shuffle
};

inline std::vector<Fiber> fibers;
inline void* scheduler = nullptr;  // stack pointer of run_block
inline const std::function<void()>* work = nullptr;

extern "C" void cuda_on_host_switch(void** save, void* to);

inline Fiber& me() { return fibers[thread_index.x]; }

inline void wait_as(State state) {
  Fiber& fiber = me();
  fiber.state = state;
  cuda_on_host_switch(&fiber.stack_pointer, scheduler);
}

inline void fiber_main() {
  (*work)();
  wait_as(State::kDone);
  std::abort();
}

inline void start_fiber(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  const auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStack) & ~uintptr_t{15};
  void** place = reinterpret_cast<void**>(top);
  *--place = nullptr;
  *--place = reinterpret_cast<void*>(&fiber_main);
  for (int saved = 0; saved < 6; ++saved) *--place = nullptr;
  fiber.stack_pointer = place;
  fiber.state = State::kReady;
}

// ---------------------------------------------------------------- barriers
inline void warp_barrier(unsigned mask) {
  if (!(mask >> thread_index.x % kWarp & 1)) give_up("a lane waits for a mask that it is not in");
  me().mask = mask;
  wait_as(State::kAtWarpBarrier);
}

inline bool release_warps(unsigned threads) {
  bool released = false;
  for (unsigned t = 0; t < threads; ++t) {
    if (fibers[t].state != State::kAtWarpBarrier) continue;
    const unsigned first = t / kWarp * kWarp, mask = fibers[t].mask;
    bool all = true;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      if (first + lane >= threads) give_up("a mask names lanes beyond the block");
      const Fiber& other = fibers[first + lane];
      all &= other.state == State::kAtWarpBarrier && other.mask == mask;
    }
    for (unsigned lane = 0; all && lane < kWarp; ++lane)
      if (mask >> lane & 1) fibers[first + lane].state = State::kReady;
    released |= all;
  }
  return released;
}

inline bool any_in(unsigned threads, State state) {
  return std::any_of(fibers.begin(), fibers.begin() + threads,
                     [&](const Fiber& f) { return f.state == state; });
}

// ---------------------------------------------------------------- one block
// Selects warps that pause for a while. The other warps run ahead to their next barrier.
struct Holding {
  std::vector<char> held;
  unsigned left = 0;

  void next(unsigned warps) {
    if (held.size() == warps && left-- > 0) return;
    auto& random = random_source();
    left = random() % 3 ? random() % 60 : random() % 5000;
    held.assign(warps, 0);
    if (const unsigned kind = random() % 3; kind > 0)
      for (char& warp : held) warp = kind == 1 ? random() % 2 : random() % 8 != 0;
  }
};

inline void run_block(unsigned threads, const std::function<void()>& body) {
  work = &body;
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned t = 0; t < threads; ++t) start_fiber(fibers[t]);
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  Holding holding;
  for (;;) {
    if (const unsigned how = random_source()() % 3; how == 1) {
      std::reverse(order.begin(), order.end());
    } else if (how == 2) {
      std::shuffle(order.begin(), order.end(), random_source());
    }
    holding.next((threads + kWarp - 1) / kWarp);
    const auto free = [&](unsigned t) {
      return fibers[t].state == State::kReady && !holding.held[t / kWarp];
    };
    const bool some_free = std::any_of(order.begin(), order.end(), free);
    for (unsigned t : order) {
      if (fibers[t].state != State::kReady || (some_free && !free(t))) continue;
      thread_index.x = t;
      cuda_on_host_switch(&scheduler, fibers[t].stack_pointer);
    }
    release_warps(threads);
    if (any_in(threads, State::kReady)) continue;
    if (any_in(threads, State::kAtWarpBarrier)) give_up("lanes wait for others that do not come");
    if (!any_in(threads, State::kAtBlockBarrier)) return;
    if (any_in(threads, State::kDone)) give_up("a thread has left before a barrier that others wait at");
    for (unsigned t = 0; t < threads; ++t) fibers[t].state = State::kReady;
  }
}

// ---------------------------------------------------------------- a launch
inline std::vector<char> shared_room;
inline char* shared_begin = nullptr;

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(shared_begin);
}

inline void launch(unsigned blocks, unsigned threads, size_t shared, const std::function<void()>& body) {
  if (threads == 0 || threads > kMostThreads) give_up("a block of no or of too many threads");
  if (shared > static_cast<size_t>(setting("QFAST_HOST_SHARED", 227 << 10)))
    give_up("too much shared memory");
  shared_room.assign(shared + 16, 0);
  const auto at = reinterpret_cast<uintptr_t>(shared_room.data());
  shared_begin = shared_room.data() + (16 - at % 16) % 16;
  block_size.x = threads, grid_size.x = blocks;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random_source());
  for (unsigned block : order) {
    std::memset(shared_begin, 0xff, shared);
    block_index.x = block;
    run_block(threads, body);
  }
}

// ---------------------------------------------------------------- shuffles
// The value of lane `source` of this thread's warp, or this thread's own value if `source` is -1.
template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(Fiber::word));
  const unsigned mine = thread_index.x;
  std::memcpy(&fibers[mine].word, &value, sizeof value);
  warp_barrier(mask);
  if (source >= 0) {
    if (!(mask >> source & 1)) give_up("a shuffle from a lane that takes no part");
    std::memcpy(&value, &fibers[mine / kWarp * kWarp + static_cast<unsigned>(source)].word, sizeof value);
  }
  warp_barrier(mask);
  return value;
}

inline int lane() { return static_cast<int>(thread_index.x % kWarp); }

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::thread_index)
#define blockIdx (cuda_on_host::block_index)
#define blockDim (cuda_on_host::block_size)
#define gridDim (cuda_on_host::grid_size)

inline void __syncthreads() { cuda_on_host::wait_as(cuda_on_host::State::kAtBlockBarrier); }
inline void __syncwarp(unsigned mask = ~0u) { cuda_on_host::warp_barrier(mask); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return cuda_on_host::shuffle(mask, value, cuda_on_host::lane() / width * width + source % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = cuda_on_host::lane(), source = lane ^ bits;
  return cuda_on_host::shuffle(mask, value, source / width <= lane / width ? source : -1);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int step, int width = 32) {
  const int lane = cuda_on_host::lane(), source = lane - step;
  return cuda_on_host::shuffle(mask, value, source >= lane / width * width ? source : -1);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int step, int width = 32) {
  const int lane = cuda_on_host::lane(), source = lane + step;
  return cuda_on_host::shuffle(mask, value, source / width == lane / width ? source : -1);
}

// CUDA does not guarantee which lanes are active together, so only the calling lane is in the mask.
inline unsigned __activemask() { return 1u << cuda_on_host::lane(); }
inline int __any_sync(unsigned mask, int found) {
  int any = 0;
  for (int source = 0; source < 32; ++source)
    if (mask >> source & 1) any |= cuda_on_host::shuffle(mask, found != 0, source);
  return any;
}
inline int __all_sync(unsigned mask, int found) { return !__any_sync(mask, !found); }

// ---------------------------------------------------------------- single threads
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline void __threadfence() {}
// Atomic, because fibers switch only at barriers.
inline unsigned atomicInc(unsigned* counter, unsigned last) {
  const unsigned before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}

// ---------------------------------------------------------------- the runtime
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  long found = 9;
  if (what == cudaDevAttrMaxSharedMemoryPerBlockOptin)
    found = cuda_on_host::setting("QFAST_HOST_SHARED", 227 << 10);
  if (what == cudaDevAttrMultiProcessorCount)
    found = cuda_on_host::setting("QFAST_HOST_MULTIPROCESSORS", 132);
  *value = static_cast<int>(found);
  return cudaSuccess;
}
struct cudaFuncAttributes {
  size_t sharedSizeBytes = 0;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
// Blocks limited by threads and by shared memory. Registers are unknown.
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads,
                                                                 size_t shared) {
  const long all_shared = cuda_on_host::setting("QFAST_HOST_SHARED", 227 << 10);
  *blocks = static_cast<int>(std::min<long>(2048 / threads, all_shared / (static_cast<long>(shared) + 1024)));
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
