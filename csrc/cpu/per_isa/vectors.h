// Vector lane types, one for each instruction set: AVX-512, AVX2 with FMA and F16C, or a baseline
// of four lanes. Specialises Lanes (csrc/math/lanes.h) so that csrc/math is compiled for them as it
// is. The instruction set is the one the compiler was told to use; namespace COUP_FAST_ISA keeps
// the translation units apart. Knows no tensor.
#pragma once

#include <cstdint>
#include <cstring>

#include "math/convert.h"
#include "math/normal.h"

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside GCC's own AVX-512 header
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#if !defined(COUP_FAST_ISA)
#error "compile with -DCOUP_FAST_ISA=<name of the instruction set>"
#endif

namespace coup_fast {

#if defined(__AVX512F__)
constexpr int kVectorWidth = 16;
#elif defined(__AVX2__)
constexpr int kVectorWidth = 8;
#else
constexpr int kVectorWidth = 4;
#endif

namespace COUP_FAST_ISA {

constexpr int kWidth = kVectorWidth;
typedef float Vec __attribute__((vector_size(4 * kVectorWidth)));
typedef uint32_t VecU __attribute__((vector_size(4 * kVectorWidth)));
typedef int32_t VecI __attribute__((vector_size(4 * kVectorWidth)));
typedef uint64_t Vec64 __attribute__((vector_size(4 * kVectorWidth)));

#if defined(__AVX512F__)

COUP_FAST_FN Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
COUP_FAST_FN Vec sqrt(Vec a) { return (Vec)_mm512_sqrt_ps((__m512)a); }
COUP_FAST_FN Vec from_unsigned(VecU a) { return (Vec)_mm512_cvtepu32_ps((__m512i)a); }
COUP_FAST_FN Vec select_by_odd(VecU value, Vec a, Vec b) {
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)value, _mm512_set1_epi32(1));
  return (Vec)_mm512_mask_mov_ps((__m512)b, odd, (__m512)a);
}
COUP_FAST_FN Vec64 multiply(Vec64 a, Vec64 b) {
  return (Vec64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
}
COUP_FAST_FN VecU merge(Vec64 lower, Vec64 upper) {
  return (VecU)_mm512_mask_mov_epi32((__m512i)lower, 0xaaaa, (__m512i)upper);
}
COUP_FAST_FN void interleave(Vec* z) {
  const __m512 a = _mm512_unpacklo_ps((__m512)z[0], (__m512)z[1]);
  const __m512 b = _mm512_unpackhi_ps((__m512)z[0], (__m512)z[1]);
  const __m512 c = _mm512_unpacklo_ps((__m512)z[2], (__m512)z[3]);
  const __m512 d = _mm512_unpackhi_ps((__m512)z[2], (__m512)z[3]);
  z[0] = (Vec)_mm512_unpacklo_pd((__m512d)a, (__m512d)c);
  z[1] = (Vec)_mm512_unpackhi_pd((__m512d)a, (__m512d)c);
  z[2] = (Vec)_mm512_unpacklo_pd((__m512d)b, (__m512d)d);
  z[3] = (Vec)_mm512_unpackhi_pd((__m512d)b, (__m512d)d);
}
COUP_FAST_FN Vec widen_float16(const uint16_t* data) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)data));
}
COUP_FAST_FN Vec widen_bfloat16(const uint16_t* data) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)data));
  return (Vec)_mm512_slli_epi32(wide, 16);
}

#elif defined(__AVX2__)

COUP_FAST_FN Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
COUP_FAST_FN Vec sqrt(Vec a) { return (Vec)_mm256_sqrt_ps((__m256)a); }
COUP_FAST_FN Vec from_unsigned(VecU a) {  // both halves are exact: one rounding, in the sum
  const __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32((__m256i)a, 16));
  const __m256 low = _mm256_cvtepi32_ps((__m256i)(a & 0xffffu));
  return (Vec)_mm256_fmadd_ps(high, _mm256_set1_ps(65536.0f), low);
}
COUP_FAST_FN Vec select_by_odd(VecU value, Vec a, Vec b) {
  const VecU bits = value << 31;
  Vec result;  // of the intrinsic, GCC 12 makes a comparison with 0 and a blend
  asm("vblendvps %3, %2, %1, %0" : "=x"(result) : "x"(b), "x"(a), "x"(bits));
  return result;
}
COUP_FAST_FN Vec64 multiply(Vec64 a, Vec64 b) {
  return (Vec64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}
COUP_FAST_FN VecU merge(Vec64 lower, Vec64 upper) {
  return (VecU)_mm256_blend_epi32((__m256i)lower, (__m256i)upper, 0xaa);
}
COUP_FAST_FN void interleave(Vec* z) {
  const __m256 a = _mm256_unpacklo_ps((__m256)z[0], (__m256)z[1]);
  const __m256 b = _mm256_unpackhi_ps((__m256)z[0], (__m256)z[1]);
  const __m256 c = _mm256_unpacklo_ps((__m256)z[2], (__m256)z[3]);
  const __m256 d = _mm256_unpackhi_ps((__m256)z[2], (__m256)z[3]);
  z[0] = (Vec)_mm256_unpacklo_pd((__m256d)a, (__m256d)c);
  z[1] = (Vec)_mm256_unpackhi_pd((__m256d)a, (__m256d)c);
  z[2] = (Vec)_mm256_unpacklo_pd((__m256d)b, (__m256d)d);
  z[3] = (Vec)_mm256_unpackhi_pd((__m256d)b, (__m256d)d);
}
COUP_FAST_FN Vec widen_float16(const uint16_t* data) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)data));
}
COUP_FAST_FN Vec widen_bfloat16(const uint16_t* data) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)data));
  return (Vec)_mm256_slli_epi32(wide, 16);
}

#else

#if defined(__x86_64__)
// a * b + c of two lanes, rounded once, without an FMA instruction, where the C library's fmaf
// takes 50 times as long: the product is exact in double; the sum is rounded to odd (its error
// decides the last bit), which makes the second rounding, to float, the only one that counts. Boldo
// and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to
// odd" (2008).
COUP_FAST_FN __m128 fma_pair(__m128 a, __m128 b, __m128 c) {
  const __m128d product = _mm_mul_pd(_mm_cvtps_pd(a), _mm_cvtps_pd(b));
  const __m128d addend = _mm_cvtps_pd(c);
  const __m128d sum = _mm_add_pd(product, addend);
  const __m128d part = _mm_sub_pd(sum, product);
  const __m128d error =
      _mm_add_pd(_mm_sub_pd(product, _mm_sub_pd(sum, part)), _mm_sub_pd(addend, part));
  const __m128d inexact = _mm_or_pd(_mm_cmplt_pd(error, _mm_setzero_pd()),
                                    _mm_cmpgt_pd(error, _mm_setzero_pd()));  // not for NaN
  const __m128i one = _mm_set1_epi64x(1);
  const __m128i bits = (__m128i)sum;
  const __m128i even = _mm_andnot_si128(bits, one);
  const __m128i inward = _mm_srli_epi64(_mm_xor_si128(bits, (__m128i)error), 63);
  const __m128i change = _mm_sub_epi64(
      even, _mm_slli_epi64(_mm_and_si128(inward, even), 1));  // +1 or -1 if even, else 0
  return _mm_cvtpd_ps((__m128d)_mm_add_epi64(bits, _mm_and_si128(change, (__m128i)inexact)));
}
COUP_FAST_FN Vec fma(Vec a, Vec b, Vec c) {
  const __m128 x = (__m128)a, y = (__m128)b, z = (__m128)c;
  return (Vec)_mm_movelh_ps(
      fma_pair(x, y, z), fma_pair(_mm_movehl_ps(x, x), _mm_movehl_ps(y, y), _mm_movehl_ps(z, z)));
}
COUP_FAST_FN Vec sqrt(Vec a) { return (Vec)_mm_sqrt_ps((__m128)a); }
COUP_FAST_FN Vec64 multiply(Vec64 a, Vec64 b) {
  return (Vec64)_mm_mul_epu32((__m128i)a, (__m128i)b);
}
#else
COUP_FAST_FN Vec fma(Vec a, Vec b, Vec c) {
  Vec result;
  for (int i = 0; i < kWidth; ++i) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return result;
}
COUP_FAST_FN Vec sqrt(Vec a) {
  Vec result;
  for (int i = 0; i < kWidth; ++i) result[i] = __builtin_sqrtf(a[i]);
  return result;
}
COUP_FAST_FN Vec64 multiply(Vec64 a, Vec64 b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
#endif
COUP_FAST_FN VecU merge(Vec64 lower, Vec64 upper) {
  return (VecU)((lower & 0xffffffffu) | (upper & ~uint64_t{0xffffffff}));
}
COUP_FAST_FN Vec select_by_odd(VecU value, Vec a, Vec b) { return (VecI)(value << 31) < 0 ? a : b; }
COUP_FAST_FN Vec from_unsigned(VecU a) {  // both halves are exact: one rounding, in the sum
  const Vec high = __builtin_convertvector((VecI)(a >> 16), Vec);
  const Vec low = __builtin_convertvector((VecI)(a & 0xffffu), Vec);
  return high * 65536.0f + low;
}
COUP_FAST_FN void interleave(Vec* z) {
  const Vec a = z[0], b = z[1], c = z[2], d = z[3];
  for (int block = 0; block < kWidth; ++block)
    z[block] = Vec{a[block], b[block], c[block], d[block]};
}
COUP_FAST_FN Vec widen_float16(const uint16_t* data) {
  Vec result;
  for (int i = 0; i < kWidth; ++i) result[i] = float_of_float16(data[i]);
  return result;
}
COUP_FAST_FN Vec widen_bfloat16(const uint16_t* data) {
  VecU result;
  for (int i = 0; i < kWidth; ++i) result[i] = static_cast<uint32_t>(data[i]) << 16;
  return (Vec)result;
}

#endif

// A vector of words in 64-bit containers: lane 2j of the vector is lane j of even, lane 2j + 1 of
// odd.
struct Wide {
  Vec64 even, odd;
};
COUP_FAST_FN Wide operator^(const Wide& a, const Wide& b) {
  return Wide{a.even ^ b.even, a.odd ^ b.odd};
}

// interleave() puts the 4 kWidth normals of a group of blocks in logical order with unpacks
// inside 128-bit parts only, if lane 4 part + k holds block (kWidth / 4) k + part of the group.
// This is the group's counters, their low words in the lower halves of the containers and their
// high words in the upper ones.
COUP_FAST_FN Wide counters_of_group(uint64_t first) {
  Vec64 even, odd;
  for (int j = 0; j < kWidth / 2; ++j) {
    even[j] = (kWidth / 4) * (2 * j % 4) + 2 * j / 4;
    odd[j] = (kWidth / 4) * ((2 * j + 1) % 4) + (2 * j + 1) / 4;
  }
  return Wide{even + first, odd + first};
}

// Those of the group after.
COUP_FAST_FN Wide next_counters(const Wide& a) {
  return Wide{a.even + kVectorWidth, a.odd + kVectorWidth};
}

COUP_FAST_FN Vec load(const float* data) {
  Vec result;
  memcpy(&result, data, sizeof(result));
  return result;
}
COUP_FAST_FN void store(float* data, Vec value) { memcpy(data, &value, sizeof(value)); }

// A store past the caches, which spares reading what it replaces. data: aligned to a vector.
// end_streams() makes such stores visible to whoever synchronises with this thread.
COUP_FAST_FN void stream(float* data, Vec value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(data, (__m512)value);
#elif defined(__AVX2__)
  _mm256_stream_ps(data, (__m256)value);
#elif defined(__x86_64__)
  _mm_stream_ps(data, (__m128)value);
#else
  store(data, value);
#endif
}
COUP_FAST_FN bool aligned(const float* data) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Vec) == 0;
}
COUP_FAST_FN void end_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace COUP_FAST_ISA

template <>
struct Lanes<COUP_FAST_ISA::Vec> {
  using F = COUP_FAST_ISA::Vec;
  using U = COUP_FAST_ISA::VecU;
  using I = COUP_FAST_ISA::VecI;

  COUP_FAST_FN F set(float value) { return value - F{}; }
  COUP_FAST_FN U set_bits(uint32_t value) { return value - U{}; }
  COUP_FAST_FN U bits(F value) { return (U)value; }
  COUP_FAST_FN F from_bits(U value) { return (F)value; }
  COUP_FAST_FN F fma(F a, F b, F c) { return COUP_FAST_ISA::fma(a, b, c); }
  COUP_FAST_FN F mad(F a, F b, F c) {
#if defined(__FMA__)
    return COUP_FAST_ISA::fma(a, b, c);
#else
    return a * b + c;
#endif
  }
  COUP_FAST_FN F sqrt(F value) { return COUP_FAST_ISA::sqrt(value); }
  COUP_FAST_FN F sqrt_in_range(F value) { return COUP_FAST_ISA::sqrt(value); }
  COUP_FAST_FN F select(I condition, F a, F b) { return condition ? a : b; }
  COUP_FAST_FN F from_int(U value) { return __builtin_convertvector((I)value, F); }
  COUP_FAST_FN F from_unsigned(U value) { return COUP_FAST_ISA::from_unsigned(value); }
  COUP_FAST_FN F select_by_odd(U value, F a, F b) {
    return COUP_FAST_ISA::select_by_odd(value, a, b);
  }

  using W = COUP_FAST_ISA::Wide;
  COUP_FAST_FN W set_word(uint32_t value) {
    const COUP_FAST_ISA::Vec64 words = uint64_t{value} - COUP_FAST_ISA::Vec64{};
    return W{words, words};
  }
  COUP_FAST_FN W product(const W& a, const W& b) {
    return W{COUP_FAST_ISA::multiply(a.even, b.even), COUP_FAST_ISA::multiply(a.odd, b.odd)};
  }
  COUP_FAST_FN W upper_half(const W& a) { return W{a.even >> 32, a.odd >> 32}; }
  COUP_FAST_FN U narrow(const W& a) { return COUP_FAST_ISA::merge(a.even, a.odd << 32); }
  COUP_FAST_FN U narrow_upper(const W& a) { return COUP_FAST_ISA::merge(a.even >> 32, a.odd); }
};

}  // namespace coup_fast
