// perturb and its backward on CUDA; formulas in math/perturb.h. Bytes an element: images read, 4
// written; backward reads grad, and images too where the row clamps, and writes the gradient in the
// type of images. The floor is those bytes over the device's copy bandwidth.
#include "calls/perturb.h"
#include "cuda/per_quad.cuh"

namespace coup_fast::cuda {
namespace {

__device__ __forceinline__ bool is_noisy(const Perturb& params, const PerturbRow& row) {
  return (params.noise.data != nullptr || params.keys != nullptr) && perturb_is_noisy(row);
}

template <Access kAccess>
__global__ void __launch_bounds__(kThreads, 2)
    perturb_kernel(const Perturb params, const QuadGrid grid) {
  const PerturbRow row = row_at<PerturbRow>(params.coeffs);
  const bool noisy = is_noisy(params, row);
  each_quads<kAccess>(grid, [&](const auto& io) {
    const auto raw = io.load_raw(params.images);
    const auto z = noise_of(io, noisy, params.noise, params.keys);
    auto u = finish_load(io, params.images, raw);
    each(io, [&](int q, int k) {
      float& at = u.quad[q].at[k];
      at = perturb_value<float>(row, noisy, at, z.quad[q].at[k]);
    });
    io.store(params.out, u);
  });
}

template <Access kAccess>
__global__ void __launch_bounds__(kThreads, 2)
    perturb_backward_kernel(const PerturbBackward params, const QuadGrid grid) {
  const Perturb& forward = params.forward;
  const PerturbRow row = row_at<PerturbRow>(forward.coeffs);
  const bool noisy = is_noisy(forward, row);
  const bool masked = bounded(row.lo, row.hi);
  each_quads<kAccess>(grid, [&](const auto& io) {
    const auto raw_grad = io.load_raw(params.grad);
    decltype(io.load_raw(params.grad)) raw{};
    if (masked) raw = io.load_raw(forward.images);  // nothing else depends on them
    const auto z = noise_of(io, masked && noisy, forward.noise, forward.keys);
    const auto u = finish_load(io, forward.images, raw);
    auto grad = finish_load(io, params.grad, raw_grad);
    each(io, [&](int q, int k) {
      float& at = grad.quad[q].at[k];
      at = perturb_gradient<float>(row, noisy, u.quad[q].at[k], z.quad[q].at[k], at);
    });
    io.store(params.grad_images, grad);
  });
}

void run(const Perturb& params, const Tensor& images) {
  const Access access = access_of({&params.images, &params.noise, &params.out}, params.channels,
                                  params.pixels, params.batch);
  const QuadKernels<Perturb> kernels{perturb_kernel<Access::kScalar>,
                                     perturb_kernel<Access::kPacked>,
                                     perturb_kernel<Access::kPixels>};
  launch_per_quad(Device(images), "perturb", kernels, params, params.images, params.batch,
                  params.channels, params.pixels, access);
}

void run_backward(const PerturbBackward& params, const Tensor& images) {
  const Perturb& forward = params.forward;
  const Access access =
      access_of({&forward.images, &forward.noise, &params.grad, &params.grad_images},
                forward.channels, forward.pixels, forward.batch);
  const QuadKernels<PerturbBackward> kernels{perturb_backward_kernel<Access::kScalar>,
                                             perturb_backward_kernel<Access::kPacked>,
                                             perturb_backward_kernel<Access::kPixels>};
  launch_per_quad(Device(images), "perturb_backward", kernels, params, forward.images,
                  forward.batch, forward.channels, forward.pixels, access);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CUDA, m) {
  m.impl("perturb", TORCH_BOX(&perturb<run>));
  m.impl("perturb_backward", TORCH_BOX(&perturb_backward<run_backward>));
}

}  // namespace coup_fast::cuda
