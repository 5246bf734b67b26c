// Parameters of normal, for the CPU and the CUDA kernels alike. The formula is in math/normal.h.
#pragma once

#include <cstdint>

namespace coup_fast {

struct Normal {
  const int64_t* keys;  // [batch, 2]: key and offset of each sample, as 64-bit patterns
  float* out;           // [batch, numel]
  int64_t batch;
  int64_t numel;  // of a sample
};

}  // namespace coup_fast
