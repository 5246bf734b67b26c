// Parameters of confidence_cotangent and its backward, for the CPU and the CUDA kernels alike.
// The formulas are in math/confidence.h.
#pragma once

#include "math/confidence.h"
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

COUP_FAST_FN float load_class(const View& view, int64_t row, int64_t j) {
  return load_as_float(view.data, view.dtype, row * view.sample_stride + j * view.channel_stride);
}

COUP_FAST_FN void store_class(const View& view, int64_t row, int64_t j, float value) {
  store_from_float(view.data, view.dtype, row * view.sample_stride + j * view.channel_stride,
                   value);
}

}  // namespace coup_fast
