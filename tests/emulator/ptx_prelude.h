// What translated PTX (ptx_translate.py) is made of: the instructions that C++ has no operator for,
// and the emulator's memory and threads. With COUP_FAST_UNFUSED, fma rounds twice: the comparison
// with the CPU has to see that. With COUP_FAST_COUNTED, instructions are counted.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda_runtime.h"

#ifdef COUP_FAST_COUNTED
#define COUNT(kind) ++emulator::executed[emulator::kind];
#else
#define COUNT(kind)
#endif

namespace ptx {

template <typename To, typename From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename T>
inline T load(const char* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}
template <typename T>
inline void store(char* at, T value) {
  std::memcpy(at, &value, sizeof value);
}

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "PTX: %s (block %u,%u thread %u)\n", message, blockIdx.x, blockIdx.y,
               threadIdx.x);
  std::abort();
}

inline void check_alignment(const char* at, unsigned bytes) {
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0) fail("a misaligned access");
}

inline char* shared(uint64_t offset) {
  return static_cast<char*>(emulator::shared_memory(-1)) + offset;
}

// The address, in a block of the cluster, of what has this address in the block itself.
inline uint64_t mapa(uint64_t address, uint32_t rank) {
  const uint64_t offset = address - reinterpret_cast<uint64_t>(shared(0));
  return reinterpret_cast<uint64_t>(emulator::shared_memory(static_cast<int>(rank))) + offset;
}

inline uint32_t butterfly(uint32_t value, uint32_t mask, uint32_t clamp, uint32_t members) {
  if (clamp != 31 || members != ~0u) fail("a shuffle of a part of a warp");
  return emulator::shuffle(value, emulator::lane() ^ mask);
}

inline float fma(float a, float b, float c) {
#ifdef COUP_FAST_UNFUSED
  return a * b + c;
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// PTX promises a relative error of 2^-22.9: the argument's last bits choose an error within it, so
// that no result depends on it unseen. Of positive normal numbers.
inline float rsqrt_approx(float a) {
  const float nearest = static_cast<float>(1.0 / __builtin_sqrt(a));
  return bits<float>(bits<uint32_t>(nearest) + bits<uint32_t>(a) % 3 - 1);
}

// Shifts by the width or more give zeros or signs.
template <typename T>
inline T left(T value, uint32_t by) {
  return by < 8 * sizeof(T) ? static_cast<T>(value << by) : T{0};
}
template <typename T>
inline T right(T value, uint32_t by) {
  constexpr uint32_t kLast = 8 * sizeof(T) - 1;
  if (by > kLast) return static_cast<T>(value < 0 ? -1 : 0);
  return static_cast<T>(value >> by);
}

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> (4 * i) & 15;
    uint32_t byte = both >> (8 * (choice & 7)) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;  // its sign, eight times
    result |= byte << (8 * i);
  }
  return result;
}

inline uint32_t bfe(uint32_t value, uint32_t position, uint32_t length) {
  const uint32_t moved = right(value, position & 255);
  return (length & 255) < 32 ? moved & ((1u << (length & 255)) - 1) : moved;
}

// The project's conversions are compared with torch's.
inline float from_half(uint16_t value) { return c10::detail::fp16_ieee_to_fp32_value(value); }
inline uint16_t to_half(float value) { return c10::detail::fp16_ieee_from_fp32_value(value); }
inline uint16_t to_bfloat16(float value) {  // to nearest even
  const uint32_t word = bits<uint32_t>(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
}

}  // namespace ptx
