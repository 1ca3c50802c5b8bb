// Additive and graph attention on the CPU: checks, results and the division of work.
// qfast/ops/additive_attention.py contains the schemas and describes the saved tensors. A thread owns whole
// days, or some blocks of a large day (additive_attention_day.h). The sums are the same in both cases.
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "additive_attention/additive_attention_day.h"

namespace qfast {
namespace {

using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kSharedRows = 16384;  // all threads share a day with at least this many rows
constexpr int64_t kLeastRows = 512;     // rows of whole days for which it pays to wake a thread

// ---------------------------------------------------------------- many days
struct Days {
  std::vector<int64_t> offsets;
  int64_t heads, rows, width;
  double slope;

  int64_t count() const { return static_cast<int64_t>(offsets.size()) - 1; }
};

Days check_days(const char* op, const MaybeTensor& offsets, double slope, int64_t heads, int64_t rows,
                int64_t width) {
  QFAST_CHECK(slope >= 0 && slope <= 1, op, ": negative_slope: expected 0 to 1, got ", slope, ".");
  QFAST_CHECK(width > 0, op, ": value: expected at least one column, got ", width, ".");
  Days days{{0, rows}, heads, rows, width, slope};
  if (offsets) {
    check_dims(op, "offsets", *offsets, 1, "[D + 1]");
    QFAST_CHECK(offsets->is_cpu() && offsets->scalar_type() == ScalarType::Long && offsets->size(0) > 0, op,
                ": offsets: expected at least one number, int64 on the CPU, got ", offsets->size(0), " of ",
                torch::headeronly::toString(offsets->scalar_type()),
                offsets->is_cpu() ? "." : " on another device.");
    const Tensor whole = as_contiguous(*offsets);
    const int64_t* from = whole.const_data_ptr<int64_t>();
    days.offsets.assign(from, from + whole.size(0));
  }
  QFAST_CHECK(days.offsets.front() == 0 && days.offsets.back() == rows, op, ": offsets: must run from 0 to ",
              rows, ", got ", days.offsets.front(), " to ", days.offsets.back(), ".");
  for (int64_t d = 0; d < days.count(); ++d) {
    const int64_t size = days.offsets[d + 1] - days.offsets[d];
    QFAST_CHECK(size >= 0, op, ": offsets: must not decrease, but day ", d, " has ", size, " rows.");
    QFAST_CHECK(size < std::numeric_limits<int32_t>::max(), op,
                ": offsets: expected fewer than 2^31 - 1 rows per day, got ", size, " in day ", d, ".");
  }
  return days;
}

// Calls body(day, head, first row) for every day that is not empty. Large days are computed one after the
// other by all threads. The other days are divided into as many runs as there are threads, with about the
// same number of rows.
template <class Element, class Body>
void each_day(const Days& days, bool backward, const Body& body) {
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<std::pair<int64_t, int64_t>> small;  // head, day
  int64_t small_rows = 0, longest_small = 0, longest = 0;
  const auto is_shared = [&](int64_t size) { return threads > 1 && size >= kSharedRows; };
  for (int64_t head = 0; head < days.heads; ++head) {
    for (int64_t d = 0; d < days.count(); ++d) {
      const int64_t size = days.offsets[d + 1] - days.offsets[d];
      longest = std::max(longest, size);
      if (size == 0 || is_shared(size)) continue;
      small.emplace_back(head, d);
      small_rows += size;
      longest_small = std::max(longest_small, size);
    }
  }
  const auto run = [&](Workspace<Element>& space, int64_t head, int64_t d, bool shared) {
    const int64_t first = days.offsets[d], size = days.offsets[d + 1] - first;
    Day<Element> day(space, size, days.width, days.slope, shared);
    body(day, head, first);
  };
  if (is_shared(longest)) {
    Workspace<Element> space(longest, days.width, backward);
    for (int64_t head = 0; head < days.heads; ++head) {
      for (int64_t d = 0; d < days.count(); ++d) {
        if (is_shared(days.offsets[d + 1] - days.offsets[d])) run(space, head, d, true);
      }
    }
  }
  const int64_t runs = std::max<int64_t>(
      1, std::min<int64_t>({threads, static_cast<int64_t>(small.size()), small_rows / kLeastRows}));
  std::vector<std::unique_ptr<Workspace<Element>>> spaces;
  std::vector<std::size_t> begins(1, 0);
  int64_t passed = 0;
  for (std::size_t i = 0; i < small.size(); ++i) {
    passed += days.offsets[small[i].second + 1] - days.offsets[small[i].second];
    if (passed * runs >= small_rows * static_cast<int64_t>(begins.size())) begins.push_back(i + 1);
  }
  for (std::size_t r = 1; r < begins.size(); ++r)
    spaces.push_back(std::make_unique<Workspace<Element>>(longest_small, days.width, backward));
  parallel_for(static_cast<int64_t>(spaces.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (std::size_t i = begins[r]; i < begins[r + 1]; ++i)
        run(*spaces[r], small[i].first, small[i].second, false);
    }
  });
}

template <class Element>
void attend_days(const Days& days, const Element* query, const Element* key, const Element* value,
                 const Element* residual, Element* out, Element* share, Element* share_weight,
                 int32_t* orders) {
  each_day<Element>(days, false, [&](Day<Element>& day, int64_t head, int64_t first) {
    const int64_t row = head * days.rows + first, at = row * days.width;
    const bool keep = orders != nullptr;
    day.run(Forward<Element>{
        query + row,
        key + row,
        value + at,
        residual ? residual + at : nullptr,
        out + at,
        keep ? share + at : nullptr,
        keep ? share_weight + row : nullptr,
        {keep ? orders + row : nullptr, keep ? orders + days.heads * days.rows + row : nullptr}});
  });
}

// The tensors that forward saves for backward.
template <class Element>
struct Saved {
  const Element *out, *share, *share_weight;
  const int32_t* orders;
};

template <class Element>
void attend_days_backward(const Days& days, const Element* grad, const Element* query, const Element* key,
                          const Element* value, const Element* residual, const Saved<Element>& saved,
                          Element* grad_query, Element* grad_key, Element* grad_value) {
  each_day<Element>(days, true, [&](Day<Element>& day, int64_t head, int64_t first) {
    const int64_t row = head * days.rows + first, at = row * days.width;
    day.run(Backward<Element>{grad + at,
                              query + row,
                              key + row,
                              value + at,
                              residual ? residual + at : nullptr,
                              saved.out + at,
                              saved.share + at,
                              saved.share_weight + row,
                              {saved.orders + row, saved.orders + days.heads * days.rows + row},
                              grad_query + row,
                              grad_key + row,
                              grad_value + at});
  });
}

// ---------------------------------------------------------------- tensors
Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape,
             std::optional<ScalarType> type = std::nullopt) {
  Tensor out = new_tensor(like, {shape.begin(), shape.size()}, type);
  const int64_t bytes = out.numel() * static_cast<int64_t>(out.element_size());
  if (bytes >= kHugeBytes) advise_huge_pages(out.mutable_data_ptr(), bytes);
  return out;
}

void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& first,
                std::initializer_list<int64_t> shape, ScalarType type) {
  bool fits = tensor.is_cpu() && first.is_cpu() && tensor.scalar_type() == type &&
              tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  std::ostringstream expected;
  for (const int64_t size : shape) {
    expected << (axis ? ", " : "") << size;
    fits = fits && tensor.size(axis) == size;
    ++axis;
  }
  QFAST_CHECK(fits, op, ": ", name, ": expected shape (", expected.str(), ") and dtype ",
              torch::headeronly::toString(type), " on the CPU, got ", shape_text(tensor), " and ",
              torch::headeronly::toString(tensor.scalar_type()), " on ", device_text(tensor), ".");
}

void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& first,
                std::initializer_list<int64_t> shape) {
  check_like(op, name, tensor, first, shape, first.scalar_type());
}

// The tensors that forward saves for backward, without its result.
struct SavedTensors {
  Tensor share, share_weight, orders;
};

SavedTensors empty_saved(const Tensor& like, int64_t heads, int64_t rows, int64_t width) {
  return {empty(like, {heads, rows, width}), empty(like, {heads, rows}),
          empty(like, {2, heads, rows}, ScalarType::Int)};
}

// Checks that `orders` [2, heads, N] contains rows of each day, because the kernels use them as indices.
void check_orders(const char* op, const Days& days, const int32_t* orders) {
  for (int64_t list = 0; list < 2 * days.heads; ++list) {
    for (int64_t d = 0; d < days.count(); ++d) {
      const int64_t first = days.offsets[d], size = days.offsets[d + 1] - first;
      const int32_t* order = orders + list * days.rows + first;
      // Negative numbers are large as unsigned ones. Without an early exit the loop is vectorized.
      uint32_t largest = 0;
      for (int64_t p = 0; p < size; ++p) largest = std::max(largest, static_cast<uint32_t>(order[p]));
      QFAST_CHECK(size == 0 || largest < size, op, ": orders: expected rows 0 to ", size - 1, " in day ", d,
                  ", got ", static_cast<int32_t>(largest),
                  ". Remedy: pass the orders that the forward operator returns.");
    }
  }
}

SavedTensors check_saved(const char* op, const Tensor& like, const Days& days, const Tensor& share,
                         const Tensor& share_weight, const Tensor& orders) {
  check_like(op, "share", share, like, {days.heads, days.rows, days.width});
  check_like(op, "share_weight", share_weight, like, {days.heads, days.rows});
  check_like(op, "orders", orders, like, {2, days.heads, days.rows}, ScalarType::Int);
  const SavedTensors saved{as_contiguous(share), as_contiguous(share_weight), as_contiguous(orders)};
  if (orders.numel() > 0) check_orders(op, days, saved.orders.const_data_ptr<int32_t>());
  return saved;
}

template <class Element>
Element* data(const Tensor& tensor) {
  return tensor.mutable_data_ptr<Element>();
}

int32_t* order_data(const Tensor& orders) {
  return orders.numel() > 0 ? orders.mutable_data_ptr<int32_t>() : nullptr;
}

// ---------------------------------------------------------------- operators
std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_cpu(const Tensor& query, const Tensor& key,
                                                                  const Tensor& value,
                                                                  const MaybeTensor& offsets, int64_t,
                                                                  double slope, bool keep) {
  const char* op = "additive_attention";
  check_floating(op, "query", query);
  check_dims(op, "value", value, 3, "[heads, N, H]");
  const int64_t heads = value.size(0), rows = value.size(1), width = value.size(2);
  check_like(op, "query", query, value, {heads, rows});
  check_like(op, "key", key, value, {heads, rows});
  const Days days = check_days(op, offsets, slope, heads, rows, width);
  const Tensor q = as_contiguous(query), k = as_contiguous(key), v = as_contiguous(value);
  Tensor out = empty(v, {heads, rows, width});
  const SavedTensors saved_tensors = empty_saved(v, heads, keep ? rows : 0, width);
  dispatch_floating(v.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    attend_days<Element>(days, data<Element>(q), data<Element>(k), data<Element>(v), nullptr,
                         data<Element>(out), data<Element>(saved_tensors.share),
                         data<Element>(saved_tensors.share_weight), order_data(saved_tensors.orders));
  });
  return {out, saved_tensors.share, saved_tensors.share_weight, saved_tensors.orders};
}

std::tuple<Tensor, Tensor, Tensor> additive_attention_backward_cpu(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
    const MaybeTensor& offsets, int64_t, double slope, const Tensor& out, const Tensor& share,
    const Tensor& share_weight, const Tensor& orders) {
  const char* op = "additive_attention_backward";
  check_floating(op, "value", value);
  check_dims(op, "value", value, 3, "[heads, N, H]");
  const int64_t heads = value.size(0), rows = value.size(1), width = value.size(2);
  check_like(op, "query", query, value, {heads, rows});
  check_like(op, "key", key, value, {heads, rows});
  check_like(op, "grad", grad, value, {heads, rows, width});
  check_like(op, "out", out, value, {heads, rows, width});
  const Days days = check_days(op, offsets, slope, heads, rows, width);
  const SavedTensors saved_tensors = check_saved(op, value, days, share, share_weight, orders);
  const Tensor g = as_contiguous(grad), q = as_contiguous(query), k = as_contiguous(key),
               v = as_contiguous(value), o = as_contiguous(out);
  Tensor grad_query = empty(v, {heads, rows}), grad_key = empty(v, {heads, rows}),
         grad_value = empty(v, {heads, rows, width});
  dispatch_floating(v.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    const Saved<Element> saved{data<Element>(o), data<Element>(saved_tensors.share),
                               data<Element>(saved_tensors.share_weight), order_data(saved_tensors.orders)};
    attend_days_backward<Element>(days, data<Element>(g), data<Element>(q), data<Element>(k),
                                  data<Element>(v), nullptr, saved, data<Element>(grad_query),
                                  data<Element>(grad_key), data<Element>(grad_value));
  });
  return {grad_query, grad_key, grad_value};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> graph_attention_cpu(const Tensor& hidden,
                                                                       const Tensor& weight,
                                                                       const Tensor& bias,
                                                                       const MaybeTensor& offsets, int64_t,
                                                                       double slope, bool keep) {
  const char* op = "graph_attention";
  check_floating(op, "hidden", hidden);
  check_dims(op, "hidden", hidden, 2, "[N, H]");
  const int64_t rows = hidden.size(0), width = hidden.size(1);
  check_like(op, "weight", weight, hidden, {2, width});
  check_like(op, "bias", bias, hidden, {2});
  const Days days = check_days(op, offsets, slope, 1, rows, width);
  const Tensor h = as_contiguous(hidden), w = as_contiguous(weight), b = as_contiguous(bias);
  Tensor out = empty(h, {rows, width}), scores = empty(h, {2, rows});
  const SavedTensors saved_tensors = empty_saved(h, 1, keep ? rows : 0, width);
  dispatch_floating(h.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    Element* const query = data<Element>(scores);
    const ScoresJob<Element> job{rows, width, data<Element>(h), data<Element>(w), data<Element>(b), query};
    const auto kernel = cpu_kernels<Element>().hidden_scores;
    parallel_for(rows, 2048, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
    attend_days<Element>(days, query, query + rows, data<Element>(h), data<Element>(h), data<Element>(out),
                         data<Element>(saved_tensors.share), data<Element>(saved_tensors.share_weight),
                         order_data(saved_tensors.orders));
  });
  return {out, scores, saved_tensors.share, saved_tensors.share_weight, saved_tensors.orders};
}

// sums[i] = sum over blocks of block_sums[block, i], in float64.
template <class Element>
void add_blocks(const Element* block_sums, int64_t blocks, int64_t count, Element* sums) {
  std::vector<double> total(count, 0.0);
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < count; ++i) total[i] += block_sums[block * count + i];
  }
  for (int64_t i = 0; i < count; ++i) sums[i] = static_cast<Element>(total[i]);
}

std::tuple<Tensor, Tensor, Tensor> graph_attention_backward_cpu(
    const Tensor& grad, const Tensor& hidden, const Tensor& weight, const MaybeTensor& offsets, int64_t,
    double slope, const Tensor& out, const Tensor& scores, const Tensor& share, const Tensor& share_weight,
    const Tensor& orders) {
  const char* op = "graph_attention_backward";
  check_floating(op, "hidden", hidden);
  check_dims(op, "hidden", hidden, 2, "[N, H]");
  const int64_t rows = hidden.size(0), width = hidden.size(1);
  check_like(op, "weight", weight, hidden, {2, width});
  check_like(op, "grad", grad, hidden, {rows, width});
  check_like(op, "out", out, hidden, {rows, width});
  check_like(op, "scores", scores, hidden, {2, rows});
  const Days days = check_days(op, offsets, slope, 1, rows, width);
  const SavedTensors saved_tensors = check_saved(op, hidden, days, share, share_weight, orders);
  const Tensor g = as_contiguous(grad), h = as_contiguous(hidden), w = as_contiguous(weight),
               o = as_contiguous(out), s = as_contiguous(scores);
  const int64_t blocks = (rows + kSumRows - 1) / kSumRows;
  Tensor grad_hidden = empty(h, {rows, width}), grad_scores = empty(h, {2, rows}),
         grad_weight = empty(h, {2, width}), grad_bias = empty(h, {2}), sums = empty(h, {blocks, 2, width});
  dispatch_floating(h.scalar_type(), [&](auto zero) {
    using Element = decltype(zero);
    const Saved<Element> saved{data<Element>(o), data<Element>(saved_tensors.share),
                               data<Element>(saved_tensors.share_weight), order_data(saved_tensors.orders)};
    const Element *query = data<Element>(s), *hidden_data = data<Element>(h);
    Element *grad_query = data<Element>(grad_scores), *grad_key = grad_query + rows;
    attend_days_backward<Element>(days, data<Element>(g), query, query + rows, hidden_data, hidden_data,
                                  saved, grad_query, grad_key, data<Element>(grad_hidden));
    const ScoresBackwardJob<Element> job{rows,
                                         width,
                                         hidden_data,
                                         data<Element>(w),
                                         data<Element>(g),
                                         grad_query,
                                         grad_key,
                                         data<Element>(grad_hidden),
                                         data<Element>(sums)};
    const auto kernel = cpu_kernels<Element>().hidden_scores_backward;
    parallel_for(blocks, 32, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
    add_blocks<Element>(data<Element>(sums), blocks, 2 * width, data<Element>(grad_weight));
    for (int side = 0; side < 2; ++side) {
      double total = 0;
      for (int64_t r = 0; r < rows; ++r) total += grad_query[side * rows + r];
      data<Element>(grad_bias)[side] = static_cast<Element>(total);
    }
  });
  return {grad_hidden, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qfast, CPU, m) {
  m.impl("additive_attention", TORCH_BOX(&additive_attention_cpu));
  m.impl("additive_attention_backward", TORCH_BOX(&additive_attention_backward_cpu));
  m.impl("graph_attention", TORCH_BOX(&graph_attention_cpu));
  m.impl("graph_attention_backward", TORCH_BOX(&graph_attention_backward_cpu));
}

}  // namespace qfast
