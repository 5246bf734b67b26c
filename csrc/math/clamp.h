// The clamp that ends every step, and its gradient. Bounds may be infinite.
#pragma once

#include "math/lanes.h"

namespace coup_fast {

// Whether the bounds bound anything.
COUP_FAST_FN bool bounded(float lo, float hi) { return !(lo == -INFINITY && hi == INFINITY); }

// NaN propagates.
template <class F>
COUP_FAST_FN F clamp(F value, float lo, float hi) {
  using L = Lanes<F>;
  value = L::select(L::set(lo) > value, L::set(lo), value);
  return L::select(L::set(hi) < value, L::set(hi), value);
}

// The gradient of clamp(value, lo, hi): it passes where lo <= value <= hi.
template <class F>
COUP_FAST_FN F clamp_gradient(F gradient, F value, float lo, float hi) {
  using L = Lanes<F>;
  gradient = L::select(value >= L::set(lo), gradient, L::set(0.0f));
  return L::select(value <= L::set(hi), gradient, L::set(0.0f));
}

}  // namespace coup_fast
