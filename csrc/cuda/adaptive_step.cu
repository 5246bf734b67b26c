// adaptive_step and its backward on CUDA; formulas in math/adaptive.h.
//
// Bytes of a forward call, float32, per element: x, h, h_ahead read, x' written: 16 (12 with 16-bit
// h and h_ahead); h is kept in shared memory between sums and update. The floor is those bytes over
// the device's copy bandwidth. Backward reads grad, x, h, h_ahead and writes three gradients: 28,
// and reads x, h_ahead and grad a second time (from L2), because the sum that alpha's gradient
// needs depends on the clamp, and that on alpha.
#include "adaptive_call.h"
#include "adaptive_step.h"
#include "cuda/per_sample.cuh"

namespace coup_fast::cuda {
namespace {

struct AdaptiveState {
  AdaptiveRow row;
  bool alive;  // before the step
  AdaptiveSample sample;
  float slope;  // backward: k of math/adaptive.h
};

// <h, h> and <h, h - h_ahead> of a quad.
template <class Io>
__device__ __forceinline__ void change_products(const Io& io, const View& h_ahead, const Quad& h,
                                                Quad (&lanes)[2]) {
  const Quad ahead = io.load(h_ahead);
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    if (k >= io.count()) break;
    lanes[0].at[k] = Lanes<float>::fma(h.at[k], h.at[k], lanes[0].at[k]);
    lanes[1].at[k] = Lanes<float>::fma(h.at[k], h.at[k] - ahead.at[k], lanes[1].at[k]);
  }
}

struct Forward {
  static constexpr int kRounds = 1;
  static constexpr int kProducts = 2;
  using State = AdaptiveState;
  AdaptiveStep params;

  __device__ State begin(int64_t sample) const {
    return State{adaptive_row(params.coeffs), params.alive[sample], {}, 0.0f};
  }

  __device__ const View& staged() const { return params.h; }

  template <int kRound, class Io>
  __device__ void products(const Io& io, const State&, const Quad& h, Quad (&lanes)[2]) const {
    change_products(io, params.h_ahead, h, lanes);
  }

  template <int kRound>
  __device__ void finish(State& state, const float (&sums)[2]) const {
    state.sample = adaptive_sample(state.row, state.alive, sums[0], sums[1]);
  }

  template <class Io>
  __device__ void update(const Io& io, const State& state, const Quad& h) const {
    Quad x = io.load(params.x);
    if (state.sample.alive) {
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        x.at[k] = adaptive_update<float>(state.row, state.sample.alpha, x.at[k], h.at[k]);
      }
    }
    io.store(params.x_next, x);
  }

  __device__ void update_sample(int64_t sample, const State& state) const {
    params.alive_next[sample] = state.sample.alive;
    params.alpha[sample] = state.sample.alpha;
  }
};

struct Backward {
  static constexpr int kRounds = 2;
  static constexpr int kProducts = 2;
  using State = AdaptiveState;
  AdaptiveStepBackward params;

  __device__ State begin(int64_t sample) const {
    return State{adaptive_row(params.forward.coeffs), params.forward.alive[sample], {}, 0.0f};
  }

  __device__ const View& staged() const { return params.forward.h; }

  // The gradient of x' behind clamp and scale.
  template <class Io>
  __device__ Quad masked(const Io& io, const State& state, const Quad& h) const {
    Quad grad = io.load(params.grad);
    if (!state.sample.alive) return grad;
    const Quad x = io.load(params.forward.x);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      grad.at[k] = adaptive_masked_gradient<float>(state.row, state.sample.alpha, x.at[k], h.at[k],
                                                   grad.at[k]);
    }
    return grad;
  }

  template <int kRound, class Io>
  __device__ void products(const Io& io, const State& state, const Quad& h,
                           Quad (&lanes)[2]) const {
    if constexpr (kRound == 0) {
      change_products(io, params.forward.h_ahead, h, lanes);
    } else {
      const Quad y = masked(io, state, h);
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        if (k < io.count()) {
          lanes[0].at[k] = Lanes<float>::fma(y.at[k], h.at[k], lanes[0].at[k]);
        }
      }
    }
  }

  template <int kRound>
  __device__ void finish(State& state, const float (&sums)[2]) const {
    if constexpr (kRound == 0) {
      state.sample = adaptive_sample(state.row, state.alive, sums[0], sums[1]);
    } else {
      state.slope = adaptive_alpha_slope(state.sample, sums[0]);
    }
  }

  template <class Io>
  __device__ void update(const Io& io, const State& state, const Quad& h) const {
    const Quad y = masked(io, state, h);
    Quad grad_h = {}, grad_h_ahead = {};
    if (state.sample.alive) {
      const Quad ahead = io.load(params.forward.h_ahead);
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        grad_h.at[k] =
            adaptive_gradient_h<float>(state.sample, state.slope, y.at[k], h.at[k], ahead.at[k]);
        grad_h_ahead.at[k] = adaptive_gradient_h_ahead<float>(state.slope, h.at[k]);
      }
    }
    io.store(params.grad_x, y);
    io.store(params.grad_h, grad_h);
    io.store(params.grad_h_ahead, grad_h_ahead);
  }

  __device__ void update_sample(int64_t, const State&) const {}
};

ThreeTensors adaptive_step(const Tensor& x, const Tensor& h, const Tensor& h_ahead,
                           const Tensor& alive, const Tensor& coeffs) {
  return adaptive_step_call(x, h, h_ahead, alive, coeffs, [&](const AdaptiveStep& params) {
    const bool packed = are_packed({&params.x, &params.h, &params.h_ahead, &params.x_next},
                                   params.channels, params.pixels, params.batch);
    launch_per_sample(Device(x), "adaptive_step", Forward{params}, x, params.batch, params.channels,
                      params.pixels, packed);
  });
}

ThreeTensors adaptive_step_backward(const Tensor& grad, const Tensor& x, const Tensor& h,
                                    const Tensor& h_ahead, const Tensor& alive,
                                    const Tensor& coeffs) {
  const auto run = [&](const AdaptiveStepBackward& params) {
    const AdaptiveStep& forward = params.forward;
    const bool packed = are_packed({&forward.x, &forward.h, &forward.h_ahead, &params.grad,
                                    &params.grad_x, &params.grad_h, &params.grad_h_ahead},
                                   forward.channels, forward.pixels, forward.batch);
    launch_per_sample(Device(x), "adaptive_step_backward", Backward{params}, x, forward.batch,
                      forward.channels, forward.pixels, packed);
  };
  return adaptive_step_backward_call(grad, x, h, h_ahead, alive, coeffs, run);
}

}  // namespace
}  // namespace coup_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CUDA, m) {
  m.impl("adaptive_step", TORCH_BOX(&coup_fast::cuda::adaptive_step));
  m.impl("adaptive_step_backward", TORCH_BOX(&coup_fast::cuda::adaptive_step_backward));
}
