// Four consecutive logical elements of a sample, a quad, in and out of registers: one load of 16
// bytes (float32) or 8 (float16, bfloat16) where the tensor allows, four scalar ones otherwise.
// A quad is also one Philox block, so whoever holds a quad holds exactly its noise.
//
// Knows raw pointers and strides; math/work.h says which quads a thread takes.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>

#include "math/layout.h"
#include "math/work.h"

namespace coup_fast::cuda {

// The bits of a quad as loaded. Loads are separated from conversion so that a kernel can issue the
// loads of all its tensors first and wait once.
struct RawQuad {
  uint32_t word[kQuad];  // float32: one element a word; 16-bit types: two
};

struct alignas(16) Quad {
  float at[kQuad];
};

// Calls visit(k, memory offset) for the elements of a quad, stepping over channel ends.
template <class Visit>
__device__ __forceinline__ void walk(const View& view, const Place& place, int pixels,
                                     Visit visit) {
  const int64_t start = place.sample * view.sample_stride;
  int channel = place.channel, pixel = place.pixel;
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    if (k >= place.count) break;
    visit(k, start + channel * view.channel_stride + pixel * view.pixel_stride);
    if (++pixel == pixels) {
      pixel = 0;
      ++channel;
    }
  }
}

template <bool kPacked>
__device__ __forceinline__ RawQuad load_raw(const View& view, const Place& place, int pixels) {
  RawQuad raw = {{0, 0, 0, 0}};
  if (view.data == nullptr) return raw;
  if constexpr (kPacked) {
    const int64_t offset = place.sample * view.sample_stride + place.first;
    if (view.dtype == DType::kFloat32) {
      const uint4 bits =
          *reinterpret_cast<const uint4*>(static_cast<const float*>(view.data) + offset);
      raw = {{bits.x, bits.y, bits.z, bits.w}};
    } else {
      const uint2 bits =
          *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(view.data) + offset);
      raw = {{bits.x, bits.y, 0, 0}};
    }
  } else if (view.dtype == DType::kFloat32) {
    walk(view, place, pixels, [&](int k, int64_t offset) {
      raw.word[k] = static_cast<const uint32_t*>(view.data)[offset];
    });
  } else {
    walk(view, place, pixels, [&](int k, int64_t offset) {
      const uint32_t bits = static_cast<const uint16_t*>(view.data)[offset];
      raw.word[k / 2] |= bits << (16 * (k % 2));
    });
  }
  return raw;
}

__device__ __forceinline__ Quad to_float(const RawQuad& raw, DType dtype) {
  Quad quad;
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    const uint16_t half = static_cast<uint16_t>(raw.word[k / 2] >> (16 * (k % 2)));
    quad.at[k] = dtype == DType::kFloat32   ? Lanes<float>::from_bits(raw.word[k])
                 : dtype == DType::kFloat16 ? float_of_float16(half)
                                            : float_of_bfloat16(half);
  }
  return quad;
}

template <bool kPacked>
__device__ __forceinline__ void store(const View& view, const Place& place, int pixels,
                                      const Quad& quad) {
  if (view.data == nullptr) return;
  if constexpr (kPacked) {
    const int64_t offset = place.sample * view.sample_stride + place.first;
    if (view.dtype == DType::kFloat32) {
      *reinterpret_cast<uint4*>(static_cast<float*>(view.data) + offset) =
          make_uint4(Lanes<float>::bits(quad.at[0]), Lanes<float>::bits(quad.at[1]),
                     Lanes<float>::bits(quad.at[2]), Lanes<float>::bits(quad.at[3]));
      return;
    }
    uint32_t half[kQuad];
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      half[k] = view.dtype == DType::kFloat16 ? float16_of_float(quad.at[k])
                                              : bfloat16_of_float(quad.at[k]);
    }
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(view.data) + offset) =
        make_uint2(half[0] | half[1] << 16, half[2] | half[3] << 16);
  } else {
    walk(view, place, pixels, [&](int k, int64_t offset) {
      store_from_float(view.data, view.dtype, offset, quad.at[k]);
    });
  }
}

// A place, and how quads go in and out of tensors there.
template <bool kPacked>
struct QuadAccess {
  Place place;
  int pixels;

  __device__ __forceinline__ QuadAccess(const Place& place_, int pixels_)
      : place(place_), pixels(pixels_) {
    if constexpr (!kPacked) locate(place, pixels);
  }
  __device__ __forceinline__ int count() const { return kPacked ? kQuad : place.count; }
  __device__ __forceinline__ RawQuad load_raw(const View& view) const {
    return cuda::load_raw<kPacked>(view, place, pixels);
  }
  __device__ __forceinline__ Quad load(const View& view) const {
    return to_float(load_raw(view), view.dtype);
  }
  __device__ __forceinline__ void store(const View& view, const Quad& quad) const {
    cuda::store<kPacked>(view, place, pixels, quad);
  }
};

// Whether every quad of every sample of the tensor is one aligned vector in memory.
inline bool is_packed(const View& view, int64_t channels, int64_t pixels, int64_t batch) {
  if (view.data == nullptr) return true;
  const int64_t vector_bytes = kQuad * size_of(view.dtype);
  return sample_is_dense(view, channels, pixels) && channels * pixels % kQuad == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(vector_bytes) == 0 &&
         (batch == 1 || view.sample_stride % kQuad == 0);
}

inline bool are_packed(std::initializer_list<const View*> views, int64_t channels, int64_t pixels,
                       int64_t batch) {
  return std::all_of(views.begin(), views.end(),
                     [=](const View* view) { return is_packed(*view, channels, pixels, batch); });
}

inline void check_sample(const char* op, int64_t numel) {
  STD_TORCH_CHECK(numel <= kMaxSample, "coup_fast::", op, ": a sample may have up to ", kMaxSample,
                  " elements on CUDA, got ", numel);
}

}  // namespace coup_fast::cuda
