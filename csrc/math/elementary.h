// log and exp in float32 with explicit fused multiply-adds: the same bits wherever they run.
// Coefficients are minimax fits in relative error, rounded to float32 one after the other from the
// lowest order, each time refitting the rest.
#pragma once

#include "math/lanes.h"

namespace coup_fast {

constexpr float kRoundToInt = 0x1.8p23f;     // adding it leaves an integer in the low mantissa bits
constexpr float kLn2Short = 0x1.62e4p-1f;    // 16 bits of ln 2: exact times a small integer
constexpr float kLn2Rest = 0x1.7f7d1cp-20f;  // ln 2 - kLn2Short
constexpr float kLog2E = 0x1.715476p0f;

template <class F>
COUP_FAST_FN F horner_step(F value, F argument, float coefficient) {
  return Lanes<F>::fma(value, argument, Lanes<F>::set(coefficient));
}

// ln(value) for positive normal numbers, within 0.9 ulp. value = 2^k m with m in [2/3, 4/3), and
// ln m = f - f^2/2 + f^3 P(f), f = m - 1 exactly, which keeps its precision up to value = 1. P is
// evaluated by pairs: half as deep as Horner's rule.
template <class F>
COUP_FAST_FN F log_positive(F value) {
  using L = Lanes<F>;
  using U = typename L::U;
  const U shifted = L::bits(value) + L::set_bits(0x3f800000u - 0x3f2aaaabu);
  const F k = L::from_int((shifted >> 23) - L::set_bits(127u));
  const F m = L::from_bits((shifted & L::set_bits(0x007fffffu)) + L::set_bits(0x3f2aaaabu));
  const F f = m - L::set(1.0f);
  const F f2 = f * f;
  const F p01 = horner_step(L::set(-0x1.fffefap-3f), f, 0x1.555506p-2f);
  const F p23 = horner_step(L::set(-0x1.559c30p-3f), f, 0x1.99d05cp-3f);
  const F p45 = horner_step(L::set(-0x1.f33c0cp-4f), f, 0x1.1ed452p-3f);
  const F p67 = horner_step(L::set(-0x1.07ab64p-3f), f, 0x1.1e72a0p-3f);
  const F p = L::fma(L::fma(p67, f2, p45), f2 * f2, L::fma(p23, f2, p01));
  const F whole = k * L::set(kLn2Short);  // exact
  const F sum = whole + f;
  const F lost = f - (sum - whole);  // exact: what the sum lost
  const F square = L::fma(f * L::set(-0.5f), f, k * L::set(kLn2Rest));
  return sum + L::fma(p, f2 * f, lost + square);
}

// log(1 + value) for value >= 0, within 1.5 ulp: log(u) + (value - (u - 1)) / u for u = 1 + value
// rounded.
COUP_FAST_FN float log_1p(float value) {
  const float u = 1.0f + value;
  return log_positive<float>(u) + (value - (u - 1.0f)) / u;
}

// value = n ln 2 + r
template <class F>
struct ReducedExponent {
  typename Lanes<F>::U power;  // n in the place of a float's exponent
  F grown;                     // exp(r) - 1 = r + r^2 Q(r)
};

template <class F>
COUP_FAST_FN ReducedExponent<F> reduced_exponent(F value) {
  using L = Lanes<F>;
  const F shifted = L::fma(value, L::set(kLog2E), L::set(kRoundToInt));
  const F n = shifted - L::set(kRoundToInt);
  F r = L::fma(n, L::set(-kLn2Short), value);
  r = L::fma(n, L::set(-kLn2Rest), r);
  F q = L::set(0x1.6a4d66p-10f);
  q = horner_step(q, r, 0x1.12398ep-7f);
  q = horner_step(q, r, 0x1.5558b0p-5f);
  q = horner_step(q, r, 0x1.555492p-3f);
  q = horner_step(q, r, 0x1.fffffcp-2f);
  return ReducedExponent<F>{L::bits(shifted) << 23, L::fma(r * r, q, r)};
}

// exp(value), within 1.1 ulp; 0 below the smallest normal result, NaN for NaN.
template <class F>
COUP_FAST_FN F exp(F value) {
  using L = Lanes<F>;
  const ReducedExponent<F> parts = reduced_exponent<F>(value);
  F result = L::from_bits(L::bits(parts.grown + L::set(1.0f)) + parts.power);
  result = L::select(value < L::set(-87.3365f), L::set(0.0f), result);
  result = L::select(value > L::set(88.7228f), L::from_bits(L::set_bits(0x7f800000u)), result);
  return L::select(value == value, result, value);
}

// exp(value) - 1 for values up to 88, within 1.5 ulp; NaN for NaN. 2^n (exp(r) - 1) + (2^n - 1).
template <class F>
COUP_FAST_FN F exp_minus_1(F value) {
  using L = Lanes<F>;
  const F one = L::set(1.0f);
  const ReducedExponent<F> parts = reduced_exponent<F>(value);
  const F power = L::from_bits(L::bits(one) + parts.power);
  F result = L::fma(parts.grown, power, power - one);
  result = L::select(value < L::set(-17.5f), L::set(-1.0f), result);
  return L::select(value == value, result, value);
}

}  // namespace coup_fast
