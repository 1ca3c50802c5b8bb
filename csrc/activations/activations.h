// Sigmoid and tanh over vectors of the instruction set being compiled, float32 and float64.
// Both tails saturate to exactly 0, 1 and -1, tanh keeps relative accuracy and the sign at 0, NaN stays NaN.
// Included inside the namespace of the instruction set.

#define QFAST_ALWAYS_INLINE static inline __attribute__((always_inline))

template <class Element>
struct Lanes;

template <>
struct Lanes<float> {
  typedef float vector __attribute__((vector_size(QFAST_VECTOR_BYTES)));
  typedef int32_t integers __attribute__((vector_size(QFAST_VECTOR_BYTES)));
  static constexpr int mantissa_bits = 23, bias = 127, terms = 7;
  static constexpr int32_t sign = INT32_MIN;
  static constexpr float magic = 0x1.8p23f;             // adding it rounds to an integer
  static constexpr float exp_zero = -104.f;             // exp is 0 from here down
  static constexpr float tanh_one = 40.f;               // tanh(20) is 1
  static constexpr float exp_infinite = 89.f;           // exp is infinite from here up
  static constexpr float ln2_high = 0.693359375f;       // few bits: times an exponent it is exact
  static constexpr float ln2_low = -2.12194440054e-4f;  // the rest of ln 2
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

// The first `count` lanes; the others are 0 and are not read.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> load(const Element* from, int64_t count) {
  Vector<Element> value = {};
  if (count == kLanes<Element>) {
    __builtin_memcpy(&value, from, sizeof(value));
  } else {
    __builtin_memcpy(&value, from, count * sizeof(Element));
  }
  return value;
}

template <class Element>
QFAST_ALWAYS_INLINE void store(Element* to, Vector<Element> value, int64_t count) {
  if (count == kLanes<Element>) {
    __builtin_memcpy(to, &value, sizeof(value));
  } else {
    __builtin_memcpy(to, &value, count * sizeof(Element));
  }
}

// Subtracts: 0 + x would be an addition at run time, as it turns -0 into 0.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> splat(Element x) {
  return x - Vector<Element>{};
}

// exp(r) = 1 + r + r^2 (c[0] + c[1] r + ...) for |r| <= ln(2) / 2. float32: least maximal relative
// error, 3.1e-9 (Lawson's iteration); float64: 1 / (k + 2)!.
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

// Sign * x = n ln(2) + r with a whole n, for |x| as large as exponents go. `magic` + n, whose last bits hold
// n.
template <class Element, int Sign = 1>
QFAST_ALWAYS_INLINE Vector<Element> reduce_exp(Vector<Element> x, Vector<Element>* r) {
  using L = Lanes<Element>;
  const Vector<Element> shifted = x * Element(Sign * 1.44269504088896340736) + L::magic;
  const Vector<Element> whole = shifted - L::magic;
  *r = ((Sign < 0 ? -x : x) - whole * L::ln2_high) - whole * L::ln2_low;
  return shifted;
}

// exp(r) - 1
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

// 2^n of `magic` + n: 0 for n = -bias, infinity for n = bias + 1.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> shifted_power(Vector<Element> shifted) {
  using L = Lanes<Element>;
  return (Vector<Element>)(((Integers<Element>)shifted << L::mantissa_bits) +
                           (Integers<Element>)splat(Element(1)));
}

// x where it is within the bound or NaN, else the bound. The processor's own minimum and maximum give the
// second operand where one is NaN. maskz: gcc 12 warns about what the plain form leaves undefined.
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

// 1 / (1 + exp(-x)), within 3 ulp (float32: where it is normal; smaller results may be 0). 0 and 1 in the
// tails.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> sigmoid(Vector<Element> x) {
  using L = Lanes<Element>;
  // past these bounds exp(-x) is infinite, or nothing beside 1
  const Vector<Element> minus =
      -at_most<Element>(-at_most<Element>(-x, L::exp_infinite), L::exp_infinite - 2);
  Vector<Element> r;
  const Vector<Element> power = shifted_power<Element>(reduce_exp<Element>(minus, &r));
  return Element(1) / (power * (exp_rest<Element>(r) + Element(1)) + Element(1));
}

// With m = exp(2|x|) - 1, free of cancellation at 0: m / (m + 2), with the sign of x. Within 3 ulp.
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

template <class Element>
static void tanh_elements(const Element* from, Element* to, int64_t begin, int64_t end) {
  constexpr int64_t lanes = kLanes<Element>;
  for (int64_t i = begin; i < end; i += lanes) {
    const int64_t count = end - i < lanes ? end - i : lanes;
    store<Element>(to + i, tanh<Element>(load<Element>(from + i, count)), count);
  }
}

static void tanh_f32(const float* from, float* to, int64_t begin, int64_t end) {
  tanh_elements<float>(from, to, begin, end);
}
static void tanh_f64(const double* from, double* to, int64_t begin, int64_t end) {
  tanh_elements<double>(from, to, begin, end);
}
