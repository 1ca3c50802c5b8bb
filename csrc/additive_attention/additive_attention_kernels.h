// CPU kernels of additive attention. docs/attention.md contains the mathematics. The file is compiled
// once per instruction set; cpu_isa_begin.h lists the language features that it may use.
//
// Columns are computed in panels of up to four vectors whose sums stay in registers. A thread owns whole
// blocks of sorted rows (block_sums) or whole tasks of lookups (attend, attend_backward), so every sum has a
// fixed order. Saved for backward: the sort orders, the smaller part of each row's sum, and its weight.
//
// A row of H elements is read three times (twice from memory, once from the caches) and written once, or
// twice if gradients are needed, for about 10 H flops. The kernels are bound by the caches for a few thousand
// rows. For more rows they are bound by memory latency, so they prefetch rows.
#pragma once

#include "matrix_tiles.h"
#include "simd.h"

namespace {

// GCC considers a function that only prefetches to have no effect, and removes its calls unless it is inlined
// first.
#define QFAST_INLINE_LAMBDA __attribute__((always_inline))

constexpr int64_t kRowsAhead = 8;

// W vectors of columns. If the length of a row is not a multiple of a vector, the last vector overlaps the
// one before it, and their common columns are computed twice with the same result. A row shorter than a
// vector (kWhole is false) is one partial vector.
template <class Element, int W, bool kWhole>
struct Panel {
  static constexpr int vectors = W;
  int64_t at[W];
  int64_t count;
  Integers<Element> fresh;  // lanes of the last vector that no other vector contains

  Panel(int64_t first, int64_t width) : count(kWhole ? kLanes<Element> : width) {
    for (int w = 0; w < W; ++w) {
      const int64_t column = (first + w) * kLanes<Element>, last = width - kLanes<Element>;
      at[w] = !kWhole ? 0 : column < last ? column : last;
      for (int64_t lane = 0; lane < kLanes<Element>; ++lane) fresh[lane] = at[w] + lane >= column ? -1 : 0;
    }
  }

  QFAST_INLINE_MEMBER Vector<Element> read(const Element* row, int w) const {
    return load<Element>(row + at[w], kWhole ? kLanes<Element> : count);
  }
  QFAST_INLINE_MEMBER void write(Element* row, int w, Vector<Element> value) const {
    store<Element>(row + at[w], value, kWhole ? kLanes<Element> : count);
  }
  // Uses non-temporal stores of whole cache lines if `past` is true: the processor then does not read a row
  // before it is overwritten.
  QFAST_INLINE_MEMBER void write(Element* row, int w, Vector<Element> value, bool past) const {
#if defined(__x86_64__)
    if (past) {
      constexpr int kParts = sizeof(value) / 16;
      __m128i parts[kParts];
      __builtin_memcpy(parts, &value, sizeof(value));
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i)
        _mm_stream_si128(reinterpret_cast<__m128i*>(row + at[w]) + i, parts[i]);
      return;
    }
#endif
    write(row, w, value);
  }
  QFAST_INLINE_MEMBER void prefetch(const Element* row) const {
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) __builtin_prefetch(row + at[w]);
  }
  QFAST_INLINE_MEMBER void prefetch_to_write(Element* row) const {
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) __builtin_prefetch(row + at[w], 1);
  }
  // Sum of the products of W vectors. Each column is counted once.
  QFAST_INLINE_MEMBER Element sum(const Vector<Element> (&products)[W]) const {
    Vector<Element> total = (Vector<Element>)((Integers<Element>)products[W - 1] & fresh);
#pragma GCC unroll 4
    for (int w = 0; w < W - 1; ++w) total += products[w];
    Element lanes[kLanes<Element>];
    store<Element>(lanes, total, kLanes<Element>);
#pragma GCC unroll 4
    for (int64_t half = kLanes<Element> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
  }
};

// Calls body(panel, whether it is the first panel) for each panel of a row.
template <class Element, class Body>
QFAST_ALWAYS_INLINE void each_panel(int64_t width, const Body& body) {
  if (width < kLanes<Element>) return body(Panel<Element, 1, false>(0, width), true);
  const int64_t vectors = (width + kLanes<Element> - 1) / kLanes<Element>;
  int64_t v = 0;
  for (; v + 4 <= vectors; v += 4) body(Panel<Element, 4, true>(v, width), v == 0);
  if (v + 2 <= vectors) {
    body(Panel<Element, 2, true>(v, width), v == 0);
    v += 2;
  }
  if (v < vectors) body(Panel<Element, 1, true>(v, width), v == 0);
}

// The rows of a block in sorted order, read in the columns of a panel.
template <class Element, class P>
struct BlockRows {
  const RunningSums<Element>& sums;
  const P& panel;
  int64_t first, last;  // positions of the block

  BlockRows(const RunningSums<Element>& sums, const P& panel, int64_t block)
      : sums(sums), panel(panel), first(block * kSumRows), last(smaller(first + kSumRows, sums.count)) {}

  QFAST_INLINE_MEMBER const Element* at(int64_t j) const { return sums.rows + sums.order[j] * sums.width; }

  // Prefetches the row of the next block that corresponds to row j.
  QFAST_INLINE_MEMBER void prefetch_next_block(int64_t j) const {
    if (j + kSumRows < sums.count) panel.prefetch(at(j + kSumRows));
  }

  QFAST_INLINE_MEMBER void add(Vector<Element> (&total)[P::vectors], int64_t j, Element weight) const {
    const Element* const row = at(j);
#pragma GCC unroll 4
    for (int w = 0; w < P::vectors; ++w) total[w] += weight * panel.read(row, w);
  }
};

// suffixes[j - low] = after + sum of the weighted rows [j, last) of the block, for low <= j <= high.
template <class Element, class P>
QFAST_ALWAYS_INLINE void sum_suffixes(const BlockRows<Element, P>& rows, int64_t low, int64_t high,
                                      const Vector<Element> (&after)[P::vectors],
                                      Vector<Element> (*suffixes)[P::vectors]) {
  constexpr int W = P::vectors;
  Vector<Element> local[W] = {};
  int64_t j = rows.last;
  while (--j >= high) {
    rows.prefetch_next_block(j);
    rows.add(local, j, rows.sums.suffix_weight[j]);
  }
#pragma GCC unroll 4
  for (int w = 0; w < W; ++w) suffixes[high - low][w] = after[w] + local[w];
  for (; j >= low; --j) {
    rows.add(local, j, rows.sums.suffix_weight[j]);
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) suffixes[j - low][w] = after[w] + local[w];
  }
}

// Calls emit(lookup, offset of its row, prefix part, suffix part) for the lookups of a task. The parts are
// the sums of the block before and from each position, plus the sums of the other blocks. The suffix sums are
// stored from the highest position of the task down to the lowest, and read again in ascending order. Calls
// prefetch_row(offset of a row) kRowsAhead lookups in advance, to prefetch it, and prefetches the rows of the
// next block.
template <class Element, class P, class Prefetch, class Emit>
QFAST_ALWAYS_INLINE void each_lookup(const Lookups<Element>& job, const LookupTask& task, const P& panel,
                                     const Prefetch& prefetch_row, const Emit& emit) {
  constexpr int W = P::vectors;
  const RunningSums<Element>& sums = job.sums;
  const BlockRows<Element, P> rows(sums, panel, task.block);
  const int64_t low = job.position[task.begin], high = job.position[task.end - 1];
  Vector<Element> before[W], after[W], local[W] = {};
  Vector<Element> suffixes[kSumRows + 1][W];
#pragma GCC unroll 4
  for (int w = 0; w < W; ++w) {
    before[w] = panel.read(sums.prefix_blocks + task.block * sums.width, w);
    after[w] = panel.read(sums.suffix_blocks + task.block * sums.width, w);
  }
  sum_suffixes(rows, low, high, after, suffixes);
  int64_t j = rows.first;
  for (int64_t l = task.begin; l < task.end; ++l) {
    if (l + kRowsAhead < sums.count) prefetch_row(job.order[l + kRowsAhead] * sums.width);
    for (; j < job.position[l]; ++j) {
      rows.prefetch_next_block(j);
      rows.add(local, j, sums.prefix_weight[j]);
    }
    const Vector<Element>(&suffix)[W] = suffixes[job.position[l] - low];
    Vector<Element> prefix_part[W], suffix_part[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      prefix_part[w] = job.prefix_factor[l] * (before[w] + local[w]);
      suffix_part[w] = job.suffix_factor[l] * suffix[w];
    }
    emit(l, job.order[l] * sums.width, prefix_part, suffix_part);
  }
}

}  // namespace

// ---------------------------------------------------------------- running sums
// Computes the sums of blocks [begin, end) with both weights.
template <class Element>
void block_sums(const RunningSums<Element>& sums, int64_t begin, int64_t end) {
  each_panel<Element>(sums.width, [&](auto panel, bool) {
    constexpr int W = decltype(panel)::vectors;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kSumRows;
      const int64_t last = first + kSumRows < sums.count ? first + kSumRows : sums.count;
      Vector<Element> prefix[W] = {}, suffix[W] = {};
      for (int64_t j = first; j < last; ++j) {
        const int64_t ahead = j + kRowsAhead < sums.count ? j + kRowsAhead : j;
        panel.prefetch(sums.rows + sums.order[ahead] * sums.width);
        const Element* row = sums.rows + sums.order[j] * sums.width;
        const Element prefix_part = sums.prefix_weight[j], suffix_part = sums.suffix_weight[j];
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
          const Vector<Element> value = panel.read(row, w);
          prefix[w] += prefix_part * value;
          suffix[w] += suffix_part * value;
        }
      }
      for (int w = 0; w < W; ++w) {
        panel.write(sums.prefix_blocks + block * sums.width, w, prefix[w]);
        panel.write(sums.suffix_blocks + block * sums.width, w, suffix[w]);
      }
    }
  });
}

// Computes the results of tasks [begin, end).
template <class Element>
void attend(const AttendJob<Element>& job, int64_t begin, int64_t end) {
  const Lookups<Element>& lookups = job.lookups;
  each_panel<Element>(lookups.sums.width, [&](auto panel, bool) {
    constexpr int W = decltype(panel)::vectors;
    for (int64_t t = begin; t < end; ++t) {
      each_lookup(
          lookups, lookups.tasks[t], panel,
          [&](int64_t at) QFAST_INLINE_LAMBDA {
            if (!job.past_caches) panel.prefetch_to_write(job.out + at);
            if (!job.past_caches && job.share != nullptr) panel.prefetch_to_write(job.share + at);
            if (job.residual != nullptr) panel.prefetch(job.residual + at);
          },
          [&](int64_t l, int64_t at, const auto& prefix_part, const auto& suffix_part) {
#pragma GCC unroll 4
            for (int w = 0; w < W; ++w) {
              Vector<Element> out = prefix_part[w] + suffix_part[w];
              if (job.residual != nullptr) out += panel.read(job.residual + at, w);
              panel.write(job.out + at, w, out, job.past_caches);
            }
            if (job.share == nullptr) return;
            const bool below = __builtin_signbit(job.share_weight[l]);
#pragma GCC unroll 4
            for (int w = 0; w < W; ++w)
              panel.write(job.share + at, w, below ? -prefix_part[w] : suffix_part[w], job.past_caches);
          });
    }
  });
  if (job.past_caches) finish_stream();
}

// Computes the gradients of the values of tasks [begin, end), and their products with the values.
template <class Element>
void attend_backward(const AttendBackwardJob<Element>& job, int64_t begin, int64_t end) {
  const Lookups<Element>& lookups = job.lookups;
  each_panel<Element>(lookups.sums.width, [&](auto panel, bool is_first) {
    constexpr int W = decltype(panel)::vectors;
    for (int64_t t = begin; t < end; ++t) {
      each_lookup(
          lookups, lookups.tasks[t], panel,
          [&](int64_t at) QFAST_INLINE_LAMBDA {
            if (!job.past_caches) panel.prefetch_to_write(job.grad_value + at);
            panel.prefetch(job.value + at);
          },
          [&](int64_t l, int64_t at, const auto& prefix_part, const auto& suffix_part) {
            Vector<Element> prefix_products[W], suffix_products[W];
#pragma GCC unroll 4
            for (int w = 0; w < W; ++w) {
              panel.write(job.grad_value + at, w, prefix_part[w] + suffix_part[w], job.past_caches);
              const Vector<Element> value = panel.read(job.value + at, w) - panel.read(job.center, w);
              prefix_products[w] = value * prefix_part[w];
              suffix_products[w] = value * suffix_part[w];
            }
            job.prefix_dot[l] = (is_first ? Element(0) : job.prefix_dot[l]) + panel.sum(prefix_products);
            job.suffix_dot[l] = (is_first ? Element(0) : job.suffix_dot[l]) + panel.sum(suffix_products);
          });
    }
  });
  if (job.past_caches) finish_stream();
}

// ---------------------------------------------------------------- passes over rows in memory order
// Computes the two dot products of each row in [begin, end): of the gradient with the mean, and with the
// share.
template <class Element>
void row_dots(const RowDotsJob<Element>& job, int64_t begin, int64_t end) {
  each_panel<Element>(job.width, [&](auto panel, bool is_first) {
    constexpr int W = decltype(panel)::vectors;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * job.width;
      Vector<Element> mean_products[W], share_products[W];
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        const Vector<Element> grad = panel.read(job.grad + at, w);
        Vector<Element> mean = panel.read(job.out + at, w);
        if (job.residual != nullptr) mean -= panel.read(job.residual + at, w);
        const Vector<Element> center = panel.read(job.center, w);
        mean_products[w] = grad * (mean - center);
        share_products[w] = grad * (panel.read(job.share + at, w) - job.share_weight[r] * center);
      }
      job.mean_dot[r] = (is_first ? Element(0) : job.mean_dot[r]) + panel.sum(mean_products);
      job.share_dot[r] = (is_first ? Element(0) : job.share_dot[r]) + panel.sum(share_products);
    }
  });
}

// Computes the query and key scores of the hidden states in rows [begin, end).
template <class Element>
void hidden_scores(const ScoresJob<Element>& job, int64_t begin, int64_t end) {
  each_panel<Element>(job.width, [&](auto panel, bool is_first) {
    constexpr int W = decltype(panel)::vectors;
    for (int64_t r = begin; r < end; ++r) {
      Vector<Element> query[W], key[W];
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        const Vector<Element> hidden = panel.read(job.hidden + r * job.width, w);
        query[w] = hidden * panel.read(job.weight, w);
        key[w] = hidden * panel.read(job.weight + job.width, w);
      }
      Element* const scores[] = {job.scores + r, job.scores + job.rows + r};
      *scores[0] = (is_first ? job.bias[0] : *scores[0]) + panel.sum(query);
      *scores[1] = (is_first ? job.bias[1] : *scores[1]) + panel.sum(key);
    }
  });
}

// Computes the gradients of the scores for blocks [begin, end) of kSumRows rows each.
template <class Element>
void hidden_scores_backward(const ScoresBackwardJob<Element>& job, int64_t begin, int64_t end) {
  each_panel<Element>(job.width, [&](auto panel, bool) {
    constexpr int W = decltype(panel)::vectors;
    Vector<Element> weights[2][W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      weights[0][w] = panel.read(job.weight, w);
      weights[1][w] = panel.read(job.weight + job.width, w);
    }
    for (int64_t block = begin; block < end; ++block) {
      Vector<Element> sums[2][W] = {};
      const int64_t first = block * kSumRows;
      const int64_t last = first + kSumRows < job.rows ? first + kSumRows : job.rows;
      for (int64_t r = first; r < last; ++r) {
        const Element grad_query = job.grad_query[r], grad_key = job.grad_key[r];
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
          const int64_t at = r * job.width;
          const Vector<Element> hidden = panel.read(job.hidden + at, w);
          Vector<Element> added =
              panel.read(job.grad + at, w) + grad_query * weights[0][w] + grad_key * weights[1][w];
          if (w == W - 1) added = (Vector<Element>)((Integers<Element>)added & panel.fresh);
          panel.write(job.grad_hidden + at, w, panel.read(job.grad_hidden + at, w) + added);
          sums[0][w] += grad_query * hidden;
          sums[1][w] += grad_key * hidden;
        }
      }
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        panel.write(job.block_sums + 2 * block * job.width, w, sums[0][w]);
        panel.write(job.block_sums + (2 * block + 1) * job.width, w, sums[1][w]);
      }
    }
  });
}
