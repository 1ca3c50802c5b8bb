// Statistics of the last rows of an instrument, for several lengths of the window at once. Included inside
// the namespace of the instruction set.
//
// Sums are taken over the window's steps back in time, for a block of rows at once (vectors lie along the
// rows), and pass the lengths of all windows on their way: no sum is ever corrected by subtraction, so none
// drifts, and an infinity is gone when its window is. Values enter as differences from a value of the window,
// which keeps what is constant exactly so. Bound by the additions: the longest window's steps a row, and for
// the moments those of every window.

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

// step(row, row - k, k) for the rows of a block and all steps back, and after those of a window
// finish(window, its number). Rows before the first do not exist.
template <class Step, class Finish>
QFAST_ALWAYS_INLINE void over_windows(const RollingStatsJob& job, const RollingBlock& block, const Step& step,
                                      const Finish& finish) {
  int64_t k = 0;
  for (int64_t w = 0; w < job.window_count; ++w) {
    for (; k < job.windows[w] && k < block.end; ++k) step(k, k > block.begin ? k : block.begin);
    finish(job.windows[w], w);
  }
}

constexpr double kMissing = __builtin_nan("");

QFAST_ALWAYS_INLINE double* rolling_out(const RollingStatsJob& job, int64_t window, int64_t first) {
  return job.out + window * job.rows + first;
}

// ---------------------------------------------------------------- sums
static void rolling_sums(const RollingStatsJob& job, const RollingBlock& block, const RollingSeries& x,
                         double* out0) {
  double* __restrict n = block.sum(0), * __restrict sum = block.sum(1), * __restrict late = block.sum(2);
  const double* __restrict value = x.value, * __restrict known = x.known;
  over_windows(
      job, block,
      [&](int64_t k, int64_t first) __attribute__((always_inline)) {
        const auto back = static_cast<double>(k);
        QFAST_BLOCK_LOOP(first) n[r] += known[r - k], sum[r] += value[r - k], late[r] += back * value[r - k];
      },
      [&](int64_t window, int64_t w) __attribute__((always_inline)) {
        double* const out = out0 + w * job.rows;
        QFAST_BLOCK_LOOP(block.begin) {
          double found = sum[r];
          if (job.kind == RollingKind::kCount) found = n[r];
          if (job.kind == RollingKind::kMean) found = sum[r] / n[r];
          if (job.kind == RollingKind::kWma) {
            const auto length = static_cast<double>(smaller(window, r + 1));
            found = (length * sum[r] - late[r]) / (length * (length + 1) / 2) / n[r];
          }
          out[r] = n[r] > 0 || job.kind == RollingKind::kCount ? found : kMissing;
        }
      });
}

// ---------------------------------------------------------------- moments
QFAST_ALWAYS_INLINE double moment_result(RollingKind kind, double n, double second, double third,
                                         double fourth, double apart) {
  if (kind == RollingKind::kMad) return n > 0 ? apart / n : kMissing;
  if (kind == RollingKind::kVar || kind == RollingKind::kStd) {
    if (!(n > 1)) return kMissing;
    return kind == RollingKind::kVar ? second / (n - 1) : __builtin_sqrt(second / (n - 1));
  }
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
  const bool high = job.kind == RollingKind::kSkew || job.kind == RollingKind::kKurt;
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
          if (high) {
            QFAST_BLOCK_LOOP(first) {
              const double off = known[r - k] * (value[r - k] - near[r] - mean[r]), square = off * off;
              second[r] += square, third[r] += square * off, fourth[r] += square * square;
            }
          } else if (job.kind == RollingKind::kMad) {
            QFAST_BLOCK_LOOP(first) {
              apart[r] += __builtin_fabs(known[r - k] * (value[r - k] - near[r] - mean[r]));
            }
          } else {
            QFAST_BLOCK_LOOP(first) {
              const double off = known[r - k] * (value[r - k] - near[r] - mean[r]);
              second[r] += off * off;
            }
          }
        }
        double* const out = out0 + w * job.rows;
        QFAST_BLOCK_LOOP(block.begin) {
          out[r] = moment_result(job.kind, n[r], second[r], third[r], fourth[r], apart[r]);
        }
      });
}

// ---------------------------------------------------------------- regression on time
constexpr double kFlat = 2e-5;  // a standard deviation up to here is taken for none, as in the reference

// Time counts back from the current row: x = -k.
static void rolling_regression(const RollingStatsJob& job, const RollingBlock& block, const RollingSeries& x,
                               double* out0) {
  double *__restrict n = block.sum(0), *__restrict sx = block.sum(1), *__restrict sxx = block.sum(2),
                     *__restrict sy = block.sum(3), *__restrict sxy = block.sum(4), *__restrict syy = block.sum(5);
  const double* __restrict value = x.value, * __restrict known = x.known, * __restrict near = x.near;
  over_windows(
      job, block,
      [&](int64_t k, int64_t first) __attribute__((always_inline)) {
        const auto back = static_cast<double>(k);
        QFAST_BLOCK_LOOP(first) {
          const double there = known[r - k], apart = there * (value[r - k] - near[r]);
          n[r] += there, sx[r] -= back * there, sxx[r] += back * back * there;
          sy[r] += apart, sxy[r] -= back * apart, syy[r] += apart * apart;
        }
      },
      [&](int64_t, int64_t w) __attribute__((always_inline)) {
        double* const out = out0 + w * job.rows;
        QFAST_BLOCK_LOOP(block.begin) {
          const double together = n[r] * sxy[r] - sx[r] * sy[r], of_x = n[r] * sxx[r] - sx[r] * sx[r],
                       of_y = n[r] * syy[r] - sy[r] * sy[r];
          const double slope = n[r] > 1 ? together / of_x : kMissing;
          double found = slope;
          if (job.kind == RollingKind::kResi)
            found = known[r] > 0 ? value[r] - near[r] - (sy[r] - slope * sx[r]) / n[r] : kMissing;
          if (job.kind == RollingKind::kRsquare) {
            const bool flat = __builtin_sqrt(of_y / (n[r] * (n[r] - 1))) <= kFlat;
            found = flat || !(n[r] > 1) ? kMissing : together * together / (of_x * of_y);
          }
          out[r] = found;
        }
      });
}

// ---------------------------------------------------------------- pairs
QFAST_ALWAYS_INLINE bool is_flat(double n, double sum, double squares) {
  return n > 1 && __builtin_sqrt((squares - sum * sum / n) / (n - 1)) <= kFlat;
}

static void rolling_pairs(const RollingStatsJob& job, const RollingBlock& block, const RollingSeries& x,
                          const RollingSeries& y, double* out0) {
  double *__restrict n = block.sum(0), *__restrict sx = block.sum(1), *__restrict sy = block.sum(2),
                     *__restrict sxx = block.sum(3), *__restrict syy = block.sum(4), *__restrict sxy = block.sum(5);
  double *__restrict xn = block.sum(6), *__restrict xs = block.sum(7), *__restrict xq = block.sum(8),
                     *__restrict yn = block.sum(9), *__restrict ys = block.sum(10), *__restrict yq = block.sum(11);
  const double* __restrict a = x.value, * __restrict a_known = x.known, * __restrict a_near = x.near;
  const double* __restrict b = y.value, * __restrict b_known = y.known, * __restrict b_near = y.near;
  // Vectors by hand: of twelve sums the compiler cannot tell that they lie apart.
  double* const __restrict all[] = {n, sx, sy, sxx, syy, sxy, xn, xs, xq, yn, ys, yq};
  constexpr int kSums = 12;
  // Steps [from, to) back of rows r, r + 1, ...: the sums are in registers meanwhile.
  const auto add_steps = [&](int64_t r, int64_t lanes, int64_t from,
                             int64_t to) __attribute__((always_inline)) {
    Vector<double> sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = load<double>(all[i] + r, lanes);
    const Vector<double> a0 = load<double>(a_near + r, lanes), b0 = load<double>(b_near + r, lanes);
    for (int64_t k = from; k < to; ++k) {
      const auto at = [&](const double* series)
                          __attribute__((always_inline)) { return load<double>(series + r - k, lanes); };
      const Vector<double> of_a = at(a_known), of_b = at(b_known), both = of_a * of_b;
      const Vector<double> p = of_a * (at(a) - a0), q = of_b * (at(b) - b0);
      const Vector<double> terms[kSums] = {
          both, both * p, both * q, both * p * p, both * q * q, p * q, of_a, p, p * p, of_b, q, q * q};
      for (int i = 0; i < kSums; ++i) sums[i] = sums[i] + terms[i];
    }
    for (int i = 0; i < kSums; ++i) store<double>(all[i] + r, sums[i], lanes);
  };
  int64_t done = 0;
  for (int64_t w = 0; w < job.window_count; ++w) {
    const int64_t steps = smaller(job.windows[w], block.end);
    // The first rows have not all steps behind them: one step at a time for those that have it.
    const int64_t inside = steps > block.begin ? steps : block.begin;
    for (int64_t k = done; k < steps; ++k)
      for (int64_t r = k > block.begin ? k : block.begin; r < inside; r += kLanes<double>)
        add_steps(r, smaller(kLanes<double>, inside - r), k, k + 1);
    for (int64_t r = inside; r < block.end; r += kLanes<double>)
      add_steps(r, smaller(kLanes<double>, block.end - r), done, steps);
    done = steps;
    double* const out = out0 + w * job.rows;
    QFAST_BLOCK_LOOP(block.begin) {
      const double together = sxy[r] - sx[r] * sy[r] / n[r];
      double found = n[r] > 1 ? together / (n[r] - 1) : kMissing;
      if (job.kind == RollingKind::kCorr) {
        const double of_x = sxx[r] - sx[r] * sx[r] / n[r], of_y = syy[r] - sy[r] * sy[r] / n[r];
        const bool flat = is_flat(xn[r], xs[r], xq[r]) || is_flat(yn[r], ys[r], yq[r]);
        found = flat || !(n[r] > 1) ? kMissing : together / __builtin_sqrt(of_x * of_y);
      }
      out[r] = found;
    }
  }
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
        double* const out = out0 + w * job.rows;
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
        double* const out = out0 + w * job.rows;
        QFAST_BLOCK_LOOP(block.begin) {
          out[r] = known[r] > 0 ? (less[r] + (equal[r] + 1) / 2) / n[r] : kMissing;
        }
      });
}

// The place of `value` in sorted[0, count): of the first that is not less.
QFAST_ALWAYS_INLINE int64_t sorted_place(const double* sorted, int64_t count, double value) {
  int64_t low = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    if (sorted[low + half] < value)
      low += half + 1, count -= half + 1;
    else
      count = half;
  }
  return low;
}

// The window's values are kept sorted; quantiles lie between two of them.
static void rolling_quantiles(const RollingStatsJob& job, const RollingSeries& x, int64_t rows,
                              double* sorted, double* out0) {
  for (int64_t w = 0; w < job.window_count; ++w) {
    const int64_t window = job.windows[w];
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      if (r >= window && x.known[r - window] > 0) {
        const int64_t at = sorted_place(sorted, count, x.value[r - window]);
        __builtin_memmove(sorted + at, sorted + at + 1, sizeof(double) * (count - at - 1));
        --count;
      }
      if (x.known[r] > 0) {
        const int64_t at = sorted_place(sorted, count, x.value[r]);
        __builtin_memmove(sorted + at + 1, sorted + at, sizeof(double) * (count - at));
        sorted[at] = x.value[r];
        ++count;
      }
      double found = kMissing;
      if (count > 0) {
        const double place = job.parameter * static_cast<double>(count - 1);
        const auto low = static_cast<int64_t>(place);
        const double high = low + 1 < count ? sorted[low + 1] : sorted[low];
        found = sorted[low] + (high - sorted[low]) * (place - static_cast<double>(low));
      }
      out0[w * job.rows + r] = found;
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
      case RollingKind::kWma:
        rolling_sums(job, block, x, out);
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
      rolling_quantiles(job, x, rows, y.value, out);
    } else if (job.kind == RollingKind::kEma) {
      exponential_mean(job, x, rows, out);
    } else {
      rolling_blocks(job, x, y, rows, sums, out);
    }
  }
}

#undef QFAST_BLOCK_LOOP
