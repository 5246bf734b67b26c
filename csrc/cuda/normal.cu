// normal on CUDA: the normals of math/normal.h, two Philox blocks a thread and turn. It writes 4
// bytes an element and reads 16 a sample, so the floor is a fill at the device's write bandwidth. A
// block takes about two hundred instructions for its four elements (ten rounds, two logarithms, two
// sines and cosines), so on devices of several TB/s the floor is more likely the rate of
// instructions.
#include "calls/normal.h"
#include "cuda/per_quad.cuh"

namespace coup_fast::cuda {
namespace {

COUP_FAST_FN View out_of(const Normal& params) {
  return View{params.out, DType::kFloat32, params.numel, params.numel, 1};
}

template <Access kAccess>
__global__ void __launch_bounds__(kThreads, 2)
    normal_kernel(const Normal params, const QuadGrid grid) {
  const View out = out_of(params);
  each_quads<kAccess>(grid, [&](const auto& io) { io.store(out, noise_at(io, params.keys)); });
}

void run(const Normal& params, const Tensor& keys) {
  const View out = out_of(params);
  const QuadKernels<Normal> kernels{normal_kernel<Access::kScalar>, normal_kernel<Access::kPacked>,
                                    nullptr, normal_kernel<Access::kPairs>};
  launch_per_quad(Device(keys), "normal", kernels, params, out, params.batch, 1, params.numel,
                  access_of({&out}, 1, params.numel, params.batch));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CUDA, m) { m.impl("normal", TORCH_BOX(&normal<run>)); }

}  // namespace coup_fast::cuda
