// Parameters of confidence_cotangent and its backward, for the CPU and the CUDA kernels alike.
// The formulas are in math/confidence_cotangent.h.
#pragma once

#include "math/layout.h"

namespace coup_fast {

// A view's channels are the classes; there is one pixel.
struct ConfidenceCotangent {
  View logits;            // [batch, classes]
  float* log_confidence;  // out: [batch]
  View cotangent;         // out: type of logits
  int64_t batch;
  int64_t classes;
};

struct ConfidenceCotangentBackward {
  const float* grad_log_confidence;  // [batch]
  View grad_cotangent;
  View logits;
  View grad_logits;  // out: type of logits
  int64_t batch;
  int64_t classes;
};

}  // namespace coup_fast
