// The LSTM and GRU cells, shared by CPU and CUDA: the new state of a unit from its four sums, and the
// gradients of the sums. Value is a vector of units on the CPU and one unit on CUDA. Math provides sigmoid
// and tanh. This file is included inside the namespace of an instruction set or of the device.
//
// A unit has four sums per step. Products with W_ih are added to the first kGates of them, products with W_hh
// to the last kGates. Each step saves five values per unit for backward: four gates in the order of the sums,
// and one `carried` value, which is the cell state c of the LSTM and the output h of the GRU.
#pragma once

// The sums are the input, forget, cell (tanh) and output gates, in torch's order.
struct LstmCell {
  static constexpr int kGates = 4;  // blocks of rows in torch's weights
  static constexpr int kStates = 2;
  static constexpr bool kCarriesOutput = false;

  // Block of rows of torch's weights that belongs to a sum.
  static constexpr int input_block(int sum) { return sum; }
  static constexpr int hidden_block(int sum) { return sum; }

  // Computes the gates, the new c and h from the sums and the previous c.
  template <class Math, class Value>
  QFAST_DEVICE_INLINE void forward(const Value sums[4], Value gates[4], Value* carried, Value* h) {
    gates[0] = Math::sigmoid(sums[0]);
    gates[1] = Math::sigmoid(sums[1]);
    gates[2] = Math::tanh(sums[2]);
    gates[3] = Math::sigmoid(sums[3]);
    *carried = gates[1] * *carried + gates[0] * gates[2];
    *h = gates[3] * Math::tanh(*carried);
  }

  // Computes the gradients of the sums. `before` is c of the previous step, `activated` is tanh of this
  // step's c, and grad_h is the complete gradient of this step's h. On entry *grad_carried is the gradient of
  // this step's c through the next step. On return it is the gradient of the previous step's c.
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

// The sums are the input part of the new gate, reset, update, and W_hn h + b_hn, which reset multiplies. The
// last is saved as the fourth gate.
struct GruCell {
  static constexpr int kGates = 3;
  static constexpr int kStates = 1;
  static constexpr bool kCarriesOutput = true;

  static constexpr int input_block(int sum) { return sum == 0 ? 2 : sum - 1; }
  static constexpr int hidden_block(int sum) { return sum - 1; }

  // Computes the gates and the new h from the sums and the previous h.
  template <class Math, class Value>
  QFAST_DEVICE_INLINE void forward(const Value sums[4], Value gates[4], Value* carried, Value* h) {
    gates[1] = Math::sigmoid(sums[1]);
    gates[2] = Math::sigmoid(sums[2]);
    gates[3] = sums[3];
    gates[0] = Math::tanh(sums[0] + gates[1] * sums[3]);
    *carried = gates[0] + gates[2] * (*carried - gates[0]);
    *h = *carried;
  }

  // Computes the gradients of the sums. `before` is h of the previous step; the third argument is not used.
  // On entry *grad_carried is the gradient of this step's h that does not pass through W_hh. On return it is
  // that gradient of the previous step's h.
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
