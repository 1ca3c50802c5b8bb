// Gradients of the temporal convolution stack, the same tiles of batch rows, last block first. Nothing is
// computed again: what was kept after ReLU and dropout tells where the first convolution's gradient passes,
// one bit an element where the second's does. Gradients of activations stay in the tile's scratch; those of
// the weights go to the sums of a chunk of tiles.

// Adds to sums[column] what body(slot, row, column, lanes) returns, over all slots and rows.
template <class Element, class Body>
QFAST_ALWAYS_INLINE void add_columns(int64_t slots, int64_t rows, int64_t columns, Element* sums,
                                     const Body& body) {
  for_vectors<Element>(columns, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
    Vector<Element> total = {};
    for (int64_t slot = 0; slot < slots; ++slot) {
      Vector<Element> part = {};  // a slot's rows by themselves: many terms lose fewer digits
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

  // Gradient of y + beside, and of the second convolution before ReLU and dropout, from that of the output.
  // `of_sum` may be `grad`.
  void through_output(const BlockJob<Element>& block, const Activation<const Element>& grad,
                      const Activation<const Element>& output, const unsigned char* signs,
                      const Activation<Element>& of_sum, const Activation<Element>& of_second) const {
    const int64_t row_signs = (block.channels + 7) / 8;
    const Element scale = static_cast<Element>(job.dropout.scale);
    add_columns<Element>(
        block.second.slots, rows, block.channels, sums + block.second_bias_sum,
        [&](int64_t slot, int64_t row, int64_t j, int64_t lanes) __attribute__((always_inline)) {
          const auto value = load<Element>(at(output, slot, row) + j, lanes);
          const auto entering = passed<Element>(value, load<Element>(at(grad, slot, row) + j, lanes));
          const auto second =
              where_sign<Element>(signs + (slot * rows + row) * row_signs, j, lanes, entering * scale);
          store<Element>(of_sum.data + slot * of_sum.slot_stride + row * of_sum.row_stride + j, entering,
                         lanes);
          store<Element>(of_second.data + slot * of_second.slot_stride + row * of_second.row_stride + j,
                         second, lanes);
          return second;
        });
  }

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
    const int64_t columns = smaller(Vectors * kLanes<Element>, channels - column);
    const bool together = slots_follow(input, rows);
    for (int64_t tap = 0; tap < kernel; ++tap) {
      for_row_tiles<kTileRows<Vectors>>(
          features, [&]<int Rows>(int64_t feature) __attribute__((always_inline)) {
            Sums<Element, Rows, Vectors> total = {};
            for_runs(runs, together, [&](int64_t slot, int64_t count) __attribute__((always_inline)) {
              // The taps of a slot end with the step itself: those inside the window are the last ones.
              const int64_t back = kernel - tap, end = reads.begin[slot + 1];
              if (end - back < reads.begin[slot]) return;
              const Element* const a =
                  at(input, reads.taps[end - back].slot, 0) + feature * input.channel_stride;
              add_product(total, a, input.channel_stride, input.row_stride, at(grad, slot, 0) + column,
                          grad.row_stride, count * rows);
            });
            Element* const out = to + (tap * features + feature) * channels + column;
            store_sums(total, out, channels, columns,
                       [&](Vector<Element> value, int i, int64_t j, int64_t lanes) __attribute__((
                           always_inline)) { return value + load<Element>(out + i * channels + j, lanes); });
          });
    }
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

  // Gradient of the first convolution before ReLU and dropout, from that of the second.
  void through_second(const BlockJob<Element>& block, const Activation<const Element>& of_second,
                      const Activation<const Element>& between, const Activation<Element>& of_first) const {
    for (int64_t p = 0; p < block.panels.count; ++p)
      for_panel_width<Element>(block.panels.width, [&]<int Vectors>() __attribute__((always_inline)) {
        through_second_panel<Vectors>(block, of_second, between, of_first, p);
      });
  }

  template <int Vectors>
  void through_second_panel(const BlockJob<Element>& block, const Activation<const Element>& of_second,
                            const Activation<const Element>& between, const Activation<Element>& of_first,
                            int64_t p) const {
    const int64_t column = p * block.panels.width, columns = panel_columns(block.panels, p);
    const Element* const weights = block.second_turned + column * block.kernel * block.channels;
    const Element scale = static_cast<Element>(job.dropout.scale);
    const TapTable& taps = block.second_read_by;
    for_runs(
        block.second_read_by_runs, true, [&](int64_t slot, int64_t count) __attribute__((always_inline)) {
          convolve_slot<Element, Vectors>(
              taps.taps + taps.begin[slot], taps.taps + taps.begin[slot + 1], of_second, block.channels,
              weights, count * rows, kNothingMore,
              [&](int64_t row, auto& total) __attribute__((always_inline)) {
                const Element* const kept = at(between, slot, row) + column;
                store_sums(total,
                           of_first.data + slot * of_first.slot_stride + row * of_first.row_stride + column,
                           of_first.row_stride, columns,
                           [&](Vector<Element> value, int i, int64_t j, int64_t lanes)
                               __attribute__((always_inline)) {
                                 return passed<Element>(
                                     load<Element>(kept + i * between.row_stride + j, lanes), value * scale);
                               });
              });
        });
  }

  // Gradient of the block's input, from those of the first convolution and of what stands beside.
  void through_first(const BlockJob<Element>& block, const Activation<const Element>& of_first,
                     const Activation<const Element>& of_sum, const Activation<Element>& of_input) const {
    for (int64_t p = 0; p < block.input_panels.count; ++p)
      for_panel_width<Element>(block.input_panels.width, [&]<int Vectors>() __attribute__((always_inline)) {
        through_first_panel<Vectors>(block, of_first, of_sum, of_input, p);
      });
  }

  template <int Vectors>
  void through_first_panel(const BlockJob<Element>& block, const Activation<const Element>& of_first,
                           const Activation<const Element>& of_sum, const Activation<Element>& of_input,
                           int64_t p) const {
    constexpr int64_t kWidth = Vectors * kLanes<Element>;
    const int64_t column = p * kWidth, columns = panel_columns(block.input_panels, p);
    const Element* const weights = block.first_turned + column * block.kernel * block.channels;
    const Element* const down = block.downsample ? block.beside_turned + column * block.channels : nullptr;
    const TapTable& taps = block.first_read_by;
    const bool together = slots_follow(of_input, rows);
    for_runs(
        block.first_read_by_runs, together, [&](int64_t slot, int64_t count) __attribute__((always_inline)) {
          const int64_t beside = block.beside_of[slot];
          convolve_slot<Element, Vectors>(
              taps.taps + taps.begin[slot], taps.taps + taps.begin[slot + 1], of_first, block.channels,
              weights, count * rows,
              [&](int64_t row, auto& total) __attribute__((always_inline)) {
                if (beside >= 0 && down != nullptr)
                  add_product(total, at(of_sum, beside, row), of_sum.row_stride, of_sum.channel_stride, down,
                              kWidth, block.channels);
              },
              [&](int64_t row, auto& total) __attribute__((always_inline)) {
                const bool adds = beside >= 0 && down == nullptr;
                const Element* const same = adds ? at(of_sum, beside, row) + column : nullptr;
                store_sums(total,
                           of_input.data + slot * of_input.slot_stride + row * of_input.row_stride + column,
                           of_input.row_stride, columns,
                           [&](Vector<Element> value, int i, int64_t j, int64_t lanes)
                               __attribute__((always_inline)) {
                                 return adds ? value + load<Element>(same + i * of_sum.row_stride + j, lanes)
                                             : value;
                               });
              });
        });
  }

  // One block: the gradient of its output comes in `grad`, that of its input goes to `of_input` (data null:
  // not wanted). `spaces` are three pieces of scratch, the first may be where `grad` lies.
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
      sum_columns(reading(of_sum), block.second.slots, block.channels, sums + block.beside_bias_sum);
      weights(block.panels, block.beside_reads, block.second_runs, 1, input, block.features, reading(of_sum),
              sums + block.beside_sum);
    }
    if (of_input.data != nullptr) through_first(block, reading(of_first), reading(of_sum), of_input);
  }
};

// Tiles [begin, end), whose weight gradients are added to `sums`. `scratch`: four gradients of a tile.
template <class Element>
static void temporal_conv_backward(const NetworkJob<Element>& job, int64_t begin, int64_t end,
                                   Element* scratch, Element* sums) {
  const int64_t piece = job.widest_elements * job.tile_rows + kPanelPadding;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first_row = tile * job.tile_rows, rows = smaller(job.tile_rows, job.batch - first_row);
    const TileBackward<Element> backward{job, first_row, rows, sums};
    Element* const kept = job.activations + first_row * job.row_elements;
    const unsigned char* const signs = job.signs + first_row * job.row_signs;
    Activation<const Element> grad = job.grad, output = reading(job.output);
    grad.data += first_row * grad.row_stride;
    output.data += first_row * output.row_stride;
    Element *here = scratch, *next = scratch + piece;
    for (int64_t i = job.blocks_count - 1; i >= 0; --i) {
      const BlockJob<Element>& block = job.blocks[i];
      const auto between = backward.dense(kept + block.between_at * rows, block.channels);
      Activation<const Element> input = job.x;
      Activation<Element> of_input = job.grad_x;
      if (i > 0) {
        input = reading(backward.dense(kept + job.blocks[i - 1].output_at * rows, block.features));
        of_input = backward.dense(next, block.features);
      } else {
        input.data += first_row * input.row_stride;
        if (of_input.data != nullptr) of_input.data += first_row * of_input.row_stride;
        input = for_rows(input, rows);
        of_input = for_rows(of_input, rows);
      }
      Element* const spaces[3] = {here, scratch + 2 * piece, scratch + 3 * piece};
      backward.block(block, grad, input, reading(between), output, signs + block.signs_at * rows, spaces,
                     of_input);
      grad = reading(of_input);
      output = input;
      Element* const free = here;
      here = next;
      next = free;
    }
  }
}

static void temporal_conv_backward_f32(const NetworkJob<float>& job, int64_t begin, int64_t end,
                                       float* scratch, float* sums) {
  temporal_conv_backward<float>(job, begin, end, scratch, sums);
}
static void temporal_conv_backward_f64(const NetworkJob<double>& job, int64_t begin, int64_t end,
                                       double* scratch, double* sums) {
  temporal_conv_backward<double>(job, begin, end, scratch, sums);
}
