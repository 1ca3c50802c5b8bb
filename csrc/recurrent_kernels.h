// LSTM and GRU cells, one pass over a time step; see cpu_isa_body.h for what may stand here. A thread owns
// whole rows. Compute bound by the activations (about 15 flops and a quarter division each) as long as the
// tile stays in the second-level cache.

template <class Element>
QFAST_ALWAYS_INLINE Vector<Element> load_or_zero(const Element* from, int64_t at, int64_t count) {
  return from == nullptr ? Vector<Element>{} : load<Element>(from + at, count);
}

// sums[j] += value[j]: the sums over the rows of a block are the gradients of the biases.
template <class Element>
QFAST_ALWAYS_INLINE void add_to(Element* sums, Vector<Element> value, int64_t count) {
  store<Element>(sums, load<Element>(sums, count) + value, count);
}

template <class Element>
QFAST_ALWAYS_INLINE void lstm_forward_units(const LstmForwardJob<Element>& job, int64_t row, int64_t j,
                                            int64_t count) {
  const int64_t H = job.hidden, at = row * H + j;
  const Element* pre = job.pre + row * 4 * H + j;
  const Element* bias = job.bias + j;
  const auto i = sigmoid<Element>(load<Element>(pre, count) + load<Element>(bias, count));
  const auto f = sigmoid<Element>(load<Element>(pre + H, count) + load<Element>(bias + H, count));
  const auto g = tanh<Element>(load<Element>(pre + 2 * H, count) + load<Element>(bias + 2 * H, count));
  const auto o = sigmoid<Element>(load<Element>(pre + 3 * H, count) + load<Element>(bias + 3 * H, count));
  const auto cell = f * load_or_zero<Element>(job.cell_before, at, count) + i * g;
  const auto h = o * tanh<Element>(cell);
  if (job.gates != nullptr) {
    Element* gates = job.gates + row * 4 * H + j;
    store<Element>(gates, i, count);
    store<Element>(gates + H, f, count);
    store<Element>(gates + 2 * H, g, count);
    store<Element>(gates + 3 * H, o, count);
  }
  store<Element>(job.cell + at, cell, count);
  store<Element>(job.output + at, h, count);
  store<Element>(job.operand + row * job.operand_stride + j, h, count);
}

// tanh of the cell is computed again: cheaper than to keep and read it.
template <class Element>
QFAST_ALWAYS_INLINE void lstm_backward_units(const LstmBackwardJob<Element>& job, int64_t row, int64_t j,
                                             int64_t count, Element* sums) {
  const int64_t H = job.hidden, at = row * H + j;
  const Element* gates = job.gates + row * 4 * H + j;
  const auto i = load<Element>(gates, count), f = load<Element>(gates + H, count);
  const auto g = load<Element>(gates + 2 * H, count), o = load<Element>(gates + 3 * H, count);
  const auto tanh_cell = tanh<Element>(load<Element>(job.cell + at, count));
  const auto grad_h = load_or_zero<Element>(job.grad_output, at, count) +
                      load_or_zero<Element>(job.grad_operand, row * job.operand_stride + j, count);
  const auto grad_cell =
      load<Element>(job.grad_cell + at, count) + grad_h * o * (Element(1) - tanh_cell * tanh_cell);
  const auto grad_i = grad_cell * g * (i - i * i);
  const auto grad_f = grad_cell * load_or_zero<Element>(job.cell_before, at, count) * (f - f * f);
  const auto grad_g = grad_cell * i * (Element(1) - g * g);
  const auto grad_o = grad_h * tanh_cell * (o - o * o);
  store<Element>(job.grad_cell + at, grad_cell * f, count);
  Element* grads = job.grad_gates + row * 4 * H + j;
  store<Element>(grads, grad_i, count);
  store<Element>(grads + H, grad_f, count);
  store<Element>(grads + 2 * H, grad_g, count);
  store<Element>(grads + 3 * H, grad_o, count);
  add_to<Element>(sums + j, grad_i, count);
  add_to<Element>(sums + H + j, grad_f, count);
  add_to<Element>(sums + 2 * H + j, grad_g, count);
  add_to<Element>(sums + 3 * H + j, grad_o, count);
}

template <class Element>
QFAST_ALWAYS_INLINE void gru_forward_units(const GruForwardJob<Element>& job, int64_t row, int64_t j,
                                           int64_t count) {
  const int64_t H = job.hidden, at = row * H + j;
  const Element* x = job.from_input + row * 3 * H + j;
  const Element* h = job.from_hidden + row * 3 * H + j;
  const Element *bias_x = job.bias_input + j, *bias_h = job.bias_hidden + j;
  const auto r = sigmoid<Element>(load<Element>(x, count) + load<Element>(bias_x, count) +
                                  load<Element>(h, count) + load<Element>(bias_h, count));
  const auto z = sigmoid<Element>(load<Element>(x + H, count) + load<Element>(bias_x + H, count) +
                                  load<Element>(h + H, count) + load<Element>(bias_h + H, count));
  const auto reset = load<Element>(h + 2 * H, count) + load<Element>(bias_h + 2 * H, count);
  const auto n =
      tanh<Element>(load<Element>(x + 2 * H, count) + load<Element>(bias_x + 2 * H, count) + r * reset);
  const auto state = n + z * (load<Element>(job.state + at, count) - n);
  if (job.gates != nullptr) {
    Element* gates = job.gates + row * 4 * H + j;
    store<Element>(gates, n, count);
    store<Element>(gates + H, r, count);
    store<Element>(gates + 2 * H, z, count);
    store<Element>(gates + 3 * H, reset, count);
  }
  store<Element>(job.state + at, state, count);
  store<Element>(job.output + at, state, count);
}

template <class Element>
QFAST_ALWAYS_INLINE void gru_backward_units(const GruBackwardJob<Element>& job, int64_t row, int64_t j,
                                            int64_t count, Element* sums) {
  const int64_t H = job.hidden, at = row * H + j;
  const Element* gates = job.gates + row * 4 * H + j;
  const auto n = load<Element>(gates, count), r = load<Element>(gates + H, count);
  const auto z = load<Element>(gates + 2 * H, count), reset = load<Element>(gates + 3 * H, count);
  const auto grad_h = load<Element>(job.grad_state + at, count) +
                      load_or_zero<Element>(job.grad_output, at, count) +
                      load_or_zero<Element>(job.grad_operand, at, count);
  const auto grad_n = grad_h * (Element(1) - z) * (Element(1) - n * n);
  const auto grad_z = grad_h * (load_or_zero<Element>(job.state_before, at, count) - n) * (z - z * z);
  const auto grad_r = grad_n * reset * (r - r * r);
  const auto grad_reset = grad_n * r;
  store<Element>(job.grad_state + at, grad_h * z, count);
  Element* grads = job.grad_gates + row * 4 * H + j;
  store<Element>(grads, grad_n, count);
  store<Element>(grads + H, grad_r, count);
  store<Element>(grads + 2 * H, grad_z, count);
  store<Element>(grads + 3 * H, grad_reset, count);
  add_to<Element>(sums + j, grad_n, count);
  add_to<Element>(sums + H + j, grad_r, count);
  add_to<Element>(sums + 2 * H + j, grad_z, count);
  add_to<Element>(sums + 3 * H + j, grad_reset, count);
}

// A loop over rows and units for each cell: whole vectors, then what is left of the row. The last argument
// of a backward kernel is [4H], the running sums of the block of rows.
#define QFAST_CELL(name, Job, Element, suffix)                                       \
  static void name##_##suffix(const Job<Element>& job, int64_t begin, int64_t end) { \
    for (int64_t row = begin; row < end; ++row) {                                    \
      int64_t j = 0;                                                                 \
      for (; j + kLanes<Element> <= job.hidden; j += kLanes<Element>)                \
        name##_units<Element>(job, row, j, kLanes<Element>);                         \
      if (j < job.hidden) name##_units<Element>(job, row, j, job.hidden - j);        \
    }                                                                                \
  }
#define QFAST_CELL_BACKWARD(name, Job, Element, suffix)                                             \
  static void name##_##suffix(const Job<Element>& job, int64_t begin, int64_t end, Element* sums) { \
    for (int64_t row = begin; row < end; ++row) {                                                   \
      int64_t j = 0;                                                                                \
      for (; j + kLanes<Element> <= job.hidden; j += kLanes<Element>)                               \
        name##_units<Element>(job, row, j, kLanes<Element>, sums);                                  \
      if (j < job.hidden) name##_units<Element>(job, row, j, job.hidden - j, sums);                 \
    }                                                                                               \
  }
QFAST_CELL(lstm_forward, LstmForwardJob, float, f32)
QFAST_CELL(lstm_forward, LstmForwardJob, double, f64)
QFAST_CELL(gru_forward, GruForwardJob, float, f32)
QFAST_CELL(gru_forward, GruForwardJob, double, f64)
QFAST_CELL_BACKWARD(lstm_backward, LstmBackwardJob, float, f32)
QFAST_CELL_BACKWARD(lstm_backward, LstmBackwardJob, double, f64)
QFAST_CELL_BACKWARD(gru_backward, GruBackwardJob, float, f32)
QFAST_CELL_BACKWARD(gru_backward, GruBackwardJob, double, f64)
#undef QFAST_CELL
#undef QFAST_CELL_BACKWARD
