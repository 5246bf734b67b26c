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

// The words of a block's counter on their way through the rounds, lowest first. A lane is a block.
template <class F>
struct PhiloxState {
  typename Lanes<F>::W a, b, c, d;
};

template <class F>
COUP_FAST_FN PhiloxState<F> philox_round(const PhiloxState<F>& in, const PhiloxKeys<F>& keys,
                                         int round) {
  using L = Lanes<F>;
  using W = typename L::W;
  const W product0 = L::product(in.a, L::set_word(kPhiloxMultiplier0));
  const W product1 = L::product(in.c, L::set_word(kPhiloxMultiplier1));
  return PhiloxState<F>{L::upper_half(product1) ^ (in.b ^ keys.key0[round]), product1,
                        L::upper_half(product0) ^ (in.d ^ keys.key1[round]), product0};
}

// The last round, into the block's words.
template <class F>
COUP_FAST_FN Words<F> philox_last_round(const PhiloxState<F>& in, const PhiloxKeys<F>& keys) {
  using L = Lanes<F>;
  using W = typename L::W;
  constexpr int kLast = kPhiloxRounds - 1;
  const W product0 = L::product(in.a, L::set_word(kPhiloxMultiplier0));
  const W product1 = L::product(in.c, L::set_word(kPhiloxMultiplier1));
  return Words<F>{{L::narrow_upper(product1) ^ (L::narrow(in.b) ^ L::narrow(keys.key0[kLast])),
                   L::narrow(product1),
                   L::narrow_upper(product0) ^ (L::narrow(in.d) ^ L::narrow(keys.key1[kLast])),
                   L::narrow(product0)}};
}

template <class F>
COUP_FAST_FN Words<F> philox(typename Lanes<F>::W a, typename Lanes<F>::W b, typename Lanes<F>::W c,
                             typename Lanes<F>::W d, const PhiloxKeys<F>& keys) {
  PhiloxState<F> state{a, b, c, d};
  COUP_FAST_UNROLL_10
  for (int round = 0; round < kPhiloxRounds - 1; ++round) {
    state = philox_round<F>(state, keys, round);
  }
  return philox_last_round<F>(state, keys);
}

// Blocks of a sample share all of their counter but its lowest word, and the upper two words are 0:
// what of the first three rounds does not depend on the lowest word, given the one above it.
constexpr int kPhiloxSharedRounds = 3;

template <class F>
struct PhiloxShared {
  typename Lanes<F>::W round1, round2;
};

template <class F>
COUP_FAST_FN PhiloxShared<F> philox_shared(typename Lanes<F>::W b, const PhiloxKeys<F>& keys) {
  using L = Lanes<F>;
  const typename L::W product = L::product(b ^ keys.key0[0], L::set_word(kPhiloxMultiplier0));
  return PhiloxShared<F>{L::upper_half(product) ^ keys.key1[1], product ^ keys.key1[2]};
}

// The state after those rounds: 9 multiplications, shifts and sums where three rounds take 24.
template <class F>
COUP_FAST_FN PhiloxState<F> philox_first_rounds(typename Lanes<F>::W a,
                                                const PhiloxShared<F>& shared,
                                                const PhiloxKeys<F>& keys) {
  using L = Lanes<F>;
  using W = typename L::W;
  const W multiplier0 = L::set_word(kPhiloxMultiplier0);
  const W multiplier1 = L::set_word(kPhiloxMultiplier1);
  const W first = L::product(a, multiplier0);
  const W second = L::product(L::upper_half(first) ^ keys.key1[0], multiplier1);
  const W third0 = L::product(L::upper_half(second) ^ keys.key0[1], multiplier0);
  const W third1 = L::product(first ^ shared.round1, multiplier1);
  return PhiloxState<F>{L::upper_half(third1) ^ (second ^ keys.key0[2]), third1,
                        L::upper_half(third0) ^ shared.round2, third0};
}

// Block number `block` of a sample, scalar.
COUP_FAST_FN Words<float> philox_block(NoiseKey noise, uint64_t block) {
  const uint64_t counter = noise.offset + block;
  return philox<float>(counter, counter >> 32, 0, 0, philox_keys<float>(noise.key));
}

}  // namespace coup_fast
