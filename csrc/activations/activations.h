// Sigmoid and tanh of vectors, in float32 and float64, and the vector primitives that all CPU kernels use. It
// is included inside the namespace of an instruction set.
//
// Both functions are exactly 0, 1 or -1 in the tails. tanh is accurate relative to its result, also near 0,
// and keeps the sign of 0. NaN stays NaN. Bound by arithmetic: a polynomial of 5 (float32) or 12 (float64)
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
  static constexpr int mantissa_bits = 23, bias = 127, terms = 7;
  static constexpr int32_t sign = INT32_MIN;
  static constexpr float magic = 0x1.8p23f;        // adding it rounds to an integer
  static constexpr float exp_zero = -104.f;        // exp(x) is 0 for smaller x
  static constexpr float tanh_one = 40.f;          // tanh(20) is 1
  static constexpr float exp_infinite = 89.f;      // exp(x) is infinite for larger x
  static constexpr float ln2_high = 0.693359375f;  // has few bits, so its product with an exponent is exact
  static constexpr float ln2_low = -2.12194440054e-4f;  // ln 2 - ln2_high
};

template <>
struct Lanes<double> {
  typedef double vector __attribute__((vector_size(QFAST_VECTOR_BYTES)));
  typedef int64_t integers __attribute__((vector_size(QFAST_VECTOR_BYTES)));
  static constexpr int mantissa_bits = 52, bias = 1023, terms = 13;
  static constexpr int64_t sign = INT64_MIN;
  static constexpr double magic = 0x1.8p52;
  static constexpr double exp_zero = -746.;
  static constexpr double tanh_one = 80.;
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

// exp(r) = 1 + r + r^2 (c[0] + c[1] r + ...) for |r| <= ln(2) / 2. The float32 coefficients minimize the
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

// Splits Sign * x into n ln(2) + r with an integer n, for every |x| for which n is a valid exponent. Returns
// magic + n, whose last bits are n.
template <class Element, int Sign = 1>
QFAST_ALWAYS_INLINE Vector<Element> reduce_exp(Vector<Element> x, Vector<Element>* r) {
  using L = Lanes<Element>;
  const Vector<Element> shifted = x * Element(Sign * 1.44269504088896340736) + L::magic;
  const Vector<Element> whole = shifted - L::magic;
  *r = ((Sign < 0 ? -x : x) - whole * L::ln2_high) - whole * L::ln2_low;
  return shifted;
}

// exp(r) - 1 for a reduced r.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> exp_rest(Vector<Element> r) {
  using Terms = ExpTerms<Element>;
  Vector<Element> sum = splat(Terms::c[Terms::count - 1]);
#pragma GCC unroll 16
  for (int k = Terms::count - 2; k >= 0; --k) sum = sum * r + Terms::c[k];
  return sum * (r * r) + r;
}

// exp(x) = 2^exponent (1 + rest), |rest| < 0.42, for x in [exp_zero, 0].
template <class Element>
QFAST_ALWAYS_INLINE void split_exp(Vector<Element> x, Vector<Element>* rest, Integers<Element>* exponent) {
  Vector<Element> r;
  const Vector<Element> shifted = reduce_exp<Element>(x, &r);
  *exponent = (Integers<Element>)shifted - (Integers<Element>)splat(Lanes<Element>::magic);
  *rest = exp_rest<Element>(r);
}

// 2^exponent for a normal result.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> power_of_two(Integers<Element> exponent) {
  return (Vector<Element>)((exponent + Lanes<Element>::bias) << Lanes<Element>::mantissa_bits);
}

// 2^n for an argument magic + n. The result is 0 for n = -bias and infinity for n = bias + 1.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> shifted_power(Vector<Element> shifted) {
  using L = Lanes<Element>;
  return (Vector<Element>)(((Integers<Element>)shifted << L::mantissa_bits) +
                           (Integers<Element>)splat(Element(1)));
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
  const Vector<Element> minus =
      -at_most<Element>(-at_most<Element>(-x, L::exp_infinite), L::exp_infinite - 2);
  Vector<Element> r;
  const Vector<Element> power = shifted_power<Element>(reduce_exp<Element>(minus, &r));
  return Element(1) / (power * (exp_rest<Element>(r) + Element(1)) + Element(1));
}

// m / (m + 2) with the sign of x, where m = exp(2|x|) - 1 is computed without cancellation near 0. Within 3
// ulp.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> tanh(Vector<Element> x) {
  using L = Lanes<Element>;
  const Integers<Element> sign = (Integers<Element>)x & L::sign;
  const Vector<Element> magnitude = (Vector<Element>)((Integers<Element>)x & ~L::sign);
  Vector<Element> r;
  const Vector<Element> power =
      shifted_power<Element>(reduce_exp<Element>(at_most<Element>(magnitude + magnitude, L::tanh_one), &r));
  const Vector<Element> m = power * exp_rest<Element>(r) + (power - Element(1));
  return (Vector<Element>)((Integers<Element>)(m / (m + Element(2))) | sign);
}

// x = exp(x) for x <= 0 or NaN, within 2 ulp.
template <class Element>
QFAST_ALWAYS_INLINE void exp_elements(Element* values, int64_t begin, int64_t end) {
  const Vector<Element> lowest = Vector<Element>{} + Lanes<Element>::exp_zero;
  for (int64_t i = begin; i < end; i += kLanes<Element>) {
    const int64_t count = end - i < kLanes<Element> ? end - i : kLanes<Element>;
    Vector<Element> x = load<Element>(values + i, count);
    x = x < lowest ? lowest : x;
    Vector<Element> rest;
    Integers<Element> exponent;
    split_exp<Element>(x, &rest, &exponent);
    const Integers<Element> half = exponent >> 1;  // in two steps: the result may be subnormal
    const Vector<Element> result =
        (rest + Element(1)) * power_of_two<Element>(half) * power_of_two<Element>(exponent - half);
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
