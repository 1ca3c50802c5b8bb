// Statistics of the last rows of an instrument, for several lengths of the window at once. Included inside
// the namespace of the instruction set.
//
// Sums are taken over the window's steps back in time, for a block of rows at once (vectors lie along the
// rows, the sums of a few of them in registers), and pass the lengths of all windows on their way: no sum is
// ever corrected by subtraction, so none drifts, and an infinity is gone when its window is. Values enter as
// differences from a value of the window, which keeps what is constant exactly so and its squares near the
// variance. Bound by the additions: the longest window's steps a row, and for skew, kurt and mad, whose
// powers are of what lies off the mean, those of every window.

#define QFAST_BLOCK_LOOP(first) for (int64_t r = (first); r < block.end; ++r)

// An instrument's series. `value` is 0 where there is none, `known` 0 or 1, `near` the latest known value.
struct RollingSeries {
  double *value, *known, *near;
};

struct RollingBlock {
  int64_t begin, end;  // rows of the instrument
  double* sums[kRollingSums];

  double* sum(int which) const { return sums[which] - begin; }
};

static void prepare_rolling(const double* from, int64_t rows, bool infinite_is_missing, double* value,
                            double* known, double* near) {
  double latest = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const double x = from[r];
    const bool there = x == x && !(infinite_is_missing && (x - x != 0));
    value[r] = there ? x : 0, known[r] = there ? 1 : 0;
    if (there && x - x == 0) latest = x;
    near[r] = latest;
  }
}

// step(k, first) for the rows [first, end) of a block that have k rows before them, for all steps back, and
// after those of a window finish(window, its number).
template <class Step, class Finish>
QFAST_ALWAYS_INLINE void over_windows(const RollingStatsJob& job, const RollingBlock& block, const Step& step,
                                      const Finish& finish) {
  int64_t k = 0;
  for (int64_t w = 0; w < job.window_count; ++w) {
    for (; k < job.windows[w] && k < block.end; ++k) step(k, k > block.begin ? k : block.begin);
    finish(job.windows[w], w);
  }
}

// Steps [from, to) back of the `Vectors` vectors of rows at r, the last of them `lanes` wide.
template <int Sums, int Vectors, class Row>
QFAST_ALWAYS_INLINE void add_steps(const RollingBlock& block, const Row& row, int64_t r, int64_t lanes,
                                   int64_t from, int64_t to) {
  constexpr int64_t wide = kLanes<double>;
  Vector<double> sums[Vectors][Sums];
  const auto width = [&](int v) __attribute__((always_inline)) { return v + 1 < Vectors ? wide : lanes; };
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v)
#pragma GCC unroll 12
    for (int i = 0; i < Sums; ++i) sums[v][i] = load<double>(block.sum(i) + r + v * wide, width(v));
  for (int64_t k = from; k < to; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) row(r + v * wide, k, width(v), sums[v]);
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v)
#pragma GCC unroll 12
    for (int i = 0; i < Sums; ++i) store<double>(block.sum(i) + r + v * wide, sums[v][i], width(v));
}

// A statistic of what is only added up: row(r, k, lanes, sums) adds step k back of a vector of rows to
// theirs, result(r, window, lanes, sums) is the statistic of a window.
template <int Sums, class Row, class Result>
QFAST_ALWAYS_INLINE void sum_over_windows(const RollingStatsJob& job, const RollingBlock& block, double* out0,
                                          const Row& row, const Result& result) {
  constexpr int64_t wide = kLanes<double>;
  constexpr int kVectors = Sums <= 3 ? 4 : Sums <= 6 ? 2 : 1;  // additions enough to hide their latency
  int64_t done = 0;
  for (int64_t w = 0; w < job.window_count; ++w) {
    const int64_t window = job.windows[w], steps = smaller(window, block.end);
    // The first rows have not all steps behind them: one step at a time for those that have it.
    const int64_t inside = steps > block.begin ? steps : block.begin;
    for (int64_t k = done; k < steps; ++k)
      for (int64_t r = k > block.begin ? k : block.begin; r < inside; r += wide)
        add_steps<Sums, 1>(block, row, r, smaller(wide, inside - r), k, k + 1);
    int64_t r = inside;
    for (; r + kVectors * wide <= block.end; r += kVectors * wide)
      add_steps<Sums, kVectors>(block, row, r, wide, done, steps);
    for (; r < block.end; r += wide)
      add_steps<Sums, 1>(block, row, r, smaller(wide, block.end - r), done, steps);
    done = steps;
    double* const out = out0 + w * job.rows;
    for (r = block.begin; r < block.end; r += wide) {
      const int64_t lanes = smaller(wide, block.end - r);
      Vector<double> sums[Sums];
#pragma GCC unroll 12
      for (int i = 0; i < Sums; ++i) sums[i] = load<double>(block.sum(i) + r, lanes);
      store<double>(out + r, result(r, window, lanes, sums), lanes);
    }
  }
}

QFAST_ALWAYS_INLINE Vector<double> root(Vector<double> x) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}

constexpr double kMissing = __builtin_nan("");

QFAST_ALWAYS_INLINE Vector<double> where(Integers<double> there, Vector<double> value) {
  return there ? value : splat(kMissing);
}

QFAST_ALWAYS_INLINE double* rolling_out(const RollingStatsJob& job, int64_t window, int64_t first) {
  return job.out + window * job.rows + first;
}

// ---------------------------------------------------------------- sums
// Late: of the linearly weighted mean, which wants the sum of k times the value too.
template <bool Late>
static void rolling_sums(const RollingStatsJob& job, const RollingBlock& block, const RollingSeries& x,
                         double* out) {
  constexpr int kSums = Late ? 3 : 2;
  sum_over_windows<kSums>(
      job, block, out,
      [&](int64_t r, int64_t k, int64_t lanes, Vector<double>* sums) __attribute__((always_inline)) {
        const Vector<double> value = load<double>(x.value + r - k, lanes);
        sums[0] += load<double>(x.known + r - k, lanes), sums[1] += value;
        if constexpr (Late) sums[2] += static_cast<double>(k) * value;
      },
      [&](int64_t r, int64_t window, int64_t, const Vector<double>(&sums)[kSums])
          __attribute__((always_inline)) {
            const Vector<double> n = sums[0], sum = sums[1];
            if (job.kind == RollingKind::kCount) return n;
            if constexpr (Late) {
              Vector<double> length;
              for (int64_t i = 0; i < kLanes<double>; ++i)
                length[i] = static_cast<double>(smaller(window, r + i + 1));
              return where(n > 0, (length * sum - sums[2]) / (length * (length + 1) / 2) / n);
            }
            return where(n > 0, job.kind == RollingKind::kMean ? sum / n : sum);
          });
}

// ---------------------------------------------------------------- moments
// The value a row's differences are from is one of its window, so their squares are at most n + 1 times those
// of what lies off the mean: the subtraction costs a few units of float64's last place times n.
static void rolling_variances(const RollingStatsJob& job, const RollingBlock& block, const RollingSeries& x,
                              double* out) {
  sum_over_windows<3>(
      job, block, out,
      [&](int64_t r, int64_t k, int64_t lanes, Vector<double>* sums) __attribute__((always_inline)) {
        const Vector<double> there = load<double>(x.known + r - k, lanes);
        const Vector<double> apart =
            there * (load<double>(x.value + r - k, lanes) - load<double>(x.near + r, lanes));
        sums[0] += there, sums[1] += apart, sums[2] += apart * apart;
      },
      [&](int64_t, int64_t, int64_t, const Vector<double>(&sums)[3]) __attribute__((always_inline)) {
        const auto& [n, sum, squares] = sums;
        const Vector<double> off = squares - sum * sum / n;
        const Vector<double> variance = (off > 0 ? off : splat(0.)) / (n - 1);
        return where(n > 1, job.kind == RollingKind::kStd ? root(variance) : variance);
      });
}

QFAST_ALWAYS_INLINE double moment_result(RollingKind kind, double n, double second, double third,
                                         double fourth, double apart) {
  if (kind == RollingKind::kMad) return n > 0 ? apart / n : kMissing;
  const double variance = second / n;
  if (kind == RollingKind::kSkew) {
    if (n < 3 || !(second > 0)) return kMissing;
    return __builtin_sqrt(n * (n - 1)) * (third / n) / ((n - 2) * variance * __builtin_sqrt(variance));
  }
  if (n < 4 || !(second > 0)) return kMissing;
  const double ratio = fourth / n / (variance * variance);
  return ((n * n - 1) * ratio - 3 * (n - 1) * (n - 1)) / ((n - 2) * (n - 3));
}

// Mean first, then powers of what lies off it, for each window.
static void rolling_moments(const RollingStatsJob& job, const RollingBlock& block, const RollingSeries& x,
                            double* out0) {
  double* __restrict n = block.sum(0), * __restrict sum = block.sum(1), * __restrict mean = block.sum(2);
  double *__restrict second = block.sum(3), *__restrict third = block.sum(4), *__restrict fourth = block.sum(5),
                     *__restrict apart = block.sum(6);
  const double* __restrict value = x.value, * __restrict known = x.known, * __restrict near = x.near;
  over_windows(
      job, block,
      [&](int64_t k, int64_t first) __attribute__((always_inline)) {
        QFAST_BLOCK_LOOP(first) n[r] += known[r - k], sum[r] += known[r - k] * (value[r - k] - near[r]);
      },
      [&](int64_t window, int64_t w) __attribute__((always_inline)) {
        QFAST_BLOCK_LOOP(block.begin) {
          mean[r] = n[r] > 0 ? sum[r] / n[r] : 0;
          second[r] = third[r] = fourth[r] = apart[r] = 0;
        }
        for (int64_t k = 0; k < window && k < block.end; ++k) {
          const int64_t first = k > block.begin ? k : block.begin;
          if (job.kind == RollingKind::kMad) {
            QFAST_BLOCK_LOOP(first) {
              apart[r] += __builtin_fabs(known[r - k] * (value[r - k] - near[r] - mean[r]));
            }
          } else {
            QFAST_BLOCK_LOOP(first) {
              const double off = known[r - k] * (value[r - k] - near[r] - mean[r]), square = off * off;
              second[r] += square, third[r] += square * off, fourth[r] += square * square;
            }
          }
        }
        double* const __restrict out = out0 + w * job.rows;
        QFAST_BLOCK_LOOP(block.begin) {
          out[r] = moment_result(job.kind, n[r], second[r], third[r], fourth[r], apart[r]);
        }
      });
}

// ---------------------------------------------------------------- regression on time
constexpr double kFlat = 2e-5;  // a standard deviation up to here is taken for none, as in the reference

// Time counts back from the current row: x = -k.
static void rolling_regression(const RollingStatsJob& job, const RollingBlock& block, const RollingSeries& x,
                               double* out) {
  const double *const value = x.value, *const known = x.known, *const near = x.near;
  sum_over_windows<6>(
      job, block, out,
      [&](int64_t r, int64_t k, int64_t lanes, Vector<double>* sums) __attribute__((always_inline)) {
        const auto back = static_cast<double>(k);
        const Vector<double> there = load<double>(known + r - k, lanes);
        const Vector<double> apart =
            there * (load<double>(value + r - k, lanes) - load<double>(near + r, lanes));
        sums[0] += there, sums[1] -= back * there, sums[2] += back * back * there;
        sums[3] += apart, sums[4] -= back * apart, sums[5] += apart * apart;
      },
      [&](int64_t r, int64_t, int64_t lanes, const Vector<double>(&sums)[6]) __attribute__((always_inline)) {
        const auto& [n, sx, sxx, sy, sxy, syy] = sums;
        const Vector<double> together = n * sxy - sx * sy, of_x = n * sxx - sx * sx, of_y = n * syy - sy * sy;
        const Vector<double> slope = where(n > 1, together / of_x);
        if (job.kind == RollingKind::kSlope) return slope;
        if (job.kind == RollingKind::kResi) {
          const Vector<double> apart = load<double>(value + r, lanes) - load<double>(near + r, lanes);
          return where(load<double>(known + r, lanes) > 0, apart - (sy - slope * sx) / n);
        }
        const Integers<double> flat = root(of_y / (n * (n - 1))) <= kFlat;
        return where(~flat & (n > 1), together * together / (of_x * of_y));
      });
}

// ---------------------------------------------------------------- pairs
QFAST_ALWAYS_INLINE Integers<double> is_flat(Vector<double> n, Vector<double> sum, Vector<double> squares) {
  return (n > 1) & (root((squares - sum * sum / n) / (n - 1)) <= kFlat);
}

static void rolling_pairs(const RollingStatsJob& job, const RollingBlock& block, const RollingSeries& x,
                          const RollingSeries& y, double* out) {
  sum_over_windows<12>(
      job, block, out,
      [&](int64_t r, int64_t k, int64_t lanes, Vector<double>* sums) __attribute__((always_inline)) {
        const auto at = [&](const double* series)
                            __attribute__((always_inline)) { return load<double>(series, lanes); };
        const Vector<double> of_x = at(x.known + r - k), of_y = at(y.known + r - k), both = of_x * of_y;
        const Vector<double> p = of_x * (at(x.value + r - k) - at(x.near + r));
        const Vector<double> q = of_y * (at(y.value + r - k) - at(y.near + r));
        sums[0] += both, sums[1] += both * p, sums[2] += both * q;
        sums[3] += both * p * p, sums[4] += both * q * q, sums[5] += p * q;
        sums[6] += of_x, sums[7] += p, sums[8] += p * p;
        sums[9] += of_y, sums[10] += q, sums[11] += q * q;
      },
      [&](int64_t, int64_t, int64_t, const Vector<double>(&sums)[12]) __attribute__((always_inline)) {
        const auto& [n, sx, sy, sxx, syy, sxy, xn, xs, xq, yn, ys, yq] = sums;
        const Vector<double> together = sxy - sx * sy / n;
        if (job.kind == RollingKind::kCov) return where(n > 1, together / (n - 1));
        const Vector<double> of_x = sxx - sx * sx / n, of_y = syy - sy * sy / n;
        const Integers<double> flat = is_flat(xn, xs, xq) | is_flat(yn, ys, yq);
        return where(~flat & (n > 1), together / root(of_x * of_y));
      });
}

// ---------------------------------------------------------------- order
// Sign 1: the largest; -1: the smallest. Of equal values the oldest, as numpy's argmax; a missing value, the
// oldest again, is before all others.
template <int Sign>
static void rolling_extremes(const RollingStatsJob& job, const RollingBlock& block, const RollingSeries& x,
                             double* out0) {
  double *__restrict n = block.sum(0), *__restrict best = block.sum(1), *__restrict place = block.sum(2),
                     *__restrict hole = block.sum(3);
  const double* __restrict value = x.value, * __restrict known = x.known;
  const bool wants_place = job.kind == RollingKind::kIdxMax || job.kind == RollingKind::kIdxMin;
  QFAST_BLOCK_LOOP(block.begin) best[r] = -__builtin_inf(), hole[r] = -1;
  over_windows(
      job, block,
      [&](int64_t k, int64_t first) __attribute__((always_inline)) {
        const auto back = static_cast<double>(k);
        QFAST_BLOCK_LOOP(first) {
          const bool there = known[r - k] > 0;
          const double here = there ? Sign * value[r - k] : -__builtin_inf();
          place[r] = here >= best[r] ? back : place[r];
          best[r] = here >= best[r] ? here : best[r];
          hole[r] = there ? hole[r] : back;
          n[r] += known[r - k];
        }
      },
      [&](int64_t window, int64_t w) __attribute__((always_inline)) {
        double* const __restrict out = out0 + w * job.rows;
        QFAST_BLOCK_LOOP(block.begin) {
          const auto length = static_cast<double>(smaller(window, r + 1));
          const double back = hole[r] >= 0 ? hole[r] : place[r];
          out[r] = n[r] > 0 ? (wants_place ? length - back : Sign * best[r]) : kMissing;
        }
      });
}

// Share of the window's values up to the current one; equal ones count from their middle.
static void rolling_ranks(const RollingStatsJob& job, const RollingBlock& block, const RollingSeries& x,
                          double* out0) {
  double* __restrict n = block.sum(0), * __restrict less = block.sum(1), * __restrict equal = block.sum(2);
  const double* __restrict value = x.value, * __restrict known = x.known;
  over_windows(
      job, block,
      [&](int64_t k, int64_t first) __attribute__((always_inline)) {
        QFAST_BLOCK_LOOP(first) {
          const double there = known[r - k], other = value[r - k];
          n[r] += there, less[r] += other < value[r] ? there : 0, equal[r] += other == value[r] ? there : 0;
        }
      },
      [&](int64_t, int64_t w) __attribute__((always_inline)) {
        double* const __restrict out = out0 + w * job.rows;
        QFAST_BLOCK_LOOP(block.begin) {
          out[r] = known[r] > 0 ? (less[r] + (equal[r] + 1) / 2) / n[r] : kMissing;
        }
      });
}

// How many of sorted[0, count) are less than `value`; infinities follow, a vector of them at least.
QFAST_ALWAYS_INLINE int64_t sorted_place(const double* sorted, int64_t count, double value) {
  // Halves without branches, which could not be foretold; then counting, faster than the last of them.
  const double* from = sorted;
  while (count > 8 * kLanes<double>) {
    const int64_t half = count / 2;
    from = from[half - 1] < value ? from + half : from;
    count -= half;
  }
  Integers<double> less = {};
  for (int64_t i = 0; i < count; i += kLanes<double>)
    less -= load<double>(from + i, kLanes<double>) < splat(value);
  int64_t total = 0;
  for (int64_t i = 0; i < kLanes<double>; ++i) total += less[i];
  return from - sorted + total;
}

// A window's values in order, infinities behind them, a vector of them at least.
struct SortedWindow {
  double* values;
  int64_t count;

  QFAST_INLINE_MEMBER void move(int64_t to, int64_t from, int64_t length) {
    __builtin_memmove(values + to, values + from, sizeof(double) * length);
  }

  // A gap opens where a value leaves, or at the end, and moves to where one comes, or to the end.
  QFAST_INLINE_MEMBER void replace(bool leaves, double left, bool comes, double come) {
    int64_t gap = leaves ? sorted_place(values, count, left) : count;
    const int64_t place = comes ? sorted_place(values, count, come) : count;
    if (place > gap) {
      move(gap, gap + 1, place - gap - 1);
      gap = place - 1;
    } else {
      move(place + 1, place, gap - place);
      gap = place;
    }
    values[gap] = comes ? come : __builtin_inf();
    count += static_cast<int64_t>(comes) - static_cast<int64_t>(leaves);
  }

  // Between two of the values.
  QFAST_INLINE_MEMBER double quantile(double share) const {
    if (count == 0) return kMissing;
    const double at = share * static_cast<double>(count - 1);
    const auto low = static_cast<int64_t>(at);
    const double high = low + 1 < count ? values[low + 1] : values[low];
    return values[low] + (high - values[low]) * (at - static_cast<double>(low));
  }
};

// Row by row for a few windows: what one waits for, the others use.
static void rolling_quantiles(const RollingStatsJob& job, const RollingSeries& x, int64_t rows,
                              double* scratch, double* out) {
  static_assert(kSortedMargin >= kLanes<double>);
  for (int64_t first = 0; first < job.window_count; first += kSortedWindows) {
    const int64_t windows = smaller(kSortedWindows, job.window_count - first);
    SortedWindow sorted[kSortedWindows];
    double* room = scratch;
    for (int64_t w = 0; w < windows; ++w) {
      const int64_t length = smaller(job.windows[first + w], rows) + kSortedMargin;
      sorted[w] = {room, 0};
      for (int64_t i = 0; i < length; ++i) *room++ = __builtin_inf();
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t w = 0; w < windows; ++w) {
        const int64_t last = r - job.windows[first + w];
        const bool leaves = last >= 0 && x.known[last] > 0;
        sorted[w].replace(leaves, leaves ? x.value[last] : 0, x.known[r] > 0, x.value[r]);
        out[(first + w) * job.rows + r] = sorted[w].quantile(job.parameter);
      }
    }
  }
}

// ---------------------------------------------------------------- exponential mean
// Weights fall by 1 - parameter a row, missing ones too, and are those of the values that are there.
static void exponential_mean(const RollingStatsJob& job, const RollingSeries& x, int64_t rows, double* out) {
  double weight = 0, mean = kMissing;
  for (int64_t r = 0; r < rows; ++r) {
    weight *= 1 - job.parameter;
    if (x.known[r] > 0) {
      mean = weight > 0 ? mean + (x.value[r] - mean) / (weight + 1) : x.value[r];
      weight += 1;
    }
    out[r] = mean;
  }
}

// ---------------------------------------------------------------- instruments
static void rolling_blocks(const RollingStatsJob& job, const RollingSeries& x, const RollingSeries& y,
                           int64_t rows, double* sums, double* out) {
  for (int64_t begin = 0; begin < rows; begin += kRollingBlock) {
    RollingBlock block{begin, smaller(begin + kRollingBlock, rows), {}};
    for (int64_t i = 0; i < kRollingSums * kRollingBlock; ++i) sums[i] = 0;
    for (int64_t i = 0; i < kRollingSums; ++i) block.sums[i] = sums + i * kRollingBlock;
    switch (job.kind) {
      case RollingKind::kMax:
      case RollingKind::kIdxMax:
        rolling_extremes<1>(job, block, x, out);
        break;
      case RollingKind::kMin:
      case RollingKind::kIdxMin:
        rolling_extremes<-1>(job, block, x, out);
        break;
      case RollingKind::kRank:
        rolling_ranks(job, block, x, out);
        break;
      case RollingKind::kSlope:
      case RollingKind::kRsquare:
      case RollingKind::kResi:
        rolling_regression(job, block, x, out);
        break;
      case RollingKind::kCov:
      case RollingKind::kCorr:
        rolling_pairs(job, block, x, y, out);
        break;
      case RollingKind::kCount:
      case RollingKind::kSum:
      case RollingKind::kMean:
        rolling_sums<false>(job, block, x, out);
        break;
      case RollingKind::kWma:
        rolling_sums<true>(job, block, x, out);
        break;
      case RollingKind::kVar:
      case RollingKind::kStd:
        rolling_variances(job, block, x, out);
        break;
      default:
        rolling_moments(job, block, x, out);
    }
  }
}

// Instruments [begin, end).
static void rolling(const RollingStatsJob& job, int64_t begin, int64_t end, int64_t longest,
                    double* scratch) {
  double* const sums = scratch + 6 * longest;
  const RollingSeries x{scratch, scratch + longest, scratch + 2 * longest},
      y{scratch + 3 * longest, scratch + 4 * longest, scratch + 5 * longest};
  // The reference's regressions let infinities in, where pandas takes them for missing.
  const bool finite =
      job.kind != RollingKind::kSlope && job.kind != RollingKind::kRsquare && job.kind != RollingKind::kResi;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = job.start[i], rows = job.stop[i] - first;
    if (rows <= 0) continue;
    prepare_rolling(job.x + first, rows, finite, x.value, x.known, x.near);
    if (job.y != nullptr) prepare_rolling(job.y + first, rows, finite, y.value, y.known, y.near);
    double* const out = rolling_out(job, 0, first);
    if (job.kind == RollingKind::kQuantile) {
      rolling_quantiles(job, x, rows, sums, out);
    } else if (job.kind == RollingKind::kEma) {
      exponential_mean(job, x, rows, out);
    } else {
      rolling_blocks(job, x, y, rows, sums, out);
    }
  }
}

#undef QFAST_BLOCK_LOOP
