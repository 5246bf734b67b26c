// perturb and its backward on CUDA; formulas in math/perturb.h. Bytes an element: images read, 4
// written; backward reads grad, and images too where the row clamps, and writes the gradient in the
// type of images. The floor is those bytes over the device's copy bandwidth.
#include "calls/perturb.h"
#include "cuda/per_quad.cuh"

namespace coup_fast::cuda {
namespace {

struct NoisyRow {
  PerturbRow row;
  bool noisy;
};

__device__ __forceinline__ NoisyRow noisy_row(const Perturb& params) {
  const PerturbRow row = perturb_row(params.coeffs);
  const bool has_noise = params.noise.data != nullptr || params.keys != nullptr;
  return NoisyRow{row, has_noise && perturb_is_noisy(row)};
}

struct Forward {
  static constexpr bool kPixels = true;
  Perturb params;
  using Row = NoisyRow;

  __device__ Row row() const { return noisy_row(params); }

  template <class Io>
  __device__ void apply(const Io& io, const Row& row) const {
    const auto raw = io.load_raw(params.images);
    const auto z = noise_of(io, row.noisy, params.noise, params.keys);
    auto u = finish_load(io, params.images, raw);
    each(io, [&](int q, int k) {
      float& at = u.quad[q].at[k];
      at = perturb_value<float>(row.row, row.noisy, at, z.quad[q].at[k]);
    });
    io.store(params.out, u);
  }
};

struct Backward {
  static constexpr bool kPixels = true;
  PerturbBackward params;
  using Row = NoisyRow;

  __device__ Row row() const { return noisy_row(params.forward); }

  template <class Io>
  __device__ void apply(const Io& io, const Row& row) const {
    const Perturb& forward = params.forward;
    const bool masked = bounded(row.row.lo, row.row.hi);
    const auto raw_grad = io.load_raw(params.grad);
    RawQuads<Io::kCount> raw{};
    if (masked) raw = io.load_raw(forward.images);
    const auto z = noise_of(io, masked && row.noisy, forward.noise, forward.keys);
    const auto u = finish_load(io, forward.images, raw);
    auto grad = finish_load(io, params.grad, raw_grad);
    each(io, [&](int q, int k) {
      float& at = grad.quad[q].at[k];
      at = perturb_gradient<float>(row.row, row.noisy, u.quad[q].at[k], z.quad[q].at[k], at);
    });
    io.store(params.grad_images, grad);
  }
};

void run(const Perturb& params, const Tensor& images) {
  const Access access = access_of({&params.images, &params.noise, &params.out}, params.channels,
                                  params.pixels, params.batch);
  launch_per_quad(Device(images), "perturb", Forward{params}, params.images, params.batch,
                  params.channels, params.pixels, access);
}

void run_backward(const PerturbBackward& params, const Tensor& images) {
  const Perturb& forward = params.forward;
  const Access access =
      access_of({&forward.images, &forward.noise, &params.grad, &params.grad_images},
                forward.channels, forward.pixels, forward.batch);
  launch_per_quad(Device(images), "perturb_backward", Backward{params}, forward.images,
                  forward.batch, forward.channels, forward.pixels, access);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CUDA, m) {
  m.impl("perturb", TORCH_BOX(&perturb<run>));
  m.impl("perturb_backward", TORCH_BOX(&perturb_backward<run_backward>));
}

}  // namespace coup_fast::cuda
