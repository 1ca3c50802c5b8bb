// Forward pass of a temporal convolution stack. It is compiled once per instruction set; cpu_isa_begin.h
// lists the language features that it may use.
//
// An output slot of a convolution is the sum, over its taps, of [rows, features] x [features, channels]. A
// thread owns tiles of batch rows, whose activations stay in the second-level cache. Weights are packed so
// that a panel of columns is read once for every few rows.
//
// Saved for backward, at the positions of the cone: the output of the first convolution after ReLU and
// dropout, the output of the block, and one bit per element of the second convolution's output. Bound by
// multiply-adds: 2 * taps * features * channels flops per row in the forward pass and twice as many in the
// backward pass, with 8 bytes per saved activation.
#pragma once

#include "dropout_kernels.h"

namespace {

// Returns the number of columns of panel p.
QFAST_ALWAYS_INLINE int64_t panel_columns(const Panels& panels, int64_t p) {
  return smaller(panels.width, panels.columns - p * panels.width);
}

template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> relu(Vector<Element> x) {
  return x < Element(0) ? Vector<Element>{} : x;  // keeps NaN
}

// ---------------------------------------------------------------- signs
// Returns the gradient of the input of a ReLU. Like in torch it passes where the output is above 0 or NaN.
template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> passed(Vector<Element> output, Vector<Element> grad) {
  return output <= Element(0) ? Vector<Element>{} : grad;
}

// Returns a mask whose bit l is set if the gradient passes in lane l.
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

// Stores the bits of columns [column, column + lanes) of a row. Columns must be written in ascending order.
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

// Returns x in lanes whose bit is set, else 0.
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

// Returns `a` for a tile of `rows` rows. The row stride of a single row has no meaning. Replacing it by the
// slot stride makes consecutive slots contiguous, so they can be computed as one matrix.
template <class Element>
QFAST_ALWAYS_INLINE Activation<Element> for_rows(Activation<Element> a, int64_t rows) {
  if (rows == 1) a.row_stride = a.slot_stride;
  return a;
}

template <class Element>
QFAST_ALWAYS_INLINE bool slots_follow(const Activation<Element>& a, int64_t rows) {
  return a.slot_stride == rows * a.row_stride;
}

// Calls body(slot, count) for all slots of the runs. If `together`, the slots of a run are one matrix and one
// call.
template <class Body>
QFAST_ALWAYS_INLINE void for_runs(const RunList& list, bool together, const Body& body) {
  for (int64_t i = 0; i < list.count; ++i) {
    const Run run = list.runs[i];
    const int64_t step = together ? run.length : 1;
    for (int64_t slot = run.slot; slot < run.slot + run.length; slot += step) body(slot, step);
  }
}

// Computes, for the register tile that begins at `row`, the sum over all taps of input x weights.
template <class Element, int Rows, int Vectors>
QFAST_ONE_COPY static void sum_taps(const Tap* taps, const Tap* end, const Activation<const Element>& input,
                                    int64_t features, const Element* weights, int64_t row,
                                    Sums<Element, Rows, Vectors>& sums) {
  constexpr int64_t kWidth = Vectors * kLanes<Element>;
  Sums<Element, Rows, Vectors> total = {};  // not `sums`, which would be written after every tap
  for (const Tap* tap = taps; tap != end; ++tap) {
    // One sum per tap, because a long chain of additions loses digits.
    Sums<Element, Rows, Vectors> part = {};
    add_product(part, at(input, tap->slot, row), input.row_stride, input.channel_stride,
                weights + tap->tap * features * kWidth, kWidth, features);
    add(total, part);
  }
  sums = total;
}

// Computes the convolution of a run of slots for one panel, in register tiles of rows. `weights` contains the
// panel. For each register tile, finish(row, sums) stores the sums.
template <class Element, int Vectors, class Finish>
QFAST_ALWAYS_INLINE void convolve_slot(const Tap* taps, const Tap* end,
                                       const Activation<const Element>& input, int64_t features,
                                       const Element* weights, int64_t rows, const Finish& finish) {
  for_row_tiles<kTileRows<Vectors>>(rows, [&]<int Rows>(int64_t row) __attribute__((always_inline)) {
    Sums<Element, Rows, Vectors> sums;
    sum_taps(taps, end, input, features, weights, row, sums);
    finish(row, sums);
  });
}

// Stores change(vector, row within the tile, column, lanes) of each vector of the sums [Rows, columns].
template <class Element, int Rows, int Vectors, class Change>
QFAST_ALWAYS_INLINE void store_sums(const Sums<Element, Rows, Vectors>& sums, Element* to, int64_t row_stride,
                                    int64_t columns, const Change& change) {
  for_panel_vectors<Element, Vectors>(columns, [&](int v, auto lanes) __attribute__((always_inline)) {
    const int64_t column = v * kLanes<Element>;
#pragma GCC unroll 24
    for (int i = 0; i < Rows; ++i)
      store<Element>(to + i * row_stride + column, change(sums.at[i][v], i, column, lanes), lanes);
  });
}

// ---------------------------------------------------------------- forward
// One panel of a convolution for a run of slots: to = input x weights + bias, then ReLU if `relu`.
template <class Element>
struct PanelConvolution {
  const Tap *taps, *taps_end;
  Activation<const Element> input;
  int64_t features;
  const Element *weights, *bias;
  Element* to;
  int64_t stride, columns, rows;
  bool relu;
};

template <int Vectors, class Element>
QFAST_ONE_COPY static void convolve_panel(const PanelConvolution<Element>& panel) {
  // Without ReLU no value is below the bound. One comparison for both cases halves the code.
  const Vector<Element> lowest = splat(panel.relu ? Element(0) : -static_cast<Element>(__builtin_inf()));
  convolve_slot<Element, Vectors>(
      panel.taps, panel.taps_end, panel.input, panel.features, panel.weights, panel.rows,
      [&](int64_t row, auto& sums) __attribute__((always_inline)) {
        store_sums(sums, panel.to + row * panel.stride, panel.stride, panel.columns,
                   [&](Vector<Element> value, int, int64_t j, auto) __attribute__((always_inline)) {
                     const Vector<Element> sum = value + load<Element>(panel.bias + j, kLanes<Element>);
                     return sum < lowest ? lowest : sum;  // keeps NaN
                   });
      });
}

template <class Element>
QFAST_ALWAYS_INLINE void convolve(int64_t width, const PanelConvolution<Element>& panel) {
  for_panel_width<Element>(
      width, [&]<int Vectors>() __attribute__((always_inline)) { convolve_panel<Vectors>(panel); });
}

template <class Element>
struct TileForward {
  const NetworkJob<Element>& job;
  int64_t first_row, rows;
  Element* scratch;

  // between = dropout(relu(first(input) + bias))
  void first(const BlockJob<Element>& block, int32_t convolution, const Activation<const Element>& input,
             const Activation<Element>& between) const {
    const bool together = slots_follow(input, rows) && slots_follow(between, rows);
    for (int64_t p = 0; p < block.panels.count; ++p) {
      const int64_t width = block.panels.width, column = p * width, columns = panel_columns(block.panels, p);
      for_runs(block.first_runs, together, [&](int64_t slot, int64_t count) __attribute__((always_inline)) {
        Element* const to = between.data + slot * between.slot_stride + column;
        convolve<Element>(width, {.taps = block.first.taps + block.first.begin[slot],
                                  .taps_end = block.first.taps + block.first.begin[slot + 1],
                                  .input = input,
                                  .features = block.features,
                                  .weights = block.first_weight + column * block.kernel * block.features,
                                  .bias = block.first_bias + column,
                                  .to = to,
                                  .stride = between.row_stride,
                                  .columns = columns,
                                  .rows = count * rows,
                                  .relu = true});
        for (int64_t i = 0; job.dropout.active && i < count; ++i)
          drop<Element>(job.dropout, {first_row, column, convolution, block.between_positions[slot + i]},
                        rows, columns, to + i * between.slot_stride, between.row_stride);
      });
    }
  }

  // output = relu(dropout(relu(second(between) + bias)) + residual)
  void second(const BlockJob<Element>& block, int32_t convolution, const Activation<const Element>& input,
              const Activation<const Element>& between, const Activation<Element>& output,
              unsigned char* signs) const {
    const int64_t width = block.panels.width;
    const bool together = slots_follow(between, rows) && (!block.downsample || slots_follow(input, rows));
    for (int64_t p = 0; p < block.panels.count; ++p)
      for_runs(block.second_runs, together, [&](int64_t slot, int64_t count) __attribute__((always_inline)) {
        Element *const product = scratch, *const residual = scratch + count * rows * width;
        convolve<Element>(width, {.taps = block.second.taps + block.second.begin[slot],
                                  .taps_end = block.second.taps + block.second.begin[slot + 1],
                                  .input = between,
                                  .features = block.channels,
                                  .weights = block.second_weight + p * width * block.kernel * block.channels,
                                  .bias = block.second_bias + p * width,
                                  .to = product,
                                  .stride = width,
                                  .columns = width,
                                  .rows = count * rows,
                                  .relu = true});
        if (block.downsample) downsample(block, input, slot, count, p, residual);
        for (int64_t i = 0; i < count; ++i)
          finish_slot(block, convolution, input, slot + i, p, product + i * rows * width,
                      residual + i * rows * width, output, signs);
      });
  }

  // Computes the 1x1 convolution of a run of slots for one panel.
  void downsample(const BlockJob<Element>& block, const Activation<const Element>& input, int64_t slot,
                  int64_t count, int64_t p, Element* to) const {
    const int64_t width = block.panels.width;
    const Tap only{0, block.residual[slot]};
    convolve<Element>(width, {.taps = &only,
                              .taps_end = &only + 1,
                              .input = input,
                              .features = block.features,
                              .weights = block.residual_weight + p * width * block.features,
                              .bias = block.residual_bias + p * width,
                              .to = to,
                              .stride = width,
                              .columns = width,
                              .rows = count * rows,
                              .relu = false});
  }

  // Applies dropout to the result of the second convolution of a slot, adds the residual and stores the
  // output. `product` contains the columns of one panel, `down` the result of the 1x1 convolution if the
  // block has one.
  void finish_slot(const BlockJob<Element>& block, int32_t convolution,
                   const Activation<const Element>& input, int64_t slot, int64_t p, Element* product,
                   const Element* down, const Activation<Element>& output, unsigned char* signs) const {
    const int64_t width = block.panels.width, column = p * width, columns = panel_columns(block.panels, p);
    const int64_t row_signs = (block.channels + 7) / 8;
    if (job.dropout.active)
      drop<Element>(job.dropout, {first_row, column, convolution, block.output_positions[slot]}, rows,
                    columns, product, width);
    Activation<const Element> other{at(input, block.residual[slot], 0) + column * input.channel_stride, 0,
                                    input.row_stride, input.channel_stride};
    if (block.downsample) other = {down, 0, width, 1};
    combine(product, width, other, output.data + slot * output.slot_stride + column, output.row_stride,
            columns, signs == nullptr ? nullptr : signs + slot * rows * row_signs, row_signs, column);
  }

  // Stores the signs of the product and output = relu(product + residual).
  void combine(const Element* product, int64_t width, const Activation<const Element>& other, Element* output,
               int64_t output_stride, int64_t columns, unsigned char* signs, int64_t row_signs,
               int64_t column) const {
    for (int64_t row = 0; row < rows; ++row) {
      const Element* const residual = other.data + row * other.row_stride;
      const bool strided = other.channel_stride != 1;
      for_vectors<Element>(columns, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
        const auto value = load<Element>(product + row * width + j, kLanes<Element>);
        if (signs != nullptr)
          store_signs<Element>(signs + row * row_signs, column + j, lanes, passing_lanes<Element>(value));
        Vector<Element> values_to_add = {};
        if (strided) {
          for (int64_t l = 0; l < lanes; ++l) values_to_add[l] = residual[(j + l) * other.channel_stride];
        } else {
          values_to_add = load<Element>(residual + j, lanes);
        }
        store<Element>(output + row * output_stride + j, relu<Element>(value + values_to_add), lanes);
      });
    }
  }
};

}  // namespace

// Computes tiles [begin, end). The scratch contains the buffers for a slot of a panel and, if activations are
// not saved, the activations of a tile.
template <class Element>
void temporal_conv_forward(const NetworkJob<Element>& job, int64_t begin, int64_t end, Element* scratch) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first_row = tile * job.tile_rows, rows = smaller(job.tile_rows, job.batch - first_row);
    const TileForward<Element> forward{job, first_row, rows, scratch};
    Element* const activations = job.activations == nullptr ? scratch + job.slot_elements
                                                            : job.activations + first_row * job.row_elements;
    unsigned char* const signs = job.signs == nullptr ? nullptr : job.signs + first_row * job.row_signs;
    Activation<const Element> input = job.x;
    input.data += first_row * input.row_stride;
    input = for_rows(input, rows);
    for (int32_t i = 0; i < job.blocks_count; ++i) {
      const BlockJob<Element>& block = job.blocks[i];
      const int64_t channels = block.channels;
      const Activation<Element> between{activations + block.between_at * rows, rows * channels, channels, 1};
      Activation<Element> output{activations + block.output_at * rows, rows * channels, channels, 1};
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
