// Sigmoid and tanh over vectors of the instruction set being compiled, float32 and float64, within 4 ulp.
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
  static constexpr float tanh_one = -40.f;              // tanh(20) is 1
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
  static constexpr double tanh_one = -80.;
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

// 1 / (k + 1)!, k = 0..12: exp(r) - 1 = r (1 + r/2 + r^2/6 + ...). For |r| <= ln(2)/2 seven terms suffice in
// float32 and thirteen in float64.
constexpr double kFactorials[] = {
    1.,         1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,        1. / 5040,
    1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800.};

// exp(x) = 2^exponent (1 + rest), |rest| < 0.42, for x in [exp_zero, 0].
template <class Element>
QFAST_ALWAYS_INLINE void split_exp(Vector<Element> x, Vector<Element>* rest, Integers<Element>* exponent) {
  using L = Lanes<Element>;
  const Vector<Element> magic = Vector<Element>{} + L::magic;
  const Vector<Element> rounded = x * Element(1.44269504088896340736) + magic;
  const Vector<Element> whole = rounded - magic;
  *exponent = (Integers<Element>)rounded - (Integers<Element>)magic;
  const Vector<Element> r = (x - whole * L::ln2_high) - whole * L::ln2_low;
  Vector<Element> sum = Vector<Element>{} + Element(kFactorials[L::terms - 1]);
#pragma GCC unroll 16
  for (int k = L::terms - 2; k > 0; --k) sum = sum * r + Element(kFactorials[k]);
  *rest = sum * r * r + r;
}

// 2^exponent for a normal result.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> power_of_two(Integers<Element> exponent) {
  return (Vector<Element>)((exponent + Lanes<Element>::bias) << Lanes<Element>::mantissa_bits);
}

template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> negative_magnitude(Vector<Element> x) {
  return (Vector<Element>)((Integers<Element>)x | Lanes<Element>::sign);
}

// With e = exp(-|x|): 1 / (1 + e) above zero, e / (1 + e) below, which keeps the small results accurate.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> sigmoid(Vector<Element> x) {
  const Vector<Element> lowest = Vector<Element>{} + Lanes<Element>::exp_zero;
  const Vector<Element> one = Vector<Element>{} + Element(1);
  Vector<Element> minus = negative_magnitude<Element>(x);
  minus = minus < lowest ? lowest : minus;  // NaN compares false and stays
  Vector<Element> rest;
  Integers<Element> exponent;
  split_exp<Element>(minus, &rest, &exponent);
  const Integers<Element> half = exponent >> 1;  // in two steps: the result may be subnormal
  const Vector<Element> e =
      (one + rest) * power_of_two<Element>(half) * power_of_two<Element>(exponent - half);
  return (x < Element(0) ? e : one) / (one + e);
}

// With m = exp(-2|x|) - 1, free of cancellation at 0: -m / (2 + m), with the sign of x.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> tanh(Vector<Element> x) {
  const Vector<Element> lowest = Vector<Element>{} + Lanes<Element>::tanh_one;
  Vector<Element> minus = negative_magnitude<Element>(x) * Element(2);
  minus = minus < lowest ? lowest : minus;
  Vector<Element> rest;
  Integers<Element> exponent;
  split_exp<Element>(minus, &rest, &exponent);
  const Vector<Element> power = power_of_two<Element>(exponent);
  const Vector<Element> m = power * rest + (power - Element(1));
  const Vector<Element> magnitude = m / (m + Element(2));  // negative
  const Integers<Element> sign = (Integers<Element>)x & Lanes<Element>::sign;
  return (Vector<Element>)(((Integers<Element>)magnitude & ~Lanes<Element>::sign) | sign);
}
