// Words to uniforms to standard normals. Box-Muller fits a counter generator: two words make two
// normals, always, with no rejection, so element i depends on its own block alone.
// Box and Muller, "A note on the generation of random normal deviates" (1958).
//
// With U0, U1 the uniforms of a pair of words: z0 = r cos(2 pi U1), z1 = r sin(2 pi U1),
// r = sqrt(-2 ln U0), within 2 ulp. In three stages, which vector code runs one after the other
// over many pairs: each is a short chain of dependent operations. Coefficients as in elementary.h.
#pragma once

#include "math/elementary.h"
#include "math/philox.h"

namespace coup_fast {

// float32(word) 2^-32 + 2^-33, in (0, 1]: never 0, so that its logarithm is finite.
template <class F>
COUP_FAST_FN F uniform(typename Lanes<F>::U word) {
  using L = Lanes<F>;
  return L::mad(L::from_unsigned(word), L::set(0x1p-32f), L::set(0x1p-33f));
}

// The uniforms, reduced: U0 = 2^k (1 - h/2) with h in [-2/3, 2/3], and 4 U1 = quadrant + f with
// f in [-1/2, 1/2], all exactly.
template <class F>
struct Reduced {
  F exponent;  // 2^23 k
  F h;
  F f;
  typename Lanes<F>::U quadrant;  // its lowest two bits; the others hold anything
};

template <class F>
COUP_FAST_FN Reduced<F> reduced(typename Lanes<F>::U word0, typename Lanes<F>::U word1) {
  using L = Lanes<F>;
  using U = typename L::U;
  constexpr uint32_t kTwoThirds = 0x3f2aaaabu;
  const U bits = L::bits(uniform<F>(word0));
  const U exponent = (bits - L::set_bits(kTwoThirds)) & L::set_bits(0xff800000u);
  const F h = L::fma(L::from_bits(bits - exponent), L::set(-2.0f), L::set(2.0f));
  const F turns = uniform<F>(word1);
  const F shifted = L::fma(turns, L::set(4.0f), L::set(kRoundToInt));
  const F f = L::fma(turns, L::set(4.0f), L::set(kRoundToInt) - shifted);
  return Reduced<F>{L::from_int(exponent), h, f, L::bits(shifted)};
}

// r^2 = -2 ln U0 = sum + rest to about 28 bits, and root = sqrt of it, twice rounded.
template <class F>
struct Square {
  F sum, rest, root;
};

// -2 ln(1 - h/2) = h + h^2 Q(h), which keeps its precision up to U0 = 1.
template <class F>
COUP_FAST_FN Square<F> squared_radius(F exponent, F h) {
  using L = Lanes<F>;
  const F minus_two_ln2 = L::set(-0x1.62e430p-23f);  // as 2^23 k wants it
  const F its_rest = L::set(0x1.05c610p-51f);
  const F h2 = h * h;
  const F q01 = horner_step(L::set(0x1.5553dep-4f), h, 0x1.ffffeep-3f);
  const F q23 = horner_step(L::set(0x1.9a319ap-7f), h, 0x1.00110ap-5f);
  const F q45 = horner_step(L::set(0x1.19df74p-9f), h, 0x1.507e30p-8f);
  const F q67 = horner_step(L::set(0x1.32f052p-11f), h, 0x1.3a27b0p-10f);
  const F q = L::fma(L::fma(L::fma(q67, h2, q45), h2, q23), h2, q01);
  const F sum = L::fma(exponent, minus_two_ln2, h);
  const F lost = L::fma(exponent, minus_two_ln2, -sum) + h;  // exact: what the sum lost
  const F rest = L::fma(h2, q, L::fma(exponent, its_rest, lost));
  return Square<F>{sum, rest, L::sqrt_in_range(sum + rest)};
}

// The normals. r = root + low: the root is corrected by its residual over twice the root, for which
// a reciprocal of four bits will do.
template <class F>
COUP_FAST_FN void from_polar(const Square<F>& square, F f, typename Lanes<F>::U quadrant, F& z0,
                             F& z1) {
  using L = Lanes<F>;
  using U = typename L::U;
  const F root = square.root;
  const F residual = L::fma(-root, root, square.sum) + square.rest;
  const F half_reciprocal = L::from_bits(L::set_bits(0x7e7311c3u) - L::bits(root));
  const F low = residual * half_reciprocal;
  const F f2 = f * f;
  F c = L::set(0x1.d4f632p-11f);  // cos(pi/2 f) = 1 + f^2 c
  c = horner_step(c, f2, -0x1.55b2b4p-6f);
  c = horner_step(c, f2, 0x1.03c1b0p-2f);
  c = horner_step(c, f2, -0x1.3bd3ccp0f);
  const F along = root + L::fma(root, f2 * c, low);
  F s = L::set(-0x1.2da132p-8f);  // sin(pi/2 f) = f (half_pi + s)
  s = horner_step(s, f2, 0x1.465ee8p-4f);
  s = horner_step(s, f2, -0x1.4abbbap-1f);
  s = horner_step(s, f2, -0x1.a0f374p-25f);
  const F half_pi = L::set(0x1.921fb6p0f);
  const F lever = root * f;  // r f = lever + lever_low
  const F lever_low = L::fma(low, f, L::fma(root, f, -lever));
  const F across = L::fma(lever, half_pi, L::fma(lever_low, half_pi, lever * s));
  // An odd quadrant swaps sine and cosine. The sign of the sine is the quadrant's second bit, that
  // of the cosine the second bit of the next quadrant.
  const U sign = L::set_bits(0x80000000u);
  const U turned = quadrant << 30;
  const U next = turned + L::set_bits(0x40000000u);
  z0 = L::from_bits(L::bits(L::select_by_odd(quadrant, across, along)) ^ (next & sign));
  z1 = L::from_bits(L::bits(L::select_by_odd(quadrant, along, across)) ^ (turned & sign));
}

template <class F>
COUP_FAST_FN void box_muller(typename Lanes<F>::U word0, typename Lanes<F>::U word1, F& z0, F& z1) {
  const Reduced<F> pair = reduced<F>(word0, word1);
  from_polar<F>(squared_radius<F>(pair.exponent, pair.h), pair.f, pair.quadrant, z0, z1);
}

template <class F>
struct Normals {
  F value[kBlock];
};

// The four normals of a block, in order.
template <class F>
COUP_FAST_FN Normals<F> normals_of(const Words<F>& words) {
  Normals<F> result;
  box_muller<F>(words.word[0], words.word[1], result.value[0], result.value[1]);
  box_muller<F>(words.word[2], words.word[3], result.value[2], result.value[3]);
  return result;
}

// The normals of block number `block` of a sample, scalar: elements 4 block .. 4 block + 3.
COUP_FAST_FN Normals<float> normal_block(NoiseKey noise, uint64_t block) {
  return normals_of<float>(philox_block(noise, block));
}

}  // namespace coup_fast
