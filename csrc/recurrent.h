// Arguments of the LSTM and GRU cell kernels, shared by host code and the CPU instruction sets.
// One job is one time step of a tile of rows. All matrices are row-major; a null matrix reads as zeros.
#pragma once

#include <cstdint>

namespace qfast {

// Gates in torch's order: input, forget, cell (tanh), output.
template <class Element>
struct LstmForwardJob {
  int64_t hidden;              // H
  const Element* pre;          // [rows, 4H]: x W_ih^T + h W_hh^T
  const Element* bias;         // [4H]
  const Element* cell_before;  // [rows, H] or null; may be `cell`
  Element* gates;              // [rows, 4H] activated gates, kept for the backward; or null
  Element* cell;               // [rows, H]
  Element* output;             // [rows, H]: h
  Element* operand;            // h once more, `operand_stride` apart: columns of the next step's GEMM operand
  int64_t operand_stride;
};

template <class Element>
struct LstmBackwardJob {
  int64_t hidden;
  const Element* gates;         // [rows, 4H]
  const Element* cell;          // [rows, H]
  const Element* cell_before;   // [rows, H] or null
  const Element* grad_output;   // [rows, H] or null: gradient that enters at this step
  const Element* grad_operand;  // [rows, H], `operand_stride` apart, or null: gradient from the step after
  int64_t operand_stride;
  Element*
      grad_cell;  // [rows, H], in place: gradient of the cell state from the step after, to the one before
  Element* grad_gates;  // [rows, 4H]: gradient of the pre-activations
};

// Weights in torch's order: reset, update, new. Kept gates in the order new, reset, update, and what reset
// multiplies (h W_hn^T + b_hn): so the gradients that belong to W_ih and those that belong to W_hh are
// adjacent columns each.
template <class Element>
struct GruForwardJob {
  int64_t hidden;
  const Element* from_input;   // [rows, 3H]: x W_ih^T
  const Element* from_hidden;  // [rows, 3H]: h W_hh^T
  const Element* bias_input;   // [3H]
  const Element* bias_hidden;  // [3H]
  Element* gates;              // [rows, 4H] or null
  Element* state;              // [rows, H], in place: h before, h after
  Element* output;             // [rows, H]: h after
};

template <class Element>
struct GruBackwardJob {
  int64_t hidden;
  const Element* gates;         // [rows, 4H]
  const Element* state_before;  // [rows, H] or null
  const Element* grad_output;   // [rows, H] or null
  const Element* grad_operand;  // [rows, H] or null: what came through W_hh from the step after
  Element* grad_state;          // [rows, H], in place: what comes past W_hh, by way of the update gate
  Element* grad_gates;          // [rows, 4H]: new, reset, update, and h W_hn^T + b_hn
};

}  // namespace qfast
