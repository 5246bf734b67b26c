// Words to uniforms to standard normals. Box-Muller fits a counter generator: two words make two
// normals, always, with no rejection, so element i depends on its own block alone.
// Box and Muller, "A note on the generation of random normal deviates" (1958).
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

template <class F>
struct Normals {
  F value[kBlock];
};

// z0 = r cos(2 pi U1), z1 = r sin(2 pi U1), r = sqrt(-2 ln U0)
template <class F>
COUP_FAST_FN void box_muller(typename Lanes<F>::U word0, typename Lanes<F>::U word1, F& z0, F& z1) {
  F radius_low;
  const F radius = sqrt_of_minus_two_log<F>(uniform<F>(word0), radius_low);
  polar<F>(radius, radius_low, uniform<F>(word1), z0, z1);
}

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
