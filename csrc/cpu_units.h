// Division of many small items of work among threads. Host only.
#pragma once

#include <algorithm>
#include <vector>

#include "common.h"

namespace qfast {

// Item i consists of the units first_unit[i] to first_unit[i + 1]. Divides the units of all items among the
// threads, at least `grain` for each. Calls body(item, begin, end), with units counted from the start of the
// item.
template <class Body>
void share_units(const std::vector<int64_t>& first_unit, int64_t grain, const Body& body) {
  parallel_for(first_unit.back(), grain, [&](int64_t begin, int64_t end) {
    std::size_t item = std::upper_bound(first_unit.begin(), first_unit.end(), begin) - first_unit.begin() - 1;
    for (; begin < end; ++item) {
      const int64_t item_end = std::min(end, first_unit[item + 1]);
      if (begin < item_end) body(item, begin - first_unit[item], item_end - first_unit[item]);
      begin = item_end;
    }
  });
}

}  // namespace qfast
