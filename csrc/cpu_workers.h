// New tensors, scratch memory and the division of work among threads, for the CPU operators. Host only.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "common.h"
#include "huge_pages.h"
#include "memory_cache.h"

namespace qfast {

constexpr int64_t kHugeBytes = 4 << 20;  // tensors of at least this size use huge pages

// A new tensor, allocated without torch's dispatcher, which takes longer than the kernel of a small call. Its
// elements are not set.
inline Tensor allocated(const Tensor& like, const TensorSizes& shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size());
  int64_t elements = 1;
  bool overflows = false;
  for (size_t axis = shape.size(); axis-- > 0;) {
    strides[axis] = elements;
    overflows |= __builtin_mul_overflow(elements, std::max<int64_t>(shape[axis], 1), &elements);
  }
  if (overflows) return new_tensor(like, shape, type);  // raises the error
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  return with_memory(like, shape, type, [&] {
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                    strides.data(), dtype, aoti_torch_device_type_cpu(), 0,
                                                    &handle));
    return Tensor(handle);
  });
}

// A new tensor with this shape and, unless `dtype` is set, the dtype of `like`. Its elements are not set.
inline Tensor empty(const Tensor& like, const TensorSizes& shape,
                    std::optional<ScalarType> dtype = std::nullopt) {
  const ScalarType type = dtype.value_or(like.scalar_type());
  const auto allocate = [&] {
    try {
      return allocated(like, shape, type);
    } catch (const OutOfMemory&) {
      if (release_idle_memory() == 0) throw;
      return allocated(like, shape, type);
    }
  };
  Tensor out = allocate();
  const int64_t bytes = out.numel() * (type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 1);
  if (bytes >= kHugeBytes) advise_huge_pages(out.mutable_data_ptr(), bytes);
  return out;
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape,
                    std::optional<ScalarType> dtype = std::nullopt) {
  return empty(like, TensorSizes(shape.begin(), shape.size()), dtype);
}

constexpr int64_t kPieces = 16;  // pieces of the share of a worker, unless their size is given

// Equal shares of [0, count), one for each worker. A worker takes its share in equal pieces of at most `most`
// items, from the front on. When nothing is left of it, it takes pieces from the back of the largest share.
// Cores differ in speed, for example because another program or another virtual machine uses them.
class Shares {
 public:
  struct Piece {
    int64_t begin, end;
  };

  Shares(int64_t count, int64_t workers, int64_t most) : shares_(workers), most_(most) {
    for (int64_t w = 0; w < workers; ++w) {
      shares_[w].begin = count * w / workers;
      shares_[w].end = count * (w + 1) / workers;
    }
  }

  // Takes the next piece for a worker, which is empty if nothing is left.
  Piece take(int64_t worker) {
    for (Share* share = &shares_[worker];;) {
      const Piece piece = share->take(most_, share == &shares_[worker]);
      if (piece.begin < piece.end) return piece;
      share = &*std::max_element(shares_.begin(), shares_.end(),
                                 [](Share& a, Share& b) { return a.left() < b.left(); });
      if (share->left() == 0) return {0, 0};
    }
  }

 private:
  struct alignas(64) Share {
    std::mutex mutex;
    int64_t begin = 0, end = 0;  // the items that no worker has taken

    int64_t left() {
      const std::lock_guard lock(mutex);
      return end - begin;
    }

    Piece take(int64_t most, bool from_front) {
      const std::lock_guard lock(mutex);
      const int64_t pieces = (end - begin + most - 1) / most;
      if (pieces == 0) return {0, 0};
      const int64_t size = (end - begin + pieces - 1) / pieces;
      if (from_front) return {std::exchange(begin, begin + size), begin};
      return {end - size, std::exchange(end, end - size)};
    }
  };

  std::vector<Share> shares_;
  int64_t most_;
};

inline int64_t worker_count(int64_t count) {
  return std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), count));
}

// Divides [0, count) among the threads. run(worker, take) runs once for each of them, and take() returns its
// next piece. A single thread receives all items as one piece.
template <class Run>
void divide(int64_t count, int64_t most, const Run& run) {
  if (count == 0) return;
  const int64_t workers = worker_count(count);
  if (workers == 1) most = count;
  if (most == 0) most = std::max<int64_t>(1, count / (workers * kPieces));
  Shares shares(count, workers, most);
  parallel_for(workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t w = first; w < last; ++w) run(w, [&] { return shares.take(w); });
  });
}

// Calls body(begin, end) for pieces of [0, count), on all threads.
template <class Body>
void share(int64_t count, const Body& body) {
  divide(count, 0, [&](int64_t, const auto& take) {
    for (Shares::Piece piece = take(); piece.begin < piece.end; piece = take()) body(piece.begin, piece.end);
  });
}

// Scratch memory of a thread. Some kernels read columns that they never write, and need zeros in them.
struct Scratch {
  int64_t elements;
  bool zeros = false;
};

// Calls body(begin, end, scratch) for pieces of [0, count), on all threads. A piece has at most `most` items,
// if `most` is not 0.
template <class Element, class Body>
void share_with_scratch(const Tensor& like, int64_t count, Scratch scratch, const Body& body,
                        int64_t most = 0) {
  const int64_t scratch_elements = rounded_up(scratch.elements, 16);
  const Buffer<Element> memory(like, worker_count(count) * scratch_elements);
  Element* const space = memory.data();
  divide(count, most, [&](int64_t worker, const auto& take) {
    Element* const thread_scratch = space + worker * scratch_elements;
    if (scratch.zeros) std::fill(thread_scratch, thread_scratch + scratch_elements, Element(0));
    for (Shares::Piece piece = take(); piece.begin < piece.end; piece = take())
      body(piece.begin, piece.end, thread_scratch);
  });
}

constexpr int64_t kSumParts = 16;             // parts of the tiles, each with its own sums
constexpr int64_t kSumPartBytes = 128 << 20;  // limit on the memory of all sums
constexpr int64_t kSumPiece = 2048;           // sums that are added up at a time
constexpr int64_t kSumGrain = 8192;           // fewest sums that a thread adds up

// Number of parts of the tiles if a part has `elements` sums. It does not depend on the number of threads.
template <class Element>
int64_t sum_parts(int64_t tiles, int64_t elements) {
  const int64_t fitting = kSumPartBytes / static_cast<int64_t>(sizeof(Element)) / elements;
  return std::max<int64_t>(1, std::min({tiles, kSumParts, fitting}));
}

// Divides the tiles into parts and calls kernel(first tile, last tile, scratch, sums) for each. Returns the
// total of the sums, `sum_elements` of it. The number of parts is fixed and their sums are added in order, so
// the result does not depend on the number of threads. The sums are 0 at first unless the kernel `sets` them.
template <class Element, class Kernel>
Buffer<Element> sum_in_parts(const Tensor& like, int64_t tiles, Scratch scratch, int64_t sum_elements,
                             const Kernel& kernel, bool sets = false) {
  const int64_t elements = rounded_up(std::max<int64_t>(sum_elements, 1), 16);
  const int64_t parts = sum_parts<Element>(tiles, elements);
  Buffer<Element> sums(like, parts * elements);
  Element* const total = sums.data();
  share_with_scratch<Element>(like, parts, scratch, [&](int64_t begin, int64_t end, Element* space) {
    for (int64_t part = begin; part < end; ++part) {
      Element* const sum = total + part * elements;
      if (!sets || tiles == 0) std::fill(sum, sum + elements, Element(0));
      kernel(tiles * part / parts, tiles * (part + 1) / parts, space, sum);
    }
  });
  if (parts == 1) return sums;  // there is nothing to add, and no thread to wake
  parallel_for(elements, kSumGrain, [&](int64_t begin, int64_t end) {
    // Pieces that stay in the first-level cache.
    for (int64_t first = begin; first < end; first += kSumPiece) {
      const int64_t count = std::min(kSumPiece, end - first);
      for (int64_t part = 1; part < parts; ++part) {
        const Element* const from = total + part * elements + first;
        for (int64_t i = 0; i < count; ++i) total[first + i] += from[i];
      }
    }
  });
  return sums;
}

// The same for sums that are the tensors `sums`, whose elements are not set. The kernel sets all sums of its
// tiles. It receives null for the first part, which it writes to the tensors, and else a copy of all tensors,
// each on a cache line of its own.
template <class Element, class Kernel>
void sum_into(const std::vector<Tensor>& sums, int64_t tiles, Scratch scratch, const Kernel& kernel) {
  constexpr int64_t line = 64 / sizeof(Element);
  int64_t elements = line;
  for (const Tensor& sum : sums) elements += rounded_up(sum.numel(), line);
  if (tiles == 0)
    for (const Tensor& sum : sums) std::fill_n(sum.mutable_data_ptr<Element>(), sum.numel(), Element(0));
  if (tiles == 0) return;
  const int64_t parts = sum_parts<Element>(tiles, elements);
  const Buffer<Element> others(sums.front(), (parts - 1) * elements);
  share_with_scratch<Element>(sums.front(), parts, scratch, [&](int64_t begin, int64_t end, Element* space) {
    for (int64_t part = begin; part < end; ++part) {
      Element* const sum = part == 0 ? nullptr : others.data() + (part - 1) * elements;
      kernel(tiles * part / parts, tiles * (part + 1) / parts, space, sum);
    }
  });
  const Element* other = others.data();
  for (int64_t part = 1; part < parts; ++part, other += line)
    for (const Tensor& sum : sums) {
      Element* const to = sum.mutable_data_ptr<Element>();
      const int64_t count = sum.numel();  // a call into libtorch, so not in the loop
      for (int64_t i = 0; i < count; ++i) to[i] += other[i];
      other += rounded_up(count, line);
    }
}

}  // namespace qfast
