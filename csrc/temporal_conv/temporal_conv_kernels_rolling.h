// Forward pass of a temporal convolution stack over consecutive windows, each shifted by one row, without
// gradients. It is included inside the namespace of an instruction set.
//
// A thread owns chunks of windows. For a chunk it first computes, once per panel row, the positions that the
// zero padding of a window cannot affect. Each window then computes only the positions near its beginning,
// and copies the shared ones to their slots. The sums have the same order as in the kernel for single
// windows, so the results have the same bits. Bound by multiply-adds, like the other forward kernel.
#pragma once

#include "temporal_conv/temporal_conv_kernels.h"

namespace {

// Rows of the output of one convolution. Row 0 of the memory is panel row `first`.
template <class Element>
struct Rows {
  Element* data;
  int64_t first, stride, channel_stride;
};

template <class Element>
struct RollingChunk {
  const RollingJob<Element>& job;
  int64_t begin, end;  // windows
  Element* scratch;

  Rows<Element> rows_of(const SharedRows& shared, int64_t channels) const {
    return {scratch + shared.rows_at, begin + shared.first_position, channels, 1};
  }

  // Returns a view in which slot t is the input of tap t, (kernel - 1 - t) * dilation rows earlier.
  Activation<const Element> tapped(const Rows<const Element>& rows, int64_t first, int64_t kernel,
                                   int64_t dilation) const {
    return {rows.data + (first - rows.first - (kernel - 1) * dilation) * rows.stride, dilation * rows.stride,
            rows.stride, rows.channel_stride};
  }

  // Computes the shared rows of all convolutions.
  void compute_shared() const {
    const NetworkJob<Element>& windows = job.windows;
    Rows<const Element> input{windows.x.data, 0, windows.x.row_stride, windows.x.channel_stride};
    for (int64_t i = 0; i < windows.blocks_count; ++i) {
      const BlockJob<Element>& block = job.row_blocks[i];
      const SharedRows &first = job.first[i], &second = job.second[i];
      if (first.first_position > first.last_position) return;
      const Rows<Element> between = rows_of(first, block.channels);
      const TileForward<Element> firsts{windows, 0, count(first), scratch};
      firsts.first(block, 0, tapped(input, between.first, block.kernel, block.dilation), as_slot(between));
      if (second.first_position > second.last_position) return;
      const Rows<Element> output = rows_of(second, block.channels);
      const TileForward<Element> seconds{windows, 0, count(second), scratch};
      const Rows<const Element> read{between.data, between.first, between.stride, 1};
      seconds.second(block, 0, tapped(input, output.first, block.kernel, block.dilation),
                     tapped(read, output.first, block.kernel, block.dilation), as_slot(output), nullptr);
      input = {output.data, output.first, output.stride, 1};
    }
  }

  // Returns the number of shared rows of the chunk.
  int64_t count(const SharedRows& shared) const {
    return end - begin + shared.last_position - shared.first_position;
  }

  Activation<Element> as_slot(const Rows<Element>& rows) const { return {rows.data, 0, rows.stride, 1}; }

  // Copies shared rows to the slots of a tile of windows.
  void copy_shared(const SharedRows& shared, int64_t first_window, int64_t windows, int64_t channels,
                   const Activation<Element>& to) const {
    const Rows<Element> rows = rows_of(shared, channels);
    for (int64_t i = 0; i < shared.copied.count; ++i) {
      const int64_t slot = shared.copied.slots[i];
      const Element* const from = rows.data + (first_window + shared.positions[slot] - rows.first) * channels;
      for (int64_t row = 0; row < windows; ++row)
        __builtin_memcpy(to.data + slot * to.slot_stride + row * to.row_stride, from + row * channels,
                         sizeof(Element) * channels);
    }
  }

  // Computes the remaining positions of a tile of windows.
  void compute_tile(int64_t first_window, int64_t rows) const {
    const NetworkJob<Element>& windows = job.windows;
    const TileForward<Element> forward{windows, first_window, rows, scratch};
    Element* const activations = scratch + job.activations_at;
    Activation<const Element> input = windows.x;
    input.data += first_window * input.row_stride;
    for (int64_t i = 0; i < windows.blocks_count; ++i) {
      const BlockJob<Element>& block = windows.blocks[i];
      const int64_t channels = block.channels;
      const Activation<Element> between{activations + block.between_at * rows, rows * channels, channels, 1};
      Activation<Element> output{activations + block.output_at * rows, rows * channels, channels, 1};
      if (i + 1 == windows.blocks_count) {
        output = windows.output;
        output.data += first_window * output.row_stride;
      }
      forward.first(block, 0, input, between);
      copy_shared(job.first[i], first_window, rows, channels, between);
      forward.second(block, 0, input, reading(between), output, nullptr);
      copy_shared(job.second[i], first_window, rows, channels, output);
      input = reading(output);
    }
  }
};

}  // namespace

// Computes chunks [begin, end) of windows.
template <class Element>
void temporal_conv_rolling(const RollingJob<Element>& job, int64_t begin, int64_t end, Element* scratch) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * job.chunk_rows;
    const RollingChunk<Element> rolling{job, first, smaller(first + job.chunk_rows, job.windows.batch),
                                        scratch};
    rolling.compute_shared();
    for (int64_t window = rolling.begin; window < rolling.end; window += job.windows.tile_rows)
      rolling.compute_tile(window, smaller(job.windows.tile_rows, rolling.end - window));
  }
}
