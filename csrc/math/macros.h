// Qualifiers of csrc/math. These headers are plain mathematics for host and device: they include
// no torch, CUDA runtime or pybind header, and no kernel knows anything they do not say here.
//
// Every function is static and forced inline, so that a translation unit compiled for AVX-512 can
// never lend its copy of a function to one compiled for a lesser machine.
#pragma once

#if defined(__CUDACC__)
#define COUP_FAST_FN static __host__ __device__ __forceinline__
#else
#define COUP_FAST_FN static inline __attribute__((always_inline))
#endif

// Unrolls the loop of ten rounds that follows, by the pragma that the compiler knows.
#if defined(__CUDA_ARCH__)
#define COUP_FAST_UNROLL_10 _Pragma("unroll")
#elif defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define COUP_FAST_UNROLL_10 _Pragma("GCC unroll 10")
#else
#define COUP_FAST_UNROLL_10
#endif
