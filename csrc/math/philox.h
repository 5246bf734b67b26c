// Philox4x32-10: the words behind all noise. A block of four words is a pure function of a 64-bit
// key and a 128-bit counter, so noise needs no state and no order of generation.
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 4.
#pragma once

#include <cstdint>

#include "math/lanes.h"

namespace coup_fast {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyIncrement0 = 0x9E3779B9u;  // golden ratio
constexpr uint32_t kPhiloxKeyIncrement1 = 0xBB67AE85u;  // sqrt(3) - 1
constexpr int kPhiloxRounds = 10;
constexpr int kBlock = 4;  // words, and so normals, of one counter

// The noise of one sample: element i takes word i mod 4 of the block at counter offset + i / 4.
struct NoiseKey {
  uint64_t key;     // key of the sample
  uint64_t offset;  // counter of element 0; counters wrap modulo 2^64
};

template <class F>
struct Words {
  typename Lanes<F>::U word[kBlock];
};

// The keys of all rounds, for those who compute many blocks under one key.
template <class F>
struct PhiloxKeys {
  typename Lanes<F>::W key0[kPhiloxRounds], key1[kPhiloxRounds];
};

template <class F>
COUP_FAST_FN PhiloxKeys<F> philox_keys(uint64_t key) {
  PhiloxKeys<F> keys;
  COUP_FAST_UNROLL_10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t number = static_cast<uint32_t>(round);
    keys.key0[round] =
        Lanes<F>::set_word(static_cast<uint32_t>(key) + number * kPhiloxKeyIncrement0);
    keys.key1[round] =
        Lanes<F>::set_word(static_cast<uint32_t>(key >> 32) + number * kPhiloxKeyIncrement1);
  }
  return keys;
}

// A lane is one block: a to d are the words of its counter, lowest first.
template <class F>
COUP_FAST_FN Words<F> philox(typename Lanes<F>::W a, typename Lanes<F>::W b, typename Lanes<F>::W c,
                             typename Lanes<F>::W d, const PhiloxKeys<F>& keys) {
  using L = Lanes<F>;
  using W = typename L::W;
  const W multiplier0 = L::set_word(kPhiloxMultiplier0);
  const W multiplier1 = L::set_word(kPhiloxMultiplier1);
  COUP_FAST_UNROLL_10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const W product0 = L::product(a, multiplier0);
    const W product1 = L::product(c, multiplier1);
    a = L::upper_half(product1) ^ (b ^ keys.key0[round]);
    c = L::upper_half(product0) ^ (d ^ keys.key1[round]);
    b = product1;
    d = product0;
  }
  return Words<F>{{L::narrow(a), L::narrow(b), L::narrow(c), L::narrow(d)}};
}

// Block number `block` of a sample, scalar.
COUP_FAST_FN Words<float> philox_block(NoiseKey noise, uint64_t block, uint64_t subsequence = 0) {
  const uint64_t counter = noise.offset + block;
  return philox<float>(counter, counter >> 32, subsequence, subsequence >> 32,
                       philox_keys<float>(noise.key));
}

}  // namespace coup_fast
