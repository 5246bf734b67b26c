// perturb and its backward on the CPU: threads over tiles. The kernels are in per_isa/perturb.cpp.
#include "calls/perturb.h"

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace coup_fast {
namespace {

Tensor perturb(const Tensor& images, const Tensor& coeffs, const MaybeTensor& keys,
               const MaybeTensor& noise) {
  return perturb_call(images, coeffs, keys, noise, [](const Perturb& params) {
    const auto kernel = COUP_FAST_PICK(perturb_tiles);
    parallel(num_tiles(params.batch, params.channels * params.pixels), kTile,
             [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  });
}

Tensor perturb_backward(const Tensor& grad, const Tensor& images, const Tensor& coeffs,
                        const MaybeTensor& keys, const MaybeTensor& noise) {
  const auto run = [](const PerturbBackward& params) {
    const Perturb& forward = params.forward;
    const auto kernel = COUP_FAST_PICK(perturb_backward_tiles);
    parallel(num_tiles(forward.batch, forward.channels * forward.pixels), kTile,
             [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  };
  return perturb_backward_call(grad, images, coeffs, keys, noise, run);
}

}  // namespace
}  // namespace coup_fast

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CPU, m) {
  m.impl("perturb", TORCH_BOX(&coup_fast::perturb));
  m.impl("perturb_backward", TORCH_BOX(&coup_fast::perturb_backward));
}
