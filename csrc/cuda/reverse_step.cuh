// What the kernels of reverse_step share: a step's inputs in registers. Loads of all tensors are
// issued before the first is used; Philox runs in their shadow. Those without a guidance norm are
// in reverse_step.cu, those with one in reverse_step_normed.cu.
#pragma once

#include "calls/tensors.h"
#include "cuda/quads.cuh"
#include "params/reverse_step.h"

namespace coup_fast::cuda {

// With a guidance norm. access: what all tensors of the call allow.
void run_normed(const ReverseStep& params, const Tensor& x, Access access);
void run_normed_backward(const ReverseStepBackward& params, const Tensor& x, Access access);

// Whether the call has neither variance channels nor a reference, which saves their registers.
inline bool is_plain(const ReverseStep& params) {
  return params.s.data == nullptr && params.r.data == nullptr;
}

// The row of a call, and what it leaves to do.
struct StepConstants {
  StepRow row;
  StepTerms terms;
};

// kPlain: see is_plain().
template <bool kPlain>
__device__ __forceinline__ StepConstants step_constants(const ReverseStep& params) {
  const StepRow row = row_at<StepRow>(params.coeffs);
  StepInputs inputs = inputs_of(params);
  if (kPlain) inputs.s = inputs.r = false;
  return StepConstants{row, step_terms(row, inputs)};
}

// For the sum of the terms: all there is, so that the loads need not wait for the row. staged_g:
// the caller holds G already.
template <bool kPlain>
__device__ __forceinline__ StepReads reads_of_call(const StepTerms& terms, bool staged_g) {
  return StepReads{true, true, !kPlain, !staged_g, !kPlain, terms.z};
}

// A step's inputs as loaded, and the noise.
template <int kCount>
struct RawStep {
  RawQuads<kCount> x, m, s, g, r;
  Quads<kCount> z;
};

template <int kCount>
struct StepQuads {
  Quads<kCount> x, m, s, g, r, z;

  __device__ __forceinline__ StepValues<float> at(int q, int k) const {
    return {x.quad[q].at[k], m.quad[q].at[k], s.quad[q].at[k],
            g.quad[q].at[k], r.quad[q].at[k], z.quad[q].at[k]};
  }
};

template <class Io>
__device__ __forceinline__ RawStep<Io::kCount> load_step(const Io& io, const ReverseStep& params,
                                                         const StepReads& reads) {
  RawStep<Io::kCount> raw{};
  if (reads.x) raw.x = io.load_raw(params.x);
  if (reads.m) raw.m = io.load_raw(params.m);
  if (reads.s) raw.s = io.load_raw(params.s);
  if (reads.g) raw.g = io.load_raw(params.g);
  if (reads.r) raw.r = io.load_raw(params.r);
  raw.z = noise_of(io, reads.z, params.z, params.keys);
  return raw;
}

// staged_g: G where the caller holds it already, or null.
template <bool kPlain, class Io>
__device__ __forceinline__ StepQuads<Io::kCount> step_values(const Io& io,
                                                             const ReverseStep& params,
                                                             const RawStep<Io::kCount>& raw,
                                                             const Quads<Io::kCount>* staged_g) {
  StepQuads<Io::kCount> in{};
  in.x = finish_load(io, params.x, raw.x);
  in.m = finish_load(io, params.m, raw.m);
  in.g = staged_g != nullptr ? *staged_g : finish_load(io, params.g, raw.g);
  if (!kPlain) {
    in.s = finish_load(io, params.s, raw.s);
    in.r = finish_load(io, params.r, raw.r);
  }
  in.z = raw.z;
  return in;
}

// x' of some quads; scale: c_i of their sample.
template <class Io>
__device__ __forceinline__ void store_step(const Io& io, const ReverseStep& params,
                                           const StepConstants& constants, float scale,
                                           const StepQuads<Io::kCount>& in) {
  Quads<Io::kCount> out;
  each(io, [&](int q, int k) {
    out.quad[q].at[k] = step_value<float>(constants.row, constants.terms, scale, in.at(q, k));
  });
  io.store(params.out, out);
}

// The gradient of the sum of the terms.
template <class Io>
__device__ __forceinline__ Quads<Io::kCount> sum_gradients(const Io& io,
                                                           const StepConstants& constants,
                                                           float scale,
                                                           const StepQuads<Io::kCount>& in,
                                                           const Quads<Io::kCount>& grad) {
  Quads<Io::kCount> out;
  each(io, [&](int q, int k) {
    const StepValues<float> values = in.at(q, k);
    const StepFactors<float> factors =
        step_factors<float>(constants.row, constants.terms, scale, values.s);
    out.quad[q].at[k] =
        sum_gradient<float>(constants.row, constants.terms, factors, values, grad.quad[q].at[k]);
  });
  return out;
}

// The gradients of all inputs, from that of the sum of the terms.
template <bool kPlain, class Io>
__device__ __forceinline__ void store_gradients(const Io& io, const ReverseStepBackward& params,
                                                const StepConstants& constants,
                                                const GuidanceSample& sample,
                                                const StepQuads<Io::kCount>& in,
                                                const Quads<Io::kCount>& y) {
  Quads<Io::kCount> x, m, s, g, r;
  each(io, [&](int q, int k) {
    const StepValues<float> values = in.at(q, k);
    const StepFactors<float> factors =
        step_factors<float>(constants.row, constants.terms, sample.scale, values.s);
    const StepGradients<float> out = step_gradients<float>(constants.row, constants.terms, sample,
                                                           factors, values, y.quad[q].at[k]);
    x.quad[q].at[k] = out.x;
    m.quad[q].at[k] = out.m;
    s.quad[q].at[k] = out.s;
    g.quad[q].at[k] = out.g;
    r.quad[q].at[k] = out.r;
  });
  io.store(params.grad_x, x);
  io.store(params.grad_m, m);
  io.store(params.grad_g, g);
  if (!kPlain) {
    io.store(params.grad_s, s);
    io.store(params.grad_r, r);
  }
}

}  // namespace coup_fast::cuda
