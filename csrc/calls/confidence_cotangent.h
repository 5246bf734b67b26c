// confidence_cotangent and its backward from tensors to parameters, for any device: checks the
// arguments, makes the outputs, calls run(params, logits), which is a device's kernels; logits
// tells which device. Knows no kernel.
#pragma once

#include <tuple>

#include "calls/arguments.h"
#include "params/confidence_cotangent.h"

namespace coup_fast {

inline void require_logits(const Arguments& arguments, const Tensor& logits) {
  constexpr int64_t kMaxClasses = 0x7fffffff;
  arguments.require(logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) <= kMaxClasses,
                    "logits", "must be [B, K] with at least one class, got ", logits);
}

template <auto run>
std::tuple<Tensor, Tensor> confidence_cotangent(const Tensor& logits) {
  Arguments arguments("confidence_cotangent", "logits", logits);
  require_logits(arguments, logits);
  ConfidenceCotangent params{};
  params.logits = arguments.any_float_state();
  params.batch = arguments.batch;
  params.classes = arguments.channels;
  const Tensor log_confidence = new_empty(logits, {params.batch}, ScalarType::Float);
  const Tensor cotangent = new_dense(logits, logits.scalar_type());
  params.log_confidence = static_cast<float*>(log_confidence.data_ptr());
  params.cotangent = arguments.output(cotangent);
  if (params.batch > 0) run(params, logits);
  return {log_confidence, cotangent};
}

template <auto run>
Tensor confidence_cotangent_backward(const Tensor& grad_log_confidence,
                                     const Tensor& grad_cotangent, const Tensor& logits) {
  Arguments arguments("confidence_cotangent_backward", "logits", logits);
  require_logits(arguments, logits);
  ConfidenceCotangentBackward params{};
  params.logits = arguments.any_float_state();
  params.batch = arguments.batch;
  params.classes = arguments.channels;
  arguments.given(arguments.op(), "grad_log_confidence", grad_log_confidence);
  arguments.require(
      grad_log_confidence.scalar_type() == ScalarType::Float && grad_log_confidence.dim() == 1 &&
          grad_log_confidence.size(0) == params.batch,
      "grad_log_confidence", "must be float32 [" + std::to_string(params.batch) + "], got ",
      grad_log_confidence);
  params.grad_log_confidence =
      static_cast<const float*>(arguments.contiguous("grad_log_confidence", grad_log_confidence));
  params.grad_cotangent = arguments.same_shape("grad_cotangent", grad_cotangent);
  const Tensor grad_logits = new_dense(logits, logits.scalar_type());
  params.grad_logits = arguments.output(grad_logits);
  if (params.batch > 0) run(params, logits);
  return grad_logits;
}

}  // namespace coup_fast
