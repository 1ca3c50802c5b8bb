// One step of Adam over clipped gradients, for some elements of a tensor; see cpu_isa_body.h for what may
// stand here. In order and rounding this is torch's fused Adam on a CPU with FMA (FusedAdamKernel.cpp), of
// which two sums are written out below as its compiler contracted them: so the results are torch's, bit for
// bit. Without FMA (the baseline) they are as close as single roundings are.

constexpr int64_t kAdamBytes = 32;  // of torch's vectors: what no longer fills one is summed in another order

// x * y + z, rounded once where the instruction set can
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> multiply_add(Vector<Element> x, Vector<Element> y, Vector<Element> z) {
#if defined(__x86_64__) && QFAST_VECTOR_BYTES == 64
  if constexpr (sizeof(Element) == 4) {
    return (Vector<Element>)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
  } else {
    return (Vector<Element>)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)z);
  }
#elif defined(__x86_64__) && QFAST_VECTOR_BYTES == 32
  if constexpr (sizeof(Element) == 4) {
    return (Vector<Element>)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
  } else {
    return (Vector<Element>)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)z);
  }
#else
  return x * y + z;
#endif
}

// Whether any lane of a comparison holds.
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

// Elements [i, i + count) of the tensor, count <= kLanes. NaN compares with nothing, so it passes the limit.
template <class Element, bool kRemainder>
QFAST_ALWAYS_INLINE void adam_vector(const AdamTensor<Element>& tensor, const AdamSettings<Element>& settings,
                                     const AdamCorrection<Element>& correction, int64_t i, int64_t count) {
  using V = Vector<Element>;
  const V limit = splat<Element>(settings.limit), parameter = load<Element>(tensor.parameter + i, count);
  V gradient = load<Element>(tensor.gradient + i, count);
  const auto above = gradient > limit, below = gradient < -limit;
  if (any_lane<Element>((Integers<Element>)(above | below))) [[unlikely]] {
    gradient = at_least<Element>(at_most<Element>(gradient, settings.limit), -settings.limit);
    store<Element>(tensor.gradient + i, gradient,
                   count);  // most need no store, which would be a quarter of them all
  }
  if (settings.weight_decay != 0)
    gradient = multiply_add<Element>(parameter, splat<Element>(settings.weight_decay), gradient);

  V mean = load<Element>(tensor.exp_avg + i, count);
  const V toward = gradient - mean;
  // torch.lerp: from whichever end is nearer
  mean = settings.rest1 < Element(0.5)
             ? multiply_add<Element>(splat<Element>(settings.rest1), toward, mean)
             : multiply_add<Element>(splat<Element>(settings.rest1 - 1), toward, gradient);
  store<Element>(tensor.exp_avg + i, mean, count);

  V square = load<Element>(tensor.exp_avg_sq + i, count);
  const V beta2 = splat<Element>(settings.beta2), fresh = splat<Element>(settings.rest2) * gradient;
  square = kRemainder ? multiply_add<Element>(square, beta2, fresh * gradient)
                      : multiply_add<Element>(fresh, gradient, square * beta2);
  store<Element>(tensor.exp_avg_sq + i, square, count);

  const V denominator =
      square_root<Element>(square) / splat<Element>(correction.root) + splat<Element>(settings.eps);
  store<Element>(tensor.parameter + i, parameter - splat<Element>(correction.step_size) * mean / denominator,
                 count);
}

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

// Elements [begin, end) of the tensor; `begin` is a multiple of 64 bytes, and `end` one or the last.
// Bytes bound: 4 elements read and 3 written for each, 4 where the limit is passed.
template <class Element>
QFAST_ALWAYS_INLINE void clipped_adam(const AdamTensor<Element>& tensor,
                                      const AdamSettings<Element>& settings,
                                      const AdamCorrection<Element>& correction, int64_t begin, int64_t end) {
  const int64_t rest = tensor.count % (kAdamBytes / static_cast<int64_t>(sizeof(Element)));
  const int64_t whole = end < tensor.count - rest ? end : tensor.count - rest;
  adam_range<Element, false>(tensor, settings, correction, begin, whole);
  adam_range<Element, true>(tensor, settings, correction, whole, end);
}

static void clipped_adam_f32(const AdamTensor<float>& tensor, const AdamSettings<float>& settings,
                             const AdamCorrection<float>& correction, int64_t begin, int64_t end) {
  clipped_adam(tensor, settings, correction, begin, end);
}

static void clipped_adam_f64(const AdamTensor<double>& tensor, const AdamSettings<double>& settings,
                             const AdamCorrection<double>& correction, int64_t begin, int64_t end) {
  clipped_adam(tensor, settings, correction, begin, end);
}
