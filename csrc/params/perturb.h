// Parameters of perturb and its backward, for the CPU and the CUDA kernels alike: pointers, strides
// and sizes, after csrc/calls has seen the tensors. The formulas are in math/perturb.h.
#pragma once

#include "math/layout.h"
#include "math/perturb.h"

namespace coup_fast {

struct Perturb {
  View images;          // u
  View noise;           // z, or absent
  const int64_t* keys;  // [batch, 2], used where noise is absent; null: z = 0
  const float* coeffs;  // [kPerturbColumns]
  View out;             // out: float32, layout of images
  int64_t batch;
  int64_t channels;
  int64_t pixels;  // of a channel
};

struct PerturbBackward {
  Perturb forward;   // the inputs of the forward call; its out is absent
  View grad;         // of the output
  View grad_images;  // out: type and layout of images
};

}  // namespace coup_fast
