// Forward pass of stacked LSTM and GRU. It is compiled once per instruction set; cpu_isa_begin.h lists
// the language features that it may use.
//
// A thread owns tiles of batch rows and computes all steps and layers of a tile. A step of a layer is the
// product [rows, features + H] x [features + H, gates * H] followed by the cell. Weights are packed with the
// gates of a block of units adjacent, so the four sums of a few rows of a block stay in registers until c and
// h are computed. The state of a tile and the weights stay in the second-level cache.
//
// Saved for backward: four gates and one carried value per unit and step, 20 bytes in float32. Bound by
// multiply-adds: 2 * gates * H * (features + H) flops per row, step and layer. A unit of the LSTM also needs
// five activations, a unit of the GRU three, of about 20 flops and a division each.
#pragma once

#include "dropout_kernels.h"
#include "recurrent/recurrent_cell.h"
#include "simd.h"

namespace {

#if QFAST_VECTOR_BYTES == 64
constexpr int kCellRows = 6;  // 32 registers: 6 x 4 sums, 4 columns, 1 broadcast
#else
constexpr int kCellRows = 3;  // 16 registers: 3 x 4 sums, 3 broadcasts, 1 column
#endif

constexpr int64_t kLongestSum = 256;  // products that one sum accumulates in order

// Stores a value that is saved for backward. If `streamed`, the store is non-temporal and `to` is aligned to
// a vector.
template <class Element>
QFAST_ALWAYS_INLINE void store_saved(Element* to, Vector<Element> value, int64_t count, bool streamed) {
#if defined(__x86_64__)
  if (streamed) {
#if QFAST_VECTOR_BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)value);
#elif QFAST_VECTOR_BYTES == 32
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)value);
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)value);
#endif
    return;
  }
#endif
  store<Element>(to, value, count);
}

template <class Element>
struct VectorMath {
  QFAST_ALWAYS_INLINE Vector<Element> sigmoid(Vector<Element> x) { return QFAST_ISA::sigmoid<Element>(x); }
  QFAST_ALWAYS_INLINE Vector<Element> tanh(Vector<Element> x) { return QFAST_ISA::tanh<Element>(x); }
};

// Arguments of one step of one layer of a tile. Pointers refer to the first row of the tile.
template <class Element>
struct LayerStep {
  int64_t hidden, stride, features;
  const Element* input;  // not read if features is 0: its products are in `start`
  int64_t input_row, input_feature;
  const Element* start;  // initial values of the sums, [block][4][lane], with row stride `start_row`
  int64_t start_row;
  const Element *input_weight, *hidden_weight;
  const Element* h_before;  // null for zeros
  Element* h;
  const Element* carried_before;
  Element* carried;
  Element *gates, *saved_carried;  // [rows, 4, H] and [rows, H] saved for backward, or null
  bool streamed;                   // use non-temporal stores for `gates` and `saved_carried`
  Element* output;                 // or null
  int64_t output_row;
};

// Like add_columns, but long sums are split into parts that start from 0, so the rounding error grows only
// with the length of a part.
template <bool Long, int First, int Count, class Element, int Rows>
QFAST_ALWAYS_INLINE void add_long_columns(Sums<Element, Rows, 4>& sums, const Element* a, int64_t a_row,
                                          int64_t a_step, const Element* b, int64_t count) {
  constexpr int64_t width = Count * kLanes<Element>;
  if constexpr (!Long) return add_columns<First, Count>(sums, a, a_row, a_step, b, width, count);
  for (int64_t begin = 0; begin < count; begin += kLongestSum) {
    Sums<Element, Rows, Count> part{};
    add_product(part, a + begin * a_step, a_row, a_step, b + begin * width, width,
                smaller(kLongestSum, count - begin));
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < Count; ++v) sums.at[i][First + v] += part.at[i][v];
  }
}

// Adds the products of the inputs with W_ih.
template <bool Long, class Cell, class Element, int Rows>
QFAST_ALWAYS_INLINE void add_inputs(Sums<Element, Rows, 4>& sums, const Element* input, int64_t row_stride,
                                    int64_t feature_stride, const Element* weight, int64_t features) {
  add_long_columns<Long, 0, Cell::kGates>(sums, input, row_stride, feature_stride, weight, features);
}

// Computes the cells of a block of units from their sums and stores the results.
template <class Cell, class Element, int Rows>
QFAST_ALWAYS_INLINE void finish_cells(const LayerStep<Element>& step, const Sums<Element, Rows, 4>& sums,
                                      int64_t unit, int64_t row, int64_t count) {
  const int64_t H = step.hidden;
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i) {
    const int64_t r = row + i, at = r * step.stride + unit;
    Vector<Element> gates[4], h;
    Vector<Element> carried = load<Element>(step.carried_before + at, kLanes<Element>);
    Cell::template forward<VectorMath<Element>>(sums.at[i], gates, &carried, &h);
    store<Element>(step.carried + at, carried, kLanes<Element>);
    if constexpr (!Cell::kCarriesOutput) store<Element>(step.h + at, h, kLanes<Element>);
    if (step.output != nullptr) store<Element>(step.output + r * step.output_row + unit, h, count);
    if (step.gates == nullptr) continue;
#pragma GCC unroll 4
    for (int64_t g = 0; g < 4; ++g)
      store_saved<Element>(step.gates + (r * 4 + g) * H + unit, gates[g], count, step.streamed);
    store_saved<Element>(step.saved_carried + r * H + unit, carried, count, step.streamed);
  }
}

// Computes a step of a block of units for `Rows` rows of the tile.
template <bool Long, class Cell, class Element, int Rows>
static void step_cells(const LayerStep<Element>& step, int64_t block, int64_t row) {
  constexpr int64_t lanes = kLanes<Element>, width = Cell::kGates * lanes;
  Sums<Element, Rows, 4> sums;
  const Element* const start = step.start + row * step.start_row + block * 4 * lanes;
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) sums.at[i][g] = load<Element>(start + i * step.start_row + g * lanes, lanes);
  add_inputs<Long, Cell>(sums, step.input + row * step.input_row, step.input_row, step.input_feature,
                         step.input_weight + block * step.features * width, step.features);
  if (step.h_before != nullptr) {
    add_long_columns<Long, 4 - Cell::kGates, Cell::kGates>(
        sums, step.h_before + row * step.stride, step.stride, 1,
        step.hidden_weight + block * step.hidden * width, step.hidden);
  }
  finish_cells<Cell>(step, sums, block * lanes, row, smaller(lanes, step.hidden - block * lanes));
}

// Computes the bias plus the products of each row of x with W_ih, [row][block][4][lane], for `rows` rows from
// `input`.
template <bool Long, class Cell, class Element>
static void project_rows(const RecurrentLayer<Element>& layer, int64_t blocks, const Element* input,
                         int64_t row_stride, int64_t feature_stride, int64_t rows, Element* out) {
  constexpr int64_t lanes = kLanes<Element>;
  for (int64_t block = 0; block < blocks; ++block) {
    const Element* const weight = layer.input_weight + block * layer.features * Cell::kGates * lanes;
    for_row_tiles<kCellRows, !Long>(rows, [&]<int Rows>(int64_t row) __attribute__((always_inline)) {
      Sums<Element, Rows, 4> sums;
#pragma GCC unroll 6
      for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g)
          sums.at[i][g] = load<Element>(layer.bias + (block * 4 + g) * lanes, lanes);
      add_inputs<Long, Cell>(sums, input + row * row_stride, row_stride, feature_stride, weight,
                             layer.features);
#pragma GCC unroll 6
      for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g)
          store<Element>(out + (((row + i) * blocks + block) * 4 + g) * lanes, sums.at[i][g], lanes);
    });
  }
}

// Copies [rows, H], or zeros if `from` is null, to [row][stride] with zeros beyond H.
template <class Element>
static void widen_rows(Element* to, int64_t stride, const Element* from, int64_t hidden, int64_t rows) {
  __builtin_memset(to, 0, sizeof(Element) * rows * stride);
  if (from == nullptr) return;
  for (int64_t row = 0; row < rows; ++row)
    __builtin_memcpy(to + row * stride, from + row * hidden, sizeof(Element) * hidden);
}

// Copies the first H columns of [row][stride] to [rows, H].
template <class Element>
static void narrow_rows(Element* to, const Element* from, int64_t stride, int64_t hidden, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row)
    __builtin_memcpy(to + row * hidden, from + row * stride, sizeof(Element) * hidden);
}

// Buffers of a tile, [rows][stride]. A layer computes `chunk` steps before the next layer. Each layer has
// chunk + 1 buffers for h, the first of them for the step before the chunk, one for c (LSTM only) and `chunk`
// for h after dropout. With chunks of one step, the two buffers for h alternate.
template <class Element>
struct ForwardTile {
  int64_t chunk, buffer_elements;
  Element* space;
  Element* rolled;  // products of consecutive rows of x with W_ih
  Element *input,
      *starts;  // x of a chunk, [step][row][feature], and its products with W_ih; not for one step

  Element* buffer(int64_t layer, int64_t number) const {
    return space + (layer * (2 * chunk + 2) + number) * buffer_elements;
  }
  Element* h(int64_t layer, int64_t t) const { return buffer(layer, chunk == 1 ? t & 1 : t % chunk + 1); }
  Element* h_before(int64_t layer, int64_t t) const {
    return buffer(layer, chunk == 1 ? (t - 1) & 1 : t % chunk);
  }
  Element* cell(int64_t layer) const { return buffer(layer, chunk + 1); }
  Element* dropped(int64_t layer, int64_t t) const { return buffer(layer, chunk + 2 + t % chunk); }
};

// Returns the arguments of step t of layer l.
template <class Cell, class Element>
static LayerStep<Element> layer_step(const RecurrentJob<Element>& job, const ForwardTile<Element>& tile,
                                     int64_t first, int64_t rows, int64_t l, int64_t t) {
  const RecurrentLayer<Element>& layer = job.layers[l];
  const int64_t H = job.hidden, at = (l * job.steps + t) * job.batch + first;
  const bool top = l + 1 == job.layer_count;
  LayerStep<Element> step{};
  step.hidden = H;
  step.stride = job.stride;
  step.features = layer.features;
  step.input = job.x.data + first * job.x.row_stride + t * job.x.step_stride;
  step.input_row = job.x.row_stride;
  step.input_feature = job.x.feature_stride;
  step.start = layer.bias;
  if (l > 0) {
    step.input = job.dropout.active ? tile.dropped(l - 1, t) : tile.h(l - 1, t);
    step.input_row = job.stride;
    step.input_feature = 1;
  } else if (job.rolling) {
    step.features = 0;
    step.start_row = job.blocks * 4 * kLanes<Element>;
    step.start = tile.rolled + t * step.start_row;
  }
  if (tile.chunk > 1 && step.features > 0) {
    step.features = 0;
    step.start_row = job.blocks * 4 * kLanes<Element>;
    step.start = tile.starts + t % tile.chunk * rows * step.start_row;
  }
  step.input_weight = layer.input_weight;
  step.hidden_weight = layer.hidden_weight;
  step.h_before = t == 0 && job.first_h == nullptr ? nullptr : tile.h_before(l, t);
  step.h = tile.h(l, t);
  step.carried_before = Cell::kCarriesOutput ? tile.h_before(l, t) : tile.cell(l);
  step.carried = Cell::kCarriesOutput ? step.h : tile.cell(l);
  if (job.gates != nullptr) {
    step.gates = job.gates + at * 4 * H;
    step.saved_carried = job.carried + at * H;
  }
  step.streamed = job.streamed;
  if (top && job.output.data != nullptr) {
    step.output = job.output.data + first * job.output.row_stride + t * job.output.step_stride;
    step.output_row = job.output.row_stride;
  }
  return step;
}

// Computes the products of the inputs of steps [begin, end) of a layer with W_ih, in tile.starts.
template <class Element, class Products>
static void project_chunk(const RecurrentJob<Element>& job, const ForwardTile<Element>& tile, int64_t first,
                          int64_t rows, int64_t l, int64_t begin, int64_t end, const Products& products) {
  const int64_t features = job.layers[l].features;
  const Element* input = tile.input;
  if (l > 0) {
    input = job.dropout.active ? tile.dropped(l - 1, begin) : tile.h(l - 1, begin);
  } else {
    Element* to = tile.input;
    for (int64_t t = begin; t < end; ++t)
      for (int64_t row = first; row < first + rows; ++row, to += features) {
        const Element* const from = job.x.data + row * job.x.row_stride + t * job.x.step_stride;
        for (int64_t j = 0; j < features; ++j) to[j] = from[j * job.x.feature_stride];
      }
  }
  products.project(l, input, l > 0 ? job.stride : features, 1, (end - begin) * rows, tile.starts);
}

// Computes step t of layer l.
template <class Cell, class Element, class Products>
static void forward_step(const RecurrentJob<Element>& job, const ForwardTile<Element>& tile, int64_t first,
                         int64_t rows, int64_t l, int64_t t, const Products& products) {
  const LayerStep<Element> step = layer_step<Cell, Element>(job, tile, first, rows, l, t);
  products.step(step, l, rows);
  if (!job.dropout.active || l + 1 == job.layer_count) return;
  Element* const dropped = tile.dropped(l, t);
  __builtin_memcpy(dropped, step.h, sizeof(Element) * rows * job.stride);
  const Place place{first, 0, static_cast<int32_t>(l), static_cast<int32_t>(t)};
  drop<Element>(job.dropout, place, rows, job.hidden, dropped, job.stride);
}

// The products of a tile, and the cells computed from them. With bfloat16 operands, recurrent_kernels_amx.h
// replaces this class.
template <bool Long, class Cell, class Element>
struct VectorProducts {
  const RecurrentJob<Element>& job;

  void begin(int64_t, const Element*, int64_t) const {}

  // Computes project_rows of layer l.
  void project(int64_t l, const Element* input, int64_t row_stride, int64_t feature_stride, int64_t rows,
               Element* out) const {
    project_rows<Long, Cell, Element>(job.layers[l], job.blocks, input, row_stride, feature_stride, rows,
                                      out);
  }

  // Computes a step of a layer.
  void step(const LayerStep<Element>& step, int64_t, int64_t rows) const {
    for (int64_t block = 0; block < job.blocks; ++block)
      for_row_tiles<kCellRows, !Long>(
          rows, [&]<int Rows>(int64_t row) { step_cells<Long, Cell, Element, Rows>(step, block, row); });
  }
};

// Computes all steps and layers of the rows [first, first + rows).
template <class Cell, class Element, class Products>
static void forward_tile(const RecurrentJob<Element>& job, int64_t first, int64_t rows,
                         const ForwardTile<Element>& tile, const Products& products) {
  const int64_t H = job.hidden;
  for (int64_t l = 0; l < job.layer_count; ++l) {
    const int64_t at = (l * job.batch + first) * H;
    widen_rows<Element>(tile.h(l, -1), job.stride, job.first_h == nullptr ? nullptr : job.first_h + at, H,
                        rows);
    if constexpr (!Cell::kCarriesOutput)
      widen_rows<Element>(tile.cell(l), job.stride, job.first_c == nullptr ? nullptr : job.first_c + at, H,
                          rows);
    products.begin(l, tile.h(l, -1), rows);
  }
  if (job.rolling) {
    products.project(0, job.x.data + first * job.x.row_stride, job.x.row_stride, job.x.feature_stride,
                     rows + job.steps - 1, tile.rolled);
  }
  for (int64_t begin = 0; begin < job.steps; begin += tile.chunk) {
    const int64_t end = smaller(begin + tile.chunk, job.steps);
    for (int64_t l = 0; l < job.layer_count; ++l) {
      if (tile.chunk > 1 && !(l == 0 && job.rolling))
        project_chunk(job, tile, first, rows, l, begin, end, products);
      for (int64_t t = begin; t < end; ++t) forward_step<Cell>(job, tile, first, rows, l, t, products);
    }
    // h of the last step is the first of the next chunk.
    for (int64_t l = 0; tile.chunk > 1 && end < job.steps && l < job.layer_count; ++l)
      __builtin_memcpy(tile.h_before(l, end), tile.h(l, end - 1), sizeof(Element) * rows * job.stride);
  }
  for (int64_t l = 0; l < job.layer_count; ++l) {
    const int64_t at = (l * job.batch + first) * H;
    narrow_rows<Element>(job.last_h + at, tile.h(l, job.steps - 1), job.stride, H, rows);
    if constexpr (!Cell::kCarriesOutput)
      narrow_rows<Element>(job.last_c + at, tile.cell(l), job.stride, H, rows);
  }
}

}  // namespace

#if defined(QFAST_AMX)
#include "recurrent/recurrent_kernels_amx.h"
#endif

namespace {

// Computes rows [begin, end) of the batch. `begin` is a multiple of 4, the number of rows that share dropout
// words.
template <class Cell, class Element>
static void forward_rows(const RecurrentJob<Element>& job, int64_t begin, int64_t end, Element* scratch) {
  const int64_t chunk = job.layer_steps;
  Element* const rolled = scratch + job.layer_count * (2 * chunk + 2) * job.tile_rows * job.stride;
  Element* const input =
      rolled + (job.rolling ? (job.tile_rows + job.steps - 1 + 15) / 16 * 16 * 4 * job.stride : 0);
  Element* const starts = input + (chunk > 1 ? chunk * job.tile_rows * job.layers[0].features : 0);
  const auto compute = [&](const auto& products) {
    for (int64_t first = begin; first < end; first += job.tile_rows) {
      const int64_t rows = smaller(job.tile_rows, end - first);
      // The buffers of consecutive steps are adjacent, so the rows of several steps are one matrix.
      const ForwardTile<Element> tile{chunk, rows * job.stride, scratch, rolled, input, starts};
      forward_tile<Cell>(job, first, rows, tile, products);
    }
  };
#if defined(QFAST_AMX)
  compute(TileProducts<Cell>(job, scratch + job.vector_scratch));
#else
  if (job.hidden > kLongestSum || job.layers[0].features > kLongestSum) {
    compute(VectorProducts<true, Cell, Element>{job});
  } else {
    compute(VectorProducts<false, Cell, Element>{job});
  }
#endif
  if (job.streamed) finish_stream();
}

}  // namespace

template <class Element>
void lstm_forward(const RecurrentJob<Element>& job, int64_t begin, int64_t end, Element* scratch) {
  forward_rows<LstmCell>(job, begin, end, scratch);
}

template <class Element>
void gru_forward(const RecurrentJob<Element>& job, int64_t begin, int64_t end, Element* scratch) {
  forward_rows<GruCell>(job, begin, end, scratch);
}
