// The two recurrent cells, once for host and device: what becomes of a unit's four sums in a step, and the
// gradient of that. Value is a vector of units on the CPU and one unit on CUDA; Math gives its sigmoid and
// tanh. Included inside the namespace of the instruction set (or of the device).
//
// A unit has four sums a step. Products with W_ih go to the first kGates of them, products with W_hh to the
// last kGates. What is kept of a step for the backward are four gates in the order of the sums and one
// `carried` value: the cell c of the LSTM, the output h of the GRU.

// Sums: input, forget, cell (tanh) and output gate, torch's order.
struct LstmCell {
  static constexpr int kGates = 4;  // blocks of rows in torch's weights
  static constexpr int kStates = 2;
  static constexpr bool kCarriesOutput = false;

  // Block of torch's weights that belongs to a sum.
  static constexpr int input_block(int sum) { return sum; }
  static constexpr int hidden_block(int sum) { return sum; }

  // From the sums and c to the gates, the new c and h.
  template <class Math, class Value>
  QFAST_DEVICE_INLINE void forward(const Value sums[4], Value gates[4], Value* carried, Value* h) {
    gates[0] = Math::sigmoid(sums[0]);
    gates[1] = Math::sigmoid(sums[1]);
    gates[2] = Math::tanh(sums[2]);
    gates[3] = Math::sigmoid(sums[3]);
    *carried = gates[1] * *carried + gates[0] * gates[2];
    *h = gates[3] * Math::tanh(*carried);
  }

  // `before`: c of the step before. `activated`: tanh of c of this step. grad_h: of this step's h, complete.
  // grad_carried: of this step's c by way of the step after; becomes that of the step before.
  template <class Value>
  QFAST_DEVICE_INLINE void backward(const Value gates[4], Value before, Value activated, Value grad_h,
                                    Value* grad_carried, Value grads[4]) {
    const Value i = gates[0], f = gates[1], g = gates[2], o = gates[3];
    const Value grad_cell = *grad_carried + grad_h * o * (1 - activated * activated);
    grads[0] = grad_cell * g * (i - i * i);
    grads[1] = grad_cell * before * (f - f * f);
    grads[2] = grad_cell * i * (1 - g * g);
    grads[3] = grad_h * activated * (o - o * o);
    *grad_carried = grad_cell * f;
  }
};

// Sums: new gate (its input part), reset, update, and what reset multiplies: W_hn h + b_hn. The last is kept
// as the fourth gate.
struct GruCell {
  static constexpr int kGates = 3;
  static constexpr int kStates = 1;
  static constexpr bool kCarriesOutput = true;

  static constexpr int input_block(int sum) { return sum == 0 ? 2 : sum - 1; }
  static constexpr int hidden_block(int sum) { return sum - 1; }

  // From the sums and h to the gates and the new h.
  template <class Math, class Value>
  QFAST_DEVICE_INLINE void forward(const Value sums[4], Value gates[4], Value* carried, Value* h) {
    gates[1] = Math::sigmoid(sums[1]);
    gates[2] = Math::sigmoid(sums[2]);
    gates[3] = sums[3];
    gates[0] = Math::tanh(sums[0] + gates[1] * sums[3]);
    *carried = gates[0] + gates[2] * (*carried - gates[0]);
    *h = *carried;
  }

  // `before`: h of the step before; `activated` is not used. grad_carried: of this step's h past W_hh;
  // becomes that of the step before.
  template <class Value>
  QFAST_DEVICE_INLINE void backward(const Value gates[4], Value before, Value, Value grad_h,
                                    Value* grad_carried, Value grads[4]) {
    const Value n = gates[0], r = gates[1], z = gates[2], q = gates[3];
    const Value grad_output = grad_h + *grad_carried;
    grads[0] = grad_output * (1 - z) * (1 - n * n);
    grads[1] = grads[0] * q * (r - r * r);
    grads[2] = grad_output * (before - n) * (z - z * z);
    grads[3] = grads[0] * r;
    *grad_carried = grad_output * z;
  }
};
