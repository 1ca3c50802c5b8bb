// Arguments of the additive attention kernels, for one day of one head. Shared by host code and all CPU
// instruction sets. Row numbers are relative to the first row of the day.
#pragma once

#include <cstdint>

namespace qfast {

constexpr int64_t kSumRows = 64;  // rows of a block; sums over the blocks are in float64

// Two weighted running sums over the rows in sorted order: prefix sums from the front, suffix sums from the
// back.
template <class Element>
struct RunningSums {
  int64_t count;                 // sorted rows
  int64_t width;                 // H
  const Element* rows;           // [count, H]
  const int32_t* order;          // [count]: row at each sorted position
  const Element* prefix_weight;  // [count], by sorted position
  const Element* suffix_weight;  // [count], by sorted position
  Element* prefix_blocks;        // [blocks, H]: sums of the blocks, then of all blocks before each
  Element* suffix_blocks;        // [blocks, H]: sums of the blocks, then of all blocks after each
};

// Lookups [begin, end) whose positions are in one block.
struct LookupTask {
  int64_t block, begin, end;
};

// A lookup reads prefix_factor * (prefix sum of the rows before its position) and suffix_factor * (suffix sum
// of the other rows).
template <class Element>
struct Lookups {
  RunningSums<Element> sums;
  const LookupTask* tasks;
  const int32_t* order;          // [count]: row of each lookup
  const int32_t* position;       // [count]: 0 to count, in ascending order
  const Element* prefix_factor;  // [count], by lookup
  const Element* suffix_factor;  // [count], by lookup
};

// out = residual + prefix part + suffix part. share is the suffix part or minus the prefix part.
template <class Element>
struct AttendJob {
  Lookups<Element> lookups;
  const Element* residual;      // [count, H] or null
  const Element* share_weight;  // [count], by lookup; its sign bit selects the part
  Element* out;                 // [count, H]
  Element* share;               // [count, H] or null
  bool past_caches;             // out and share are written with non-temporal stores
};

// grad_value = prefix part + suffix part. The products of the two parts with value - center are needed for
// the gradients of the keys.
template <class Element>
struct AttendBackwardJob {
  Lookups<Element> lookups;
  const Element* value;   // [count, H]
  const Element* center;  // [H]
  Element* grad_value;    // [count, H]
  bool past_caches;       // grad_value is written with non-temporal stores
  Element* prefix_dot;    // [count], by lookup
  Element* suffix_dot;    // [count], by lookup
};

// For each row: mean_dot = grad . (out - residual - center) and share_dot = grad . (share - share_weight *
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

// grad_hidden += grad + grad_query w_query + grad_key w_key. block_sums are the sums of grad_query hidden and
// of grad_key hidden over each block.
template <class Element>
struct ScoresBackwardJob {
  int64_t rows, width;
  const Element* hidden;
  const Element* weight;      // [2, H]
  const Element* grad;        // [rows, H]
  const Element* grad_query;  // [rows]
  const Element* grad_key;    // [rows]
  Element* grad_hidden;       // [rows, H], in place
  Element* block_sums;        // [blocks of kSumRows rows, 2, H]
};

}  // namespace qfast
