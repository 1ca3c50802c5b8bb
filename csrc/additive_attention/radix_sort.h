// Radix sort of the scores of one day, least significant digit first. The sort is stable: equal scores stay
// in the order of their rows, so the result is always the same.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace qfast {

template <class Element>
using SortBits = std::conditional_t<sizeof(Element) == 4, uint32_t, uint64_t>;

template <class Element>
struct SortEntry {
  SortBits<Element> bits;
  int32_t row;
};

// Converts a finite or infinite value to an unsigned number, in the same order. All bits of negative values
// are inverted.
template <class Element>
SortBits<Element> sort_bits(Element value) {
  constexpr SortBits<Element> sign = SortBits<Element>(1) << (8 * sizeof(Element) - 1);
  const auto bits = std::bit_cast<SortBits<Element>>(value);
  return bits & sign ? ~bits : bits | sign;
}

// The inverse of sort_bits.
template <class Element>
Element sorted_value(SortBits<Element> bits) {
  constexpr SortBits<Element> sign = SortBits<Element>(1) << (8 * sizeof(Element) - 1);
  return std::bit_cast<Element>(bits & sign ? bits & ~sign : ~bits);
}

// Sorts `entries` in ascending order. `other` is scratch of the same size. Returns the array that contains
// the result. Digits that are equal in all entries (often those of sign and exponent) are skipped.
template <class Element>
SortEntry<Element>* radix_sort(SortEntry<Element>* entries, SortEntry<Element>* other, int64_t count) {
  constexpr int64_t kInsertion = 48;  // for fewer entries, insertion sort is faster than counting digits
  if (count <= kInsertion) {
    for (int64_t i = 1; i < count; ++i) {
      const SortEntry<Element> entry = entries[i];
      int64_t j = i;
      for (; j > 0 && entries[j - 1].bits > entry.bits; --j) entries[j] = entries[j - 1];
      entries[j] = entry;
    }
    return entries;
  }
  constexpr int kDigits = sizeof(Element);
  std::array<std::array<uint32_t, 256>, kDigits> counts{};
  for (int64_t i = 0; i < count; ++i) {
    for (int digit = 0; digit < kDigits; ++digit) ++counts[digit][entries[i].bits >> (8 * digit) & 255];
  }
  for (int digit = 0; digit < kDigits; ++digit) {
    auto& begins = counts[digit];
    if (begins[entries[0].bits >> (8 * digit) & 255] == count) continue;
    uint32_t sum = 0;
    for (uint32_t& begin : begins) sum += std::exchange(begin, sum);
    for (int64_t i = 0; i < count; ++i) other[begins[entries[i].bits >> (8 * digit) & 255]++] = entries[i];
    std::swap(entries, other);
  }
  return entries;
}

}  // namespace qfast
