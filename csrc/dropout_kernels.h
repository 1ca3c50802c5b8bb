// Dropout with counters: each lane of a vector runs Philox (philox.h) for one element of four rows. This file
// is included inside the namespace of an instruction set.
#pragma once

#include "matrix_tiles.h"
#include "philox.h"

namespace {

typedef uint32_t word_vector __attribute__((vector_size(QFAST_VECTOR_BYTES)));
typedef uint64_t double_words __attribute__((vector_size(QFAST_VECTOR_BYTES)));
constexpr int64_t kWordLanes = QFAST_VECTOR_BYTES / 4;

// Computes the high and low halves of the 64-bit products of 32-bit words.
QFAST_ALWAYS_INLINE void multiply_words(word_vector x, uint32_t by, word_vector* high, word_vector* low) {
#if QFAST_VECTOR_BYTES == 64
  const __m512i factor = _mm512_set1_epi32(static_cast<int32_t>(by));
  // GCC 12 warns about undefined values in the form without maskz.
  const auto even = (double_words)_mm512_maskz_mul_epu32(0xFF, (__m512i)x, factor);
  const auto odd = (double_words)_mm512_maskz_mul_epu32(0xFF, (__m512i)((double_words)x >> 32), factor);
  *high = (word_vector)_mm512_mask_mov_epi32((__m512i)(even >> 32), 0xAAAA, (__m512i)odd);
  *low = (word_vector)_mm512_mask_mov_epi32((__m512i)even, 0xAAAA, (__m512i)(odd << 32));
#elif QFAST_VECTOR_BYTES == 32
  const __m256i factor = _mm256_set1_epi32(static_cast<int32_t>(by));
  const auto even = (double_words)_mm256_mul_epu32((__m256i)x, factor);
  const auto odd = (double_words)_mm256_mul_epu32((__m256i)((double_words)x >> 32), factor);
  *high = (word_vector)_mm256_blend_epi32((__m256i)(even >> 32), (__m256i)odd, 0xAA);
  *low = (word_vector)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xAA);
#else
  for (int64_t lane = 0; lane < kWordLanes; ++lane) {
    const uint64_t product = static_cast<uint64_t>(x[lane]) * by;
    (*high)[lane] = static_cast<uint32_t>(product >> 32);
    (*low)[lane] = static_cast<uint32_t>(product);
  }
#endif
}

// Computes philox() of the counters (channel + lane, position, convolution, group) in every lane.
QFAST_ALWAYS_INLINE void philox_lanes(uint64_t seed, uint32_t channel, uint32_t position,
                                      uint32_t convolution, uint32_t group, word_vector words[4]) {
  word_vector lane;
  for (uint32_t l = 0; l < kWordLanes; ++l) lane[l] = l;
  word_vector c0 = lane + channel, c1 = word_vector{} + position, c2 = word_vector{} + convolution,
              c3 = word_vector{} + group;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    word_vector high0, low0, high1, low1;
    multiply_words(c0, kPhiloxMultiply0, &high0, &low0);
    multiply_words(c2, kPhiloxMultiply1, &high1, &low1);
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += kPhiloxStep0;
    key1 += kPhiloxStep1;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Multiplies values[lane] by the scale, or by 0 if the word of the lane is below the threshold.
template <class Element>
QFAST_ALWAYS_INLINE void scale_or_drop(const DropoutRule& rule, word_vector words, Element* values,
                                       int64_t lanes) {
  const auto passes = words >= rule.threshold;
  if constexpr (sizeof(Element) == 4) {
    const Vector<Element> factor =
        passes ? Vector<Element>{} + static_cast<Element>(rule.scale) : Vector<Element>{};
    if (lanes == kWordLanes) {
      store<Element>(values, load<Element>(values, kWordLanes) * factor, kWordLanes);
    } else {
      store<Element>(values, load<Element>(values, lanes) * factor, lanes);
    }
  } else {
    for (int64_t lane = 0; lane < lanes; ++lane) values[lane] *= passes[lane] ? rule.scale : 0;
  }
}

// Position of elements [rows, columns] in the batch.
struct Place {
  int64_t first_row, first_channel;  // first_row is a multiple of 4, because four rows share a counter
  int32_t convolution, position;
};

// Applies dropout to values [rows, columns] with row stride `stride`.
template <class Element>
static void drop(const DropoutRule& rule, const Place& place, int64_t rows, int64_t columns, Element* values,
                 int64_t stride) {
  for (int64_t row = 0; row < rows; row += 4) {
    const int64_t group_rows = smaller(4, rows - row);
    for (int64_t j = 0; j < columns; j += kWordLanes) {
      word_vector words[4];
      philox_lanes(rule.seed, static_cast<uint32_t>(place.first_channel + j),
                   static_cast<uint32_t>(place.position), static_cast<uint32_t>(place.convolution),
                   static_cast<uint32_t>((place.first_row + row) / 4), words);
      const int64_t lanes = smaller(kWordLanes, columns - j);
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i)
        if (i < group_rows) scale_or_drop<Element>(rule, words[i], values + (row + i) * stride + j, lanes);
    }
  }
}

}  // namespace
