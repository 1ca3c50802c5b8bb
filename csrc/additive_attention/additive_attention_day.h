// Additive attention over the rows of one day: sort keys and queries, sum weighted values from both ends of
// the sorted keys, look the two sums up for each query; the backward does the same with keys and queries
// changed over. docs/attention.md has the mathematics, additive_attention_kernels.h the passes over rows.
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

constexpr int64_t kTaskLookups = 4 * kSumRows;  // most lookups of a task: they may all stand at one position
constexpr int64_t kHugeBytes = 4 << 20;
constexpr int64_t kPastCachesBytes = 16 << 20;

// ---------------------------------------------------------------- memory
// One piece of memory, handed out part by part; a first pass without memory counts what is needed.
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

// What the computation of one day needs, for up to `rows` rows; every array is [rows] unless it says more.
template <class Element>
struct Workspace {
  SortEntry<Element>* entries[2][2];     // keys, queries: the entries and the room to sort them into
  int32_t* orders[2];                    // sorted position -> row: keys ascending, queries descending
  Element *keys, *queries;               // the scores in these orders
  Element *above, *below;                // weights of the sorted keys on either side of the bend, at most 1
  Element *above_factor, *below_factor;  // of the sorted queries, divided by the row's sum of weights
  Element* share_weight;                 // by sorted query
  Element *mean_dot, *share_dot;         // by row
  Element *prefix_dot, *suffix_dot;      // by sorted key
  int32_t* position;                     // of each lookup
  double *prefix, *suffix;               // [rows + 1]: running sums of scalars, up to and from each position
  double *prefix_mass, *suffix_mass;     // [rows + 1], likewise
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
template <class Element>
struct Forward {  // pointers to the day's rows
  const Element *query, *key, *value, *residual;
  Element *out, *share, *share_weight;  // the last two null where nothing is kept
  int32_t* orders[2];                   // null where nothing is kept
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

  template <class Body>
  void each(int64_t count, int64_t grain, const Body& body) const {
    if (shared_) {
      parallel_for(count, grain, body);
    } else if (count > 0) {
      body(0, count);
    }
  }

  // Whether rows are written around the caches: where they are too many to stay in them, and whole lines.
  bool past_caches(std::initializer_list<const Element*> written) const {
    constexpr int64_t kLine = 64;
    const int64_t row = sizeof(Element) * width_;
    const auto on_lines = [](const Element* rows) { return reinterpret_cast<uintptr_t>(rows) % kLine == 0; };
    return n_ * row >= kPastCachesBytes && row % kLine == 0 && std::ranges::all_of(written, on_lines);
  }

  // Where a score is not a number its row has no place in the order. Last among the queries it disturbs no
  // other, and -inf marks it: a query of -inf has no result either.
  static Element sane(Element query) { return std::isfinite(query) ? query : -kInfinity; }

  // False where the dense softmax is NaN in every row: a key NaN or +inf, no key above -inf, or -inf times a
  // slope of 0.
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

  // Side 0: keys ascending; side 1: queries descending.
  void sort(int64_t side, const Element* scores) {
    SortEntry<Element>* entries = w_.entries[side][0];
    const SortBits<Element> turned = side == 0 ? 0 : ~SortBits<Element>(0);
    for (int64_t i = 0; i < n_; ++i) {
      const Element score = side == 0 ? scores[i] : sane(scores[i]);
      entries[i] = {sort_bits(score) ^ turned, static_cast<int32_t>(i)};
    }
    entries = radix_sort<Element>(entries, w_.entries[side][1], n_);
    Element* const sorted = side == 0 ? w_.keys : w_.queries;
    for (int64_t p = 0; p < n_; ++p) {
      sorted[p] = sorted_value<Element>(entries[p].bits ^ turned);
      w_.orders[side][p] = entries[p].row;
    }
  }

  // Weights of the sorted keys relative to the highest, and their running sums.
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

  // For each sorted query: the first key with a score above 0, the factors of the two sums, and the share of
  // the smaller (see the schema), also to `share_weight` by row if that is not null.
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

  // A row's weights sum to 1, so a vector taken off every value leaves the gradients of the scores as they
  // are, and takes the rounding of what it has in common with them off. That is the mean result of rows taken
  // evenly from the sorted queries: about the mean value where attention is spread, and the value that all
  // look at where it is not.
  void find_center(const Backward<Element>& day) {
    const int64_t taken = std::min(n_, kSumRows);
    std::fill_n(w_.center_sum, width_, 0.0);
    int64_t rows = 0;
    for (int64_t i = 0; i < taken; ++i) {
      const int64_t l = i * n_ / taken;
      if (!(w_.queries[l] > -kInfinity)) continue;  // without a result
      const int64_t at = w_.orders[1][l] * width_;
      for (int64_t c = 0; c < width_; ++c)
        w_.center_sum[c] += day.out[at + c] - (day.residual != nullptr ? day.residual[at + c] : 0);
      ++rows;
    }
    for (int64_t c = 0; c < width_; ++c)
      w_.center[c] = static_cast<Element>(w_.center_sum[c] / std::max<int64_t>(rows, 1));
  }

  // The softmax of a row sums to 1, so the gradients of its scores sum to 0: those above the bend to minus
  // those below it, and one of the two sums gives both.
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

  // For each sorted key: how many of the queries, descending, have a score above 0 with it.
  void place_keys() {
    int64_t at = 0;
    for (int64_t p = 0; p < n_; ++p) {
      const Element bend = -w_.keys[p];
      while (at < n_ && w_.queries[at] > bend) ++at;
      w_.position[p] = static_cast<int32_t>(at);
    }
  }

  // Running sums of the rows' mean gradients, as those of the gradients themselves, and of their weights.
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

  // The gradients of all scores of the day sum to 0 before the bend's slope, row by row. What rounding leaves
  // of that sum would push all keys the same way, step after step, where their true gradient is 0 (as long as
  // all scores lie on one side of the bend); so it is spread over the rows' mean gradients, and gone.
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

  // Sums of the blocks, then what lies before and behind each block, in float64: over many blocks a float32
  // sum would drift.
  void sum_up(const RunningSums<Element>& sums) {
    const int64_t blocks = (n_ + kSumRows - 1) / kSumRows;
    const auto kernel = cpu_kernels<Element>().block_sums;
    each(blocks, 16, [&](int64_t begin, int64_t end) { kernel(sums, begin, end); });
    const int64_t last = n_ / kSumRows;  // the block of the position behind the last row; it may be empty
    for (Element* of : {w_.prefix_blocks, w_.suffix_blocks}) {
      if (last == blocks) std::fill_n(of + last * width_, width_, Element(0));
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

  // Groups of lookups that share a block; returns how many.
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
