// The pixel map with forward diffusion that starts a run, and its gradient:
//   out_scale clamp(scale u + bias + std z + sign_std sign(z), lo, hi) + out_bias
// A row holds the eight constants in the order of PerturbRow.
#pragma once

#include "math/clamp.h"
#include "math/rows.h"

namespace coup_fast {

struct PerturbRow {
  float scale, bias, std, sign_std, lo, hi, out_scale, out_bias;
};
constexpr int kPerturbColumns = 8;
static_assert(sizeof(PerturbRow) == kPerturbColumns * sizeof(float), "a row is its columns");

COUP_FAST_FN bool perturb_is_noisy(const PerturbRow& row) {
  return row.std != 0.0f || row.sign_std != 0.0f;
}

// Before the clamp. noisy: the row is, and there is noise. sign(z) is 1 for z = 0.
template <class F>
COUP_FAST_FN F perturb_sum(const PerturbRow& row, bool noisy, F u, F z) {
  using L = Lanes<F>;
  F sum = L::set(row.bias);
  if (row.scale != 0.0f) sum = L::fma(L::set(row.scale), u, sum);
  if (noisy && row.std != 0.0f) sum = L::fma(L::set(row.std), z, sum);
  if (noisy && row.sign_std != 0.0f) {
    sum = sum + L::select(z < L::set(0.0f), L::set(-row.sign_std), L::set(row.sign_std));
  }
  return sum;
}

template <class F>
COUP_FAST_FN F perturb_value(const PerturbRow& row, bool noisy, F u, F z) {
  using L = Lanes<F>;
  F sum = perturb_sum<F>(row, noisy, u, z);
  if (bounded(row.lo, row.hi)) sum = clamp<F>(sum, row.lo, row.hi);
  return L::fma(L::set(row.out_scale), sum, L::set(row.out_bias));
}

template <class F>
COUP_FAST_FN F perturb_gradient(const PerturbRow& row, bool noisy, F u, F z, F gradient) {
  using L = Lanes<F>;
  const F y = L::set(row.out_scale) * gradient * L::set(row.scale);
  if (!bounded(row.lo, row.hi)) return y;
  return clamp_gradient<F>(y, perturb_sum<F>(row, noisy, u, z), row.lo, row.hi);
}

}  // namespace coup_fast
