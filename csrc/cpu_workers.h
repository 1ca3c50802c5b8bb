// Fresh tensors and equal shares of work for the CPU operators. Host only.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "common.h"
#include "huge_pages.h"

namespace qfast {

constexpr int64_t kHugeBytes = 4 << 20;  // of a tensor: from here huge pages pay

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape,
                    std::optional<ScalarType> dtype = std::nullopt) {
  Tensor out = torch::stable::new_empty(like, {shape.begin(), shape.size()}, dtype);
  const ScalarType type = out.scalar_type();
  const int64_t bytes = out.numel() * (type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 1);
  if (bytes >= kHugeBytes) advise_huge_pages(out.mutable_data_ptr(), bytes);
  return out;
}

// body(worker, begin, end) for equal shares of [0, count), one for each thread.
template <class Body>
void share(int64_t count, const Body& body) {
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), count);
  parallel_for(workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t w = first; w < last; ++w) body(w, count * w / workers, count * (w + 1) / workers);
  });
}

inline int64_t worker_count(int64_t count) {
  return std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), count));
}

}  // namespace qfast
