// Quads, four consecutive logical elements of a sample, in and out of registers. A quad is also one
// Philox block, so whoever holds a quad holds exactly its noise.
//
// ScalarAccess takes one quad of any tensor, element by element. StripAccess takes a strip of quads
// of one sample at equal spacing by vectors: a quad of a dense sample is 16 bytes of float32 or 8
// of a 16-bit type, and neighbouring threads take neighbouring vectors. In channels_last memory of
// three channels the quads of the same four pixels are twelve neighbours, three vectors, which the
// strip of the three channels reads and writes whole, transposing in registers. So tensors of
// either layout and any of the three types mix in one kernel, all by vectors.
//
// Everything is read once, so loads are marked for early eviction from the caches.
//
// Knows raw pointers and strides; cuda/index.h says which quads a thread takes.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>

#include "cuda/index.h"
#include "math/layout.h"
#include "math/normal.h"

namespace coup_fast::cuda {

struct alignas(16) Quad {
  float at[kQuad];
};

template <int kCount>
struct Quads {
  Quad quad[kCount];
};

// The bits of quads as loaded; a 16-bit type has its four elements in the first two words. Loads
// are separated from conversion so that a kernel can issue those of all its tensors and wait once.
template <int kCount>
struct RawQuads {
  uint32_t word[kCount][kQuad];
};

// The type is looked at once, not once an element.
template <int kCount>
__device__ __forceinline__ Quads<kCount> to_float(const RawQuads<kCount>& raw, DType dtype) {
  Quads<kCount> quads;
  const auto convert = [&](auto element) {
#pragma unroll
    for (int q = 0; q < kCount; ++q) {
#pragma unroll
      for (int k = 0; k < kQuad; ++k) quads.quad[q].at[k] = element(raw.word[q], k);
    }
  };
  const auto half = [](const uint32_t* word, int k) {
    return static_cast<uint16_t>(word[k / 2] >> (16 * (k % 2)));
  };
  if (dtype == DType::kFloat32) {
    convert([](const uint32_t* word, int k) { return Lanes<float>::from_bits(word[k]); });
  } else if (dtype == DType::kFloat16) {
    convert([=](const uint32_t* word, int k) { return float_of_float16(half(word, k)); });
  } else {
    convert([=](const uint32_t* word, int k) { return float_of_bfloat16(half(word, k)); });
  }
  return quads;
}

// The bits of two elements of a 16-bit type, the first in the lower half.
__device__ __forceinline__ uint32_t to_halves(float first, float second, DType dtype) {
  return dtype == DType::kFloat16
             ? float16_of_float(first) | uint32_t{float16_of_float(second)} << 16
             : bfloat16_of_float(first) | uint32_t{bfloat16_of_float(second)} << 16;
}

// --- one quad of any tensor ---------------------------------------------------------------------

struct ScalarAccess {
  static constexpr int kCount = 1;
  Place place;
  int pixels;

  __device__ __forceinline__ ScalarAccess(const Place& place_, int pixels_)
      : place(place_), pixels(pixels_) {
    locate(place, pixels);
  }

  __device__ __forceinline__ int64_t sample() const { return place.sample; }
  __device__ __forceinline__ uint64_t block(int) const {
    return static_cast<unsigned>(place.first) / kBlock;
  }
  __device__ __forceinline__ bool holds(int, int k) const { return k < place.count; }

  // Calls visit(k, memory offset) for the elements, stepping over channel ends.
  template <class Visit>
  __device__ __forceinline__ void walk(const View& view, Visit visit) const {
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

  __device__ __forceinline__ RawQuads<1> load_raw(const View& view) const {
    RawQuads<1> raw = {};
    if (view.data == nullptr) return raw;
    if (view.dtype == DType::kFloat32) {
      walk(view, [&](int k, int64_t offset) {
        raw.word[0][k] = static_cast<const uint32_t*>(view.data)[offset];
      });
    } else {
      walk(view, [&](int k, int64_t offset) {
        const uint32_t bits = static_cast<const uint16_t*>(view.data)[offset];
        raw.word[0][k / 2] |= bits << (16 * (k % 2));
      });
    }
    return raw;
  }

  __device__ __forceinline__ void store(const View& view, const Quads<1>& quads) const {
    if (view.data == nullptr) return;
    walk(view, [&](int k, int64_t offset) {
      store_from_float(view.data, view.dtype, offset, quads.quad[0].at[k]);
    });
  }
};

// --- strips of whole quads ----------------------------------------------------------------------

constexpr int kStripChannels = 3;  // of the channels_last tensors that strips can read

// Up to kCount quads, kSpacing logical elements apart; kSpacing 0: `pixels`.
template <int kCount_, int kSpacing>
struct StripAccess {
  static constexpr int kCount = kCount_;
  int64_t sample_;
  int first;   // logical index of the first quad
  int quads;   // those inside the sample, 1 to kCount
  int pixels;  // of a channel, or of what stands for one

  __device__ __forceinline__ int64_t sample() const { return sample_; }
  __device__ __forceinline__ int spacing() const { return kSpacing == 0 ? pixels : kSpacing; }
  __device__ __forceinline__ bool has(int q) const { return q == 0 || q < quads; }
  __device__ __forceinline__ bool holds(int q, int) const { return has(q); }
  __device__ __forceinline__ uint64_t block(int q) const {
    return static_cast<unsigned>(first + q * spacing()) / kBlock;
  }

  // Whether the view is channels_last; then the strip is that of all channels.
  __device__ __forceinline__ static bool is_interleaved(const View& view) {
    return kCount == kStripChannels && static_cast<int>(view.pixel_stride) != 1;
  }

  // The view's vector number q of the strip.
  template <class Vector, class Element>
  __device__ __forceinline__ Vector* vector(const View& view, int q) const {
    Element* sample = static_cast<Element*>(view.data) + sample_ * view.sample_stride;
    const bool interleaved = is_interleaved(view);
    Element* start = sample + (interleaved ? first * kStripChannels : first);
    return reinterpret_cast<Vector*>(start + q * (interleaved ? kQuad : spacing()));
  }

  // Calls visit(quad, element of it, number among the strip's twelve neighbours in memory).
  template <class Visit>
  __device__ __forceinline__ static void transpose(Visit visit) {
#pragma unroll
    for (int q = 0; q < kCount; ++q) {
#pragma unroll
      for (int k = 0; k < kQuad; ++k) visit(q, k, k * kCount + q);
    }
  }

  __device__ __forceinline__ RawQuads<kCount> load_raw(const View& view) const {
    RawQuads<kCount> raw = {};
    if (view.data == nullptr) return raw;
    if (view.dtype == DType::kFloat32) {
#pragma unroll
      for (int q = 0; q < kCount; ++q) {
        if (!has(q)) continue;
        const uint4 bits = __ldcs(vector<const uint4, const float>(view, q));
        raw.word[q][0] = bits.x, raw.word[q][1] = bits.y;
        raw.word[q][2] = bits.z, raw.word[q][3] = bits.w;
      }
    } else {
#pragma unroll
      for (int q = 0; q < kCount; ++q) {
        if (!has(q)) continue;
        const uint2 bits = __ldcs(vector<const uint2, const uint16_t>(view, q));
        raw.word[q][0] = bits.x, raw.word[q][1] = bits.y;
      }
    }
    return raw;
  }

  // To logical order, from that in which load_raw found them.
  __device__ __forceinline__ Quads<kCount> in_order(const View& view,
                                                    const Quads<kCount>& loaded) const {
    if (!is_interleaved(view)) return loaded;
    Quads<kCount> out;
    transpose(
        [&](int q, int k, int n) { out.quad[q].at[k] = loaded.quad[n / kQuad].at[n % kQuad]; });
    return out;
  }

  __device__ __forceinline__ void store(const View& view, const Quads<kCount>& given) const {
    if (view.data == nullptr) return;
    Quads<kCount> out = given;
    if (is_interleaved(view)) {
      transpose(
          [&](int q, int k, int n) { out.quad[n / kQuad].at[n % kQuad] = given.quad[q].at[k]; });
    }
#pragma unroll
    for (int q = 0; q < kCount; ++q) {
      if (!has(q)) continue;
      const float* at = out.quad[q].at;
      if (view.dtype == DType::kFloat32) {
        *vector<uint4, float>(view, q) =
            make_uint4(Lanes<float>::bits(at[0]), Lanes<float>::bits(at[1]),
                       Lanes<float>::bits(at[2]), Lanes<float>::bits(at[3]));
      } else {
        *vector<uint2, uint16_t>(view, q) =
            make_uint2(to_halves(at[0], at[1], view.dtype), to_halves(at[2], at[3], view.dtype));
      }
    }
  }
};

// One quad of tensors all of whose samples are dense.
using PackedAccess = StripAccess<1, 0>;
// Two quads of such tensors, half a sample apart: one key schedule, one set of constants for both.
using PairAccess = StripAccess<2, 0>;
// Four pixels of three channels, of tensors of either layout.
using PixelsAccess = StripAccess<kStripChannels, 0>;

template <class Io>
__device__ __forceinline__ Quads<Io::kCount> finish_load(const Io& io, const View& view,
                                                         const RawQuads<Io::kCount>& raw) {
  if constexpr (Io::kCount == kStripChannels) return io.in_order(view, to_float(raw, view.dtype));
  return to_float(raw, view.dtype);
}

template <class Io>
__device__ __forceinline__ Quads<Io::kCount> load(const Io& io, const View& view) {
  return finish_load(io, view, io.load_raw(view));
}

// Calls visit(quad, element of it) for all of them, also for those outside the sample.
template <class Io, class Visit>
__device__ __forceinline__ void each(const Io&, Visit visit) {
#pragma unroll
  for (int q = 0; q < Io::kCount; ++q) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) visit(q, k);
  }
}

// --- the noise of quads --------------------------------------------------------------------------

// The normals of the quads' Philox blocks. They are of one sample: one key, one key schedule.
template <class Io>
__device__ __forceinline__ Quads<Io::kCount> noise_at(const Io& io, const int64_t* keys) {
  const NoiseKey key{static_cast<uint64_t>(keys[2 * io.sample()]),
                     static_cast<uint64_t>(keys[2 * io.sample() + 1])};
  const PhiloxKeys<float> schedule = philox_keys<float>(key.key);
  Quads<Io::kCount> quads;
#pragma unroll
  for (int q = 0; q < Io::kCount; ++q) {
    const uint64_t counter = key.offset + io.block(q);
    const Normals<float> normals =
        normals_of<float>(philox<float>(counter, counter >> 32, 0, 0, schedule));
#pragma unroll
    for (int k = 0; k < kQuad; ++k) quads.quad[q].at[k] = normals.value[k];
  }
  return quads;
}

// z, given or drawn. wanted is uniform over the grid.
template <class Io>
__device__ __forceinline__ Quads<Io::kCount> noise_of(const Io& io, bool wanted, const View& given,
                                                      const int64_t* keys) {
  if (!wanted) return {};
  return given.data != nullptr ? load(io, given) : noise_at(io, keys);
}

// --- which access a call can have, decided on the host ------------------------------------------

enum class Access { kScalar, kPacked, kPairs, kPixels };

inline bool is_aligned(const View& view, int64_t batch) {
  const int64_t vector_bytes = kQuad * size_of(view.dtype);
  return reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(vector_bytes) == 0 &&
         (batch == 1 || view.sample_stride % kQuad == 0);
}

// Whether every quad of every sample is one aligned vector in memory.
inline bool is_packed(const View& view, int64_t channels, int64_t pixels, int64_t batch) {
  if (view.data == nullptr) return true;
  return sample_is_dense(view, channels, pixels) && channels * pixels % kQuad == 0 &&
         is_aligned(view, batch);
}

// Whether every four pixels of all channels are three aligned vectors in memory.
inline bool is_interleaved(const View& view, int64_t channels, int64_t pixels, int64_t batch) {
  return channels == kStripChannels && pixels % kQuad == 0 && view.channel_stride == 1 &&
         view.pixel_stride == kStripChannels && is_aligned(view, batch);
}

// The best access that all tensors of a call allow, but kPairs, which a kernel may have for
// kPacked. Beside a channels_last tensor the channels of a dense one begin on vectors too:
// is_interleaved asks for whole quads of pixels.
inline Access access_of(std::initializer_list<const View*> views, int64_t channels, int64_t pixels,
                        int64_t batch) {
  Access best = Access::kPacked;
  for (const View* view : views) {
    if (is_packed(*view, channels, pixels, batch)) continue;
    if (!is_interleaved(*view, channels, pixels, batch)) return Access::kScalar;
    best = Access::kPixels;
  }
  return best;
}

inline void check_sample(const char* op, int64_t numel) {
  STD_TORCH_CHECK(numel <= kMaxSample, "coup_fast::", op, ": a sample may have up to ", kMaxSample,
                  " elements on CUDA, got ", numel);
}

}  // namespace coup_fast::cuda
