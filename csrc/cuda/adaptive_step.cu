// adaptive_step and its backward on CUDA; formulas in math/adaptive_step.h, how a sample is summed
// in per_sample.cuh, which keeps h in between.
//
// Bytes of a forward call, float32, per element: x, h, h_ahead read, x' written: 16 (12 with 16-bit
// h and h_ahead). The floor is those bytes over the device's copy bandwidth. Backward reads grad,
// x, h, h_ahead and writes three gradients: 28. Above 3072 elements a sample it reads x, h_ahead
// and grad a second time (from L2), because the sum that alpha's gradient needs depends on the
// clamp, and that on alpha.
#include "calls/adaptive_step.h"
#include "cuda/per_sample.cuh"

namespace coup_fast::cuda {
namespace {

// The tensors beside h, as loaded.
template <int kCount>
struct Inputs {
  RawQuads<kCount> x, ahead, grad;
};

// <h, h> and <h, h - h_ahead> of some quads.
template <class Io>
__device__ __forceinline__ void change_products(const Io& io, const Quads<Io::kCount>& h,
                                                const Quads<Io::kCount>& ahead, Quad (&lanes)[2]) {
  each(io, [&](int q, int k) {
    if (!io.holds(q, k)) return;
    const float at = h.quad[q].at[k];
    lanes[0].at[k] = Lanes<float>::fma(at, at, lanes[0].at[k]);
    lanes[1].at[k] = Lanes<float>::fma(at, at - ahead.quad[q].at[k], lanes[1].at[k]);
  });
}

// --- forward ------------------------------------------------------------------------------------

struct Changes : Sums<1, 2> {
  static constexpr int kGroups = 3;
  static constexpr int kSumSteps = 2;
  static constexpr int kUpdateSteps = 2;
};

template <Keeping kKeeping>
__global__ void __launch_bounds__(threads_of<Changes>(kKeeping), blocks_of(kKeeping))
    adaptive_step_kernel(const AdaptiveStep params, const SampleJob job) {
  const auto load = [&](const auto& io, auto phase) {
    Inputs<std::decay_t<decltype(io)>::kCount> in{};
    if (phase.sums(0)) in.ahead = io.load_raw(params.h_ahead);
    if (phase.updates()) in.x = io.load_raw(params.x);
    return in;
  };
  const AdaptiveRow row = row_at<AdaptiveRow>(params.coeffs);
  const auto sample = open_sample<Changes, kKeeping>(job, params.h, load);
  const bool alive = params.alive[sample.number()];

  float sums[2];
  const auto products = [&](const auto& io, const auto& h, const auto& in, auto& lanes) {
    change_products(io, h, finish_load(io, params.h_ahead, in.ahead), lanes);
  };
  if (!sample.template sum<0>(products, sums)) return;
  const AdaptiveSample result = adaptive_sample(row, alive, sums[0], sums[1]);

  sample.update([&](const auto& io, const auto& h, const auto& in) {
    auto x = finish_load(io, params.x, in.x);
    if (result.alive) {
      each(io, [&](int q, int k) {
        float& at = x.quad[q].at[k];
        at = adaptive_update<float>(row, result.alpha, at, h.quad[q].at[k]);
      });
    }
    io.store(params.x_next, x);
  });
  if (sample.leads()) {
    params.alive_next[sample.number()] = result.alive;
    params.alpha[sample.number()] = result.alpha;
  }
}

// --- backward -----------------------------------------------------------------------------------

struct ChangesAndDots : Sums<2, 2> {
  static constexpr int kGroups = 2;
  static constexpr int kSumSteps = 4;
  static constexpr int kUpdateSteps = 2;
};

template <Keeping kKeeping>
__global__ void __launch_bounds__(threads_of<ChangesAndDots>(kKeeping), blocks_of(kKeeping))
    adaptive_step_backward_kernel(const AdaptiveStepBackward params, const SampleJob job) {
  const AdaptiveStep& forward = params.forward;
  const auto load = [&](const auto& io, auto phase) {
    Inputs<std::decay_t<decltype(io)>::kCount> in{};
    if (phase.sums(0) || phase.updates()) in.ahead = io.load_raw(forward.h_ahead);
    if (phase.sums(1) || phase.updates()) in.x = io.load_raw(forward.x);
    if (phase.sums(1) || phase.updates()) in.grad = io.load_raw(params.grad);
    return in;
  };
  const AdaptiveRow row = row_at<AdaptiveRow>(forward.coeffs);
  const auto sample = open_sample<ChangesAndDots, kKeeping>(job, forward.h, load);
  const bool alive = forward.alive[sample.number()];

  float sums[2];
  const auto changes = [&](const auto& io, const auto& h, const auto& in, auto& lanes) {
    change_products(io, h, finish_load(io, forward.h_ahead, in.ahead), lanes);
  };
  if (!sample.template sum<0>(changes, sums)) return;
  const AdaptiveSample result = adaptive_sample(row, alive, sums[0], sums[1]);

  // The gradient of x' behind clamp and scale.
  const auto masked = [&](const auto& io, const auto& h, const auto& in) {
    auto grad = finish_load(io, params.grad, in.grad);
    if (!result.alive) return grad;
    const auto x = finish_load(io, forward.x, in.x);
    each(io, [&](int q, int k) {
      float& at = grad.quad[q].at[k];
      at = adaptive_masked_gradient<float>(row, result.alpha, x.quad[q].at[k], h.quad[q].at[k], at);
    });
    return grad;
  };
  const auto dots = [&](const auto& io, const auto& h, const auto& in, auto& lanes) {
    const auto y = masked(io, h, in);
    each(io, [&](int q, int k) {
      float& lane = lanes[0].at[k];
      if (io.holds(q, k)) lane = Lanes<float>::fma(y.quad[q].at[k], h.quad[q].at[k], lane);
    });
  };
  if (!sample.template sum<1>(dots, sums)) return;
  const float slope = adaptive_alpha_slope(result, sums[0]);

  sample.update([&](const auto& io, const auto& h, const auto& in) {
    const auto y = masked(io, h, in);
    std::decay_t<decltype(y)> grad_h = {}, grad_h_ahead = {};
    if (result.alive) {
      const auto ahead = finish_load(io, forward.h_ahead, in.ahead);
      each(io, [&](int q, int k) {
        const float at = h.quad[q].at[k];
        grad_h.quad[q].at[k] =
            adaptive_gradient_h<float>(result, slope, y.quad[q].at[k], at, ahead.quad[q].at[k]);
        grad_h_ahead.quad[q].at[k] = adaptive_gradient_h_ahead<float>(slope, at);
      });
    }
    io.store(params.grad_x, y);
    io.store(params.grad_h, grad_h);
    io.store(params.grad_h_ahead, grad_h_ahead);
  });
}

void run(const AdaptiveStep& params, const Tensor& x) {
  const Access access = access_of({&params.x, &params.h, &params.h_ahead, &params.x_next},
                                  params.channels, params.pixels, params.batch);
  const SampleKernels<AdaptiveStep> kernels{adaptive_step_kernel<Keeping::kScalars>,
                                            adaptive_step_kernel<Keeping::kVectors>,
                                            adaptive_step_kernel<Keeping::kRegisters>};
  launch_per_sample<Changes>("adaptive_step", kernels, params, x,
                             {params.batch, params.channels, params.pixels, access});
}

void run_backward(const AdaptiveStepBackward& params, const Tensor& x) {
  const AdaptiveStep& forward = params.forward;
  const Access access = access_of({&forward.x, &forward.h, &forward.h_ahead, &params.grad,
                                   &params.grad_x, &params.grad_h, &params.grad_h_ahead},
                                  forward.channels, forward.pixels, forward.batch);
  const SampleKernels<AdaptiveStepBackward> kernels{
      adaptive_step_backward_kernel<Keeping::kScalars>,
      adaptive_step_backward_kernel<Keeping::kVectors>,
      adaptive_step_backward_kernel<Keeping::kRegisters>};
  launch_per_sample<ChangesAndDots>("adaptive_step_backward", kernels, params, x,
                                    {forward.batch, forward.channels, forward.pixels, access});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CUDA, m) {
  m.impl("adaptive_step", TORCH_BOX(&adaptive_step<run>));
  m.impl("adaptive_step_backward", TORCH_BOX(&adaptive_step_backward<run_backward>));
}

}  // namespace coup_fast::cuda
