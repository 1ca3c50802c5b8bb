// Dropout with counters: each lane of a vector runs Philox (philox.h) for one element of four rows. This file
// is included inside the namespace of an instruction set.
#pragma once

#include "matrix_tiles.h"
#include "philox.h"

namespace {

typedef uint32_t word_vector __attribute__((vector_size(QFAST_VECTOR_BYTES)));
typedef uint64_t double_words __attribute__((vector_size(QFAST_VECTOR_BYTES)));
constexpr int64_t kWordLanes = QFAST_VECTOR_BYTES / 4;

// Multiplies the low halves of 64-bit words by a factor, whatever the high halves contain.
QFAST_ALWAYS_INLINE double_words multiply_low_halves(double_words x, uint32_t by) {
#if defined(__x86_64__) && QFAST_VECTOR_BYTES == 64
  // GCC 12 warns about undefined values in the form without maskz.
  return (double_words)_mm512_maskz_mul_epu32(0xFF, (__m512i)x, _mm512_set1_epi64(by));
#elif defined(__x86_64__) && QFAST_VECTOR_BYTES == 32
  return (double_words)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(by));
#elif defined(__x86_64__)
  return (double_words)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(by));
#else
  return (x & 0xFFFFFFFFu) * by;
#endif
}

// Computes philox() of the counters (channel, position, convolution, group) for the channels in the low
// halves of 64-bit words. The results are also low halves. The high halves may contain anything. A round then
// needs no shift to move 32-bit words to where the processor multiplies them.
QFAST_ALWAYS_INLINE void philox_halves(uint64_t seed, double_words channel, uint32_t position,
                                       uint32_t convolution, uint32_t group, double_words words[4]) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  // Three counters are the same in all lanes, so half of the first two rounds is computed for all lanes at
  // once.
  const uint64_t first = static_cast<uint64_t>(convolution) * kPhiloxMultiply1;
  const double_words product = multiply_low_halves(channel, kPhiloxMultiply0);
  const uint64_t second =
      static_cast<uint64_t>(static_cast<uint32_t>(first >> 32) ^ position ^ key0) * kPhiloxMultiply0;
  double_words c2 = (product >> 32) ^ (group ^ key1);
  key0 += kPhiloxStep0;
  key1 += kPhiloxStep1;
  double_words c1 = multiply_low_halves(c2, kPhiloxMultiply1);
  double_words c0 = (c1 >> 32) ^ (static_cast<uint32_t>(first) ^ key0);
  c2 = product ^ ((second >> 32) ^ key1);
  double_words c3 = double_words{} + second;
#pragma GCC unroll 8
  for (int round = 2; round < kPhiloxRounds; ++round) {
    key0 += kPhiloxStep0;
    key1 += kPhiloxStep1;
    const double_words product0 = multiply_low_halves(c0, kPhiloxMultiply0);
    const double_words product1 = multiply_low_halves(c2, kPhiloxMultiply1);
    c0 = (product1 >> 32) ^ c1 ^ key0;
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ key1;
    c3 = product0;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Computes philox() of the counters (channel + lane, position, convolution, group) in every lane.
QFAST_ALWAYS_INLINE void philox_lanes(uint64_t seed, uint32_t channel, uint32_t position,
                                      uint32_t convolution, uint32_t group, word_vector words[4]) {
  double_words channels, even[4], odd[4];
  for (uint32_t l = 0; l < kWordLanes / 2; ++l) channels[l] = channel + 2 * l;
  philox_halves(seed, channels, position, convolution, group, even);
  philox_halves(seed, channels + 1, position, convolution, group, odd);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) words[i] = (word_vector)((even[i] & 0xFFFFFFFFu) | (odd[i] << 32));
}

// Multiplies values[lane] by the scale, or by 0 if the word of the lane is below the threshold.
template <class Element>
QFAST_ALWAYS_INLINE void scale_or_drop(const DropoutRule& rule, word_vector words, Element* values,
                                       int64_t lanes) {
  const auto passes = words >= rule.threshold;
  if constexpr (sizeof(Element) == 4) {
    const Vector<Element> scale = splat(static_cast<Element>(rule.scale));
    store<Element>(values, load<Element>(values, lanes) * (passes ? scale : Vector<Element>{}), lanes);
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
static void drop(const DropoutRule& call_rule, const Place& call_place, int64_t rows, int64_t columns,
                 Element* values, int64_t stride) {
  // Copies, which stores to `values` cannot change. The keys of the rounds then remain in registers.
  const DropoutRule rule = call_rule;
  const Place place = call_place;
  for (int64_t row = 0; row < rows; row += 4) {
    const auto group = static_cast<uint32_t>((place.first_row + row) / 4);
    for (int64_t j = 0; j < columns; j += kWordLanes) {
      word_vector words[4];
      philox_lanes(rule.seed, static_cast<uint32_t>(place.first_channel + j),
                   static_cast<uint32_t>(place.position), static_cast<uint32_t>(place.convolution), group,
                   words);
      Element* const at = values + row * stride + j;
      if (rows - row >= 4 && columns - j >= kWordLanes) {
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; ++i) scale_or_drop<Element>(rule, words[i], at + i * stride, kWordLanes);
      } else {
        for (int64_t i = 0; i < smaller(4, rows - row); ++i)
          scale_or_drop<Element>(rule, words[i], at + i * stride, smaller(kWordLanes, columns - j));
      }
    }
  }
}

}  // namespace
