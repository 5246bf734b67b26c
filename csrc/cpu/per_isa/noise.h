// The normals of many blocks of one sample, in vectors. For cpu/per_isa only (one namespace
// per instruction set). Knows keys and counters; formulas in math/philox.h and math/normal.h.
//
// In stages over kStaged groups of blocks, through arrays that stay in the first-level cache. A
// processor looks ahead over some hundred operations; a block takes several hundred, most of them
// waiting for the one before. In one loop it would work on one block at a time; a stage is short
// enough that it works on several, and its variables fit the registers.
#pragma once

#include "cpu/per_isa/vectors.h"

namespace coup_fast::COUP_FAST_ISA {

constexpr int kGroup = kBlock * kWidth;  // normals of kWidth blocks
constexpr int kStaged = 256 / kWidth;    // groups

// What the stages leave to each other. When there are squares, the states are no longer needed.
struct NoiseStages {
  Words<Vec> words[kStaged];
  Reduced<Vec> reduced[2 * kStaged];
  union {
    PhiloxState<Vec> state[kStaged];
    Square<Vec> square[2 * kStaged];
  };
};

// Words of `count` groups from counter `first` on.
static inline void make_words(uint64_t first, int count, const PhiloxKeys<Vec>& keys,
                              NoiseStages& stages) {
  using L = Lanes<Vec>;
  constexpr int kHalfway = 5;  // rounds of the first loop: both take equally long
  const uint64_t last = first + static_cast<uint64_t>(count) * kWidth - 1;
  const bool carries = first >> 32 != last >> 32;  // the upper word of the counter changes
  L::W counters = counters_of_group(first);
  PhiloxShared<Vec> shared = philox_shared<Vec>(L::upper_half(counters), keys);
  for (int group = 0; group < count; ++group) {
    if (carries) shared = philox_shared<Vec>(L::upper_half(counters), keys);
    PhiloxState<Vec> state = philox_first_rounds<Vec>(counters, shared, keys);
    COUP_FAST_UNROLL_10
    for (int round = kPhiloxSharedRounds; round < kHalfway; ++round) {
      state = philox_round<Vec>(state, keys, round);
    }
    stages.state[group] = state;
    counters = next_counters(counters);
  }
  for (int group = 0; group < count; ++group) {
    PhiloxState<Vec> state = stages.state[group];
    COUP_FAST_UNROLL_10
    for (int round = kHalfway; round < kPhiloxRounds - 1; ++round) {
      state = philox_round<Vec>(state, keys, round);
    }
    stages.words[group] = philox_last_round<Vec>(state, keys);
  }
}

// All but the last stage of `count` groups from counter `first` on.
static __attribute__((noinline)) void prepare(uint64_t first, int count,
                                              const PhiloxKeys<Vec>& keys, NoiseStages& stages) {
  make_words(first, count, keys, stages);
  for (int group = 0; group < count; ++group) {
    const Words<Vec>& words = stages.words[group];
    stages.reduced[2 * group] = reduced<Vec>(words.word[0], words.word[1]);
    stages.reduced[2 * group + 1] = reduced<Vec>(words.word[2], words.word[3]);
  }
  for (int pair = 0; pair < 2 * count; ++pair) {
    const Reduced<Vec>& from = stages.reduced[pair];
    stages.square[pair] = squared_radius<Vec>(from.exponent, from.h);
  }
}

// Hands the normals of `groups` groups from block number `block` on to take(i, z), in logical
// order: normals i to i + kWidth - 1, counted from the first of the block.
template <class Take>
static inline __attribute__((always_inline)) void generate(NoiseKey noise, uint64_t block,
                                                           int groups, Take take) {
  const PhiloxKeys<Vec> keys = philox_keys<Vec>(noise.key);
  NoiseStages stages;
  for (int done = 0; done < groups; done += kStaged) {
    const int count = groups - done < kStaged ? groups - done : kStaged;
    prepare(noise.offset + block + static_cast<uint64_t>(done) * kWidth, count, keys, stages);
    for (int group = 0; group < count; ++group) {
      Normals<Vec> normals;
      for (int half = 0; half < 2; ++half) {
        const Reduced<Vec>& from = stages.reduced[2 * group + half];
        from_polar<Vec>(stages.square[2 * group + half], from.f, from.quadrant,
                        normals.value[2 * half], normals.value[2 * half + 1]);
      }
      interleave(normals.value);
      for (int k = 0; k < kBlock; ++k) take((done + group) * kGroup + k * kWidth, normals.value[k]);
    }
  }
}

// The same into memory.
static inline void generate(NoiseKey noise, uint64_t block, int groups, float* out) {
  generate(noise, block, groups, [=](int i, Vec z) { store(out + i, z); });
}

}  // namespace coup_fast::COUP_FAST_ISA
