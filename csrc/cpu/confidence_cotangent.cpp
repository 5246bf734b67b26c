// confidence_cotangent and its backward on the CPU: threads over rows. The kernels are in
// per_isa/confidence_cotangent.cpp.
#include "calls/confidence_cotangent.h"

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace coup_fast {
namespace {

void run(const ConfidenceCotangent& params, const Tensor&) {
  const auto kernel = COUP_FAST_PICK(confidence_cotangent_rows);
  parallel(params.batch, params.classes,
           [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

void run_backward(const ConfidenceCotangentBackward& params, const Tensor&) {
  const auto kernel = COUP_FAST_PICK(confidence_cotangent_backward_rows);
  parallel(params.batch, params.classes,
           [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CPU, m) {
  m.impl("confidence_cotangent", TORCH_BOX(&confidence_cotangent<run>));
  m.impl("confidence_cotangent_backward", TORCH_BOX(&confidence_cotangent_backward<run_backward>));
}

}  // namespace coup_fast
