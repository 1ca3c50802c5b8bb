// Sigmoid and tanh of vectors, in float32 and float64, and the vector primitives that all CPU kernels use. It
// is included inside the namespace of an instruction set.
//
// Both functions are exactly 0, 1 or -1 in the tails. tanh is accurate relative to its result, also near 0,
// and keeps the sign of 0. NaN stays NaN. Bound by arithmetic: a polynomial of 6 (float32) or 13 (float64)
// terms and a division per vector. In the operator `tanh` a thread owns a range of elements; backward needs
// the result only.
#pragma once

namespace {

#define QFAST_ALWAYS_INLINE static inline __attribute__((always_inline))
#define QFAST_INLINE_MEMBER inline __attribute__((always_inline))
// For large functions with several callers: neither inlined nor copied for constant arguments, which would
// multiply the time to compile them.
#if defined(__clang__)
#define QFAST_ONE_COPY __attribute__((noinline))
#else
#define QFAST_ONE_COPY __attribute__((noinline, noclone))
#endif

template <class Element>
struct Lanes;

template <>
struct Lanes<float> {
  typedef float vector __attribute__((vector_size(QFAST_VECTOR_BYTES)));
  typedef int32_t integers __attribute__((vector_size(QFAST_VECTOR_BYTES)));
  static constexpr int mantissa_bits = 23, bias = 127;
  static constexpr float magic = 0x1.8p23f;          // adding it rounds to an integer
  static constexpr float exp_zero = -104.f;          // exp(x) is 0 for smaller x
  static constexpr float tanh_one = 20.f;            // tanh(20) is 1
  static constexpr float exp_infinite = 89.f;        // exp(x) is infinite for larger x
  static constexpr float ln2_high = 0x1.62e3p-1f;    // has few bits, so its product with an exponent is exact
  static constexpr float ln2_low = 0x1.2fefa4p-17f;  // ln 2 - ln2_high, positive, so a reduced -0 stays -0
};

template <>
struct Lanes<double> {
  typedef double vector __attribute__((vector_size(QFAST_VECTOR_BYTES)));
  typedef int64_t integers __attribute__((vector_size(QFAST_VECTOR_BYTES)));
  static constexpr int mantissa_bits = 52, bias = 1023;
  static constexpr double magic = 0x1.8p52;
  static constexpr double exp_zero = -746.;
  static constexpr double tanh_one = 40.;
  static constexpr double exp_infinite = 710.;
  static constexpr double ln2_high = 6.93147180369123816490e-01;
  static constexpr double ln2_low = 1.90821492927058770002e-10;
};

template <class Element>
using Vector = typename Lanes<Element>::vector;
template <class Element>
using Integers = typename Lanes<Element>::integers;
template <class Element>
constexpr int64_t kLanes = QFAST_VECTOR_BYTES / sizeof(Element);

// The first `count` lanes of a vector in memory. Masks, because a call of memcpy in a loop
// would spill every sum that is held in registers.
#if defined(__x86_64__) && QFAST_VECTOR_BYTES == 64
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> load_part(const Element* from, int64_t count) {
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(Element) == 4) {
    return (Vector<Element>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
  } else {
    return (Vector<Element>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from);
  }
}

template <class Element>
QFAST_ALWAYS_INLINE void store_part(Element* to, Vector<Element> value, int64_t count) {
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(Element) == 4) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), (__m512)value);
  } else {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), (__m512d)value);
  }
}
#elif defined(__x86_64__) && QFAST_VECTOR_BYTES == 32
template <class Element>
QFAST_ALWAYS_INLINE __m256i lanes_below(int64_t count) {
  if constexpr (sizeof(Element) == 4) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  } else {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
  }
}

template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> load_part(const Element* from, int64_t count) {
  if constexpr (sizeof(Element) == 4) {
    return (Vector<Element>)_mm256_maskload_ps(from, lanes_below<Element>(count));
  } else {
    return (Vector<Element>)_mm256_maskload_pd(from, lanes_below<Element>(count));
  }
}

template <class Element>
QFAST_ALWAYS_INLINE void store_part(Element* to, Vector<Element> value, int64_t count) {
  if constexpr (sizeof(Element) == 4) {
    _mm256_maskstore_ps(to, lanes_below<Element>(count), (__m256)value);
  } else {
    _mm256_maskstore_pd(to, lanes_below<Element>(count), (__m256d)value);
  }
}
#else
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> load_part(const Element* from, int64_t count) {
  Vector<Element> value = {};
  __builtin_memcpy(&value, from, count * sizeof(Element));
  return value;
}

template <class Element>
QFAST_ALWAYS_INLINE void store_part(Element* to, Vector<Element> value, int64_t count) {
  __builtin_memcpy(to, &value, count * sizeof(Element));
}
#endif

// Loads the first `count` lanes. The other lanes are 0, and their memory is not read.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> load(const Element* from, int64_t count) {
  if (count != kLanes<Element>) return load_part<Element>(from, count);
  Vector<Element> value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

template <class Element>
QFAST_ALWAYS_INLINE void store(Element* to, Vector<Element> value, int64_t count) {
  if (count == kLanes<Element>) {
    __builtin_memcpy(to, &value, sizeof(value));
  } else {
    store_part<Element>(to, value, count);
  }
}

// The same where the compiler knows which of the two it is.
struct AllLanes {};
struct FirstLanes {
  int64_t count;
};

template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> load(const Element* from, AllLanes) {
  return load<Element>(from, kLanes<Element>);
}

template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> load(const Element* from, FirstLanes lanes) {
  return load_part<Element>(from, lanes.count);
}

template <class Element>
QFAST_ALWAYS_INLINE void store(Element* to, Vector<Element> value, AllLanes) {
  store<Element>(to, value, kLanes<Element>);
}

template <class Element>
QFAST_ALWAYS_INLINE void store(Element* to, Vector<Element> value, FirstLanes lanes) {
  store_part<Element>(to, value, lanes.count);
}

// A vector with x in every lane. x - 0 equals x for every x, so the compiler removes the subtraction. It
// cannot remove 0 + x, which turns -0 into 0.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> splat(Element x) {
  return x - Vector<Element>{};
}

// exp(r) = 1 + r (1 + c[0] r + c[1] r^2 + ...) for |r| <= ln(2) / 2. The float32 coefficients minimize the
// maximal relative error, 3.1e-9 (Lawson's iteration). The float64 coefficients are the Taylor series, 1 / (k
// + 2)!.
template <class Element>
struct ExpTerms;

template <>
struct ExpTerms<float> {
  static constexpr int count = 5;
  static constexpr float c[] = {0x1.fffffcp-2f, 0x1.55549p-3f, 0x1.5558f8p-5f, 0x1.123b02p-7f,
                                0x1.6a2256p-10f};
};

template <>
struct ExpTerms<double> {
  static constexpr int count = 12;
  static constexpr double c[] = {1. / 2,       1. / 6,        1. / 24,        1. / 120,
                                 1. / 720,     1. / 5040,     1. / 40320,     1. / 362880,
                                 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800.};
};

// Splits Factor * x into n ln(2) + |Factor| r with an integer n, for every |x| for which n is a valid
// exponent. Returns magic + n, whose last bits are n.
template <class Element, int Factor = 1>
QFAST_ALWAYS_INLINE Vector<Element> reduce_exp(Vector<Element> x, Vector<Element>* r) {
  using L = Lanes<Element>;
  constexpr Element magnitude = Factor < 0 ? -Factor : Factor;
  const Vector<Element> shifted = x * Element(Factor * 1.44269504088896340736) + L::magic;
  const Vector<Element> whole = shifted - L::magic;
  *r = ((Factor < 0 ? -x : x) - whole * (L::ln2_high / magnitude)) - whole * (L::ln2_low / magnitude);
  return shifted;
}

// (exp(Factor r) - 1) / (Factor r) for a reduced r.
template <class Element, int Factor = 1>
QFAST_ALWAYS_INLINE Vector<Element> exp_slope(Vector<Element> r) {
  using Terms = ExpTerms<Element>;
  Element power = Factor;
#pragma GCC unroll 16
  for (int k = 1; k < Terms::count; ++k) power *= Factor;
  Vector<Element> sum = splat(Terms::c[Terms::count - 1] * power);
#pragma GCC unroll 16
  for (int k = Terms::count - 2; k >= 0; --k) {
    power /= Factor;
    sum = sum * r + Terms::c[k] * power;
  }
  return sum * r + Element(1);
}

#if QFAST_VECTOR_BYTES < 64
// 2^exponent for a normal result.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> power_of_two(Integers<Element> exponent) {
  return (Vector<Element>)((exponent + Lanes<Element>::bias) << Lanes<Element>::mantissa_bits);
}
#endif

// x 2^n for an argument magic + n. 2^n is infinite for n = bias + 1. It is 0 for n = -bias, or with AVX-512
// a subnormal number.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> times_power(Vector<Element> x, Vector<Element> shifted) {
  using L = Lanes<Element>;
#if QFAST_VECTOR_BYTES == 64
  const Vector<Element> n = shifted - L::magic;
  if constexpr (sizeof(Element) == 4) {
    return (Vector<Element>)_mm512_maskz_scalef_ps(0xFFFF, (__m512)x, (__m512)n);
  } else {
    return (Vector<Element>)_mm512_maskz_scalef_pd(0xFF, (__m512d)x, (__m512d)n);
  }
#else
  return x * (Vector<Element>)(((Integers<Element>)shifted << L::mantissa_bits) +
                               (Integers<Element>)splat(Element(1)));
#endif
}

// Returns x if it is within the bound or NaN, else the bound. The minimum and maximum instructions return the
// second operand if either is NaN, so x is the second operand. The maskz forms avoid a warning of gcc 12
// about an undefined operand in the plain forms.
#if QFAST_VECTOR_BYTES == 64
#define QFAST_BOUND(name, operation, beyond)                                                          \
  template <class Element>                                                                            \
  QFAST_ALWAYS_INLINE Vector<Element> name(Vector<Element> x, Element bound) {                        \
    if constexpr (sizeof(Element) == 4) {                                                             \
      return (Vector<Element>)_mm512_maskz_##operation##_ps(0xFFFF, (__m512)splat(bound), (__m512)x); \
    } else {                                                                                          \
      return (Vector<Element>)_mm512_maskz_##operation##_pd(0xFF, (__m512d)splat(bound), (__m512d)x); \
    }                                                                                                 \
  }
#elif QFAST_VECTOR_BYTES == 32
#define QFAST_BOUND(name, operation, beyond)                                              \
  template <class Element>                                                                \
  QFAST_ALWAYS_INLINE Vector<Element> name(Vector<Element> x, Element bound) {            \
    if constexpr (sizeof(Element) == 4) {                                                 \
      return (Vector<Element>)_mm256_##operation##_ps((__m256)splat(bound), (__m256)x);   \
    } else {                                                                              \
      return (Vector<Element>)_mm256_##operation##_pd((__m256d)splat(bound), (__m256d)x); \
    }                                                                                     \
  }
#else
#define QFAST_BOUND(name, operation, beyond)                                   \
  template <class Element>                                                     \
  QFAST_ALWAYS_INLINE Vector<Element> name(Vector<Element> x, Element bound) { \
    const Vector<Element> bounds = splat(bound);                               \
    return x beyond bounds ? bounds : x;                                       \
  }
#endif
QFAST_BOUND(at_most, min, >)
QFAST_BOUND(at_least, max, <)
#undef QFAST_BOUND

// 1 / (1 + exp(-x)), within 3 ulp. It is exactly 0 and 1 in the tails. float32 results below the smallest
// normal number may be 0.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> sigmoid(Vector<Element> x) {
  using L = Lanes<Element>;
  // Beyond these bounds exp(-x) is infinite, or too small to change 1.
  const Vector<Element> bounded =
      at_least<Element>(at_most<Element>(x, L::exp_infinite - 2), -L::exp_infinite);
  Vector<Element> r;
  const Vector<Element> shifted = reduce_exp<Element, -1>(bounded, &r);
  const Vector<Element> reduced = exp_slope<Element>(r) * r + Element(1);
  return Element(1) / (times_power<Element>(reduced, shifted) + Element(1));
}

// h / (h + 1), where h = (exp(2x) - 1) / 2 is computed without cancellation near 0. Within 3 ulp.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> tanh(Vector<Element> x) {
  using L = Lanes<Element>;
  const Vector<Element> bounded = at_least<Element>(at_most<Element>(x, L::tanh_one), -L::tanh_one);
  Vector<Element> r;
  const Vector<Element> shifted = reduce_exp<Element, 2>(bounded, &r);
  const Vector<Element> power = times_power<Element>(splat(Element(1)), shifted);
  // A difference, because -0 + 0 would lose the sign.
  const Vector<Element> h = power * (exp_slope<Element, 2>(r) * r) - (Element(0.5) - power * Element(0.5));
  return h / (h + Element(1));
}

// x = exp(x) for x <= 0 or NaN, within 2 ulp.
template <class Element>
QFAST_ALWAYS_INLINE void exp_elements(Element* values, int64_t begin, int64_t end) {
  using L = Lanes<Element>;
  for (int64_t i = begin; i < end; i += kLanes<Element>) {
    const int64_t count = end - i < kLanes<Element> ? end - i : kLanes<Element>;
    Vector<Element> r;
    const Vector<Element> x = at_least<Element>(load<Element>(values + i, count), L::exp_zero);
    const Vector<Element> shifted = reduce_exp<Element>(x, &r);
    const Vector<Element> reduced = exp_slope<Element>(r) * r + Element(1);
#if QFAST_VECTOR_BYTES == 64
    const Vector<Element> result = times_power<Element>(reduced, shifted);
#else
    // In two steps, because the result may be subnormal.
    const Integers<Element> exponent = (Integers<Element>)shifted - (Integers<Element>)splat(L::magic);
    const Integers<Element> half = exponent >> 1;
    const Vector<Element> result =
        reduced * power_of_two<Element>(half) * power_of_two<Element>(exponent - half);
#endif
    store<Element>(values + i, result, count);
  }
}

}  // namespace

template <class Element>
void exp_in_place(Element* values, int64_t begin, int64_t end) {
  exp_elements(values, begin, end);
}

// to[i] = tanh(from[i]) for begin <= i < end.
template <class Element>
void tanh_elements(const Element* from, Element* to, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kLanes<Element>;
  int64_t i = begin;
  for (; i + lanes <= end; i += lanes)
    store<Element>(to + i, tanh<Element>(load<Element>(from + i, lanes)), lanes);
  if (i < end) store<Element>(to + i, tanh<Element>(load<Element>(from + i, end - i)), end - i);
}
