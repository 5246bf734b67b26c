// confidence_cotangent and its backward from tensors to parameters, for any device: checks the
// arguments, makes the outputs, calls run(params, logits), which is a device's kernels; logits
// tells which device. Knows no kernel.
#pragma once

#include <string>
#include <tuple>

#include "calls/arguments.h"
#include "params/confidence_cotangent.h"

namespace coup_fast {

inline Confidence quantity_of(const Arguments& arguments, const std::string& text) {
  if (text == "log_confidence") return Confidence::kLogProbability;
  if (text == "margin") return Confidence::kMargin;
  STD_TORCH_CHECK(false, "coup_fast::", arguments.op(),
                  ": quantity must be log_confidence or margin, got ", text);
}

inline void require_logits(const Arguments& arguments, const Tensor& logits, Confidence quantity) {
  constexpr int64_t kMaxClasses = 0x7fffffff;
  arguments.require(logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) <= kMaxClasses,
                    "logits", "must be [B, K] with at least one class, got ", logits);
  arguments.require(quantity != Confidence::kMargin || logits.size(1) >= 2, "logits",
                    "must have at least two classes for the margin, got ", logits);
}

template <auto run>
std::tuple<Tensor, Tensor> confidence_cotangent(const Tensor& logits, const std::string& quantity) {
  Arguments arguments("confidence_cotangent", "logits", logits);
  ConfidenceCotangent params{};
  params.quantity = quantity_of(arguments, quantity);
  require_logits(arguments, logits, params.quantity);
  params.logits = arguments.any_float_state();
  params.batch = arguments.batch;
  params.classes = arguments.channels;
  const Tensor value = new_empty(logits, {params.batch}, ScalarType::Float);
  const Tensor cotangent = new_dense(logits, logits.scalar_type());
  params.value = static_cast<float*>(value.data_ptr());
  params.cotangent = arguments.output(cotangent);
  if (params.batch > 0) run(params, logits);
  return {value, cotangent};
}

template <auto run>
Tensor confidence_cotangent_backward(const Tensor& grad_value, const Tensor& grad_cotangent,
                                     const Tensor& logits, const std::string& quantity) {
  Arguments arguments("confidence_cotangent_backward", "logits", logits);
  ConfidenceCotangentBackward params{};
  params.quantity = quantity_of(arguments, quantity);
  require_logits(arguments, logits, params.quantity);
  params.logits = arguments.any_float_state();
  params.batch = arguments.batch;
  params.classes = arguments.channels;
  params.grad_value = arguments.per_sample("grad_value", grad_value);
  params.grad_cotangent = arguments.same_shape("grad_cotangent", grad_cotangent);
  const Tensor grad_logits = new_dense(logits, logits.scalar_type());
  params.grad_logits = arguments.output(grad_logits);
  if (params.batch > 0) run(params, logits);
  return grad_logits;
}

}  // namespace coup_fast
