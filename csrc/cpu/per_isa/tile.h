// A tile: up to kTile consecutive logical elements of one sample, small enough that everything
// about it stays in the first-level cache. Tensors that are not consecutive float32 are staged into
// buffers; noise is generated into one; then one pass over vectors does the arithmetic. For
// cpu/per_isa only (one namespace per instruction set). Knows raw pointers and strides.
#pragma once

#include "cpu/kernels.h"
#include "cpu/per_isa/noise.h"
#include "math/layout.h"
#include "math/reduce.h"

namespace coup_fast::COUP_FAST_ISA {

struct alignas(64) Buffer {
  float data[kTile + 4 * kVectorWidth];  // noise comes in groups of 4 kVectorWidth
};

struct Tile {
  int64_t sample;
  int64_t first;  // logical index of the first element; a multiple of kTile
  int count;
};

// The tiles of a batch, numbered. Where the channels of a pixel are neighbours in memory, tiles of
// the same pixels follow each other, so that a cache line is used up while it is there.
struct Tiling {
  int64_t channels, pixels;
  int64_t tiles;  // of a sample
  bool channels_inner;

  Tiling(int64_t channels_, int64_t pixels_, const View& state)
      : channels(channels_),
        pixels(pixels_),
        tiles((channels_ * pixels_ + kTile - 1) / kTile),
        channels_inner(channels_ > 1 && pixels_ % kTile == 0 && state.channel_stride == 1) {}

  Tile operator[](int64_t item) const {
    const int64_t sample = item / tiles;
    int64_t tile = item - sample * tiles;
    if (channels_inner) {
      const int64_t group = tile / channels;
      tile = (tile - group * channels) * (pixels / kTile) + group;
    }
    return at(sample, tile);
  }

  Tile at(int64_t sample, int64_t tile) const {
    const int64_t first = tile * kTile, left = channels * pixels - first;
    return Tile{sample, first, static_cast<int>(left < kTile ? left : kTile)};
  }
};

// Calls visit(tile) for the tiles of segment number `item` of the batch (math/reduce.h), in order.
template <class Visit>
static inline __attribute__((always_inline)) void for_tiles_of_segment(const Tiling& tiling,
                                                                       int64_t item, Visit visit) {
  constexpr int64_t kTiles = kSegment / kTile;
  const int64_t segments = num_segments(tiling.channels * tiling.pixels);
  const int64_t sample = item / segments, segment = item - sample * segments;
  const int64_t last = (segment + 1) * kTiles;
  for (int64_t t = segment * kTiles; t < last && t < tiling.tiles; ++t) {
    visit(tiling.at(sample, t));
  }
}

// Some consecutive logical elements that are equally spaced in memory.
struct Run {
  const View& view;
  int64_t offset;  // of the first, in elements
  int64_t stride;
  int count;
};

static inline void gather(const Run& run, float* out) {
  const int64_t stride = run.stride;
  if (run.view.dtype == DType::kFloat32) {
    const float* data = static_cast<const float*>(run.view.data) + run.offset;
    for (int i = 0; i < run.count; ++i) out[i] = data[i * stride];
    return;
  }
  const uint16_t* data = static_cast<const uint16_t*>(run.view.data) + run.offset;
  const bool half = run.view.dtype == DType::kFloat16;
  int i = 0;
  if (stride == 1) {
    for (; i + kWidth <= run.count; i += kWidth) {
      store(out + i, half ? widen_float16(data + i) : widen_bfloat16(data + i));
    }
  }
  for (; i < run.count; ++i) {
    out[i] = half ? float_of_float16(data[i * stride]) : float_of_bfloat16(data[i * stride]);
  }
}

static inline void scatter(const Run& run, const float* from) {
  if (run.view.dtype == DType::kFloat32) {
    float* data = static_cast<float*>(run.view.data) + run.offset;
    for (int i = 0; i < run.count; ++i) data[i * run.stride] = from[i];
    return;
  }
  uint16_t* data = static_cast<uint16_t*>(run.view.data) + run.offset;
  const bool half = run.view.dtype == DType::kFloat16;
  for (int i = 0; i < run.count; ++i) {
    data[i * run.stride] = half ? float16_of_float(from[i]) : bfloat16_of_float(from[i]);
  }
}

// Reads and writes of tensors at one tile.
class TileAccess {
 public:
  TileAccess(const Tiling& tiling, const Tile& tile) : tiling_(tiling), tile_(tile) {}

  // The tile's elements of a tensor as floats: where they are, or staged. Null if it is absent.
  const float* read(const View& view, Buffer& buffer) const {
    if (view.data == nullptr) return nullptr;
    if (direct(view)) return static_cast<const float*>(view.data) + dense_offset(view);
    runs(view, [&](const Run& run, int done) { gather(run, buffer.data + done); });
    return buffer.data;
  }

  // Asks for the tile's elements ahead of time, where they are consecutive.
  void prefetch(const View& view) const {
    if (view.data == nullptr || !dense(view)) return;
    const int64_t size = size_of(view.dtype);
    const char* data = static_cast<const char*>(view.data) + dense_offset(view) * size;
    for (int64_t byte = 0; byte < tile_.count * size; byte += 64) __builtin_prefetch(data + byte);
  }

  // Where to write the tile's elements: the tensor itself or the buffer, which finish_write()
  // copies over.
  float* begin_write(const View& view, Buffer& buffer) const {
    if (view.data == nullptr || !direct(view)) return buffer.data;
    return static_cast<float*>(view.data) + dense_offset(view);
  }
  void finish_write(const View& view, const Buffer& buffer) const {
    if (view.data == nullptr || direct(view)) return;
    runs(view, [&](const Run& run, int done) { scatter(run, buffer.data + done); });
  }

 private:
  bool dense(const View& view) const {
    return sample_is_dense(view, tiling_.channels, tiling_.pixels);
  }
  bool direct(const View& view) const { return view.dtype == DType::kFloat32 && dense(view); }
  int64_t dense_offset(const View& view) const {
    return tile_.sample * view.sample_stride + tile_.first;
  }

  // Calls visit(run, elements before it) for the parts of the tile that are equally spaced.
  template <class Visit>
  void runs(const View& view, Visit visit) const {
    if (dense(view)) return visit(Run{view, dense_offset(view), 1, tile_.count}, 0);
    for (int done = 0; done < tile_.count;) {
      const int64_t i = tile_.first + done;
      const int64_t left = tiling_.pixels - i % tiling_.pixels;  // of this channel
      const int count = left < tile_.count - done ? static_cast<int>(left) : tile_.count - done;
      visit(Run{view, offset_of(view, tile_.sample, i, tiling_.pixels), view.pixel_stride, count},
            done);
      done += count;
    }
  }

  const Tiling& tiling_;
  const Tile& tile_;
};

static inline NoiseKey noise_key(const int64_t* keys, int64_t sample) {
  return NoiseKey{static_cast<uint64_t>(keys[2 * sample]),
                  static_cast<uint64_t>(keys[2 * sample + 1])};
}

// The noise of a tile into a buffer.
static inline const float* noise_of(const int64_t* keys, const Tile& tile, Buffer& buffer) {
  const int group = kBlock * kWidth;
  generate(noise_key(keys, tile.sample), static_cast<uint64_t>(tile.first / kBlock),
           (tile.count + group - 1) / group, buffer.data);
  return buffer.data;
}

// A whole vector of a tile, or what is left at its end.
struct Whole {
  int i;
  Vec load(const float* data) const { return COUP_FAST_ISA::load(data + i); }
  void store(float* data, Vec value) const { COUP_FAST_ISA::store(data + i, value); }
  void stream(float* data, Vec value) const { COUP_FAST_ISA::stream(data + i, value); }
};

struct Rest {
  int i, count;
  Vec load(const float* data) const {
    Vec value = {};
    for (int k = 0; k < count; ++k) value[k] = data[i + k];
    return value;
  }
  void store(float* data, Vec value) const {
    for (int k = 0; k < count; ++k) data[i + k] = value[k];
  }
  void stream(float* data, Vec value) const { store(data, value); }
};

// Calls body(vector) for all vectors of a tile of `count` elements.
template <class Body>
static inline __attribute__((always_inline)) void for_vectors(int count, Body body) {
  int i = 0;
  for (; i + kWidth <= count; i += kWidth) body(Whole{i});
  if (i < count) body(Rest{i, count - i});
}

// Adds a_i b_i of a tile to the lanes of a reduction.
static inline void add_products(const float* a, const float* b, int count, float* lanes) {
  for_vectors(count, [=](auto at) {
    at.store(lanes, Lanes<Vec>::fma(at.load(a), at.load(b), at.load(lanes)));
  });
}

// The halving tree over the lanes, two of its levels at a time. Uses them as scratch.
static inline float sum_lanes(float* lanes) {
  int width = kReduceLanes / 4;
  for (; width >= kWidth; width /= 4) {
    for (int j = 0; j < width; j += kWidth) {
      const float* at = lanes + j;
      store(lanes + j,
            (load(at) + load(at + 2 * width)) + (load(at + width) + load(at + 3 * width)));
    }
  }
  return halving_tree(lanes, 4 * width);
}

}  // namespace coup_fast::COUP_FAST_ISA
