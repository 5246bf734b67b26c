// float16 and bfloat16 as bit patterns: exact widening, and rounding to nearest even.
// Scalar, for host and device; csrc/cpu/per_isa/vectors.h widens whole vectors to the same values.
// On a device the conversions are instructions, which round the same (only the payload of a NaN may
// differ).
#pragma once

#include <cstdint>

#include "math/lanes.h"

namespace coup_fast {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

COUP_FAST_FN int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

COUP_FAST_FN float float_of_bfloat16(uint16_t value) {
  return Lanes<float>::from_bits(static_cast<uint32_t>(value) << 16);
}

COUP_FAST_FN uint16_t bfloat16_of_float(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
#else
  const uint32_t bits = Lanes<float>::bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return static_cast<uint16_t>((bits >> 16) | 0x40u);  // NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

COUP_FAST_FN float float_of_float16(uint16_t value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
  return result;
#else
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(value & 0x7fffu);
  if (rest >= 0x7c00u) {  // infinity, NaN (made quiet)
    const uint32_t quiet = rest > 0x7c00u ? 0x00400000u : 0u;
    return Lanes<float>::from_bits(sign | 0x7f800000u | quiet | (rest << 13));
  }
  // exponents shifted by 2^112, exact, subnormals included
  const float magnitude = Lanes<float>::from_bits(rest << 13) * 0x1p112f;
  return Lanes<float>::from_bits(sign | Lanes<float>::bits(magnitude));
#endif
}

COUP_FAST_FN uint16_t float16_of_float(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
#else
  const uint32_t bits = Lanes<float>::bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((rest >> 13) & 0x3ffu));
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above
  if (rest < 0x38800000u) {  // subnormal: adding 1/2 rounds to a multiple of 2^-24
    const float sum = Lanes<float>::from_bits(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (Lanes<float>::bits(sum) - 0x3f000000u));
  }
  const uint32_t rounded = rest + 0xfffu + ((rest >> 13) & 1u) - 0x38000000u;
  return static_cast<uint16_t>(sign | (rounded >> 13));
#endif
}

COUP_FAST_FN float load_as_float(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == DType::kFloat16 ? float_of_float16(bits) : float_of_bfloat16(bits);
}

COUP_FAST_FN void store_from_float(void* data, DType dtype, int64_t index, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<uint16_t*>(data)[index] =
        dtype == DType::kFloat16 ? float16_of_float(value) : bfloat16_of_float(value);
  }
}

}  // namespace coup_fast
