// Parameters of confidence_cotangent and its backward, for the CPU and the CUDA kernels alike.
// The formulas are in math/confidence_cotangent.h.
#pragma once

#include "math/confidence_cotangent.h"
#include "math/layout.h"

namespace coup_fast {

// A view's channels are the classes; there is one pixel.
struct ConfidenceCotangent {
  View logits;          // [batch, classes]
  float* value;         // out: [batch], log p_w or m
  View cotangent;       // out: of the value; type of logits
  Confidence quantity;  // which of the two
  int64_t batch;
  int64_t classes;
};

struct ConfidenceCotangentBackward {
  const float* grad_value;  // [batch]
  View grad_cotangent;
  View logits;
  View grad_logits;  // out: type of logits
  Confidence quantity;
  int64_t batch;
  int64_t classes;
};

}  // namespace coup_fast
