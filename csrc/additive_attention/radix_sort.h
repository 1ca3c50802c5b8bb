// Sorting scores of one day: least significant digit first, stable, so that equal scores keep their rows'
// order and the result is the same every time.
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

// Unsigned numbers in the order of the floating ones (finite or infinite): negative ones upside down.
template <class Element>
SortBits<Element> sort_bits(Element value) {
  constexpr SortBits<Element> sign = SortBits<Element>(1) << (8 * sizeof(Element) - 1);
  const auto bits = std::bit_cast<SortBits<Element>>(value);
  return bits & sign ? ~bits : bits | sign;
}

template <class Element>
Element sorted_value(SortBits<Element> bits) {
  constexpr SortBits<Element> sign = SortBits<Element>(1) << (8 * sizeof(Element) - 1);
  return std::bit_cast<Element>(bits & sign ? bits & ~sign : ~bits);
}

// Sorts `entries` ascending with the help of `other`, of the same size; returns where the result lies. Digits
// that all entries share (often those of sign and exponent) cost nothing.
template <class Element>
SortEntry<Element>* radix_sort(SortEntry<Element>* entries, SortEntry<Element>* other, int64_t count) {
  constexpr int64_t kInsertion = 48;  // below, counting digits costs more than the comparisons
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
