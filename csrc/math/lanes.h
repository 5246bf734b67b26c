// What the mathematics asks of a lane type, and the scalar lane type, float, for host and device.
// csrc/cpu/per_isa/vectors.h specialises Lanes for vector types; every operation gives the same
// bits in each.
//
// Operators (+ - * & | ^ << >> < == ...) are those of the language. A type F is a float or a vector
// of them, Lanes<F>::U the unsigned integers of the same width; >> is a logical shift.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "math/macros.h"

namespace coup_fast {

template <class F>
struct Lanes;

// The square root of 0 or of a number between 2^-100 and 2^100, correctly rounded, from a
// reciprocal of it that is within 8 ulp. P. Markstein, "Computation of elementary functions on the
// IBM RISC System/6000 processor" (1990); tests/ops/test_normal.py tries all significands.
COUP_FAST_FN float sqrt_by_reciprocal(float value, float reciprocal);

template <>
struct Lanes<float> {
  using U = uint32_t;

  COUP_FAST_FN float set(float value) { return value; }
  COUP_FAST_FN U set_bits(uint32_t value) { return value; }

  COUP_FAST_FN U bits(float value) {
    U result;
    memcpy(&result, &value, sizeof(result));
    return result;
  }

  COUP_FAST_FN float from_bits(U value) {
    float result;
    memcpy(&result, &value, sizeof(result));
    return result;
  }

  // a * b + c, rounded once
  COUP_FAST_FN float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
  }

  // a * b + c where the product is exact: fused or not, the bits are the same
  COUP_FAST_FN float mad(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return a * b + c;
#endif
  }

  // correctly rounded
  COUP_FAST_FN float sqrt(float value) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(value);
#else
    return __builtin_sqrtf(value);
#endif
  }

  // the same of 0 or of a number between 2^-100 and 2^100, which on a device needs no branch
  COUP_FAST_FN float sqrt_in_range(float value) {
#if defined(__CUDA_ARCH__)
    float reciprocal;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(fmaxf(value, 0x1p-100f)));
    return sqrt_by_reciprocal(value, reciprocal);
#else
    return __builtin_sqrtf(value);
#endif
  }

  COUP_FAST_FN float select(bool condition, float a, float b) { return condition ? a : b; }

  // a where the integer is odd, b where it is even
  COUP_FAST_FN float select_by_odd(U value, float a, float b) { return value & 1 ? a : b; }

  // an integer that a float can hold, exactly; the bits are two's complement
  COUP_FAST_FN float from_int(U value) { return static_cast<float>(static_cast<int32_t>(value)); }

  // an unsigned integer as float, rounded to nearest even
  COUP_FAST_FN float from_unsigned(U value) { return static_cast<float>(value); }

  // Words in 64-bit containers, whose upper halves hold anything: what the product of two words
  // leaves without further ado.
  using W = uint64_t;
  COUP_FAST_FN W set_word(uint32_t value) { return value; }
  COUP_FAST_FN W product(W a, W b) {
    const uint32_t low_a = static_cast<uint32_t>(a), low_b = static_cast<uint32_t>(b);
#if defined(__CUDA_ARCH__)  // one instruction; the compiler's 64-bit product adds zeros to its top
    uint64_t result;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(result) : "r"(low_a), "r"(low_b));
    return result;
#else
    return static_cast<uint64_t>(low_a) * low_b;
#endif
  }
  COUP_FAST_FN W upper_half(W value) { return value >> 32; }
  COUP_FAST_FN U narrow(W value) { return static_cast<U>(value); }
  COUP_FAST_FN U narrow_upper(W value) { return static_cast<U>(value >> 32); }
};

COUP_FAST_FN float sqrt_by_reciprocal(float value, float reciprocal) {
  using L = Lanes<float>;
  const float root = value * reciprocal, half = 0.5f * reciprocal;
  const float error = L::fma(-half, root, 0.5f);
  const float better_root = L::fma(root, error, root), better_half = L::fma(half, error, half);
  const float residual = L::fma(-better_root, better_root, value);
  return L::fma(residual, better_half, better_root);
}

}  // namespace coup_fast
