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

// A lane is one block: its counter is counter.word (lowest word first), its key (key0, key1).
template <class F>
COUP_FAST_FN Words<F> philox(Words<F> counter, uint32_t key0, uint32_t key1) {
  using L = Lanes<F>;
  using U = typename L::U;
  const U multiplier0 = L::set_bits(kPhiloxMultiplier0);
  const U multiplier1 = L::set_bits(kPhiloxMultiplier1);
  U a = counter.word[0], b = counter.word[1], c = counter.word[2], d = counter.word[3];
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    U high0, low0, high1, low1;
    L::multiply(a, multiplier0, high0, low0);
    L::multiply(c, multiplier1, high1, low1);
    a = high1 ^ b ^ L::set_bits(key0);
    b = low1;
    c = high0 ^ d ^ L::set_bits(key1);
    d = low0;
    key0 += kPhiloxKeyIncrement0;
    key1 += kPhiloxKeyIncrement1;
  }
  return Words<F>{{a, b, c, d}};
}

// Block number `block` of a sample, scalar.
COUP_FAST_FN Words<float> philox_block(NoiseKey noise, uint64_t block, uint64_t subsequence = 0) {
  const uint64_t counter = noise.offset + block;
  return philox<float>(
      {{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32),
        static_cast<uint32_t>(subsequence), static_cast<uint32_t>(subsequence >> 32)}},
      static_cast<uint32_t>(noise.key), static_cast<uint32_t>(noise.key >> 32));
}

}  // namespace coup_fast
