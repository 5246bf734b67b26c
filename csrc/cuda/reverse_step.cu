// reverse_step, its in-place twin and its backward on CUDA; formulas in math/step.h.
//
// Without a guidance norm every element stands alone: per_quad.cuh. With one, per_sample.cuh sums
// <G, G> first, and in backward <G, a> as well, keeping G in shared memory in between.
// Bytes of a forward call an element, float32: x read, x' written, 8, and 4 for each of m, G, r
// that the row uses (2 in 16 bits); generated noise costs none, and in place the bytes are the
// same. Backward reads grad, and of the inputs only what masks, variance or norm depend on, and
// writes a gradient for each input. The floor is those bytes over the device's copy bandwidth, or
// the arithmetic of the noise (see normal.cu), whichever takes longer.
#include <string>

#include "cuda/per_quad.cuh"
#include "cuda/per_sample.cuh"
#include "cuda/step_quads.cuh"
#include "reverse_step_call.h"

namespace coup_fast::cuda {
namespace {

struct Forward {
  ReverseStep params;
  using Row = StepConstants;

  __device__ Row row() const { return step_constants(params); }

  template <class Io>
  __device__ void apply(const Io& io, const Row& row) const {
    step_quad(io, params, row, row.row.c, nullptr);
  }
};

struct Backward {
  ReverseStepBackward params;
  using Row = StepConstants;

  __device__ Row row() const { return step_constants(params.forward); }

  template <class Io>
  __device__ void apply(const Io& io, const Row& row) const {
    step_gradient_quad(io, params, row, GuidanceSample{row.row.c, 0.0f}, false, nullptr);
  }
};

struct NormedState {
  StepConstants constants;
  float square;
  GuidanceSample sample;
};

// <G, b> of a quad.
template <class Io>
__device__ __forceinline__ void add_products(const Io& io, const Quad& g, const Quad& b,
                                             Quad& lanes) {
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    if (k < io.count()) lanes.at[k] = Lanes<float>::fma(g.at[k], b.at[k], lanes.at[k]);
  }
}

struct NormedForward {
  static constexpr int kRounds = 1;
  static constexpr int kProducts = 1;
  using State = NormedState;
  ReverseStep params;

  __device__ State begin(int64_t) const { return State{step_constants(params), 0.0f, {}}; }
  __device__ const View& staged() const { return params.g; }

  template <int kRound, class Io>
  __device__ void products(const Io& io, const State&, const Quad& g, Quad (&lanes)[1]) const {
    add_products(io, g, g, lanes[0]);
  }

  template <int kRound>
  __device__ void finish(State& state, const float (&sums)[1]) const {
    state.sample.scale = guidance_scale(state.constants.row, params.guidance_norm, sums[0]);
  }

  template <class Io>
  __device__ void update(const Io& io, const State& state, const Quad& g) const {
    step_quad(io, params, state.constants, state.sample.scale, &g);
  }

  __device__ void update_sample(int64_t, const State&) const {}
};

struct NormedBackward {
  static constexpr int kRounds = 2;
  static constexpr int kProducts = 1;
  using State = NormedState;
  ReverseStepBackward params;

  __device__ State begin(int64_t) const { return State{step_constants(params.forward), 0.0f, {}}; }
  __device__ const View& staged() const { return params.forward.g; }

  // a of the guidance's gradient, see guidance_sample
  template <class Io>
  __device__ Quad along(const Io& io, const State& state, const Quad& g) const {
    const StepRow& row = state.constants.row;
    const StepTerms& terms = state.constants.terms;
    StepReads reads{};
    if (terms.out_clamp) reads = reads_of_sum(terms);
    reads.s = terms.learned;
    const RawQuad raw_grad = io.load_raw(params.grad);
    const StepQuads in = load_step(io, params.forward, reads, &g);
    Quad out = to_float(raw_grad, params.grad.dtype);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      const StepValues<float> values = in.at(k);
      const StepFactors<float> factors =
          step_factors<float>(row, terms, state.sample.scale, values.s);
      const float y = sum_gradient<float>(row, terms, factors, values, out.at[k]);
      out.at[k] = guided_gradient<float>(terms, factors, y);
    }
    return out;
  }

  template <int kRound, class Io>
  __device__ void products(const Io& io, const State& state, const Quad& g,
                           Quad (&lanes)[1]) const {
    add_products(io, g, kRound == 0 ? g : along(io, state, g), lanes[0]);
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
  __device__ void update(const Io& io, const State& state, const Quad& g) const {
    step_gradient_quad(io, params, state.constants, state.sample, true, &g);
  }

  __device__ void update_sample(int64_t, const State&) const {}
};

bool is_normed(const ReverseStep& params) {
  return params.guidance_norm != GuidanceNorm::kNone && params.g.data != nullptr;
}

bool is_packed(const ReverseStep& params) {
  return are_packed({&params.x, &params.m, &params.s, &params.g, &params.r, &params.z, &params.out},
                    params.channels, params.pixels, params.batch);
}

void run(const Device& device, const Tensor& x, const ReverseStep& params) {
  const bool packed = is_packed(params);
  if (is_normed(params)) {
    launch_per_sample(device, "reverse_step", NormedForward{params}, x, params.batch,
                      params.channels, params.pixels, packed);
  } else {
    launch_per_quad(device, "reverse_step", Forward{params}, params.batch,
                    order_of(params.x, params.channels, params.pixels), packed);
  }
}

void run_backward(const Device& device, const Tensor& x, const ReverseStepBackward& params) {
  const ReverseStep& forward = params.forward;
  const bool packed =
      is_packed(forward) && are_packed({&params.grad, &params.grad_x, &params.grad_m,
                                        &params.grad_s, &params.grad_g, &params.grad_r},
                                       forward.channels, forward.pixels, forward.batch);
  if (is_normed(forward)) {
    launch_per_sample(device, "reverse_step_backward", NormedBackward{params}, x, forward.batch,
                      forward.channels, forward.pixels, packed);
  } else {
    launch_per_quad(device, "reverse_step_backward", Backward{params}, forward.batch,
                    order_of(forward.x, forward.channels, forward.pixels), packed);
  }
}

Tensor reverse_step(const Tensor& x, const MaybeTensor& model_out, const Tensor& coeffs,
                    const MaybeTensor& keys, const MaybeTensor& guidance,
                    const MaybeTensor& reference, const MaybeTensor& noise,
                    const std::string& guidance_norm) {
  return reverse_step_call(x, model_out, coeffs, keys, guidance, reference, noise, guidance_norm,
                           [&](const ReverseStep& params) { run(Device(x), x, params); });
}

void reverse_step_(const Tensor& x, const MaybeTensor& model_out, const Tensor& coeffs,
                   const MaybeTensor& keys, const MaybeTensor& guidance,
                   const MaybeTensor& reference, const MaybeTensor& noise,
                   const std::string& guidance_norm) {
  reverse_step_in_place_call(x, model_out, coeffs, keys, guidance, reference, noise, guidance_norm,
                             [&](const ReverseStep& params) { run(Device(x), x, params); });
}

FourTensors reverse_step_backward(const Tensor& grad, const Tensor& x, const MaybeTensor& model_out,
                                  const Tensor& coeffs, const MaybeTensor& keys,
                                  const MaybeTensor& guidance, const MaybeTensor& reference,
                                  const MaybeTensor& noise, const std::string& guidance_norm) {
  return reverse_step_backward_call(
      grad, x, model_out, coeffs, keys, guidance, reference, noise, guidance_norm,
      [&](const ReverseStepBackward& params) { run_backward(Device(x), x, params); });
}

}  // namespace
}  // namespace coup_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CUDA, m) {
  m.impl("reverse_step", TORCH_BOX(&coup_fast::cuda::reverse_step));
  m.impl("reverse_step_", TORCH_BOX(&coup_fast::cuda::reverse_step_));
  m.impl("reverse_step_backward", TORCH_BOX(&coup_fast::cuda::reverse_step_backward));
}
