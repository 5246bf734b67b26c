// normal from tensors to parameters, for any device: checks the arguments,
// makes the outputs, calls run(params, keys), which is a device's kernels; keys tells which device.
// Knows no kernel.
#pragma once

#include <vector>

#include "calls/arguments.h"
#include "params/normal.h"

namespace coup_fast {

template <auto run>
Tensor normal(const Tensor& keys, const std::vector<int64_t>& shape) {
  const auto given = [&] {
    return sizes_text(shape.data(), static_cast<int64_t>(shape.size())) + " and keys " +
           text_of(keys);
  };
  STD_TORCH_CHECK(keys.scalar_type() == ScalarType::Long && keys.dim() == 2 && keys.size(1) == 2 &&
                      !shape.empty() && shape[0] == keys.size(0),
                  "coup_fast::normal: keys must be int64 [B, 2] and shape [B, ...], got shape ",
                  given());
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(size >= 0, "coup_fast::normal: sizes must not be negative, got shape ",
                    given());
  }
  STD_TORCH_CHECK(sizes_fit(shape.data(), static_cast<int64_t>(shape.size())),
                  "coup_fast::normal: shape ", kSizesExpected, ", got shape ", given());
  const Tensor out = new_empty(keys, shape, ScalarType::Float);
  Arguments arguments("normal", "keys", keys);
  Normal params{};
  params.keys = arguments.keys(keys);
  params.out = static_cast<float*>(out.data_ptr());
  params.batch = arguments.batch;
  params.numel = params.batch == 0 ? 0 : out.numel() / params.batch;
  if (params.batch * params.numel > 0) run(params, keys);
  return out;
}

}  // namespace coup_fast
