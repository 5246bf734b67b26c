// normal on CUDA: the normals of math/normal.h, one Philox block a thread and turn. It writes 4
// bytes an element and reads 16 a sample, so the floor is a fill at the device's write bandwidth. A
// block takes several hundred instructions for its four elements (ten rounds, two logarithms, two
// sines and cosines), so on devices of several TB/s the floor is more likely the rate of
// instructions.
#include "calls/normal.h"
#include "cuda/per_quad.cuh"

namespace coup_fast::cuda {
namespace {

View out_of(const Normal& params) {
  return View{params.out, DType::kFloat32, params.numel, params.numel, 1};
}

struct Draw {
  const int64_t* keys;
  View out;
};

template <Access kAccess>
__global__ void __launch_bounds__(kThreads, 2)
    normal_kernel(const Draw params, const QuadGrid grid) {
  each_quads<kAccess>(grid,
                      [&](const auto& io) { io.store(params.out, noise_at(io, params.keys)); });
}

void run(const Normal& params, const Tensor& keys) {
  const Draw draw{params.keys, out_of(params)};
  const QuadKernels<Draw> kernels{normal_kernel<Access::kScalar>, normal_kernel<Access::kPacked>,
                                  nullptr};
  launch_per_quad(Device(keys), "normal", kernels, draw, draw.out, params.batch, 1, params.numel,
                  access_of({&draw.out}, 1, params.numel, params.batch));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CUDA, m) { m.impl("normal", TORCH_BOX(&normal<run>)); }

}  // namespace coup_fast::cuda
