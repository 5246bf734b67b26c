// The adaptive step of ADP (Yoon, Hwang, Lee, ICML 2021, arXiv 2106.06041, section 3.2): the step
// size follows from how much the score h = S(x) changes along itself, h' = S(x + delta h):
//   1 - gamma = <h, h - h'> / <h, h>,   raw = numerator / (1 - gamma),
//   alpha = clip(raw, alpha_min, alpha_max),   alive' = alive and alpha > tau,
//   x' = clamp(scale (x + alpha h) + bias, lo, hi) where alive', x bit for bit where not.
// A NaN alpha (h = 0, for one) stops its sample. A row holds the eight constants in this order.
#pragma once

#include "math/clamp.h"
#include "math/rows.h"

namespace coup_fast {

struct AdaptiveRow {
  float numerator, alpha_min, alpha_max, tau, scale, bias, lo, hi;
};
constexpr int kAdaptiveColumns = 8;
static_assert(sizeof(AdaptiveRow) == kAdaptiveColumns * sizeof(float), "a row is its columns");

// What the elements of a sample need to know about it.
struct AdaptiveSample {
  float square;           // <h, h>
  float one_minus_gamma;  // <h, change> / <h, h>, change = h - h'
  float raw;              // the step size before clipping
  float alpha;
  bool alive;    // after this step
  bool clipped;  // alpha carries no gradient
};

COUP_FAST_FN AdaptiveSample adaptive_sample(const AdaptiveRow& row, bool alive, float square,
                                            float change) {
  AdaptiveSample sample{};
  sample.square = square;
  sample.one_minus_gamma = change / square;
  sample.raw = row.numerator / sample.one_minus_gamma;
  sample.clipped = !(sample.raw >= row.alpha_min && sample.raw <= row.alpha_max);
  const float raised = sample.raw < row.alpha_min ? row.alpha_min : sample.raw;
  sample.alpha = raised > row.alpha_max ? row.alpha_max : raised;
  sample.alive = alive && sample.alpha > row.tau;
  return sample;
}

// scale (x + alpha h) + bias: x' of a living sample before its clamp.
template <class F>
COUP_FAST_FN F adaptive_unclamped(const AdaptiveRow& row, float alpha, F x, F h) {
  using L = Lanes<F>;
  const F moved = L::fma(L::set(alpha), h, x);
  return L::fma(L::set(row.scale), moved, L::set(row.bias));
}

// x' of a living sample. NaN propagates.
template <class F>
COUP_FAST_FN F adaptive_update(const AdaptiveRow& row, float alpha, F x, F h) {
  return clamp<F>(adaptive_unclamped<F>(row, alpha, x, h), row.lo, row.hi);
}

// Backward, for living samples. With y the gradient of x', masked by the clamp and scaled:
//   gx = y,   gh = alpha y + k (h + change - 2 (1 - gamma) h),   gh' = -k h,
//   k = d(loss)/d(alpha) * d(alpha)/d(1-gamma) / <h, h>, d(loss)/d(alpha) = <y, h>; 0 if clipped.
template <class F>
COUP_FAST_FN F adaptive_masked_gradient(const AdaptiveRow& row, float alpha, F x, F h, F grad) {
  const F result = adaptive_unclamped<F>(row, alpha, x, h);
  return Lanes<F>::set(row.scale) * clamp_gradient<F>(grad, result, row.lo, row.hi);
}

COUP_FAST_FN float adaptive_alpha_slope(const AdaptiveSample& sample, float dot) {
  if (sample.clipped) return 0.0f;
  return -dot * (sample.raw / sample.one_minus_gamma) / sample.square;
}

template <class F>
COUP_FAST_FN F adaptive_gradient_h(const AdaptiveSample& sample, float slope, F masked, F h,
                                   F h_ahead) {
  using L = Lanes<F>;
  const F change = h - h_ahead;
  const F turn = L::fma(L::set(1.0f - 2.0f * sample.one_minus_gamma), h, change);
  return L::fma(L::set(slope), turn, L::set(sample.alpha) * masked);
}

template <class F>
COUP_FAST_FN F adaptive_gradient_h_ahead(float slope, F h) {
  return Lanes<F>::set(-slope) * h;
}

}  // namespace coup_fast
