// perturb and its backward on the CPU: checks, output, threads. The kernels are in tiles_noise.cpp.
#include "perturb.h"

#include "checks.h"
#include "cpu/parallel.h"
#include "cpu/tiles.h"

namespace coup_fast {
namespace {

Tensor perturb(const Tensor& images, const Tensor& coeffs, const MaybeTensor& keys,
               const MaybeTensor& noise) {
  Arguments arguments("perturb", "images", images);
  Perturb params = perturb_params(arguments, coeffs, keys, noise);
  Tensor out = new_dense(images, ScalarType::Float);
  params.out = arguments.output(out);
  const auto kernel = COUP_FAST_PICK(perturb_tiles);
  if (arguments.empty()) return out;
  parallel(num_tiles(params.batch, params.channels * params.pixels), kTileElements,
           [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  return out;
}

Tensor perturb_backward(const Tensor& grad, const Tensor& images, const Tensor& coeffs,
                        const MaybeTensor& keys, const MaybeTensor& noise) {
  Arguments arguments("perturb_backward", "images", images);
  PerturbBackward params{};
  params.forward = perturb_params(arguments, coeffs, keys, noise);
  params.grad = arguments.same_shape("grad", grad);
  Tensor out = new_dense(images, images.scalar_type());
  params.grad_images = arguments.output(out);
  const auto kernel = COUP_FAST_PICK(perturb_backward_tiles);
  if (arguments.empty()) return out;
  parallel(num_tiles(params.forward.batch, params.forward.channels * params.forward.pixels),
           kTileElements, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  return out;
}

}  // namespace
}  // namespace coup_fast

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CPU, m) {
  m.impl("perturb", TORCH_BOX(&coup_fast::perturb));
  m.impl("perturb_backward", TORCH_BOX(&coup_fast::perturb_backward));
}
