#include "memory_cache.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <list>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "cpu_workers.h"
#include "huge_pages.h"

// Available from torch 2.11 on. Under torch 2.10 the address is null, and torch allocates the saved tensors.
extern "C" __attribute__((weak, visibility("default"))) int32_t
torch_from_blob(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides,
                int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                AtenTensorHandle* result, int32_t layout, const uint8_t* metadata, int64_t metadata_size,
                void (*deleter)(void* data, void* context), void* context);

namespace qfast {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kLargest = int64_t{1} << 48;  // larger requests fail
constexpr int64_t kSpare = int64_t{512} << 20;  // idle bytes beyond those that were in use
constexpr int64_t kSmallestSaved = 256 << 10;   // the C library serves smaller tensors well

using Clock = std::chrono::steady_clock;
constexpr Clock::duration kLongestIdle = std::chrono::seconds(30);

struct Block {
  void* data;
  int64_t bytes;
  Clock::time_point returned;
};

// Size of the block for a request, at most an eighth larger. Few sizes mean that blocks fit later requests.
int64_t block_bytes(int64_t bytes) {
  if (bytes > kLargest) return bytes;
  int64_t unit = 64;
  while (unit * 16 < bytes) unit *= 2;
  return rounded_up(std::max<int64_t>(bytes, 1), unit);
}

class MemoryCache {
 public:
  static MemoryCache& instance() {
    static MemoryCache* const cache = new MemoryCache;  // never destroyed: torch frees tensors until the end
    return *cache;
  }

  void* take(int64_t bytes) {
    bytes = block_bytes(bytes);
    if (bytes > kLargest) return nullptr;
    const std::lock_guard guard(mutex_);
    // The smallest block that fits, unless it is more than twice as large.
    auto best = idle_.end();
    for (auto block = idle_.begin(); block != idle_.end(); ++block)
      if (block->bytes >= bytes && block->bytes <= 2 * bytes &&
          (best == idle_.end() || block->bytes < best->bytes))
        best = block;
    Block block{nullptr, bytes, {}};
    if (best != idle_.end()) {
      block = *best;
      facts_.idle_bytes -= block.bytes;
      ++facts_.reused;
      idle_.erase(best);
    } else {
      block.data = allocate(bytes);
      if (block.data == nullptr && shrink(0) > 0) block.data = allocate(bytes);
      if (block.data == nullptr) return nullptr;
      ++facts_.allocated;
    }
    used_[block.data] = block.bytes;
    facts_.used_bytes += block.bytes;
    most_used_ = std::max(most_used_, facts_.used_bytes);
    shrink(limit());
    return block.data;
  }

  void give_back(void* data) {
    const std::lock_guard guard(mutex_);
    const auto used = used_.find(data);
    const Block block{data, used->second, Clock::now()};
    used_.erase(used);
    facts_.used_bytes -= block.bytes;
    facts_.idle_bytes += block.bytes;
    idle_.push_back(block);
    shrink(limit());
    while (!idle_.empty() && block.returned - idle_.front().returned > kLongestIdle) free_first();
  }

  int64_t release() {
    const std::lock_guard guard(mutex_);
    most_used_ = facts_.used_bytes;
    return shrink(0);
  }

  void set_limit(int64_t bytes) {
    const std::lock_guard guard(mutex_);
    limit_ = bytes;
    shrink(limit());
  }

  MemoryCacheFacts facts() {
    const std::lock_guard guard(mutex_);
    return facts_;
  }

 private:
  MemoryCache() {
    // A child process must not inherit a locked mutex.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  static void* allocate(int64_t bytes) {
    const int64_t alignment = bytes >= 2 * kHugePage ? kHugePage : 64;
    void* const data = std::aligned_alloc(alignment, rounded_up(bytes, alignment));
    if (data != nullptr && bytes >= 2 * kHugePage) advise_huge_pages(data, bytes);
    return data;
  }

  // Frees the blocks that were returned first until at most `limit` bytes are idle.
  int64_t shrink(int64_t limit) {
    int64_t freed = 0;
    while (facts_.idle_bytes > limit) freed += free_first();
    return freed;
  }

  // By default, the blocks that were in use at the same time may all be idle.
  int64_t limit() const { return limit_ >= 0 ? limit_ : most_used_ - facts_.used_bytes + kSpare; }

  // Frees the block that was returned first, and returns its size.
  int64_t free_first() {
    const Block block = idle_.front();
    idle_.pop_front();
    std::free(block.data);
    facts_.idle_bytes -= block.bytes;
    return block.bytes;
  }

  std::mutex mutex_;
  std::list<Block> idle_;  // the block returned last is at the end
  std::unordered_map<void*, int64_t> used_;
  MemoryCacheFacts facts_{};
  int64_t limit_ = -1;     // the one that was set, or -1
  int64_t most_used_ = 0;  // since the last release
};

}  // namespace

MemoryCacheFacts memory_cache_facts() { return MemoryCache::instance().facts(); }
void set_memory_cache_limit(int64_t bytes) { MemoryCache::instance().set_limit(bytes); }
int64_t release_idle_memory() { return MemoryCache::instance().release(); }
void* take_block(int64_t bytes) { return MemoryCache::instance().take(bytes); }
void return_block(void* block) { MemoryCache::instance().give_back(block); }

Tensor saved_tensor(const Tensor& like, std::initializer_list<int64_t> shape,
                    std::optional<ScalarType> dtype) {
  const ScalarType type = dtype.value_or(like.scalar_type());
  const int64_t element = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 1;
  int64_t bytes = element;
  // An overflow becomes the largest size, for which `empty` raises the error.
  for (const int64_t size : shape)
    if (__builtin_mul_overflow(bytes, size, &bytes)) bytes = INT64_MAX;
  if (torch_from_blob == nullptr || bytes < kSmallestSaved || bytes == INT64_MAX)
    return empty(like, shape, dtype);
  void* const data = take_block(bytes);
  if (data == nullptr) throw OutOfMemory(shortage_text(like, {shape.begin(), shape.size()}, type));
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t axis = shape.size(); axis > 1; --axis)
    strides[axis - 2] = strides[axis - 1] * shape.begin()[axis - 1];
  const int32_t shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  const int32_t error = torch_from_blob(
      data, static_cast<int64_t>(shape.size()), shape.begin(), strides.data(), 0, shim_dtype,
      aoti_torch_device_type_cpu(), like.get_device_index(), &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void* block, void*) { return_block(block); }, nullptr);
  if (error != 0) {
    return_block(data);
    return empty(like, shape, dtype);
  }
  return Tensor(handle);
}

}  // namespace qfast
