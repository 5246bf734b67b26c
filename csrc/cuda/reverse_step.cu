// reverse_step, its in-place twin and its backward on CUDA; formulas in math/reverse_step.h.
//
// Without a guidance norm every element stands alone: per_quad.cuh. With one, per_sample.cuh sums
// <G, G> first, and in backward <G, a> as well, keeping G in shared memory in between.
// Bytes of a forward call an element, float32: x read, x' written, 8, and 4 for each of m, G, r
// that the row uses (2 in 16 bits); generated noise costs none, and in place the bytes are the
// same. Backward reads grad, and of the inputs only what masks, variance or norm depend on, and
// writes a gradient for each input. The floor is those bytes over the device's copy bandwidth, or
// the arithmetic of the noise (see normal.cu), whichever takes longer.
#include "calls/reverse_step.h"
#include "cuda/per_quad.cuh"
#include "cuda/per_sample.cuh"
#include "cuda/step_quads.cuh"

namespace coup_fast::cuda {
namespace {

// kPlain: without variance channels and reference, as most calls are.
template <bool kPlain>
struct Forward {
  static constexpr bool kPixels = true;
  ReverseStep params;
  using Row = StepConstants;

  __device__ Row row() const { return step_constants<kPlain>(params); }

  template <class Io>
  __device__ void apply(const Io& io, const Row& row) const {
    const auto raw = load_step(io, params, reads_of_call<kPlain>(row.terms, false));
    store_step(io, params, row, row.row.c, step_values<kPlain>(io, params, raw, nullptr));
  }
};

template <bool kPlain>
struct Backward {
  static constexpr bool kPixels = kPlain;  // otherwise its registers would spill
  ReverseStepBackward params;
  using Row = StepConstants;

  __device__ Row row() const { return step_constants<kPlain>(params.forward); }

  template <class Io>
  __device__ void apply(const Io& io, const Row& row) const {
    const auto raw_grad = io.load_raw(params.grad);
    const auto raw = load_step(io, params.forward, reads_of_gradient(row.terms, false));
    const auto in = step_values<kPlain>(io, params.forward, raw, nullptr);
    const auto grad = finish_load(io, params.grad, raw_grad);
    const float scale = row.row.c;
    store_gradients<kPlain>(io, params, row, GuidanceSample{scale, 0.0f}, in,
                            sum_gradients(io, row, scale, in, grad));
  }
};

struct NormedState {
  StepConstants constants;
  float square;
  GuidanceSample sample;
};

// <a, b> of some quads.
template <class Io>
__device__ __forceinline__ void add_products(const Io& io, const Quads<Io::kCount>& a,
                                             const Quads<Io::kCount>& b, Quad& lanes) {
  each(io, [&](int q, int k) {
    float& lane = lanes.at[k];
    if (io.holds(q, k)) lane = Lanes<float>::fma(a.quad[q].at[k], b.quad[q].at[k], lane);
  });
}

template <bool kPlain>
struct NormedForward {
  static constexpr int kRounds = 1;
  static constexpr int kProducts = 1;
  static constexpr bool kRegisters = kPlain;  // otherwise they would spill
  static constexpr int kGroups = 3;
  static constexpr int kSumSteps = 4;
  static constexpr int kUpdateSteps = kPlain ? 2 : 1;
  using State = NormedState;
  template <int kCount>
  using Inputs = RawStep<kCount>;
  ReverseStep params;

  __device__ State begin(int64_t) const { return State{step_constants<kPlain>(params), 0.0f, {}}; }
  __device__ const View& staged() const { return params.g; }

  template <int kPhase, class Io>
  __device__ Inputs<Io::kCount> load(const Io& io, const State& state) const {
    if (!is_phase(kPhase, kRounds)) return {};
    return load_step(io, params, reads_of_call<kPlain>(state.constants.terms, true));
  }

  template <int kRound, class Io>
  __device__ void products(const Io& io, const State&, const Quads<Io::kCount>& g,
                           const Inputs<Io::kCount>&, Quad (&lanes)[1]) const {
    add_products(io, g, g, lanes[0]);
  }

  template <int kRound>
  __device__ void finish(State& state, const float (&sums)[1]) const {
    state.sample.scale = guidance_scale(state.constants.row, params.guidance_norm, sums[0]);
  }

  template <class Io>
  __device__ void update(const Io& io, const State& state, const Quads<Io::kCount>& g,
                         const Inputs<Io::kCount>& raw) const {
    store_step(io, params, state.constants, state.sample.scale,
               step_values<kPlain>(io, params, raw, &g));
  }

  __device__ void update_sample(int64_t, const State&) const {}
};

struct NormedBackward {
  static constexpr int kRounds = 2;
  static constexpr int kProducts = 1;
  static constexpr bool kRegisters = false;
  static constexpr int kGroups = 2;
  static constexpr int kSumSteps = 1;
  static constexpr int kUpdateSteps = 1;
  using State = NormedState;
  template <int kCount>
  struct Inputs {
    RawStep<kCount> step;
    RawQuads<kCount> grad;
  };
  ReverseStepBackward params;

  __device__ State begin(int64_t) const {
    return State{step_constants<false>(params.forward), 0.0f, {}};
  }
  __device__ const View& staged() const { return params.forward.g; }

  template <int kPhase, class Io>
  __device__ Inputs<Io::kCount> load(const Io& io, const State& state) const {
    if (kPhase == 0) return {};
    const StepTerms& terms = state.constants.terms;
    StepReads reads = kPhase == 1 ? reads_of_dot(terms) : reads_of_gradient(terms, true);
    reads.g = false;  // it is staged
    Inputs<Io::kCount> in;
    in.grad = io.load_raw(params.grad);
    in.step = load_step(io, params.forward, reads);
    return in;
  }

  template <class Io>
  __device__ Quads<Io::kCount> gradient_of_sum(const Io& io, const State& state,
                                               const StepQuads<Io::kCount>& values,
                                               const Inputs<Io::kCount>& in) const {
    return sum_gradients(io, state.constants, state.sample.scale, values,
                         finish_load(io, params.grad, in.grad));
  }

  // <G, G>, then <G, a>, see guidance_sample.
  template <int kRound, class Io>
  __device__ void products(const Io& io, const State& state, const Quads<Io::kCount>& g,
                           const Inputs<Io::kCount>& in, Quad (&lanes)[1]) const {
    if constexpr (kRound == 0) {
      add_products(io, g, g, lanes[0]);
    } else {
      const StepConstants& constants = state.constants;
      const auto values = step_values<false>(io, params.forward, in.step, &g);
      auto along = gradient_of_sum(io, state, values, in);
      each(io, [&](int q, int k) {
        const StepFactors<float> factors = step_factors<float>(
            constants.row, constants.terms, state.sample.scale, values.s.quad[q].at[k]);
        float& at = along.quad[q].at[k];
        at = guided_gradient<float>(constants.terms, factors, at);
      });
      add_products(io, g, along, lanes[0]);
    }
  }

  template <int kRound>
  __device__ void finish(State& state, const float (&sums)[1]) const {
    if constexpr (kRound == 0) {
      state.square = sums[0];
      state.sample.scale =
          guidance_scale(state.constants.row, params.forward.guidance_norm, sums[0]);
    } else {
      state.sample =
          guidance_sample(state.constants.row, params.forward.guidance_norm, state.square, sums[0]);
    }
  }

  template <class Io>
  __device__ void update(const Io& io, const State& state, const Quads<Io::kCount>& g,
                         const Inputs<Io::kCount>& in) const {
    const auto values = step_values<false>(io, params.forward, in.step, &g);
    store_gradients<false>(io, params, state.constants, state.sample, values,
                           gradient_of_sum(io, state, values, in));
  }

  __device__ void update_sample(int64_t, const State&) const {}
};

bool is_normed(const ReverseStep& params) {
  return params.guidance_norm != GuidanceNorm::kNone && params.g.data != nullptr;
}

bool is_plain(const ReverseStep& params) {
  return params.s.data == nullptr && params.r.data == nullptr;
}

template <bool kPlain>
void launch_step(const ReverseStep& params, const Tensor& x) {
  const Device device(x);
  const Access access =
      access_of({&params.x, &params.m, &params.s, &params.g, &params.r, &params.z, &params.out},
                params.channels, params.pixels, params.batch);
  if (is_normed(params)) {
    launch_per_sample(device, "reverse_step", NormedForward<kPlain>{params}, x, params.batch,
                      params.channels, params.pixels, access);
  } else {
    launch_per_quad(device, "reverse_step", Forward<kPlain>{params}, params.x, params.batch,
                    params.channels, params.pixels, access);
  }
}

void run(const ReverseStep& params, const Tensor& x) {
  is_plain(params) ? launch_step<true>(params, x) : launch_step<false>(params, x);
}

void run_backward(const ReverseStepBackward& params, const Tensor& x) {
  const Device device(x);
  const ReverseStep& forward = params.forward;
  const Access access = access_of(
      {&forward.x, &forward.m, &forward.s, &forward.g, &forward.r, &forward.z, &params.grad,
       &params.grad_x, &params.grad_m, &params.grad_s, &params.grad_g, &params.grad_r},
      forward.channels, forward.pixels, forward.batch);
  if (is_normed(forward)) {
    launch_per_sample(device, "reverse_step_backward", NormedBackward{params}, x, forward.batch,
                      forward.channels, forward.pixels, access);
  } else if (is_plain(forward)) {
    launch_per_quad(device, "reverse_step_backward", Backward<true>{params}, forward.x,
                    forward.batch, forward.channels, forward.pixels, access);
  } else {
    launch_per_quad(device, "reverse_step_backward", Backward<false>{params}, forward.x,
                    forward.batch, forward.channels, forward.pixels, access);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CUDA, m) {
  m.impl("reverse_step", TORCH_BOX(&reverse_step<run>));
  m.impl("reverse_step_", TORCH_BOX(&reverse_step_<run>));
  m.impl("reverse_step_backward", TORCH_BOX(&reverse_step_backward<run_backward>));
}

}  // namespace coup_fast::cuda
