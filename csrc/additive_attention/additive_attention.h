// Arguments of the additive attention kernels, shared by host code and the CPU instruction sets. All of them
// concern one day of one head; row numbers count from the day's first row.
#pragma once

#include <cstdint>

namespace qfast {

constexpr int64_t kSumRows = 64;  // rows of a block: summed by themselves, then carried on in float64

// Two weighted sums over the rows in sorted order, one from the front and one from the back.
template <class Element>
struct RunningSums {
  int64_t count;                 // sorted rows
  int64_t width;                 // H
  const Element* rows;           // [count, H]
  const int32_t* order;          // [count]: row at each sorted position
  const Element* prefix_weight;  // [count], by sorted position
  const Element* suffix_weight;  // [count], by sorted position
  Element* prefix_blocks;        // [blocks, H]: sums of the blocks, then of all blocks before each
  Element* suffix_blocks;        // [blocks, H]: sums of the blocks, then of all blocks behind each
};

// Lookups [begin, end) whose positions lie in one block.
struct LookupTask {
  int64_t block, begin, end;
};

// Reads prefix_factor * (sum of the rows before its position) and suffix_factor * (sum of the others).
template <class Element>
struct Lookups {
  RunningSums<Element> sums;
  const LookupTask* tasks;
  const int32_t* order;          // [count]: row of each lookup
  const int32_t* position;       // [count]: 0 to count, never falling
  const Element* prefix_factor;  // [count], by lookup
  const Element* suffix_factor;  // [count], by lookup
};

// out = residual + both parts; share = the part of the suffix, or minus that of the prefix.
template <class Element>
struct AttendJob {
  Lookups<Element> lookups;
  const Element* residual;      // [count, H] or null
  const Element* share_weight;  // [count], by lookup: its sign bit chooses the part
  Element* out;                 // [count, H]
  Element* share;               // [count, H] or null
  bool past_caches;             // whether out and share are written around the caches
};

// grad_value = both parts; their products with value - center go into the gradient of the keys.
template <class Element>
struct AttendBackwardJob {
  Lookups<Element> lookups;
  const Element* value;   // [count, H]
  const Element* center;  // [H]
  Element* grad_value;    // [count, H]
  bool past_caches;       // whether grad_value is written around the caches
  Element* prefix_dot;    // [count], by lookup
  Element* suffix_dot;    // [count], by lookup
};

// Row by row: mean_dot = grad . (out - residual - center), share_dot = grad . (share - share_weight *
// center).
template <class Element>
struct RowDotsJob {
  int64_t width;
  const Element* grad;
  const Element* out;
  const Element* residual;  // or null
  const Element* share;
  const Element* share_weight;  // [count]
  const Element* center;        // [H]
  Element* mean_dot;            // [count]
  Element* share_dot;           // [count]
};

// scores[s, r] = weight[s] . hidden[r] + bias[s], s = 0, 1.
template <class Element>
struct ScoresJob {
  int64_t rows, width;
  const Element* hidden;
  const Element* weight;  // [2, H]
  const Element* bias;    // [2]
  Element* scores;        // [2, rows]
};

// grad_hidden += grad + of_query w_query + of_key w_key; block sums of of_query hidden and of_key hidden.
template <class Element>
struct ScoresBackwardJob {
  int64_t rows, width;
  const Element* hidden;
  const Element* weight;    // [2, H]
  const Element* grad;      // [rows, H]
  const Element* of_query;  // [rows]
  const Element* of_key;    // [rows]
  Element* grad_hidden;     // [rows, H], in place
  Element* block_sums;      // [blocks of kSumRows rows, 2, H]
};

}  // namespace qfast
