// The one step that every purification method is a sequence of, and its gradient (docs of the
// coefficient table: coup_fast/plan/columns.py).
//
//   x0  = clamp(p x + q m, x0_lo, x0_hi)
//   sum = u x0 + v x + w m + c_i G + e r + d z
//   x'  = out_scale clamp(sum, out_lo, out_hi) + out_bias
//
// With learned variance V = exp(clip(log V)), log V = (s+1)/2 log_var_hi + (1-s)/2 log_var_lo, the
// factors v, c_i, e, d become v + x_var V, c_i V, e V, sqrt(d^2 V + z_var^2 V^2).
// The sum is one chain of fused multiply-adds in the order above, from +0. A term whose coefficient
// in the row is exactly 0, or whose input is absent, contributes nothing, whatever its input.
#pragma once

#include "math/clamp.h"
#include "math/elementary.h"
#include "math/rows.h"
#include "math/stable_guidance.h"

namespace coup_fast {

// A row of the coefficient table; the order is that of its columns in memory.
struct StepRow {
  float p, q, x0_lo, x0_hi;                   // x0 and its bounds
  float u, v, w, c, e, d;                     // coefficients of x0, x, m, G, r, z
  float out_lo, out_hi, out_scale, out_bias;  // bounds and map of the result
  float g_max;                                // largest guidance norm, if clipped
  float log_var_lo, log_var_hi;               // log of beta-tilde and beta
  float x_var, z_var;                         // factors of V in those of x and z
};
constexpr int kStepColumns = 19;
static_assert(sizeof(StepRow) == kStepColumns * sizeof(float), "a row is its columns");

enum class GuidanceNorm : int32_t { kNone = 0, kNormalised = 1, kClipped = 2, kStable = 3 };

// Which inputs a call has.
struct StepInputs {
  bool m, s, g, r, z;  // s: variance channels; z: keys or noise
};

// What a row and the inputs leave to do; the same for every element of a call.
struct StepTerms {
  bool x0, x0_x, x0_m, x, m, g, r, z;  // terms that contribute
  bool x0_clamp, out_clamp;            // bounds that are not both infinite
  bool learned;                        // some of them depend on the learned variance
};

// The terms of most rows: x0 and x, or x and m, and of G, r and z those that are named. Bounds are
// applied even where they are infinite, which changes nothing.
COUP_FAST_FN constexpr StepTerms terms_of(bool x0, bool g, bool r, bool z) {
  StepTerms terms{};
  terms.x0 = terms.x0_x = terms.x0_m = x0;
  terms.x = true;
  terms.m = !x0;
  terms.g = g;
  terms.r = r;
  terms.z = z;
  terms.x0_clamp = terms.out_clamp = true;
  return terms;
}

COUP_FAST_FN StepTerms step_terms(const StepRow& row, const StepInputs& inputs) {
  StepTerms terms{};
  terms.x0 = row.u != 0.0f;
  terms.x0_x = row.p != 0.0f;
  terms.x0_m = row.q != 0.0f && inputs.m;
  terms.x = row.v != 0.0f || (inputs.s && row.x_var != 0.0f);
  terms.m = row.w != 0.0f && inputs.m;
  terms.g = row.c != 0.0f && inputs.g;
  terms.r = row.e != 0.0f && inputs.r;
  terms.z = (row.d != 0.0f || (inputs.s && row.z_var != 0.0f)) && inputs.z;
  terms.learned = inputs.s && (row.x_var != 0.0f || terms.g || terms.r || terms.z);
  terms.x0_clamp = bounded(row.x0_lo, row.x0_hi);
  terms.out_clamp = bounded(row.out_lo, row.out_hi);
  return terms;
}

// The terms of most steps: noise, x, m, and G if the call has it, without bounds on the sum.
COUP_FAST_FN constexpr StepTerms usual_terms(bool g) {
  StepTerms terms = terms_of(false, g, false, true);
  terms.x0_clamp = terms.out_clamp = false;
  return terms;
}

// Whether a step without learned variance has just those; x0's bounds don't count without x0.
COUP_FAST_FN constexpr bool is_usual(const StepTerms& terms) {
  return !terms.x0 && terms.x && terms.m && !terms.r && terms.z && !terms.out_clamp;
}

// Which inputs an element needs.
struct StepReads {
  bool x, m, s, g, r, z;
};

COUP_FAST_FN constexpr StepReads reads_of_sum(const StepTerms& terms) {
  return StepReads{terms.x || (terms.x0 && terms.x0_x),
                   terms.m || (terms.x0 && terms.x0_m),
                   terms.learned,
                   terms.g,
                   terms.r,
                   terms.z};
}

// c_i: the row's c scaled by the norm of the sample's guidance, 0 if that is 0; or that of
// math/stable_guidance.h, for which alone `margin` matters.
COUP_FAST_FN float guidance_scale(const StepRow& row, GuidanceNorm norm, float square,
                                  float margin) {
  if (norm == GuidanceNorm::kNone) return row.c;
  if (norm == GuidanceNorm::kStable) return stable_guidance(row.c, square, margin).scale;
  if (square == 0.0f) return 0.0f;
  const float length = Lanes<float>::sqrt(square);
  if (norm == GuidanceNorm::kNormalised) return row.c / length;
  return length <= row.g_max ? row.c : row.c * (row.g_max / length);
}

// The inputs of some elements. What the terms leave out is not read.
template <class F>
struct StepValues {
  F x, m, s, g, r, z;
};

// The coefficients of some elements: the row's, or with learned variance their own.
template <class F>
struct StepFactors {
  F x, g, r, z;
  F variance;
};

template <class F>
COUP_FAST_FN F log_variance(const StepRow& row, F s) {
  using L = Lanes<F>;
  const F half = L::set(0.5f) * s;
  return L::fma(half + L::set(0.5f), L::set(row.log_var_hi),
                (L::set(0.5f) - half) * L::set(row.log_var_lo));
}

template <class F>
COUP_FAST_FN StepFactors<F> step_factors(const StepRow& row, const StepTerms& terms, float scale,
                                         F s) {
  using L = Lanes<F>;
  StepFactors<F> factors{L::set(row.v), L::set(scale), L::set(row.e), L::set(row.d), L::set(1.0f)};
  if (!terms.learned) return factors;
  const F variance = exp<F>(clamp<F>(log_variance<F>(row, s), row.log_var_lo, row.log_var_hi));
  if (row.x_var != 0.0f) factors.x = L::fma(L::set(row.x_var), variance, factors.x);
  factors.g = factors.g * variance;
  factors.r = factors.r * variance;
  F square = L::set(0.0f);
  if (row.z_var != 0.0f) square = (L::set(row.z_var) * variance) * (L::set(row.z_var) * variance);
  if (row.d != 0.0f) square = L::fma(L::set(row.d * row.d), variance, square);
  factors.z = L::sqrt(square);
  factors.variance = variance;
  return factors;
}

// p x + q m
template <class F>
COUP_FAST_FN F unclamped_x0(const StepRow& row, const StepTerms& terms, const StepValues<F>& in) {
  using L = Lanes<F>;
  F x0 = L::set(0.0f);
  if (terms.x0_x) x0 = L::fma(L::set(row.p), in.x, x0);
  if (terms.x0_m) x0 = L::fma(L::set(row.q), in.m, x0);
  return x0;
}

// The sum of the terms, before its clamp.
template <class F>
COUP_FAST_FN F step_sum(const StepRow& row, const StepTerms& terms, const StepFactors<F>& factors,
                        const StepValues<F>& in) {
  using L = Lanes<F>;
  F sum = L::set(0.0f);
  if (terms.x0) {
    F x0 = unclamped_x0<F>(row, terms, in);
    if (terms.x0_clamp) x0 = clamp<F>(x0, row.x0_lo, row.x0_hi);
    sum = L::fma(L::set(row.u), x0, sum);
  }
  if (terms.x) sum = L::fma(factors.x, in.x, sum);
  if (terms.m) sum = L::fma(L::set(row.w), in.m, sum);
  if (terms.g) sum = L::fma(factors.g, in.g, sum);
  if (terms.r) sum = L::fma(factors.r, in.r, sum);
  if (terms.z) sum = L::fma(factors.z, in.z, sum);
  return sum;
}

// x' of some elements. scale: c_i of their sample.
template <class F>
COUP_FAST_FN F step_value(const StepRow& row, const StepTerms& terms, float scale,
                          const StepValues<F>& in) {
  using L = Lanes<F>;
  F sum = step_sum<F>(row, terms, step_factors<F>(row, terms, scale, in.s), in);
  if (terms.out_clamp) sum = clamp<F>(sum, row.out_lo, row.out_hi);
  return L::fma(L::set(row.out_scale), sum, L::set(row.out_bias));
}

// --- gradient ------------------------------------------------------------------------------------

// For the gradients: all that a clamp's mask, the variance or the guidance's norm depends on.
COUP_FAST_FN constexpr StepReads reads_of_gradient(const StepTerms& terms, bool normed) {
  const StepReads sum = reads_of_sum(terms);
  const bool all = terms.out_clamp || terms.learned;
  const bool x0 = terms.x0 && terms.x0_clamp;
  return StepReads{(all && sum.x) || (x0 && terms.x0_x),
                   (all && sum.m) || (x0 && terms.x0_m),
                   terms.learned,
                   terms.g && (all || normed),
                   terms.r && all,
                   terms.z && all};
}

// For <G, a>, see guidance_sample: G, and what a depends on.
COUP_FAST_FN constexpr StepReads reads_of_dot(const StepTerms& terms) {
  StepReads reads{};
  if (terms.out_clamp) reads = reads_of_sum(terms);
  reads.s = terms.learned;
  reads.g = terms.g;
  return reads;
}

// y: the gradient of the sum, given that of x'.
template <class F>
COUP_FAST_FN F sum_gradient(const StepRow& row, const StepTerms& terms,
                            const StepFactors<F>& factors, const StepValues<F>& in, F gradient) {
  const F y = Lanes<F>::set(row.out_scale) * gradient;
  if (!terms.out_clamp) return y;
  return clamp_gradient<F>(y, step_sum<F>(row, terms, factors, in), row.out_lo, row.out_hi);
}

// What the elements of a sample need to know about its guidance: c_i, and how much of G is turned
// away where c_i depends on it, t <G, a> / <G, G> with t = -2 d log c_i / d log <G, G> (a: the
// gradient of c_i G divided by c_i, see guided_gradient). And the gradient of the sample's margin.
struct GuidanceSample {
  float scale;
  float turn;
  float grad_margin;
};

COUP_FAST_FN GuidanceSample guidance_sample(const StepRow& row, GuidanceNorm norm, float square,
                                            float dot, float margin) {
  if (norm == GuidanceNorm::kStable) {
    const StableGuidance stable = stable_guidance(row.c, square, margin);
    const float turn = stable.turn == 0.0f ? 0.0f : stable.turn * (dot / square);
    return GuidanceSample{stable.scale, turn, row.c == 0.0f ? 0.0f : stable.margin_slope * dot};
  }
  const float scale = guidance_scale(row, norm, square, margin);
  const bool fixed = norm == GuidanceNorm::kNone || square == 0.0f ||
                     (norm == GuidanceNorm::kClipped && Lanes<float>::sqrt(square) <= row.g_max);
  return GuidanceSample{scale, fixed ? 0.0f : dot / square, 0.0f};
}

// a = y, or V y with learned variance
template <class F>
COUP_FAST_FN F guided_gradient(const StepTerms& terms, const StepFactors<F>& factors, F y) {
  return terms.learned ? factors.variance * y : y;
}

template <class F>
struct StepGradients {
  F x, m, s, g, r;
};

// The gradients of all inputs of some elements; 0 where a term does not contribute.
//   G: c_i (a - t G <G, a> / <G, G>), the second part only where c_i depends on G
//   s: y (x_var V x + c_i V G + e V r + z dd/dlogV) dlogV/ds
template <class F>
COUP_FAST_FN StepGradients<F> step_gradients(const StepRow& row, const StepTerms& terms,
                                             const GuidanceSample& sample,
                                             const StepFactors<F>& factors, const StepValues<F>& in,
                                             F y) {
  using L = Lanes<F>;
  const F zero = L::set(0.0f);
  StepGradients<F> out{zero, zero, zero, zero, zero};
  if (terms.x) out.x = factors.x * y;
  if (terms.m) out.m = L::set(row.w) * y;
  if (terms.r) out.r = factors.r * y;
  if (terms.x0) {
    F part = L::set(row.u) * y;
    if (terms.x0_clamp) {
      part = clamp_gradient<F>(part, unclamped_x0<F>(row, terms, in), row.x0_lo, row.x0_hi);
    }
    if (terms.x0_x) out.x = L::fma(L::set(row.p), part, out.x);
    if (terms.x0_m) out.m = L::fma(L::set(row.q), part, out.m);
  }
  if (terms.g) {
    F along = guided_gradient<F>(terms, factors, y);
    if (sample.turn != 0.0f) along = L::fma(L::set(-sample.turn), in.g, along);
    out.g = L::set(sample.scale) * along;
  }
  if (terms.learned) {
    F slope = zero;  // d(sum) / d(log V)
    if (row.x_var != 0.0f) slope = L::fma(L::set(row.x_var) * factors.variance, in.x, slope);
    if (terms.g) slope = L::fma(factors.g, in.g, slope);
    if (terms.r) slope = L::fma(factors.r, in.r, slope);
    if (terms.z) {
      F doubled = factors.z * factors.z;  // d^2 V + z_var^2 V^2, the second part twice
      if (row.z_var != 0.0f) {
        const F extra = L::set(row.z_var) * factors.variance;
        doubled = L::fma(extra, extra, doubled);
      }
      const F part = L::set(0.5f) * doubled / factors.z;
      slope = L::fma(L::select(factors.z > zero, part, zero), in.z, slope);
    }
    const F range = L::set(0.5f * (row.log_var_hi - row.log_var_lo));
    out.s = clamp_gradient<F>(range * slope * y, log_variance<F>(row, in.s), row.log_var_lo,
                              row.log_var_hi);
  }
  return out;
}

}  // namespace coup_fast
