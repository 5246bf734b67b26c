// What the kernels of reverse_step and perturb share: the noise of a quad, and a step's inputs in
// registers. Loads of all tensors are issued before the first is used; Philox runs in their shadow.
#pragma once

#include "cuda/packed.cuh"
#include "math/normal.h"
#include "reverse_step.h"

namespace coup_fast::cuda {

// The normals of the quad's Philox block.
__device__ __forceinline__ Quad noise_at(const Place& place, const int64_t* keys) {
  const NoiseKey key{static_cast<uint64_t>(keys[2 * place.sample]),
                     static_cast<uint64_t>(keys[2 * place.sample + 1])};
  const Normals<float> normals = normal_block(key, static_cast<uint64_t>(place.first / kQuad));
  return Quad{{normals.value[0], normals.value[1], normals.value[2], normals.value[3]}};
}

// z, given or drawn. wanted is uniform over the grid.
template <class Io>
__device__ __forceinline__ Quad noise_of(const Io& io, bool wanted, const View& given,
                                         const int64_t* keys) {
  if (!wanted) return Quad{};
  return given.data != nullptr ? io.load(given) : noise_at(io.place, keys);
}

// The row of a call, what it leaves to do, and which inputs that reads.
struct StepConstants {
  StepRow row;
  StepTerms terms;
};

__device__ __forceinline__ StepConstants step_constants(const ReverseStep& params) {
  const StepRow row = step_row(params.coeffs);
  return StepConstants{row, step_terms(row, inputs_of(params))};
}

struct StepReads {
  bool x, m, s, g, r, z;
};

// For the sum of the terms.
__device__ __forceinline__ StepReads reads_of_sum(const StepTerms& terms) {
  return StepReads{terms.x || (terms.x0 && terms.x0_x),
                   terms.m || (terms.x0 && terms.x0_m),
                   terms.learned,
                   terms.g,
                   terms.r,
                   terms.z};
}

// For the gradients: all that a clamp's mask, the variance or the guidance's norm depends on.
__device__ __forceinline__ StepReads reads_of_gradient(const StepTerms& terms, bool normed) {
  const StepReads sum = reads_of_sum(terms);
  const bool all = terms.out_clamp || terms.learned;
  const bool x0 = terms.x0 && terms.x0_clamp;
  return StepReads{sum.x && (all || (x0 && terms.x0_x)),
                   sum.m && (all || (x0 && terms.x0_m)),
                   sum.s,
                   sum.g && (all || normed),
                   sum.r && all,
                   gradient_needs_noise(terms)};
}

struct StepQuads {
  Quad x, m, s, g, r, z;

  __device__ __forceinline__ StepValues<float> at(int k) const {
    return {x.at[k], m.at[k], s.at[k], g.at[k], r.at[k], z.at[k]};
  }
};

// staged_g: G where the caller holds it already, or null.
template <class Io>
__device__ __forceinline__ StepQuads load_step(const Io& io, const ReverseStep& params,
                                               const StepReads& reads, const Quad* staged_g) {
  const RawQuad none{};
  const RawQuad x = reads.x ? io.load_raw(params.x) : none;
  const RawQuad m = reads.m ? io.load_raw(params.m) : none;
  const RawQuad s = reads.s ? io.load_raw(params.s) : none;
  const RawQuad g = reads.g && staged_g == nullptr ? io.load_raw(params.g) : none;
  const RawQuad r = reads.r ? io.load_raw(params.r) : none;
  StepQuads quads;
  quads.z = noise_of(io, reads.z, params.z, params.keys);
  quads.x = to_float(x, params.x.dtype);
  quads.m = to_float(m, params.m.dtype);
  quads.s = to_float(s, params.s.dtype);
  quads.g = staged_g == nullptr ? to_float(g, params.g.dtype) : *staged_g;
  quads.r = to_float(r, params.r.dtype);
  return quads;
}

// x' of a quad; scale: c_i of its sample.
template <class Io>
__device__ __forceinline__ void step_quad(const Io& io, const ReverseStep& params,
                                          const StepConstants& constants, float scale,
                                          const Quad* staged_g) {
  const StepQuads in = load_step(io, params, reads_of_sum(constants.terms), staged_g);
  Quad out;
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    out.at[k] = step_value<float>(constants.row, constants.terms, scale, in.at(k));
  }
  io.store(params.out, out);
}

// The gradients of a quad.
template <class Io>
__device__ __forceinline__ void step_gradient_quad(const Io& io, const ReverseStepBackward& params,
                                                   const StepConstants& constants,
                                                   const GuidanceSample& sample, bool normed,
                                                   const Quad* staged_g) {
  const StepReads reads = reads_of_gradient(constants.terms, normed);
  const RawQuad raw_grad = io.load_raw(params.grad);
  const StepQuads in = load_step(io, params.forward, reads, staged_g);
  const Quad grad = to_float(raw_grad, params.grad.dtype);
  Quad x, m, s, g, r;
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    const StepValues<float> values = in.at(k);
    const StepFactors<float> factors =
        step_factors<float>(constants.row, constants.terms, sample.scale, values.s);
    const float y =
        sum_gradient<float>(constants.row, constants.terms, factors, values, grad.at[k]);
    const StepGradients<float> out =
        step_gradients<float>(constants.row, constants.terms, sample, factors, values, y);
    x.at[k] = out.x;
    m.at[k] = out.m;
    s.at[k] = out.s;
    g.at[k] = out.g;
    r.at[k] = out.r;
  }
  io.store(params.grad_x, x);
  io.store(params.grad_m, m);
  io.store(params.grad_s, s);
  io.store(params.grad_g, g);
  io.store(params.grad_r, r);
}

}  // namespace coup_fast::cuda
