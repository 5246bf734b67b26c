// Parameters of reverse_step and its backward, for the CPU and the CUDA kernels alike: pointers,
// strides and sizes, after csrc/calls has seen the tensors. The formulas are in
// math/reverse_step.h.
#pragma once

#include "math/layout.h"
#include "math/reverse_step.h"

namespace coup_fast {

// Any view but x and out may be absent. x and out may be the same tensor.
struct ReverseStep {
  View x;                      // float32 state
  View m;                      // model output: its first `channels` channels
  View s;                      // its last `channels` channels where variance is learned
  View g;                      // guidance
  View r;                      // reference image
  View z;                      // given noise
  const int64_t* keys;         // [batch, 2], used where z is absent; null: z = 0
  const float* coeffs;         // [kStepColumns]
  View out;                    // out: float32, layout of x
  GuidanceNorm guidance_norm;  // what c is divided by
  const float* margin;         // [batch], of a stable step; else null
  int64_t batch;
  int64_t channels;  // of x
  int64_t pixels;    // of a channel
};

// A gradient is absent where its input is.
struct ReverseStepBackward {
  ReverseStep forward;  // the inputs of the forward call; its out is absent
  View grad;            // of the output
  View grad_x;          // out: each in the type and layout of its input
  View grad_m;
  View grad_s;
  View grad_g;
  View grad_r;
  float* grad_margin;  // out: [batch], or null
};

COUP_FAST_FN float margin_of(const ReverseStep& step, int64_t sample) {
  return step.margin == nullptr ? 0.0f : step.margin[sample];
}

COUP_FAST_FN StepInputs inputs_of(const ReverseStep& step) {
  return StepInputs{step.m.data != nullptr, step.s.data != nullptr, step.g.data != nullptr,
                    step.r.data != nullptr, step.z.data != nullptr || step.keys != nullptr};
}

}  // namespace coup_fast
