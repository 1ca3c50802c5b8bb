// Builds the tables of a WindowIndex from instrument and date codes, on the CPU and in one thread. It runs
// once per panel, in O(R + number of dates): 8 bytes read and 12 written per row, plus a table of 4 bytes per
// date. Sparse date codes are sorted, in O(R log R).
#include "window_index/window_index.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "message.h"

namespace qfast {
namespace {

// Largest size of the table of dates, which needs 4 bytes per entry: 16 bytes per row, or 4 MiB.
constexpr int64_t kTableEntriesPerRow = 4;
constexpr int64_t kSmallTable = 1 << 20;

void check_codes(const char* name, const int32_t* codes, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    QFAST_CHECK(codes[r] >= 0, name, "[", r, "] is ", codes[r],
                ": codes are not negative. Remedy: drop rows without a key.");
  }
}

void check_order(const int32_t* instruments, const int32_t* dates, int64_t rows) {
  for (int64_t r = 1; r < rows; ++r) {
    const bool same_instrument = instruments[r] == instruments[r - 1];
    if (same_instrument ? dates[r] > dates[r - 1] : instruments[r] > instruments[r - 1]) continue;
    const bool repeats = same_instrument && dates[r] == dates[r - 1];
    QFAST_CHECK(false, "row ", r, " (instrument code ", instruments[r], ", date code ", dates[r], ") ",
                repeats ? "repeats the key of" : "sorts before", " row ", r - 1, " (instrument code ",
                instruments[r - 1], ", date code ", dates[r - 1],
                "); rows must ascend by (instrument, date) without duplicates. Remedy: sort_index() and drop "
                "duplicates.");
  }
}

// Returns whether check_codes and check_order accept all rows. It has no branches, so the compiler vectorizes
// it.
bool valid(const int32_t* instruments, const int32_t* dates, int64_t rows) {
  if (rows == 0) return true;
  int32_t signs = instruments[0] | dates[0], ascend = -1;
  for (int64_t r = 1; r < rows; ++r) {
    signs |= instruments[r] | dates[r];
    const int32_t next_instrument = -static_cast<int32_t>(instruments[r] > instruments[r - 1]);
    const int32_t same_instrument = -static_cast<int32_t>(instruments[r] == instruments[r - 1]);
    const int32_t later = -static_cast<int32_t>(dates[r] > dates[r - 1]);
    ascend &= next_instrument | (same_instrument & later);
  }
  return signs >= 0 && ascend != 0;
}

// Calls body(row, code) for every live row.
template <class Body>
void each_live(const int32_t* dates, const bool* live, int64_t rows, const Body& body) {
  for (int64_t r = 0; r < rows; ++r) {
    if (live == nullptr || live[r]) body(r, dates[r]);
  }
}

// position[r] = number of dates before the date of row r on which at least one live row exists. Dead rows are
// not written. Codes are ranks of dates, so a table indexed by code is small. Sparse codes, for example
// timestamps, are sorted, because their table would need gigabytes.
void rank_dates(const int32_t* dates, const bool* live, int64_t rows, int32_t* position) {
  int32_t last = -1;
  for (int64_t r = 0; r < rows; ++r) last = std::max(last, dates[r]);
  if (last > kTableEntriesPerRow * rows + kSmallTable) {
    std::vector<int32_t> codes;
    each_live(dates, live, rows, [&](int64_t, int32_t code) { codes.push_back(code); });
    std::sort(codes.begin(), codes.end());
    codes.erase(std::unique(codes.begin(), codes.end()), codes.end());
    each_live(dates, live, rows, [&](int64_t r, int32_t code) {
      const auto at = std::lower_bound(codes.begin(), codes.end(), code);
      position[r] = static_cast<int32_t>(at - codes.begin());
    });
    return;
  }
  std::vector<int32_t> rank(static_cast<size_t>(last) + 1, 0);
  each_live(dates, live, rows, [&](int64_t, int32_t code) { rank[code] = 1; });
  int32_t dates_before = 0;
  for (int32_t& entry : rank) {
    const int32_t has_live_row = entry;
    entry = dates_before;
    dates_before += has_live_row;
  }
  each_live(dates, live, rows, [&](int64_t r, int32_t code) { position[r] = rank[code]; });
}

// The tables of a panel whose rows are all live.
void count_runs(const int32_t* instruments, const int32_t* position, int64_t rows, int32_t* back,
                int32_t* run) {
  int32_t length = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t same = r > 0 && instruments[r - 1] == instruments[r];
    const int32_t follows = same & static_cast<int32_t>(r > 0 && position[r - 1] + 1 == position[r]);
    back[r] = same;
    length = (length + 1) & -follows;
    run[r] = length;
  }
}

}  // namespace

void build_window_index(const int32_t* instruments, const int32_t* dates, const bool* live, int64_t rows,
                        int32_t* position, int32_t* back, int32_t* run) {
  QFAST_CHECK(rows <= std::numeric_limits<int32_t>::max(), "the panel has ", rows, " rows, expected at most ",
              std::numeric_limits<int32_t>::max(),
              " because the tables are int32. Remedy: split the panel by instrument.");
  if (!valid(instruments, dates, rows)) {
    check_codes("instrument_codes", instruments, rows);
    check_codes("date_codes", dates, rows);
    check_order(instruments, dates, rows);
  }
  rank_dates(dates, live, rows, position);
  if (live == nullptr) return count_runs(instruments, position, rows, back, run);
  int64_t previous = -1;  // the last live row before r
  for (int64_t r = 0; r < rows; ++r) {
    back[r] = 0;
    run[r] = 0;
    if (!live[r]) {
      position[r] = -1;
      continue;
    }
    if (previous >= 0 && instruments[previous] == instruments[r]) {
      back[r] = static_cast<int32_t>(r - previous);
      if (back[r] == 1 && position[previous] + 1 == position[r]) run[r] = run[previous] + 1;
    }
    previous = r;
  }
}

}  // namespace qfast
