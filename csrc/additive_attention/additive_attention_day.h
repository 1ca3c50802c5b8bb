// Additive attention over the rows of one day. Forward sorts keys and queries, sums the weighted values from
// both ends of the sorted keys, and looks up the two sums for each query. Backward does the same with the
// roles of keys and queries exchanged. docs/attention.md contains the mathematics,
// additive_attention_kernels.h the passes over rows. Host only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "additive_attention/additive_attention.h"
#include "additive_attention/radix_sort.h"
#include "common.h"
#include "cpu_dispatch.h"
#include "huge_pages.h"
#include "panels.h"

namespace qfast {

// Most lookups of a task. The limit is needed because all lookups may have the same position.
constexpr int64_t kTaskLookups = 4 * kSumRows;
constexpr int64_t kHugeBytes = 4 << 20;
constexpr int64_t kPastCachesBytes = 16 << 20;  // results of this size are written with non-temporal stores

// ---------------------------------------------------------------- memory
// One allocation that is divided into parts. Before allocate(), take() only counts the bytes.
class Arena {
 public:
  void allocate() {
    const int64_t used = carving_.used, bytes = used + kLine;
    memory_ = std::make_unique_for_overwrite<std::byte[]>(bytes);
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    carving_ = {reinterpret_cast<std::byte*>((address + kLine - 1) / kLine * kLine)};
    if (bytes >= kHugeBytes) advise_huge_pages(carving_.base, used);
  }

  template <class T>
  void take(T*& part, int64_t count) {
    part = reinterpret_cast<T*>(carving_.take(static_cast<int64_t>(sizeof(T)) * count));
  }

 private:
  static constexpr int64_t kLine = 64;
  std::unique_ptr<std::byte[]> memory_;
  Carving<std::byte> carving_{nullptr};
};

// Scratch of one day with up to `rows` rows. Arrays are [rows] unless their comment says otherwise.
template <class Element>
struct Workspace {
  SortEntry<Element>* entries[2][2];     // entries of keys and of queries, each with scratch for the sort
  int32_t* orders[2];                    // row at each sorted position: keys ascending, queries descending
  Element *keys, *queries;               // the scores in these orders
  Element *above, *below;                // weights of the sorted keys for scores above and below 0, at most 1
  Element *above_factor, *below_factor;  // factors of the sorted queries, divided by the sum of weights
  Element* share_weight;                 // by sorted query
  Element *mean_dot, *share_dot;         // by row
  Element *prefix_dot, *suffix_dot;      // by sorted key
  int32_t* position;                     // by lookup
  double *prefix, *suffix;               // [rows + 1]: running sums of scalars, up to and from each position
  double *prefix_mass, *suffix_mass;     // [rows + 1]: running sums of weights
  Element* center;                       // [width]
  double* center_sum;                    // [width]
  Element *prefix_blocks, *suffix_blocks;  // [blocks + 1, width]
  LookupTask* tasks;                       // [blocks + 1 + rows / kTaskLookups]

  Workspace(int64_t rows, int64_t width, bool backward) {
    lay_out(rows, width, backward);
    arena_.allocate();
    lay_out(rows, width, backward);
  }

 private:
  void lay_out(int64_t rows, int64_t width, bool backward) {
    const int64_t blocks = rows / kSumRows + 1;
    for (int side = 0; side < 2; ++side) {
      for (auto& part : entries[side]) arena_.take(part, backward ? 0 : rows);
      arena_.take(orders[side], rows);
    }
    for (Element** part : {&keys, &queries, &above, &below, &above_factor, &below_factor})
      arena_.take(*part, rows);
    arena_.take(share_weight, backward ? 0 : rows);
    for (Element** part : {&mean_dot, &share_dot, &prefix_dot, &suffix_dot})
      arena_.take(*part, backward ? rows : 0);
    arena_.take(position, rows);
    for (double** part : {&prefix, &suffix}) arena_.take(*part, rows + 1);
    for (double** part : {&prefix_mass, &suffix_mass}) arena_.take(*part, backward ? rows + 1 : 0);
    arena_.take(center, backward ? width : 0);
    arena_.take(center_sum, backward ? width : 0);
    for (Element** part : {&prefix_blocks, &suffix_blocks}) arena_.take(*part, (blocks + 1) * width);
    arena_.take(tasks, blocks + 1 + rows / kTaskLookups);
  }

  Arena arena_;
};

// ---------------------------------------------------------------- one day
// Pointers to the rows of the day. share, share_weight and orders are null if nothing is saved.
template <class Element>
struct Forward {
  const Element *query, *key, *value, *residual;
  Element *out, *share, *share_weight;
  int32_t* orders[2];
};

template <class Element>
struct Backward {
  const Element *grad, *query, *key, *value, *residual, *out, *share, *share_weight;
  const int32_t* orders[2];
  Element *grad_query, *grad_key, *grad_value;
};

template <class Element>
class Day {
 public:
  Day(Workspace<Element>& space, int64_t rows, int64_t width, double slope, bool shared)
      : w_(space), n_(rows), width_(width), slope_(static_cast<Element>(slope)), shared_(shared) {}

  void run(const Forward<Element>& day) {
    if (!has_result(day.key)) return spoil(day);
    each(2, 1, [&](int64_t begin, int64_t end) {
      for (int64_t side = begin; side < end; ++side) sort(side, side == 0 ? day.key : day.query);
    });
    weigh();
    place_queries(day.share_weight);
    const RunningSums<Element> sums{n_,       width_,   day.value,        w_.orders[0],
                                    w_.below, w_.above, w_.prefix_blocks, w_.suffix_blocks};
    sum_up(sums);
    const AttendJob<Element> job{
        {sums, w_.tasks, w_.orders[1], w_.position, w_.below_factor, w_.above_factor},
        day.residual,
        w_.share_weight,
        day.out,
        day.share,
        past_caches({day.out, day.share})};
    const auto kernel = cpu_kernels<Element>().attend;
    each(split_lookups(), 4, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
    if (day.orders[0] == nullptr) return;
    for (int side = 0; side < 2; ++side) std::memcpy(day.orders[side], w_.orders[side], sizeof(int32_t) * n_);
  }

  void run(const Backward<Element>& day) {
    if (!has_result(day.key)) return spoil(day);
    for (int side = 0; side < 2; ++side) std::memcpy(w_.orders[side], day.orders[side], sizeof(int32_t) * n_);
    each(n_, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        w_.keys[p] = day.key[w_.orders[0][p]];
        w_.queries[p] = sane(day.query[w_.orders[1][p]]);
      }
    });
    weigh();
    place_queries(nullptr);
    find_center(day);
    grad_queries(day);
    place_keys();
    sum_scalars();
    const RunningSums<Element> sums{n_,
                                    width_,
                                    day.grad,
                                    w_.orders[1],
                                    w_.above_factor,
                                    w_.below_factor,
                                    w_.prefix_blocks,
                                    w_.suffix_blocks};
    sum_up(sums);
    const AttendBackwardJob<Element> job{{sums, w_.tasks, w_.orders[0], w_.position, w_.above, w_.below},
                                         day.value,
                                         w_.center,
                                         day.grad_value,
                                         past_caches({day.grad_value}),
                                         w_.prefix_dot,
                                         w_.suffix_dot};
    const auto kernel = cpu_kernels<Element>().attend_backward;
    each(split_lookups(), 4, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
    grad_keys(day.grad_key);
  }

 private:
  static constexpr Element kNan = std::numeric_limits<Element>::quiet_NaN();
  static constexpr Element kInfinity = std::numeric_limits<Element>::infinity();

  // Calls body(begin, end) for [0, count): with all threads if they share the day, else in one call.
  template <class Body>
  void each(int64_t count, int64_t grain, const Body& body) const {
    if (shared_) {
      parallel_for(count, grain, body);
    } else if (count > 0) {
      body(0, count);
    }
  }

  // Returns whether rows are written with non-temporal stores: if they do not fit in the caches and consist
  // of whole cache lines.
  bool past_caches(std::initializer_list<const Element*> written) const {
    constexpr int64_t kLine = 64;
    const int64_t row = sizeof(Element) * width_;
    const auto on_lines = [](const Element* rows) { return reinterpret_cast<uintptr_t>(rows) % kLine == 0; };
    return n_ * row >= kPastCachesBytes && row % kLine == 0 && std::ranges::all_of(written, on_lines);
  }

  // A query that is not finite cannot be sorted. It becomes -inf, which sorts it after all other queries and
  // marks it: a query of -inf has no result either.
  static Element sane(Element query) { return std::isfinite(query) ? query : -kInfinity; }

  // Returns false if the dense softmax is NaN in every row: a key is NaN or +inf, no key is above -inf, or a
  // key of -inf is multiplied by a slope of 0.
  bool has_result(const Element* key) const {
    Element highest = -kInfinity, lowest = kInfinity;
    bool numbers = true;
    for (int64_t j = 0; j < n_; ++j) {
      numbers &= key[j] == key[j];
      highest = std::max(highest, key[j]);
      lowest = std::min(lowest, key[j]);
    }
    return numbers && highest < kInfinity && highest > -kInfinity && (lowest > -kInfinity || slope_ > 0);
  }

  // Sets all results to NaN.
  void spoil(const Forward<Element>& day) const {
    std::fill_n(day.out, n_ * width_, kNan);
    if (day.orders[0] == nullptr) return;
    std::fill_n(day.share, n_ * width_, kNan);
    std::fill_n(day.share_weight, n_, kNan);
    for (int32_t* order : day.orders) {
      for (int64_t p = 0; p < n_; ++p) order[p] = static_cast<int32_t>(p);
    }
  }

  void spoil(const Backward<Element>& day) const {
    std::fill_n(day.grad_query, n_, kNan);
    std::fill_n(day.grad_key, n_, kNan);
    std::fill_n(day.grad_value, n_ * width_, kNan);
  }

  // Sorts side 0, the keys, in ascending order, or side 1, the queries, in descending order.
  void sort(int64_t side, const Element* scores) {
    SortEntry<Element>* entries = w_.entries[side][0];
    const SortBits<Element> inversion = side == 0 ? 0 : ~SortBits<Element>(0);
    for (int64_t i = 0; i < n_; ++i) {
      const Element score = side == 0 ? scores[i] : sane(scores[i]);
      entries[i] = {sort_bits(score) ^ inversion, static_cast<int32_t>(i)};
    }
    entries = radix_sort<Element>(entries, w_.entries[side][1], n_);
    Element* const sorted = side == 0 ? w_.keys : w_.queries;
    for (int64_t p = 0; p < n_; ++p) {
      sorted[p] = sorted_value<Element>(entries[p].bits ^ inversion);
      w_.orders[side][p] = entries[p].row;
    }
  }

  // Computes the weights of the sorted keys relative to the highest key, and their running sums.
  void weigh() {
    const Element highest = w_.keys[n_ - 1];
    const auto exp_of = cpu_kernels<Element>().exp_in_place;
    each(n_, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        w_.above[p] = w_.keys[p] - highest;
        w_.below[p] = slope_ > 0 ? slope_ * w_.above[p] : 0;  // the difference may be infinite
      }
      exp_of(w_.above, begin, end);
      exp_of(w_.below, begin, end);
    });
    w_.prefix[0] = w_.suffix[n_] = 0;
    for (int64_t p = 0; p < n_; ++p) {
      w_.prefix[p + 1] = w_.prefix[p] + w_.below[p];
      w_.suffix[n_ - 1 - p] = w_.suffix[n_ - p] + w_.above[n_ - 1 - p];
    }
  }

  // Computes for each sorted query the first key with a score above 0, the factors of the two sums, and the
  // weight of the smaller part. Also writes this weight to `share_weight`, by row, unless it is null.
  void place_queries(Element* share_weight) {
    int64_t at = 0;
    for (int64_t l = 0; l < n_; ++l) {
      const Element bend = -w_.queries[l];
      while (at < n_ && !(w_.keys[at] > bend)) ++at;
      w_.position[l] = static_cast<int32_t>(at);
    }
    const Element highest = w_.keys[n_ - 1];
    const auto exp_of = cpu_kernels<Element>().exp_in_place;
    each(n_, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t l = begin; l < end; ++l) {
        const Element top = w_.queries[l] + highest;
        w_.above_factor[l] = top > 0 ? 1 : 0;
        w_.below_factor[l] = w_.queries[l] > -kInfinity ? (slope_ - 1) * std::max(top, Element(0)) : kNan;
      }
      exp_of(w_.below_factor, begin, end);
      for (int64_t l = begin; l < end; ++l) {
        const int32_t k = w_.position[l];
        const double above = w_.above_factor[l] * w_.suffix[k], below = w_.below_factor[l] * w_.prefix[k];
        const double scale = 1 / (above + below);
        w_.above_factor[l] = static_cast<Element>(w_.above_factor[l] * scale);
        w_.below_factor[l] = static_cast<Element>(w_.below_factor[l] * scale);
        if (share_weight == nullptr) continue;
        w_.share_weight[l] = static_cast<Element>(above <= below ? above * scale : -below * scale);
        share_weight[w_.orders[1][l]] = w_.share_weight[l];
      }
    });
  }

  // Computes the center of the day. The weights of a row sum to 1, so subtracting one vector from all values
  // does not change the gradients of the scores, but removes the rounding of the part that the values share
  // with this vector. The center is the mean result of rows at even distances among the sorted queries. It is
  // near the mean value if attention is spread, and near the value that all rows attend to if it is not.
  void find_center(const Backward<Element>& day) {
    const int64_t samples = std::min(n_, kSumRows);
    std::fill_n(w_.center_sum, width_, 0.0);
    int64_t rows = 0;
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t l = i * n_ / samples;
      if (!(w_.queries[l] > -kInfinity)) continue;  // the row has no result
      const int64_t at = w_.orders[1][l] * width_;
      for (int64_t c = 0; c < width_; ++c)
        w_.center_sum[c] += day.out[at + c] - (day.residual != nullptr ? day.residual[at + c] : 0);
      ++rows;
    }
    for (int64_t c = 0; c < width_; ++c)
      w_.center[c] = static_cast<Element>(w_.center_sum[c] / std::max<int64_t>(rows, 1));
  }

  // Computes the gradients of the queries. The weights of a row sum to 1, so the gradients of its scores sum
  // to 0: the sum above 0 is minus the sum below 0, and one of them gives both.
  void grad_queries(const Backward<Element>& day) {
    const RowDotsJob<Element> job{width_,           day.grad,  day.out,     day.residual, day.share,
                                  day.share_weight, w_.center, w_.mean_dot, w_.share_dot};
    const auto kernel = cpu_kernels<Element>().row_dots;
    each(n_, 256, [&](int64_t begin, int64_t end) {
      kernel(job, begin, end);
      for (int64_t r = begin; r < end; ++r)
        day.grad_query[r] = (1 - slope_) * (w_.share_dot[r] - w_.mean_dot[r] * day.share_weight[r]);
    });
  }

  // Computes for each sorted key how many of the sorted queries have a score above 0 with it.
  void place_keys() {
    int64_t at = 0;
    for (int64_t p = 0; p < n_; ++p) {
      const Element bend = -w_.keys[p];
      while (at < n_ && w_.queries[at] > bend) ++at;
      w_.position[p] = static_cast<int32_t>(at);
    }
  }

  // Computes the running sums of the mean gradients of the rows, weighted like the gradients, and of the
  // weights.
  void sum_scalars() {
    w_.prefix[0] = w_.suffix[n_] = w_.prefix_mass[0] = w_.suffix_mass[n_] = 0;
    for (int64_t l = 0; l < n_; ++l) {
      const int64_t m = n_ - 1 - l;
      const double above = w_.above_factor[l], below = w_.below_factor[m];
      w_.prefix[l + 1] = w_.prefix[l] + above * w_.mean_dot[w_.orders[1][l]];
      w_.prefix_mass[l + 1] = w_.prefix_mass[l] + above;
      w_.suffix[m] = w_.suffix[m + 1] + below * w_.mean_dot[w_.orders[1][m]];
      w_.suffix_mass[m] = w_.suffix_mass[m + 1] + below;
    }
  }

  // Computes the gradients of the keys. The gradients of all scores of a row, before the slope of LeakyReLU,
  // sum to 0, and so do those of the keys of a day. Rounding leaves a sum that is not 0, the excess. If all
  // scores have the same sign, the exact gradient of a shift of all keys is 0, and the excess would move all
  // keys in one direction at every step of training. It is therefore subtracted from the mean gradients of
  // the rows in proportion to their mass.
  void grad_keys(Element* grad_key) {
    double excess = 0, mass = 0;
    for (int64_t p = 0; p < n_; ++p) {
      const int32_t at = w_.position[p];
      const double above = w_.above[p], below = w_.below[p];
      excess += w_.prefix_dot[p] - above * w_.prefix[at] + w_.suffix_dot[p] - below * w_.suffix[at];
      mass += above * w_.prefix_mass[at] + below * w_.suffix_mass[at];
    }
    const double shift = excess / mass;
    for (int64_t p = 0; p < n_; ++p) {
      const int32_t at = w_.position[p];
      const double above = w_.prefix_dot[p] - w_.above[p] * (w_.prefix[at] + shift * w_.prefix_mass[at]);
      const double below = w_.suffix_dot[p] - w_.below[p] * (w_.suffix[at] + shift * w_.suffix_mass[at]);
      grad_key[w_.orders[0][p]] = static_cast<Element>(above + slope_ * below);
    }
  }

  // Computes the sums of the blocks, then the sums before and after each block. The latter are in float64,
  // because the rounding error of a float32 sum would grow over many blocks.
  void sum_up(const RunningSums<Element>& sums) {
    const int64_t blocks = (n_ + kSumRows - 1) / kSumRows;
    const auto kernel = cpu_kernels<Element>().block_sums;
    each(blocks, 16, [&](int64_t begin, int64_t end) { kernel(sums, begin, end); });
    const int64_t last = n_ / kSumRows;  // block of the position after the last row; it may be empty
    for (Element* sums_of_blocks : {w_.prefix_blocks, w_.suffix_blocks}) {
      if (last == blocks) std::fill_n(sums_of_blocks + last * width_, width_, Element(0));
    }
    constexpr int64_t kColumns = 16;
    for (int64_t first = 0; first < width_; first += kColumns) {
      const int64_t columns = std::min(kColumns, width_ - first);
      double before[kColumns] = {}, behind[kColumns] = {};
      for (int64_t b = 0; b <= last; ++b) {
        Element* __restrict from_front = w_.prefix_blocks + b * width_ + first;
        Element* __restrict from_back = w_.suffix_blocks + (last - b) * width_ + first;
        for (int64_t c = 0; c < columns; ++c) {
          const Element front = from_front[c], back = from_back[c];
          from_front[c] = static_cast<Element>(before[c]);
          from_back[c] = static_cast<Element>(behind[c]);
          before[c] += front;
          behind[c] += back;
        }
      }
    }
  }

  // Divides the lookups into tasks whose positions are in one block, and returns the number of tasks.
  int64_t split_lookups() {
    int64_t tasks = 0;
    for (int64_t begin = 0, end; begin < n_; begin = end) {
      const int64_t block = w_.position[begin] / kSumRows;
      const int64_t most = std::min(n_, begin + kTaskLookups);
      for (end = begin + 1; end < most && w_.position[end] / kSumRows == block; ++end) {
      }
      w_.tasks[tasks++] = {block, begin, end};
    }
    return tasks;
  }

  Workspace<Element>& w_;
  int64_t n_, width_;
  Element slope_;
  bool shared_;
};

}  // namespace qfast
