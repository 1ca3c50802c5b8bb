// The state of rolling statistics that are updated row by row: each new row adds its value and removes the
// value that leaves the window. The operations and their order are those of pandas 3.1 and of Qlib, so the
// rounding errors that such updates leave behind are theirs too, bit for bit. rolling_online.cpp runs them.
//
// Every state has restart(x, y), which forgets all values before the window that begins with the pair (x, y);
// add(x, y) and remove(x, y), which ignore NaN; unstable, true if cancellation may have destroyed the state,
// which is then computed again from the values of the window; and result(). Statistics of one series ignore
// y.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

namespace qfast::online {

constexpr double kNoValue = __builtin_nan("");
constexpr double kCancelled = DBL_EPSILON * 1e3;  // relative size of a sum of squares that has cancelled
constexpr double kLargestDeviation = DBL_EPSILON / kCancelled;  // of squares, relative to their sum
constexpr double kAnchorDrift =
    1.0 / 16;  // squared distance of mean and anchor relative to the sum of squares
constexpr double kLargestAnchor = 1.3407807929942596e154;  // the root of the largest double

inline bool is_missing(double x) { return x != x; }

// Adds a value to a sum with Kahan's compensation.
inline void compensated_add(double value, double& sum, double& compensation) {
  const double corrected = value - compensation, total = sum + corrected;
  compensation = total - sum - corrected;
  sum = total;
}

// A value far from zero is not subtracted from others, because the difference could overflow.
inline double anchor(double value) { return std::fabs(value) < kLargestAnchor ? value : 0; }

// Sum or mean by Kahan's method, with separate compensations for additions and removals. A window of equal
// values has their exact sum.
template <bool Mean>
struct Sum {
  int64_t n = 0, negative = 0, equal = 0;  // `equal` latest values are equal
  double sum = 0, compensation_added = 0, compensation_removed = 0, latest = 0;
  static constexpr bool unstable = false;

  void restart(double x, double) { *this = {.latest = x}; }
  void add(double x, double) {
    if (is_missing(x)) return;
    ++n;
    compensated_add(x, sum, compensation_added);
    negative += std::signbit(x);
    equal = x == latest ? equal + 1 : 1;
    latest = x;
  }
  void remove(double x, double) {
    if (is_missing(x)) return;
    --n;
    compensated_add(-x, sum, compensation_removed);
    negative -= std::signbit(x);
  }
  double result() const {
    if (n < 1) return kNoValue;
    const auto count = static_cast<double>(n);
    if constexpr (!Mean) return equal >= n ? latest * count : sum;
    if (equal >= n) return latest;
    const double mean = sum / count;
    return (negative == 0 && mean < 0) || (negative == n && mean > 0) ? 0 : mean;
  }
};

// Variance or standard deviation by Welford's method, whose mean is updated with Kahan's compensation.
template <bool Root>
struct Variance {
  double n = 0, mean = 0, squares = 0, compensation_added = 0, compensation_removed = 0;
  bool unstable = false;

  void restart(double, double) { *this = {}; }
  void add(double x, double) {
    if (is_missing(x)) return;
    n += 1;
    const double before = squares, mean_before = mean - compensation_added;
    mean += deviation(x, compensation_added) / n;
    squares += (x - mean_before) * (x - mean);
    if (before * kCancelled > squares) unstable = true;
  }
  void remove(double x, double) {
    if (is_missing(x)) return;
    n -= 1;
    if (n == 0) {
      mean = squares = 0;
      unstable = false;
      return;
    }
    const double before = squares, mean_before = mean - compensation_removed;
    mean -= deviation(x, compensation_removed) / n;
    squares -= (x - mean_before) * (x - mean);
    if (before * kCancelled > squares) unstable = true;
  }
  double result() const {
    if (n <= 1) return kNoValue;
    const double variance = squares / (n - 1);
    if constexpr (!Root) return variance;
    return variance < 0 ? 0 : std::sqrt(variance);
  }

 private:
  double deviation(double x, double& compensation) const {
    const double corrected = x - compensation, difference = corrected - mean;
    compensation = difference + mean - corrected;
    return difference;
  }
};

// Skewness (Order 3) or kurtosis (Order 4): updates of the sums of powers of the deviations from the mean.
// Values are relative to an anchor, a value of the window.
template <int Order>
struct Moments {
  int64_t n = 0;
  double mean = 0, origin = 0, second = 0, third = 0, fourth = 0, largest = 0;
  bool unstable = false;

  void restart(double, double) { *this = {}; }
  void add(double x, double) {
    if (is_missing(x)) return;
    if (n == 0) origin = anchor(x);
    const double shifted = x - origin, difference = shifted - mean;
    const auto count = static_cast<double>(++n);
    const double step = difference / count, term = difference * step * (count - 1);
    if constexpr (Order == 4)
      fourth += step * (-4 * third + step * (6 * second + term * (count * count - 3 * count + 3)));
    third += step * (term * (count - 2) - 3 * second);
    second += term;
    mean += step;
    check(shifted);
  }
  void remove(double x, double) {
    if (is_missing(x)) return;
    if (--n == 0) {
      *this = {};
      return;
    }
    const double shifted = x - origin, difference = shifted - mean;
    const auto count = static_cast<double>(n);
    const double step = difference / count, term = step * difference * (count + 1);
    if constexpr (Order == 4)
      fourth += step * (4 * third + step * (6 * second - term * (count * count + 3 * count + 3)));
    third -= step * (term * (count + 2) - 3 * second);
    second -= term;
    mean -= step;
    check(shifted);
  }
  double result() const {
    if (n < Order) return kNoValue;
    const auto count = static_cast<double>(n);
    if constexpr (Order == 3) {
      const double ratio = third / (second * std::sqrt(second));
      return ratio * (count * std::sqrt(count - 1) / (count - 2));
    }
    const double ratio = fourth / (second * second);
    return (count - 1) / ((count - 2) * (count - 3)) * (count * (count + 1) * ratio - 3 * (count - 1));
  }

 private:
  void check(double shifted) {
    const double distance = std::fabs(shifted - mean);
    if (distance > largest) largest = distance;
    if (is_missing(second) || is_missing(third) || is_missing(fourth) ||
        mean * mean * kAnchorDrift > second || largest * largest * kLargestDeviation > second)
      unstable = true;
  }
};

// Covariance or correlation of the rows where both series have a value, relative to an anchor of each series.
template <bool Correlation>
struct Pair {
  double n = 0, mean_x = 0, mean_y = 0, origin_x = 0, origin_y = 0;
  double products = 0, squares_x = 0, squares_y = 0, largest_x = 0, largest_y = 0;
  bool unstable = false;

  void restart(double, double) { *this = {}; }
  void add(double x, double y) {
    if (is_missing(x) || is_missing(y)) return;
    n += 1;
    if (n == 1) {
      origin_x = anchor(x);
      origin_y = anchor(y);
    }
    const double p = x - origin_x, q = y - origin_y, dx = p - mean_x, dy = q - mean_y;
    mean_x += dx / n;
    mean_y += dy / n;
    products += (p - mean_x) * dy;
    squares_x += (p - mean_x) * dx;
    squares_y += (q - mean_y) * dy;
    check(p, q);
  }
  void remove(double x, double y) {
    if (is_missing(x) || is_missing(y)) return;
    n -= 1;
    if (n == 0) {
      *this = {};
      return;
    }
    const double p = x - origin_x, q = y - origin_y, dx = p - mean_x, dy = q - mean_y;
    mean_x -= dx / n;
    mean_y -= dy / n;
    products -= (p - mean_x) * dy;
    squares_x -= (p - mean_x) * dx;
    squares_y -= (q - mean_y) * dy;
    check(p, q);
  }
  double result() const {
    if constexpr (!Correlation) return n <= 1 ? kNoValue : products / (n - 1);
    if (n <= 0 || squares_x == 0 || squares_y == 0) return kNoValue;
    // pandas calls pow, which does not always round like sqrt. A constant exponent would let the compiler
    // replace it.
    static const volatile double half = 0.5;
    const double value = products / std::pow(squares_x * squares_y, half);
    return value > 1 ? 1 : value < -1 ? -1 : value;
  }

 private:
  void check(double p, double q) {
    const double distance_x = std::fabs(p - mean_x), distance_y = std::fabs(q - mean_y);
    if (distance_x > largest_x) largest_x = distance_x;
    if (distance_y > largest_y) largest_y = distance_y;
    if (is_missing(products) || is_missing(squares_x) || is_missing(squares_y) ||
        largest_x * largest_y * kCancelled > std::fabs(products) ||
        largest_x * largest_x * kCancelled > squares_x || largest_y * largest_y * kCancelled > squares_y)
      unstable = true;
  }
};

enum class Line { kSlope, kRsquare, kResi };

// Qlib's regression on the position in the window, 1 for the oldest row. Nothing is ever computed again, so
// an infinite value leaves NaN behind for good.
template <Line Kind>
struct Regression {
  double length =
      0;  // of the window; 0 for all rows so far, where the position of the newest row is their number
  double n = 0, x = 0, xx = 0, y = 0, yy = 0, xy = 0, newest = 0;

  // Moves all positions one row back. The first of these updates changes sums by the values of the others.
  void advance() {
    xy -= y;
    xx = xx + n - 2 * x;
    x -= n;
  }
  void remove(double value) {
    if (is_missing(value)) return;
    n -= 1;
    y -= value;
    yy -= value * value;
  }
  void add(double value, double position) {
    newest = value;
    length = position;
    if (is_missing(value)) return;
    n += 1;
    x += position;
    xx += position * position;
    y += value;
    yy += value * value;
    xy += position * value;
  }
  double result() const {
    const double covariance = n * xy - x * y, variance = n * xx - x * x;
    if constexpr (Kind == Line::kSlope) return covariance / variance;
    if constexpr (Kind == Line::kRsquare) {
      const double correlation = covariance / std::sqrt(variance * (n * yy - y * y));
      return correlation * correlation;
    }
    const double slope = covariance / variance, intercept = y / n - slope * (x / n);
    return newest - (slope * length + intercept);
  }
};

}  // namespace qfast::online
