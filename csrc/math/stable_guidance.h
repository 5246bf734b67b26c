// The stable step of guidance, for the samples of reverse_step. It is ours and not published.
//
// Guidance moves a state by c d(log p)/dx, p the largest softmax. With m the margin, the largest
// logit less log-sum-exp of the others, log p = -log(1 + e^-m) and its gradient is s(-m) grad m,
// s the logistic function. The explicit step takes s(-m) from where it starts and overshoots once
// c |grad m|^2 / 4 > 2. Here grad m is held, and the margin follows its own equation over the whole
// step: dm = q s(-m) for a unit of c, q = |grad m|^2, so that m + e^m grows by c q. With
//   m1 + exp(m1) = m + exp(m) + c q,   D = m1 - m,
// the step is (D / q) grad m, which is the explicit one to first order in c. Times s(-m) that is
//   f(D) = s(-m) (D - c q) + s(m) (exp(D) - 1) = 0,
// whose terms overflow for no m, and where nothing cancels: the root is as exact as its terms.
#pragma once

#include "math/elementary.h"

namespace coup_fast {

// What a sample's guidance is multiplied by, and how that depends on its margin and its gradient.
struct StableGuidance {
  float scale;         // D / q; c s(-m), its limit, where q is 0
  float turn;          // 2 (1 - c q s(-m1) / D): -2 d log(D / q) / d log q
  float margin_slope;  // d(D / q) / dm
};

constexpr float kMostGrowth = 0x1p126f;  // of e^m: its logarithm stays within exp_minus_1

// c: coefficient of the gradient; square: q; margin: m.
COUP_FAST_FN StableGuidance stable_guidance(float c, float square, float margin) {
  const bool sure = margin > 0.0f;
  const float ratio = exp<float>(sure ? -margin : margin);
  const float larger = 1.0f / (1.0f + ratio);
  const float smaller = ratio * larger;
  const float doubt = sure ? smaller : larger;  // s(-m)
  const float trust = sure ? larger : smaller;  // s(m)
  if (square == 0.0f) return StableGuidance{c * doubt, 0.0f, -c * doubt * trust};

  float pull = c * square;
  if (pull > kMostGrowth) pull = kMostGrowth;
  // f is convex and grows: from above its root, Newton's iterates fall until rounding ends it. The
  // explicit step is above, and so is log(1 + c q e^-m), where the exponential has all of c q.
  float change = doubt * pull;
  if (change > 0.0f) {
    float growth = pull * (sure ? ratio : exp<float>(-margin));
    if (growth > kMostGrowth) growth = kMostGrowth;
    const float bound = log_1p(growth);
    if (bound < change) change = bound;
  }
  float grown, slope;
  for (;;) {
    grown = trust * exp_minus_1<float>(change);
    slope = doubt + (trust + grown);  // f'
    const float next = change - Lanes<float>::fma(doubt, change - pull, grown) / slope;
    if (!(next < change)) break;
    change = next;
  }
  const float turn = change == 0.0f ? 0.0f : 2.0f * (1.0f - pull * doubt / (slope * change));
  return StableGuidance{change / square, turn, -grown / slope / square};
}

}  // namespace coup_fast
