// One step of Adam with clipped gradients for a range of elements of one tensor. It is compiled once per
// instruction set; cpu_isa_begin.h lists the language features that it may use.
//
// A thread owns a range of elements and reads, computes and writes each of them once; nothing is saved. Bound
// by bytes: 4 elements read and 3 written per parameter, 4 written where the gradient is clipped.
//
// The results equal those of torch's fused Adam bit for bit on a CPU with FMA (FusedAdamKernel.cpp). Torch's
// compiler contracts two of the sums to FMA, in different ways for whole vectors and for the remainder, so
// both forms are written out below. Without FMA (the baseline) the results differ by single roundings.
#pragma once

#include "matrix_tiles.h"

namespace {

constexpr int64_t kAdamBytes = 32;  // size of torch's vectors; its remainder loop rounds in another order

// Returns whether a comparison is true in any lane.
template <class Element>
QFAST_ALWAYS_INLINE bool any_lane(Integers<Element> lanes) {
#if defined(__x86_64__) && QFAST_VECTOR_BYTES == 64
  if constexpr (sizeof(Element) == 4) {
    return _mm512_movepi32_mask((__m512i)lanes) != 0;
  } else {
    return _mm512_movepi64_mask((__m512i)lanes) != 0;
  }
#elif defined(__x86_64__) && QFAST_VECTOR_BYTES == 32
  return _mm256_movemask_epi8((__m256i)lanes) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_epi8((__m128i)lanes) != 0;
#else
  bool any = false;
  for (int64_t lane = 0; lane < kLanes<Element>; ++lane) any = any || lanes[lane] != 0;
  return any;
#endif
}

template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> square_root(Vector<Element> x) {
#if defined(__x86_64__) && QFAST_VECTOR_BYTES == 64
  if constexpr (sizeof(Element) == 4) {
    return (Vector<Element>)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)x);
  } else {
    return (Vector<Element>)_mm512_maskz_sqrt_pd(0xFF, (__m512d)x);
  }
#elif defined(__x86_64__) && QFAST_VECTOR_BYTES == 32
  if constexpr (sizeof(Element) == 4) {
    return (Vector<Element>)_mm256_sqrt_ps((__m256)x);
  } else {
    return (Vector<Element>)_mm256_sqrt_pd((__m256d)x);
  }
#else
  for (int64_t lane = 0; lane < kLanes<Element>; ++lane) {
    x[lane] = sizeof(Element) == 4 ? static_cast<Element>(__builtin_sqrtf(static_cast<float>(x[lane])))
                                   : static_cast<Element>(__builtin_sqrt(x[lane]));
  }
  return x;
#endif
}

// Updates elements [i, i + count) of the tensor, count <= kLanes. NaN gradients are not clipped, because
// comparisons with NaN are false.
template <class Element, bool kRemainder>
QFAST_ALWAYS_INLINE void adam_vector(const AdamTensor<Element>& tensor, const AdamSettings<Element>& settings,
                                     const AdamCorrection<Element>& correction, int64_t i, int64_t count) {
  using V = Vector<Element>;
  const V limit = splat<Element>(settings.limit), parameter = load<Element>(tensor.parameter + i, count);
  V gradient = load<Element>(tensor.gradient + i, count);
  const auto above = gradient > limit, below = gradient < -limit;
  if (any_lane<Element>((Integers<Element>)(above | below))) [[unlikely]] {
    gradient = at_least<Element>(at_most<Element>(gradient, settings.limit), -settings.limit);
    // Stored only if clipped, because it would be a quarter of all stores.
    store<Element>(tensor.gradient + i, gradient, count);
  }
  if (settings.weight_decay != 0)
    gradient = multiply_add<Element>(parameter, splat<Element>(settings.weight_decay), gradient);

  V mean = load<Element>(tensor.exp_avg + i, count);
  const V difference = gradient - mean;
  // torch.lerp interpolates from the nearer end.
  mean = settings.rest1 < Element(0.5)
             ? multiply_add<Element>(splat<Element>(settings.rest1), difference, mean)
             : multiply_add<Element>(splat<Element>(settings.rest1 - 1), difference, gradient);
  store<Element>(tensor.exp_avg + i, mean, count);

  V square = load<Element>(tensor.exp_avg_sq + i, count);
  const V beta2 = splat<Element>(settings.beta2), weighted = splat<Element>(settings.rest2) * gradient;
  square = kRemainder ? multiply_add<Element>(square, beta2, weighted * gradient)
                      : multiply_add<Element>(weighted, gradient, square * beta2);
  store<Element>(tensor.exp_avg_sq + i, square, count);

  const V denominator =
      square_root<Element>(square) / splat<Element>(correction.root) + splat<Element>(settings.eps);
  store<Element>(tensor.parameter + i, parameter - splat<Element>(correction.step_size) * mean / denominator,
                 count);
}

// Updates elements [begin, end) of the tensor. kRemainder selects the rounding of torch's remainder loop.
template <class Element, bool kRemainder>
QFAST_ALWAYS_INLINE void adam_range(const AdamTensor<Element>& tensor, const AdamSettings<Element>& settings,
                                    const AdamCorrection<Element>& correction, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kLanes<Element>;
  int64_t i = begin;
  for (; i + lanes <= end; i += lanes) {
    adam_vector<Element, kRemainder>(tensor, settings, correction, i, lanes);
  }
  if (i < end) adam_vector<Element, kRemainder>(tensor, settings, correction, i, end - i);
}

}  // namespace

// Updates elements [begin, end) of the tensor. `begin` is a multiple of 64 bytes; `end` is a multiple or the
// last element.
template <class Element>
void clipped_adam(const AdamTensor<Element>& tensor, const AdamSettings<Element>& settings,
                  const AdamCorrection<Element>& correction, int64_t begin, int64_t end) {
  const int64_t rest = tensor.count % (kAdamBytes / static_cast<int64_t>(sizeof(Element)));
  const int64_t whole = end < tensor.count - rest ? end : tensor.count - rest;
  adam_range<Element, false>(tensor, settings, correction, begin, whole);
  adam_range<Element, true>(tensor, settings, correction, whole, end);
}
