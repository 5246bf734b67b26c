// confidence_cotangent and its backward on the CPU: threads over rows. The kernels are in
// per_isa/confidence_cotangent.cpp.
#include "calls/confidence_cotangent.h"

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace coup_fast {
namespace {

std::tuple<Tensor, Tensor> confidence_cotangent(const Tensor& logits) {
  return confidence_cotangent_call(logits, [](const ConfidenceCotangent& params) {
    const auto kernel = COUP_FAST_PICK(confidence_cotangent_rows);
    parallel(params.batch, params.classes,
             [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  });
}

Tensor confidence_cotangent_backward(const Tensor& grad_log_confidence,
                                     const Tensor& grad_cotangent, const Tensor& logits) {
  const auto run = [](const ConfidenceCotangentBackward& params) {
    const auto kernel = COUP_FAST_PICK(confidence_cotangent_backward_rows);
    parallel(params.batch, params.classes,
             [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  };
  return confidence_cotangent_backward_call(grad_log_confidence, grad_cotangent, logits, run);
}

}  // namespace
}  // namespace coup_fast

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CPU, m) {
  m.impl("confidence_cotangent", TORCH_BOX(&coup_fast::confidence_cotangent));
  m.impl("confidence_cotangent_backward", TORCH_BOX(&coup_fast::confidence_cotangent_backward));
}
