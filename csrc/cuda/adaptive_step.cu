// adaptive_step and its backward on CUDA; formulas in math/adaptive_step.h.
//
// Bytes of a forward call, float32, per element: x, h, h_ahead read, x' written: 16 (12 with 16-bit
// h and h_ahead); h is kept between sums and update. The floor is those bytes over the device's
// copy bandwidth. Backward reads grad, x, h, h_ahead and writes three gradients: 28. Above 3072
// elements a sample it reads x, h_ahead and grad a second time (from L2), because the sum that
// alpha's gradient needs depends on the clamp, and that on alpha.
#include "calls/adaptive_step.h"
#include "cuda/per_sample.cuh"
#include "params/adaptive_step.h"

namespace coup_fast::cuda {
namespace {

struct AdaptiveState {
  AdaptiveRow row;
  bool alive;  // before the step
  AdaptiveSample sample;
  float slope;  // backward: k of math/adaptive_step.h
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

struct Forward {
  static constexpr int kRounds = 1;
  static constexpr int kProducts = 2;
  static constexpr bool kRegisters = true;
  static constexpr int kGroups = 3;
  static constexpr int kSumSteps = 2;
  static constexpr int kUpdateSteps = 2;
  using State = AdaptiveState;
  template <int kCount>
  struct Inputs {
    RawQuads<kCount> x, ahead;
  };
  AdaptiveStep params;

  __device__ State begin(int64_t sample) const {
    return State{adaptive_row(params.coeffs), params.alive[sample], {}, 0.0f};
  }

  __device__ const View& staged() const { return params.h; }

  template <int kPhase, class Io>
  __device__ Inputs<Io::kCount> load(const Io& io, const State&) const {
    Inputs<Io::kCount> in{};
    if (is_phase(kPhase, 0)) in.ahead = io.load_raw(params.h_ahead);
    if (is_phase(kPhase, kRounds)) in.x = io.load_raw(params.x);
    return in;
  }

  template <int kRound, class Io>
  __device__ void products(const Io& io, const State&, const Quads<Io::kCount>& h,
                           const Inputs<Io::kCount>& in, Quad (&lanes)[2]) const {
    change_products(io, h, finish_load(io, params.h_ahead, in.ahead), lanes);
  }

  template <int kRound>
  __device__ void finish(State& state, const float (&sums)[2]) const {
    state.sample = adaptive_sample(state.row, state.alive, sums[0], sums[1]);
  }

  template <class Io>
  __device__ void update(const Io& io, const State& state, const Quads<Io::kCount>& h,
                         const Inputs<Io::kCount>& in) const {
    auto x = finish_load(io, params.x, in.x);
    if (state.sample.alive) {
      each(io, [&](int q, int k) {
        float& at = x.quad[q].at[k];
        at = adaptive_update<float>(state.row, state.sample.alpha, at, h.quad[q].at[k]);
      });
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
  static constexpr bool kRegisters = true;
  static constexpr int kGroups = 2;
  static constexpr int kSumSteps = 4;
  static constexpr int kUpdateSteps = 2;
  using State = AdaptiveState;
  template <int kCount>
  struct Inputs {
    RawQuads<kCount> x, ahead, grad;
  };
  AdaptiveStepBackward params;

  __device__ State begin(int64_t sample) const {
    return State{adaptive_row(params.forward.coeffs), params.forward.alive[sample], {}, 0.0f};
  }

  __device__ const View& staged() const { return params.forward.h; }

  template <int kPhase, class Io>
  __device__ Inputs<Io::kCount> load(const Io& io, const State&) const {
    Inputs<Io::kCount> in{};
    if (kPhase != 1) in.ahead = io.load_raw(params.forward.h_ahead);
    if (kPhase != 0) in.x = io.load_raw(params.forward.x);
    if (kPhase != 0) in.grad = io.load_raw(params.grad);
    return in;
  }

  // The gradient of x' behind clamp and scale.
  template <class Io>
  __device__ Quads<Io::kCount> masked(const Io& io, const State& state, const Quads<Io::kCount>& h,
                                      const Inputs<Io::kCount>& in) const {
    auto grad = finish_load(io, params.grad, in.grad);
    if (!state.sample.alive) return grad;
    const auto x = finish_load(io, params.forward.x, in.x);
    each(io, [&](int q, int k) {
      float& at = grad.quad[q].at[k];
      at = adaptive_masked_gradient<float>(state.row, state.sample.alpha, x.quad[q].at[k],
                                           h.quad[q].at[k], at);
    });
    return grad;
  }

  template <int kRound, class Io>
  __device__ void products(const Io& io, const State& state, const Quads<Io::kCount>& h,
                           const Inputs<Io::kCount>& in, Quad (&lanes)[2]) const {
    if constexpr (kRound == 0) {
      change_products(io, h, finish_load(io, params.forward.h_ahead, in.ahead), lanes);
    } else {
      const auto y = masked(io, state, h, in);
      each(io, [&](int q, int k) {
        float& lane = lanes[0].at[k];
        if (io.holds(q, k)) lane = Lanes<float>::fma(y.quad[q].at[k], h.quad[q].at[k], lane);
      });
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
  __device__ void update(const Io& io, const State& state, const Quads<Io::kCount>& h,
                         const Inputs<Io::kCount>& in) const {
    const auto y = masked(io, state, h, in);
    Quads<Io::kCount> grad_h = {}, grad_h_ahead = {};
    if (state.sample.alive) {
      const auto ahead = finish_load(io, params.forward.h_ahead, in.ahead);
      each(io, [&](int q, int k) {
        const float at = h.quad[q].at[k];
        grad_h.quad[q].at[k] = adaptive_gradient_h<float>(state.sample, state.slope,
                                                          y.quad[q].at[k], at, ahead.quad[q].at[k]);
        grad_h_ahead.quad[q].at[k] = adaptive_gradient_h_ahead<float>(state.slope, at);
      });
    }
    io.store(params.grad_x, y);
    io.store(params.grad_h, grad_h);
    io.store(params.grad_h_ahead, grad_h_ahead);
  }

  __device__ void update_sample(int64_t, const State&) const {}
};

void run(const AdaptiveStep& params, const Tensor& x) {
  const Access access = access_of({&params.x, &params.h, &params.h_ahead, &params.x_next},
                                  params.channels, params.pixels, params.batch);
  launch_per_sample(Device(x), "adaptive_step", Forward{params}, x, params.batch, params.channels,
                    params.pixels, access);
}

void run_backward(const AdaptiveStepBackward& params, const Tensor& x) {
  const AdaptiveStep& forward = params.forward;
  const Access access = access_of({&forward.x, &forward.h, &forward.h_ahead, &params.grad,
                                   &params.grad_x, &params.grad_h, &params.grad_h_ahead},
                                  forward.channels, forward.pixels, forward.batch);
  launch_per_sample(Device(x), "adaptive_step_backward", Backward{params}, x, forward.batch,
                    forward.channels, forward.pixels, access);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CUDA, m) {
  m.impl("adaptive_step", TORCH_BOX(&adaptive_step<run>));
  m.impl("adaptive_step_backward", TORCH_BOX(&adaptive_step_backward<run_backward>));
}

}  // namespace coup_fast::cuda
