// Parameters of adaptive_step and its backward, for the CPU and the CUDA kernels alike: pointers,
// strides and sizes, after csrc/calls has seen the tensors. The formulas are in
// math/adaptive_step.h.
#pragma once

#include "math/adaptive_step.h"
#include "math/layout.h"

namespace coup_fast {

struct AdaptiveStep {
  View x;               // float32 state
  View h;               // S(x)
  View h_ahead;         // S(x + delta h)
  const bool* alive;    // [batch]
  const float* coeffs;  // [kAdaptiveColumns]
  View x_next;          // out: float32, layout of x
  bool* alive_next;     // out: [batch]
  float* alpha;         // out: [batch]
  int64_t batch;
  int64_t channels;
  int64_t pixels;  // of a channel
};

struct AdaptiveStepBackward {
  AdaptiveStep forward;  // the inputs of the forward call; its outputs are absent
  View grad;             // of x_next
  View grad_x;           // out: each in the type and layout of its input
  View grad_h;
  View grad_h_ahead;
};

}  // namespace coup_fast
