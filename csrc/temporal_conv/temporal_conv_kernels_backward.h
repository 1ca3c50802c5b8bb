// Backward pass of a temporal convolution stack, from the last block to the first. It is included inside the
// namespace of an instruction set.
//
// A thread owns chunks of tiles of batch rows, the same tiles as in the forward pass. Gradients of
// activations stay in the scratch of a tile, and gradients of weights are added to the sums of the chunk.
// Nothing is computed again. The saved activations show where the gradient of the first convolution passes
// its ReLU and dropout, and one saved bit per element shows it for the second convolution. Bound by
// multiply-adds: 4 * taps * features * channels flops per row.
#pragma once

#include "temporal_conv/temporal_conv_kernels.h"

namespace {

// Adds body(slot, row, column, lanes) to sums[column], over all slots and rows.
template <class Element, class Body>
QFAST_ALWAYS_INLINE void add_columns(int64_t slots, int64_t rows, int64_t columns, Element* sums,
                                     const Body& body) {
  for_vectors<Element>(columns, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
    Vector<Element> total = {};
    for (int64_t slot = 0; slot < slots; ++slot) {
      Vector<Element> part = {};  // one sum per slot, because a long chain of additions loses digits
      for (int64_t row = 0; row < rows; ++row) part += body(slot, row, j, lanes);
      total += part;
    }
    store<Element>(sums + j, load<Element>(sums + j, lanes) + total, lanes);
  });
}

template <class Element>
struct TileBackward {
  const NetworkJob<Element>& job;
  int64_t first_row, rows;
  Element* sums;

  Activation<Element> dense(Element* data, int64_t channels) const {
    return {data, rows * channels, channels, 1};
  }

  // Computes, from the gradient of the output, the gradient `of_sum` of the sum y + residual, and the
  // gradient `of_second` of the second convolution before ReLU and dropout. `of_sum` may be the same memory
  // as `grad`.
  void through_output(const BlockJob<Element>& block, const Activation<const Element>& grad,
                      const Activation<const Element>& output, const unsigned char* signs,
                      const Activation<Element>& of_sum, const Activation<Element>& of_second) const {
    const int64_t row_signs = (block.channels + 7) / 8;
    const Element scale = static_cast<Element>(job.dropout.scale);
    add_columns<Element>(
        block.second.slots, rows, block.channels, sums + block.second_bias_sum,
        [&](int64_t slot, int64_t row, int64_t j, int64_t lanes) __attribute__((always_inline)) {
          const auto value = load<Element>(at(output, slot, row) + j, lanes);
          const auto of_output = passed<Element>(value, load<Element>(at(grad, slot, row) + j, lanes));
          const auto second =
              where_sign<Element>(signs + (slot * rows + row) * row_signs, j, lanes, of_output * scale);
          store<Element>(of_sum.data + slot * of_sum.slot_stride + row * of_sum.row_stride + j, of_output,
                         lanes);
          store<Element>(of_second.data + slot * of_second.slot_stride + row * of_second.row_stride + j,
                         second, lanes);
          return second;
        });
  }

  // to[column] += sum of the gradient over slots and rows.
  void sum_columns(const Activation<const Element>& grad, int64_t slots, int64_t columns, Element* to) const {
    add_columns<Element>(
        slots, rows, columns, to,
        [&](int64_t slot, int64_t row, int64_t j, int64_t lanes)
            __attribute__((always_inline)) { return load<Element>(at(grad, slot, row) + j, lanes); });
  }

  // to[tap][feature][channel] += sum over slots and rows of input * grad.
  template <int Vectors>
  void weight_panel(const TapTable& reads, const RunList& runs, int64_t kernel,
                    const Activation<const Element>& input, int64_t features,
                    const Activation<const Element>& grad, int64_t channels, int64_t column,
                    Element* to) const {
    for (int64_t tap = 0; tap < kernel; ++tap)
      for_row_tiles<kTileRows<Vectors>>(
          features, [&]<int Rows>(int64_t feature) __attribute__((always_inline)) {
            weight_tile<Rows, Vectors>(reads, runs, kernel - tap, input, feature, grad, channels, column,
                                       to + (tap * features + feature) * channels + column);
          });
  }

  // Computes a register tile: the weights of one tap for features [feature, feature + Rows) and the columns
  // of a panel. The tap is number `back` from the end. A function of its own, because the compiler needs much
  // more time for one large function than for several small ones.
  template <int Rows, int Vectors>
  QFAST_ONE_COPY void weight_tile(const TapTable& reads, const RunList& runs, int64_t back,
                                  const Activation<const Element>& input, int64_t feature,
                                  const Activation<const Element>& grad, int64_t channels, int64_t column,
                                  Element* to) const {
    Sums<Element, Rows, Vectors> total = {};
    for_runs(
        runs, slots_follow(input, rows), [&](int64_t slot, int64_t count) __attribute__((always_inline)) {
          // The last tap of a slot is the current step. Taps before the window are missing at the front.
          const int64_t end = reads.begin[slot + 1];
          if (end - back < reads.begin[slot]) return;
          const Element* const a = at(input, reads.taps[end - back].slot, 0) + feature * input.channel_stride;
          add_product(total, a, input.channel_stride, input.row_stride, at(grad, slot, 0) + column,
                      grad.row_stride, count * rows);
        });
    store_sums(total, to, channels, smaller(Vectors * kLanes<Element>, channels - column),
               [&](Vector<Element> value, int i, int64_t j, auto lanes) __attribute__((always_inline)) {
                 return value + load<Element>(to + i * channels + j, lanes);
               });
  }

  void weights(const Panels& panels, const TapTable& reads, const RunList& runs, int64_t kernel,
               const Activation<const Element>& input, int64_t features,
               const Activation<const Element>& grad, Element* to) const {
    for (int64_t p = 0; p < panels.count; ++p)
      for_panel_width<Element>(panels.width, [&]<int Vectors>() __attribute__((always_inline)) {
        weight_panel<Vectors>(reads, runs, kernel, input, features, grad, panels.columns, p * panels.width,
                              to);
      });
  }

  // Computes the gradient of the first convolution before ReLU and dropout from the gradient of the second.
  void through_second(const BlockJob<Element>& block, const Activation<const Element>& of_second,
                      const Activation<const Element>& between, const Activation<Element>& of_first) const {
    for (int64_t p = 0; p < block.panels.count; ++p)
      for_panel_width<Element>(block.panels.width, [&]<int Vectors>() __attribute__((always_inline)) {
        through_second_panel<Vectors>(block, of_second, between, of_first, p);
      });
  }

  template <int Vectors>
  QFAST_ONE_COPY void through_second_panel(const BlockJob<Element>& block,
                                           const Activation<const Element>& of_second,
                                           const Activation<const Element>& between,
                                           const Activation<Element>& of_first, int64_t p) const {
    const int64_t column = p * block.panels.width, columns = panel_columns(block.panels, p);
    const Element* const weights = block.second_turned + column * block.kernel * block.channels;
    const Element scale = static_cast<Element>(job.dropout.scale);
    const TapTable& taps = block.second_read_by;
    for_runs(
        block.second_read_by_runs, true, [&](int64_t slot, int64_t count) __attribute__((always_inline)) {
          convolve_slot<Element, Vectors>(
              taps.taps + taps.begin[slot], taps.taps + taps.begin[slot + 1], of_second, block.channels,
              weights, count * rows, [&](int64_t row, auto& total) __attribute__((always_inline)) {
                const Element* const outputs = at(between, slot, row) + column;
                store_sums(
                    total, of_first.data + slot * of_first.slot_stride + row * of_first.row_stride + column,
                    of_first.row_stride, columns,
                    [&](Vector<Element> value, int i, int64_t j, auto lanes) __attribute__((always_inline)) {
                      return passed<Element>(load<Element>(outputs + i * between.row_stride + j, lanes),
                                             value * scale);
                    });
              });
        });
  }

  // Computes the gradient of the block's input from the gradients of the first convolution and of the
  // residual.
  void through_first(const BlockJob<Element>& block, const Activation<const Element>& of_first,
                     const Activation<const Element>& of_sum, const Activation<Element>& of_input) const {
    for (int64_t p = 0; p < block.input_panels.count; ++p)
      for_panel_width<Element>(block.input_panels.width, [&]<int Vectors>() __attribute__((always_inline)) {
        through_first_panel<Vectors>(block, of_first, of_sum, of_input, p);
      });
  }

  template <int Vectors>
  QFAST_ONE_COPY void through_first_panel(const BlockJob<Element>& block,
                                          const Activation<const Element>& of_first,
                                          const Activation<const Element>& of_sum,
                                          const Activation<Element>& of_input, int64_t p) const {
    const int64_t column = p * Vectors * kLanes<Element>, columns = panel_columns(block.input_panels, p);
    const Element* const weights = block.first_turned + column * block.kernel * block.channels;
    const TapTable& taps = block.first_read_by;
    const bool together = slots_follow(of_input, rows);
    for_runs(block.first_read_by_runs, together,
             [&](int64_t slot, int64_t count) __attribute__((always_inline)) {
               const int64_t residual = block.residual_of[slot];
               Element* const to = of_input.data + slot * of_input.slot_stride + column;
               convolve_slot<Element, Vectors>(
                   taps.taps + taps.begin[slot], taps.taps + taps.begin[slot + 1], of_first, block.channels,
                   weights, count * rows, [&](int64_t row, auto& total) __attribute__((always_inline)) {
                     if (residual >= 0) add_residual(total, block, of_sum, residual, row, column);
                     store_sums(total, to + row * of_input.row_stride, of_input.row_stride, columns,
                                [](Vector<Element> value, int, int64_t, auto)
                                    __attribute__((always_inline)) { return value; });
                   });
             });
  }

  // Adds the gradient that reaches the block's input through the residual.
  template <int Rows, int Vectors>
  QFAST_INLINE_MEMBER void add_residual(Sums<Element, Rows, Vectors>& total, const BlockJob<Element>& block,
                                        const Activation<const Element>& of_sum, int64_t slot, int64_t row,
                                        int64_t column) const {
    const Element* const from = at(of_sum, slot, row);
    if (block.downsample) {
      add_product(total, from, of_sum.row_stride, of_sum.channel_stride,
                  block.residual_turned + column * block.channels, Vectors * kLanes<Element>, block.channels);
      return;
    }
#pragma GCC unroll 24
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v)  // whole vectors, as kPanelPadding allows
        total.at[i][v] +=
            load<Element>(from + i * of_sum.row_stride + column + v * kLanes<Element>, AllLanes{});
  }

  // Computes the gradients of one block. `grad` is the gradient of its output, `of_input` receives the
  // gradient of its input unless its data is null. `spaces` are three buffers of scratch. The first may be
  // the memory of `grad`.
  void block(const BlockJob<Element>& block, const Activation<const Element>& grad,
             const Activation<const Element>& input, const Activation<const Element>& between,
             const Activation<const Element>& output, const unsigned char* signs, Element* const spaces[3],
             const Activation<Element>& of_input) const {
    const auto of_sum = dense(spaces[0], block.channels), of_second = dense(spaces[1], block.channels),
               of_first = dense(spaces[2], block.channels);
    through_output(block, grad, output, signs, of_sum, of_second);
    weights(block.panels, block.second, block.second_runs, block.kernel, between, block.channels,
            reading(of_second), sums + block.second_sum);
    through_second(block, reading(of_second), between, of_first);
    sum_columns(reading(of_first), block.first.slots, block.channels, sums + block.first_bias_sum);
    weights(block.panels, block.first, block.first_runs, block.kernel, input, block.features,
            reading(of_first), sums + block.first_sum);
    if (block.downsample) {
      sum_columns(reading(of_sum), block.second.slots, block.channels, sums + block.residual_bias_sum);
      weights(block.panels, block.residual_reads, block.second_runs, 1, input, block.features,
              reading(of_sum), sums + block.residual_sum);
    }
    if (of_input.data != nullptr) through_first(block, reading(of_first), reading(of_sum), of_input);
  }
};

}  // namespace

// Computes the gradients of tiles [begin, end) and adds the weight gradients to `sums`. The scratch contains
// four gradients of a tile.
template <class Element>
void temporal_conv_backward(const NetworkJob<Element>& job, int64_t begin, int64_t end, Element* scratch,
                            Element* sums) {
  const int64_t buffer_elements = job.widest_elements * job.tile_rows + kPanelPadding;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first_row = tile * job.tile_rows, rows = smaller(job.tile_rows, job.batch - first_row);
    const TileBackward<Element> backward{job, first_row, rows, sums};
    Element* const activations = job.activations + first_row * job.row_elements;
    const unsigned char* const signs = job.signs + first_row * job.row_signs;
    Activation<const Element> grad = job.grad, output = reading(job.output);
    grad.data += first_row * grad.row_stride;
    output.data += first_row * output.row_stride;
    Element *current = scratch, *next = scratch + buffer_elements;
    for (int64_t i = job.blocks_count - 1; i >= 0; --i) {
      const BlockJob<Element>& block = job.blocks[i];
      const auto between = backward.dense(activations + block.between_at * rows, block.channels);
      Activation<const Element> input = job.x;
      Activation<Element> of_input = job.grad_x;
      if (i > 0) {
        input = reading(backward.dense(activations + job.blocks[i - 1].output_at * rows, block.features));
        of_input = backward.dense(next, block.features);
      } else {
        input.data += first_row * input.row_stride;
        if (of_input.data != nullptr) of_input.data += first_row * of_input.row_stride;
        input = for_rows(input, rows);
        of_input = for_rows(of_input, rows);
      }
      Element* const spaces[3] = {current, scratch + 2 * buffer_elements, scratch + 3 * buffer_elements};
      backward.block(block, grad, input, reading(between), output, signs + block.signs_at * rows, spaces,
                     of_input);
      grad = reading(of_input);
      output = input;
      Element* const unused = current;
      current = next;
      next = unused;
    }
  }
}
