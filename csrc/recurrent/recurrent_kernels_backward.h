// Backward pass of stacked LSTM and GRU. It is compiled once per instruction set; cpu_isa_begin.h lists
// the language features that it may use.
//
// A thread owns parts of the batch and computes the tiles of a part in order, each from the last step to the
// first, in chunks of a few steps. A chunk runs from the top layer down. A step computes the gradients of the
// four sums of every unit. Their product with the transposed W_hh is the gradient of the previous h. The
// gradients of the sums of a chunk are collected for its product with the transposed W_ih, which is the
// gradient of the layer's input, and for a product with the inputs, which is added to the part's weight
// gradients.
//
// tanh(c) and the LSTM's h are computed again from the saved gates and carried values. Bound by
// multiply-adds: 4 * gates * H * (features + H) flops per row, step and layer, and a quarter less for the
// first layer if x needs no gradient. 20 bytes per unit are read in float32.
#pragma once

#include "recurrent/recurrent_kernels.h"

namespace {

// The first of the four sums of a unit that h of the previous step contributes to.
template <class Cell>
constexpr int64_t kFirstHidden = 4 - Cell::kGates;

// Number of rows of a weight gradient (inputs of a layer) whose sums fill the registers.
template <class Cell>
constexpr int kInputRows = kPanelVectors == 4 ? (Cell::kGates == 4 ? 6 : 8) : (Cell::kGates == 4 ? 3 : 4);

// Buffers of a layer of a tile, [rows][stride] each. `grad_above`, `outputs`, `dropped` and `sums` are ring
// buffers with a slot for every step of a chunk.
template <class Element>
struct BackwardLayer {
  Element* grad_h;        // gradient of this step's h through the next step
  Element* grad_carried;  // gradient of the carried value through the next step
  Element* activated;     // tanh(c) of the step
  Element* grad_above;    // gradient of h from the layer above, of chunk_steps steps
  Element* outputs;       // h of chunk_steps + 1 steps, computed again (LSTM only)
  Element* dropped;       // h after dropout, of chunk_steps steps
  Element* sums;          // gradients of the sums, [chunk_steps][rows][sum_stride]
};

template <class Element>
struct BackwardTile {
  int64_t first, rows;
  int64_t buffer_elements;  // elements of a buffer
  int64_t sum_stride;       // row stride of `sums`
  int64_t chunk;
  const BackwardLayer<Element>* layers;
  int64_t step_sums;  // step stride of `sums`

  Element* sums(int64_t layer, int64_t t) const { return layers[layer].sums + t % chunk * step_sums; }
  Element* grad_above(int64_t layer, int64_t t) const {
    return layers[layer].grad_above + t % chunk * buffer_elements;
  }
};

// Location of the rows of a tile, for example h of a step of a layer. Null data means zeros.
template <class Element>
struct ReadRows {
  const Element* data;
  int64_t row_stride, feature_stride;
};

// The gradient of h of a step from above. If `step_stride` is not 0, a row of the previous step is so many
// elements before the same row of this step, and is prefetched, because the rows of a step are far apart.
template <class Element>
struct GradAbove {
  const Element* data;
  int64_t row_stride, step_stride;
};

// Offset of row `first` in the saved carried values of a step, in elements.
template <class Element>
QFAST_ALWAYS_INLINE int64_t saved_offset(const RecurrentJob<Element>& job, int64_t layer, int64_t t,
                                         int64_t first) {
  return ((layer * job.steps + t) * job.batch + first) * job.hidden;
}

// Returns h of step t of a layer, the initial h for t = -1.
template <class Cell, class Element>
static ReadRows<Element> output_rows(const RecurrentJob<Element>& job, const BackwardTile<Element>& tile,
                                     int64_t layer, int64_t t) {
  if (t < 0) {
    if (job.first_h == nullptr) return {nullptr, 0, 0};
    return {job.first_h + (layer * job.batch + tile.first) * job.hidden, job.hidden, 1};
  }
  if constexpr (Cell::kCarriesOutput) {
    return {job.carried + saved_offset(job, layer, t, tile.first), job.hidden, 1};
  } else {
    return {tile.layers[layer].outputs + t % (tile.chunk + 1) * tile.buffer_elements, job.stride, 1};
  }
}

// Returns the input of a layer at step t.
template <class Cell, class Element>
static ReadRows<Element> input_rows(const RecurrentJob<Element>& job, const BackwardTile<Element>& tile,
                                    int64_t layer, int64_t t) {
  if (layer == 0) {
    return {job.x.data + tile.first * job.x.row_stride + t * job.x.step_stride, job.x.row_stride,
            job.x.feature_stride};
  }
  if (job.dropout.active)
    return {tile.layers[layer - 1].dropped + t % tile.chunk * tile.buffer_elements, job.stride, 1};
  return output_rows<Cell>(job, tile, layer - 1, t);
}

// Saved values that a matrix product prefetches, because the cells read them faster than memory delivers
// them. prefetch_next requests only a few cache lines: a burst of requests would delay the loads of the
// product.
struct SavedAhead {
  struct Range {
    const char* from;
    int64_t bytes, piece;
  };
  Range ranges[2];

  QFAST_INLINE_MEMBER void prefetch_next() {
    constexpr int64_t line = 64;
#pragma GCC unroll 2
    for (Range& range : ranges) {
      const int64_t piece = smaller(range.piece, range.bytes);
      for (int64_t at = 0; at < piece; at += line) __builtin_prefetch(range.from + at);
      range.from += piece;
      range.bytes -= piece;
    }
  }
};

constexpr int64_t kProductsPerPrefetch = 8;  // products that a sum adds between two calls of prefetch_next

// Returns the saved values that the product of step t with hidden_turned prefetches. Step t - 1 is the first
// to read the carried values and, for the LSTM, a gate of step t - 2. Only a step itself reads the gates of a
// GRU.
template <class Cell, class Element>
static SavedAhead saved_ahead(const RecurrentJob<Element>& job, const BackwardTile<Element>& tile, int64_t l,
                              int64_t t) {
  constexpr int64_t block_calls = (Cell::kGates * kLanes<Element> - 1) / kProductsPerPrefetch + 1;
  const int64_t calls = (tile.rows / kTileRows<kPanelVectors> + 1) * job.blocks * block_calls;
  const auto range = [&](const Element* from, int64_t step, int64_t values) -> SavedAhead::Range {
    if (step < 0) return {};
    const int64_t line = 64, bytes = values * tile.rows * job.hidden * static_cast<int64_t>(sizeof(Element));
    const Element* const at = from + saved_offset(job, l, step, tile.first) * values;
    return {reinterpret_cast<const char*>(at), bytes, (bytes / calls / line + 1) * line};
  };
  return {{range(job.gates, Cell::kCarriesOutput ? t - 1 : t - 2, 4), range(job.carried, t - 2, 1)}};
}

// out[rows][columns] = gradients of the sums, from the first of four on, x transposed weights.
template <class Cell, class Element>
QFAST_ONE_COPY static void turned_product(const RecurrentJob<Element>& job, int64_t first,
                                          const Element* sums, int64_t sum_stride, const Element* turned,
                                          int64_t width, int64_t columns, int64_t rows, Element* out,
                                          int64_t out_stride, SavedAhead ahead = {}) {
  constexpr int64_t lanes = kLanes<Element>, gates = Cell::kGates * lanes;
  for (int64_t begin = 0; begin < columns; begin += width, turned += job.blocks * gates * width) {
    for_panel_width<Element>(width, [&]<int Vectors>() {
      for_row_tiles<kTileRows<Vectors>>(rows, [&]<int Count>(int64_t row) __attribute__((always_inline)) {
        Sums<Element, Count, Vectors> product{};
        const Element* const from = sums + row * sum_stride + first * lanes;
        for (int64_t block = 0; block < job.blocks; ++block)
          for (int64_t k = 0; k < gates; k += kProductsPerPrefetch, ahead.prefetch_next())
            add_product(product, from + block * 4 * lanes + k, sum_stride, 1,
                        turned + (block * gates + k) * width, width,
                        smaller(kProductsPerPrefetch, gates - k));
        for_panel_vectors<Element, Vectors>(
            columns - begin, [&](int v, auto some) __attribute__((always_inline)) {
#pragma GCC unroll 24
              for (int i = 0; i < Count; ++i)
                store<Element>(out + (row + i) * out_stride + begin + v * lanes, product.at[i][v], some);
            });
      });
    });
  }
}

// sum[block][input][gate][lane] += inputs^T x gradients of the sums, over the rows of steps [begin, end). If
// `sets`, the previous values are not read.
template <class Cell, class Element>
QFAST_ONE_COPY static void add_weight_sums(const RecurrentJob<Element>& job,
                                           const BackwardTile<Element>& tile, int64_t layer, int64_t begin,
                                           int64_t end, int64_t features, bool hidden, bool sets,
                                           Element* sum) {
  constexpr int64_t lanes = kLanes<Element>, gates = Cell::kGates * lanes;
  const int64_t first = hidden ? kFirstHidden<Cell> : 0;
  for (int64_t block = 0; block < job.blocks; ++block) {
    for_row_tiles<kInputRows<Cell>>(features, [&]<int Count>(int64_t input) __attribute__((always_inline)) {
      Sums<Element, Count, Cell::kGates> sums{};
      for (int64_t t = begin; t < end; ++t) {
        const ReadRows<Element> rows =
            hidden ? output_rows<Cell>(job, tile, layer, t - 1) : input_rows<Cell>(job, tile, layer, t);
        if (rows.data == nullptr) continue;
        add_product(sums, rows.data + input * rows.feature_stride, rows.feature_stride, rows.row_stride,
                    tile.sums(layer, t) + (block * 4 + first) * lanes, tile.sum_stride, tile.rows);
      }
      Element* const to = sum + (block * features + input) * gates;
#pragma GCC unroll 24
      for (int i = 0; i < Count; ++i)
#pragma GCC unroll 4
        for (int g = 0; g < Cell::kGates; ++g) {
          Element* const place = to + i * gates + g * lanes;
          const Vector<Element> value = sums.at[i][g];
          store<Element>(place, sets ? value : load<Element>(place, lanes) + value, lanes);
        }
    });
  }
}

// sum[block][sum][lane] += gradients of the sums, over the rows of steps [begin, end). If `sets`, the
// previous values are not read.
template <class Element>
static void add_bias_sums(const RecurrentJob<Element>& job, const BackwardTile<Element>& tile, int64_t layer,
                          int64_t begin, int64_t end, bool sets, Element* sum) {
  constexpr int64_t lanes = kLanes<Element>;
  for (int64_t block = 0; block < job.blocks; ++block) {
    Vector<Element> total[4] = {};
    for (int64_t t = begin; t < end; ++t) {
      const Element* const from = tile.sums(layer, t) + block * 4 * lanes;
      for (int64_t row = 0; row < tile.rows; ++row)
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g)
          total[g] += load<Element>(from + row * tile.sum_stride + g * lanes, lanes);
    }
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      Element* const place = sum + (block * 4 + g) * lanes;
      store<Element>(place, sets ? total[g] : load<Element>(place, lanes) + total[g], lanes);
    }
  }
}

// Computes the gradients of the sums of step t of a layer, and for the LSTM h of the previous step.
// `grad_above` is the gradient of h from the layer above or from the output, or null.
template <class Cell, class Element>
static void cell_gradients(const RecurrentJob<Element>& job, const BackwardTile<Element>& tile, int64_t l,
                           int64_t t, const GradAbove<Element>& grad_above) {
  constexpr int64_t lanes = kLanes<Element>;
  const BackwardLayer<Element>& layer = tile.layers[l];
  const int64_t H = job.hidden, stride = job.stride;
  const Element* const saved_gates = job.gates + saved_offset(job, l, t, tile.first) * 4;
  const Element* const first = Cell::kCarriesOutput ? job.first_h : job.first_c;
  const Element* carried_before = nullptr;
  if (t > 0) {
    carried_before = job.carried + saved_offset(job, l, t - 1, tile.first);
  } else if (first != nullptr) {
    carried_before = first + (l * job.batch + tile.first) * H;
  }
  const Element* const previous_gates =
      t == 0 ? nullptr : job.gates + saved_offset(job, l, t - 1, tile.first) * 4;
  // The slot of h of step t - 1.
  Element* const output = layer.outputs + (t + tile.chunk) % (tile.chunk + 1) * tile.buffer_elements;
  Element* const sums = tile.sums(l, t);
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t j = 0; j < H; j += lanes) {
      const int64_t count = smaller(lanes, H - j), at = row * stride + j;
      Vector<Element> gates[4], grads[4];
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) gates[g] = load<Element>(saved_gates + (row * 4 + g) * H + j, count);
      const Vector<Element> before =
          carried_before == nullptr ? Vector<Element>{} : load<Element>(carried_before + row * H + j, count);
      Vector<Element> grad_h = load<Element>(layer.grad_h + at, lanes);
      if (grad_above.data != nullptr) {
        const Element* const from = grad_above.data + row * grad_above.row_stride + j;
        grad_h += load<Element>(from, count);
        if (t > 0 && grad_above.step_stride > 0) __builtin_prefetch(from - grad_above.step_stride);
      }
      Vector<Element> grad_carried = load<Element>(layer.grad_carried + at, lanes);
      const Vector<Element> activated = load<Element>(layer.activated + at, lanes);
      Cell::backward(gates, before, activated, grad_h, &grad_carried, grads);
      store<Element>(layer.grad_carried + at, grad_carried, lanes);
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g)
        store<Element>(sums + row * tile.sum_stride + j * 4 + g * lanes, grads[g], lanes);
      if constexpr (!Cell::kCarriesOutput) {
        if (previous_gates == nullptr) continue;
        const Vector<Element> tanh_cell = tanh<Element>(before);
        store<Element>(layer.activated + at, tanh_cell, lanes);
        store<Element>(output + at, tanh_cell * load<Element>(previous_gates + (row * 4 + 3) * H + j, count),
                       lanes);
      }
    }
  }
}

// Initializes the buffers of a layer for the last step.
template <class Cell, class Element>
static void begin_layer(const RecurrentJob<Element>& job, const BackwardTile<Element>& tile, int64_t l) {
  constexpr int64_t lanes = kLanes<Element>;
  const BackwardLayer<Element>& layer = tile.layers[l];
  const int64_t H = job.hidden, stride = job.stride, at = (l * job.batch + tile.first) * H;
  widen_rows<Element>(layer.grad_h, stride, job.grad_h == nullptr ? nullptr : job.grad_h + at, H, tile.rows);
  if (l + 1 == job.layer_count && job.grad_last != nullptr)
    for (int64_t row = 0; row < tile.rows; ++row)
      for (int64_t j = 0; j < H; ++j)
        layer.grad_h[row * stride + j] += job.grad_last[(tile.first + row) * H + j];
  widen_rows<Element>(layer.grad_carried, stride, job.grad_c == nullptr ? nullptr : job.grad_c + at, H,
                      tile.rows);
  if constexpr (!Cell::kCarriesOutput) {
    if (job.steps == 0) return;
    const int64_t t = job.steps - 1, offset = saved_offset(job, l, t, tile.first);
    Element* const output = layer.outputs + t % (tile.chunk + 1) * tile.buffer_elements;
    for (int64_t row = 0; row < tile.rows; ++row)
      for (int64_t j = 0; j < H; j += lanes) {
        const int64_t count = smaller(lanes, H - j), place = row * stride + j;
        const Vector<Element> tanh_cell =
            tanh<Element>(load<Element>(job.carried + offset + row * H + j, count));
        const Vector<Element> gate = load<Element>(job.gates + (offset + row * H) * 4 + 3 * H + j, count);
        store<Element>(layer.activated + place, tanh_cell, lanes);
        store<Element>(output + place, tanh_cell * gate, lanes);
      }
  }
}

// Computes h of step t after dropout, which is the input of the layer above, and applies the mask to its
// gradient.
template <class Cell, class Element>
static void pass_dropout(const RecurrentJob<Element>& job, const BackwardTile<Element>& tile, int64_t l,
                         int64_t t) {
  const BackwardLayer<Element>& layer = tile.layers[l];
  const Place place{tile.first, 0, static_cast<int32_t>(l), static_cast<int32_t>(t)};
  const ReadRows<Element> output = output_rows<Cell>(job, tile, l, t);
  Element* const dropped = layer.dropped + t % tile.chunk * tile.buffer_elements;
  for (int64_t row = 0; row < tile.rows; ++row)
    __builtin_memcpy(dropped + row * job.stride, output.data + row * output.row_stride,
                     sizeof(Element) * job.hidden);
  drop<Element>(job.dropout, place, tile.rows, job.hidden, dropped, job.stride);
  drop<Element>(job.dropout, place, tile.rows, job.hidden, tile.grad_above(l, t), job.stride);
}

// The products of a tile. With bfloat16 operands, recurrent_kernels_backward_amx.h replaces this class.
template <class Cell, class Element>
struct VectorGradients {
  const RecurrentJob<Element>& job;

  // Computes the gradient of h of step t - 1 from the gradients of the sums of step t.
  void to_hidden(const BackwardTile<Element>& tile, int64_t l, int64_t t) const {
    turned_product<Cell>(job, kFirstHidden<Cell>, tile.sums(l, t), tile.sum_stride,
                         job.layers[l].hidden_turned, job.hidden_width, job.hidden, tile.rows,
                         tile.layers[l].grad_h, job.stride, saved_ahead<Cell>(job, tile, l, t));
  }

  // Computes the gradient of the input of a layer.
  void to_input(int64_t l, const Element* sums, int64_t sum_stride, int64_t rows, Element* out,
                int64_t stride) const {
    const RecurrentLayer<Element>& layer = job.layers[l];
    turned_product<Cell>(job, 0, sums, sum_stride, layer.input_turned, layer.input_width, layer.features,
                         rows, out, stride);
  }

  // Adds or, if `sets`, stores the gradients of both weights of a layer over the steps [begin, end). The
  // gradient of the hidden weight is not computed if hidden_sum is null.
  void add_weights(const BackwardTile<Element>& tile, int64_t l, int64_t begin, int64_t end, bool sets,
                   Element* input_sum, Element* hidden_sum) const {
    add_weight_sums<Cell>(job, tile, l, begin, end, job.layers[l].features, false, sets, input_sum);
    if (hidden_sum != nullptr)
      add_weight_sums<Cell>(job, tile, l, begin, end, job.hidden, true, sets, hidden_sum);
  }
};

}  // namespace

#if defined(QFAST_AMX)
#include "recurrent/recurrent_kernels_backward_amx.h"
#endif

namespace {

// Computes the gradients of step t of layer l, except the gradients of the input of an upper layer.
template <class Cell, class Element, class Products>
static void backward_step(const RecurrentJob<Element>& job, const BackwardTile<Element>& tile, int64_t l,
                          int64_t t, const Products& products) {
  GradAbove<Element> grad_above{};
  if (l + 1 < job.layer_count) {
    if (job.dropout.active) pass_dropout<Cell>(job, tile, l, t);
    grad_above = {tile.grad_above(l, t), job.stride, 0};
  } else if (job.grad_output.data != nullptr) {
    const auto& [data, row_stride, step_stride, _] = job.grad_output;
    grad_above = {data + tile.first * row_stride + t * step_stride, row_stride, step_stride};
  }
  cell_gradients<Cell>(job, tile, l, t, grad_above);
  if (t > 0 || job.grad_first_h != nullptr) products.to_hidden(tile, l, t);
  if (l == 0 && job.grad_x != nullptr) {
    const int64_t features = job.layers[l].features;
    products.to_input(l, tile.sums(l, t), tile.sum_stride, tile.rows,
                      job.grad_x + (tile.first * job.steps + t) * features, job.steps * features);
  }
}

// Computes the gradients of all steps and layers of a tile and adds the weight gradients to `total`, or sets
// them if the rows are the first of a part.
template <class Cell, class Element, class Products>
static void backward_tile(const RecurrentJob<Element>& job, const BackwardTile<Element>& tile,
                          bool first_rows, Element* total, const Products& products) {
  for (int64_t l = 0; l < job.layer_count; ++l) begin_layer<Cell>(job, tile, l);
  for (int64_t end = job.steps, begin; end > 0; end = begin) {
    begin = end > tile.chunk ? end - tile.chunk : 0;
    for (int64_t l = job.layer_count - 1; l >= 0; --l) {
      for (int64_t t = end - 1; t >= begin; --t) backward_step<Cell>(job, tile, l, t, products);
      // The steps of a chunk fill the slots from the first one on, in any order.
      if (l > 0)
        products.to_input(l, tile.layers[l].sums, tile.sum_stride, (end - begin) * tile.rows,
                          tile.layers[l - 1].grad_above, job.stride);
    }
    const bool sets = first_rows && end == job.steps;
    for (int64_t l = 0; l < job.layer_count; ++l) {
      const RecurrentLayer<Element>& layer = job.layers[l];
      products.add_weights(tile, l, begin, end, sets, total + layer.input_sum,
                           layer.hidden_sum < 0 ? nullptr : total + layer.hidden_sum);
      add_bias_sums(job, tile, l, begin, end, sets, total + layer.bias_sum);
    }
  }
  if (job.grad_first_h == nullptr) return;
  for (int64_t l = 0; l < job.layer_count; ++l) {
    const BackwardLayer<Element>& layer = tile.layers[l];
    if constexpr (Cell::kCarriesOutput)
      for (int64_t i = 0; i < tile.rows * job.stride; ++i) layer.grad_h[i] += layer.grad_carried[i];
    const int64_t at = (l * job.batch + tile.first) * job.hidden;
    narrow_rows<Element>(job.grad_first_h + at, layer.grad_h, job.stride, job.hidden, tile.rows);
    if constexpr (!Cell::kCarriesOutput)
      narrow_rows<Element>(job.grad_first_c + at, layer.grad_carried, job.stride, job.hidden, tile.rows);
  }
}

// Computes the gradients of rows [begin, end), which are one part of the batch, and adds the weight gradients
// to `total`. `begin` is a multiple of 4, the number of rows that share dropout words. The scratch contains
// one BackwardLayer for each layer, followed by RecurrentJob::layer_scratch elements of buffers for each
// layer.
template <class Cell, class Element>
static void backward_rows(const RecurrentJob<Element>& job, int64_t begin, int64_t end, Element* scratch,
                          Element* total) {
  const int64_t chunk = job.chunk_steps, buffer_elements = job.tile_rows * job.stride;
  auto* const layers = reinterpret_cast<BackwardLayer<Element>*>(scratch);
  Element* const space = scratch + job.layer_count * job.header_elements;
  for (int64_t l = 0; l < job.layer_count; ++l) {
    Element* const at = space + l * job.layer_scratch;
    layers[l] = {at,
                 at + buffer_elements,
                 at + 2 * buffer_elements,
                 at + 3 * buffer_elements,
                 at + (3 + chunk) * buffer_elements,
                 at + (4 + 2 * chunk) * buffer_elements,
                 at + (4 + 3 * chunk) * buffer_elements};
  }
#if defined(QFAST_AMX)
  const TileGradients<Cell> products(job, scratch + job.vector_scratch);
#else
  const VectorGradients<Cell, Element> products{job};
#endif
  for (int64_t first = begin; first < end; first += job.tile_rows) {
    const int64_t rows = smaller(job.tile_rows, end - first);
    const BackwardTile<Element> tile{first, rows,   rows * job.stride,    job.sum_stride,
                                     chunk, layers, rows * job.sum_stride};
    backward_tile<Cell>(job, tile, first == begin, total, products);
  }
}

}  // namespace

template <class Element>
void lstm_backward(const RecurrentJob<Element>& job, int64_t begin, int64_t end, Element* scratch,
                   Element* total) {
  backward_rows<LstmCell>(job, begin, end, scratch, total);
}

template <class Element>
void gru_backward(const RecurrentJob<Element>& job, int64_t begin, int64_t end, Element* scratch,
                  Element* total) {
  backward_rows<GruCell>(job, begin, end, scratch, total);
}
