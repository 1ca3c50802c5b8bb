// Temporal convolution stack, a tile of batch rows at a time; see cpu_isa_body.h for what may stand here.
//
// A convolution's output slot is the sum, over its taps, of [rows, features] x [features, channels]. A thread
// owns whole tiles, whose activations stay in the second-level cache; weights are packed so that a panel of
// columns streams through once for every few rows. Bound by multiply-adds: 2 * taps * features * channels
// flops a row forward, twice that backward, against 8 bytes a kept activation.

// The columns of panel p.
QFAST_ALWAYS_INLINE int64_t panel_columns(const Panels& panels, int64_t p) {
  return smaller(panels.width, panels.columns - p * panels.width);
}

template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> relu(Vector<Element> x) {
  return x < Element(0) ? Vector<Element>{} : x;  // NaN stays
}

// body(column, lanes) for vectors that cover `columns`.
template <class Element, class Body>
QFAST_ALWAYS_INLINE void for_vectors(int64_t columns, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes<Element> <= columns; j += kLanes<Element>) body(j, kLanes<Element>);
  if (j < columns) body(j, columns - j);
}

// ---------------------------------------------------------------- signs
// Where the gradient passes a ReLU of this output: above 0, and as in torch where it is NaN.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> passed(Vector<Element> output, Vector<Element> grad) {
  return output <= Element(0) ? Vector<Element>{} : grad;
}

// Bit l: it passes in lane l.
template <class Element>
QFAST_ALWAYS_INLINE uint32_t passing_lanes(Vector<Element> x) {
#if QFAST_VECTOR_BYTES == 64
  if constexpr (sizeof(Element) == 4) {
    return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NLE_UQ);
  } else {
    return _mm512_cmp_pd_mask((__m512d)x, _mm512_setzero_pd(), _CMP_NLE_UQ);
  }
#elif QFAST_VECTOR_BYTES == 32
  if constexpr (sizeof(Element) == 4) {
    return ~_mm256_movemask_ps((__m256)(x <= Element(0)));
  } else {
    return ~_mm256_movemask_pd((__m256d)(x <= Element(0)));
  }
#else
  uint32_t bits = 0;
  for (int64_t lane = 0; lane < kLanes<Element>; ++lane) bits |= (x[lane] <= Element(0) ? 0u : 1u) << lane;
  return bits;
#endif
}

// Bits of columns [column, column + lanes) of a row; columns are written in ascending order.
template <class Element>
QFAST_ALWAYS_INLINE void store_signs(unsigned char* signs, int64_t column, int64_t lanes, uint32_t bits) {
  bits &= (1u << (lanes - 1) << 1) - 1;
  if constexpr (kLanes<Element> < 8) {
    const int64_t shift = column % 8;
    unsigned char* const byte = signs + column / 8;
    *byte = static_cast<unsigned char>((shift == 0 ? 0 : *byte) | bits << shift);
  } else {
    for (int64_t bit = 0; bit < lanes; bit += 8)
      signs[(column + bit) / 8] = static_cast<unsigned char>(bits >> bit);
  }
}

// x where the bit is set, else 0.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> where_sign(const unsigned char* signs, int64_t column, int64_t lanes,
                                               Vector<Element> x) {
  uint32_t bits = signs[column / 8];
  if constexpr (kLanes<Element> < 8) {
    bits >>= column % 8;
  } else {
    if (lanes > 8) bits |= static_cast<uint32_t>(signs[column / 8 + 1]) << 8;
  }
  Integers<Element> lane;
  for (int64_t l = 0; l < kLanes<Element>; ++l) lane[l] = 1ll << l;
  return ((Integers<Element>{} + static_cast<int32_t>(bits)) & lane) != 0 ? x : Vector<Element>{};
}

// ---------------------------------------------------------------- convolution
template <class Element>
QFAST_ALWAYS_INLINE const Element* at(const Activation<const Element>& a, int64_t slot, int64_t row) {
  return a.data + slot * a.slot_stride + row * a.row_stride;
}

template <class Element>
QFAST_ALWAYS_INLINE Activation<const Element> reading(const Activation<Element>& a) {
  return {a.data, a.slot_stride, a.row_stride, a.channel_stride};
}

// `a` for a tile of this many rows: one row has no stride, which makes slots follow each other like rows.
template <class Element>
QFAST_ALWAYS_INLINE Activation<Element> for_rows(Activation<Element> a, int64_t rows) {
  if (rows == 1) a.row_stride = a.slot_stride;
  return a;
}

template <class Element>
QFAST_ALWAYS_INLINE bool slots_follow(const Activation<Element>& a, int64_t rows) {
  return a.slot_stride == rows * a.row_stride;
}

// body(slot, count) for the slots of the runs, as many at a time as are one matrix.
template <class Body>
QFAST_ALWAYS_INLINE void for_runs(const RunList& list, bool together, const Body& body) {
  for (int64_t i = 0; i < list.count; ++i) {
    const Run run = list.runs[i];
    const int64_t step = together ? run.length : 1;
    for (int64_t slot = run.slot; slot < run.slot + run.length; slot += step) body(slot, step);
  }
}

// finish(row, sums) for each tile of the rows of a run of slots and one panel;
// `weights` is the panel's. `more` may add to the sums before.
template <class Element, int Vectors, class More, class Finish>
QFAST_ALWAYS_INLINE void convolve_slot(const Tap* taps, const Tap* end,
                                       const Activation<const Element>& input, int64_t features,
                                       const Element* weights, int64_t rows, const More& more,
                                       const Finish& finish) {
  constexpr int64_t kWidth = Vectors * kLanes<Element>;
  for_row_tiles<kTileRows<Vectors>>(rows, [&]<int Rows>(int64_t row) __attribute__((always_inline)) {
    Sums<Element, Rows, Vectors> sums = {};
    for (const Tap* tap = taps; tap != end; ++tap) {
      Sums<Element, Rows, Vectors> part = {};  // a tap by itself: a long chain of additions loses digits
      add_product(part, at(input, tap->slot, row), input.row_stride, input.channel_stride,
                  weights + tap->tap * features * kWidth, kWidth, features);
      add(sums, part);
    }
    more(row, sums);
    finish(row, sums);
  });
}

constexpr auto kNothingMore = [](int64_t, auto&) __attribute__((always_inline)) {};

// Writes sums [Rows, columns], each vector changed by change(vector, row within the tile, column).
template <class Element, int Rows, int Vectors, class Change>
QFAST_ALWAYS_INLINE void store_sums(const Sums<Element, Rows, Vectors>& sums, Element* to, int64_t row_stride,
                                    int64_t columns, const Change& change) {
#pragma GCC unroll 24
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const int64_t column = v * kLanes<Element>, lanes = smaller(kLanes<Element>, columns - column);
      if (lanes == kLanes<Element>) {
        store<Element>(to + i * row_stride + column, change(sums.at[i][v], i, column, lanes),
                       kLanes<Element>);
      } else if (lanes > 0) {
        store<Element>(to + i * row_stride + column, change(sums.at[i][v], i, column, lanes), lanes);
      }
    }
  }
}

// ---------------------------------------------------------------- forward
template <class Element>
struct TileForward {
  const NetworkJob<Element>& job;
  int64_t first_row, rows;
  Element* scratch;

  // between = dropout(relu(first(input) + bias))
  void first(const BlockJob<Element>& block, int32_t convolution, const Activation<const Element>& input,
             const Activation<Element>& between) const {
    for (int64_t p = 0; p < block.panels.count; ++p)
      for_panel_width<Element>(block.panels.width, [&]<int Vectors>() __attribute__((always_inline)) {
        first_panel<Vectors>(block, convolution, input, between, p);
      });
  }

  template <int Vectors>
  void first_panel(const BlockJob<Element>& block, int32_t convolution,
                   const Activation<const Element>& input, const Activation<Element>& between,
                   int64_t p) const {
    const int64_t width = block.panels.width, column = p * width, columns = panel_columns(block.panels, p);
    const Element* const weights = block.first_weight + column * block.kernel * block.features;
    const Element* const bias = block.first_bias + column;
    const bool together = slots_follow(input, rows) && slots_follow(between, rows);
    for_runs(block.first_runs, together, [&](int64_t slot, int64_t count) __attribute__((always_inline)) {
      Element* const to = between.data + slot * between.slot_stride + column;
      convolve_slot<Element, Vectors>(
          block.first.taps + block.first.begin[slot], block.first.taps + block.first.begin[slot + 1], input,
          block.features, weights, count * rows, kNothingMore,
          [&](int64_t row, auto& sums) __attribute__((always_inline)) {
            store_sums(sums, to + row * between.row_stride, between.row_stride, columns,
                       [&](Vector<Element> value, int, int64_t j, int64_t) __attribute__((always_inline)) {
                         return relu<Element>(value + load<Element>(bias + j, kLanes<Element>));
                       });
          });
      for (int64_t i = 0; job.dropout.active && i < count; ++i)
        drop<Element>(job.dropout, {first_row, column, convolution, block.between_positions[slot + i]}, rows,
                      columns, to + i * between.slot_stride, between.row_stride);
    });
  }

  // output = relu(dropout(relu(second(between) + bias)) + beside)
  void second(const BlockJob<Element>& block, int32_t convolution, const Activation<const Element>& input,
              const Activation<const Element>& between, const Activation<Element>& output,
              unsigned char* signs) const {
    for (int64_t p = 0; p < block.panels.count; ++p)
      for_panel_width<Element>(block.panels.width, [&]<int Vectors>() __attribute__((always_inline)) {
        second_panel<Vectors>(block, convolution, input, between, output, signs, p);
      });
  }

  template <int Vectors>
  void second_panel(const BlockJob<Element>& block, int32_t convolution,
                    const Activation<const Element>& input, const Activation<const Element>& between,
                    const Activation<Element>& output, unsigned char* signs, int64_t p) const {
    const int64_t width = block.panels.width, column = p * width;
    const Element* const weights = block.second_weight + column * block.kernel * block.channels;
    const Element* const bias = block.second_bias + column;
    const bool together = slots_follow(between, rows) && (!block.downsample || slots_follow(input, rows));
    for_runs(block.second_runs, together, [&](int64_t slot, int64_t count) __attribute__((always_inline)) {
      Element *const product = scratch, *const beside = scratch + count * rows * width;
      convolve_slot<Element, Vectors>(
          block.second.taps + block.second.begin[slot], block.second.taps + block.second.begin[slot + 1],
          between, block.channels, weights, count * rows, kNothingMore,
          [&](int64_t row, auto& sums) __attribute__((always_inline)) {
            store_sums(sums, product + row * width, width, width,
                       [&](Vector<Element> value, int, int64_t j, int64_t) __attribute__((always_inline)) {
                         return relu<Element>(value + load<Element>(bias + j, kLanes<Element>));
                       });
          });
      if (block.downsample) downsample<Vectors>(block, input, slot, count, p, beside);
      for (int64_t i = 0; i < count; ++i)
        finish_slot(block, convolution, input, slot + i, p, product + i * rows * width,
                    beside + i * rows * width, output, signs);
    });
  }

  // What follows the second convolution of a slot: its columns of a panel stand in `product`, and if they
  // come from a 1x1 convolution what stands beside in `down`.
  void finish_slot(const BlockJob<Element>& block, int32_t convolution,
                   const Activation<const Element>& input, int64_t slot, int64_t p, Element* product,
                   const Element* down, const Activation<Element>& output, unsigned char* signs) const {
    const int64_t width = block.panels.width, column = p * width, columns = panel_columns(block.panels, p);
    const int64_t row_signs = (block.channels + 7) / 8;
    if (job.dropout.active)
      drop<Element>(job.dropout, {first_row, column, convolution, block.output_positions[slot]}, rows,
                    columns, product, width);
    Activation<const Element> other{at(input, block.beside[slot], 0) + column * input.channel_stride, 0,
                                    input.row_stride, input.channel_stride};
    if (block.downsample) other = {down, 0, width, 1};
    combine(product, width, other, output.data + slot * output.slot_stride + column, output.row_stride,
            columns, signs == nullptr ? nullptr : signs + slot * rows * row_signs, row_signs, column);
  }

  template <int Vectors>
  void downsample(const BlockJob<Element>& block, const Activation<const Element>& input, int64_t slot,
                  int64_t count, int64_t p, Element* to) const {
    const int64_t width = block.panels.width, column = p * width;
    const Element* const bias = block.beside_bias + column;
    const Tap only{0, block.beside[slot]};
    convolve_slot<Element, Vectors>(
        &only, &only + 1, input, block.features, block.beside_weight + column * block.features, count * rows,
        kNothingMore, [&](int64_t row, auto& sums) __attribute__((always_inline)) {
          store_sums(sums, to + row * width, width, width,
                     [&](Vector<Element> value, int, int64_t j, int64_t) __attribute__((always_inline)) {
                       return value + load<Element>(bias + j, kLanes<Element>);
                     });
        });
  }

  void combine(const Element* product, int64_t width, const Activation<const Element>& other, Element* output,
               int64_t output_stride, int64_t columns, unsigned char* signs, int64_t row_signs,
               int64_t column) const {
    for (int64_t row = 0; row < rows; ++row) {
      const Element* const beside = other.data + row * other.row_stride;
      const bool strided = other.channel_stride != 1;
      for_vectors<Element>(columns, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
        const auto value = load<Element>(product + row * width + j, kLanes<Element>);
        if (signs != nullptr)
          store_signs<Element>(signs + row * row_signs, column + j, lanes, passing_lanes<Element>(value));
        Vector<Element> residual = {};
        if (strided) {
          for (int64_t l = 0; l < lanes; ++l) residual[l] = beside[(j + l) * other.channel_stride];
        } else {
          residual = load<Element>(beside + j, lanes);
        }
        store<Element>(output + row * output_stride + j, relu<Element>(value + residual), lanes);
      });
    }
  }
};

// Tiles [begin, end). `scratch`: what a slot of a panel needs, then, where nothing is kept, the activations
// of a tile.
template <class Element>
static void temporal_conv_forward(const NetworkJob<Element>& job, int64_t begin, int64_t end,
                                  Element* scratch) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first_row = tile * job.tile_rows, rows = smaller(job.tile_rows, job.batch - first_row);
    const TileForward<Element> forward{job, first_row, rows, scratch};
    Element* const kept = job.activations == nullptr ? scratch + job.slot_elements
                                                     : job.activations + first_row * job.row_elements;
    unsigned char* const signs = job.signs == nullptr ? nullptr : job.signs + first_row * job.row_signs;
    Activation<const Element> input = job.x;
    input.data += first_row * input.row_stride;
    input = for_rows(input, rows);
    for (int32_t i = 0; i < job.blocks_count; ++i) {
      const BlockJob<Element>& block = job.blocks[i];
      const int64_t channels = block.channels;
      const Activation<Element> between{kept + block.between_at * rows, rows * channels, channels, 1};
      Activation<Element> output{kept + block.output_at * rows, rows * channels, channels, 1};
      if (i + 1 == job.blocks_count) {
        output = job.output;
        output.data += first_row * output.row_stride;
      }
      forward.first(block, 2 * i, input, between);
      forward.second(block, 2 * i + 1, input, reading(between), output,
                     signs == nullptr ? nullptr : signs + block.signs_at * rows);
      input = reading(output);
    }
  }
}

static void temporal_conv_forward_f32(const NetworkJob<float>& job, int64_t begin, int64_t end,
                                      float* scratch) {
  temporal_conv_forward<float>(job, begin, end, scratch);
}
static void temporal_conv_forward_f64(const NetworkJob<double>& job, int64_t begin, int64_t end,
                                      double* scratch) {
  temporal_conv_forward<double>(job, begin, end, scratch);
}
