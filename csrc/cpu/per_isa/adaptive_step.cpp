// Kernels of adaptive_step and its backward, compiled once per instruction set. Formulas:
// math/adaptive_step.h.
#include "cpu/kernels.h"
#include "cpu/per_isa/tile.h"

namespace coup_fast::COUP_FAST_ISA {
namespace {

constexpr int64_t kStreamedBytes = 4 << 20;  // docs/kernels.md

// The masked gradient of a tile's vector.
struct Masked {
  const AdaptiveRow& row;
  const AdaptiveSample& sample;
  const float *grad, *x, *h;

  template <class At>
  __attribute__((always_inline)) Vec load(At at) const {
    if (!sample.alive) return at.load(grad);
    return adaptive_masked_gradient<Vec>(row, sample.alpha, at.load(x), at.load(h), at.load(grad));
  }
};

struct Buffers {
  Buffer x, h, h_ahead, out, square, change;
};

// <h, h> and <h, h - h_ahead> over the elements of a segment.
struct Sums {
  float square, change;
};

// Adds the products of whole tiles to the lanes, or starts them with these. A lane is read and
// written once for all tiles.
template <bool kStart>
void add_whole_tiles(const float* h, const float* ahead, int tiles, float* squares,
                     float* changes) {
  for (int lane = 0; lane < kTile; lane += kWidth) {
    Vec square = {}, change = {};
    if (!kStart) square = load(squares + lane), change = load(changes + lane);
    for (int i = lane; i < tiles * kTile; i += kTile) {
      const Vec value = load(h + i);
      square = Lanes<Vec>::fma(value, value, square);
      change = Lanes<Vec>::fma(value, value - load(ahead + i), change);
    }
    store(squares + lane, square);
    store(changes + lane, change);
  }
}

// Adds those of a tile, whole or not.
void add_tile(const float* h, const float* ahead, int count, float* squares, float* changes) {
  for_vectors(count, [=](auto at) __attribute__((always_inline)) {
    const Vec value = at.load(h);
    at.store(squares, Lanes<Vec>::fma(value, value, at.load(squares)));
    at.store(changes, Lanes<Vec>::fma(value, value - at.load(ahead), at.load(changes)));
  });
}

Sums sums_of_segment(const AdaptiveStep& params, const Tiling& tiling, int64_t item,
                     Buffers& buffers) {
  constexpr int64_t kTogether = 4;  // tiles; their lines share a set of the first-level cache
  const int64_t numel = tiling.channels * tiling.pixels, segments = num_segments(numel);
  const int64_t sample = item / segments, begin = (item - sample * segments) * kSegment;
  const int64_t end = begin + kSegment < numel ? begin + kSegment : numel;
  float *squares = buffers.square.data, *changes = buffers.change.data;
  for (int64_t first = begin; first < end;) {
    const Tile tile = tiling.at(sample, first / kTile);
    const TileAccess access(tiling, tile);
    const float* h = access.read(params.h, buffers.h);
    const float* ahead = access.read(params.h_ahead, buffers.h_ahead);
    const bool staged = h == buffers.h.data || ahead == buffers.h_ahead.data;
    const int64_t whole = (end - first) / kTile, most = staged ? 1 : kTogether;
    const int tiles = static_cast<int>(whole < most ? whole : most);
    if (tiles > 0 && first == begin) {
      add_whole_tiles<true>(h, ahead, tiles, squares, changes);
    } else if (tiles > 0) {
      add_whole_tiles<false>(h, ahead, tiles, squares, changes);
    } else {
      if (first == begin) memset(squares, 0, sizeof(buffers.square.data));
      if (first == begin) memset(changes, 0, sizeof(buffers.change.data));
      add_tile(h, ahead, tile.count, squares, changes);
    }
    first += tiles > 0 ? tiles * kTile : tile.count;
  }
  return Sums{sum_lanes(squares), sum_lanes(changes)};
}

// Whether x' is written past the caches: it would not stay in them, and reading what it replaces
// takes as long as writing it.
bool streams(const AdaptiveStep& params) {
  return params.batch * params.channels * params.pixels * size_of(params.x_next.dtype) >=
         kStreamedBytes;
}

// x' of a tile of a living sample.
template <bool kStreamed>
void update_values(const AdaptiveRow& coefficients, float alpha, const float* x, const float* h,
                   float* out, int count) {
  const AdaptiveRow row = coefficients;  // in registers: out might be where it came from
  for_vectors(count, [=](auto at) __attribute__((always_inline)) {
    const Vec value = adaptive_update<Vec>(row, alpha, at.load(x), at.load(h));
    if constexpr (kStreamed) {
      at.stream(out, value);
    } else {
      at.store(out, value);
    }
  });
}

void update_tile(const AdaptiveStep& params, const Tiling& tiling, const Tile& tile,
                 const AdaptiveRow& row, const AdaptiveSample& sample, bool streamed,
                 Buffers& buffers) {
  const TileAccess access(tiling, tile);
  const float* x = access.read(params.x, buffers.x);
  float* out = access.begin_write(params.x_next, buffers.out);
  if (!sample.alive) {
    memcpy(out, x, sizeof(float) * static_cast<size_t>(tile.count));
  } else {
    const float* h = access.read(params.h, buffers.h);
    const bool past = streamed && out != buffers.out.data && aligned(out);
    (past ? update_values<true> : update_values<false>)(row, sample.alpha, x, h, out, tile.count);
  }
  access.finish_write(params.x_next, buffers.out);
}

}  // namespace

void adaptive_step_samples(const AdaptiveStep& params, int64_t begin, int64_t end) {
  const AdaptiveRow row = row_at<AdaptiveRow>(params.coeffs);
  const Tiling logical(params.channels, params.pixels, View{});
  const Tiling tiling(params.channels, params.pixels, params.x);
  const bool streamed = streams(params);
  Buffers buffers;
  for (int64_t i = begin; i < end; ++i) {
    const Sums sums = sums_of_segment(params, logical, i, buffers);
    const AdaptiveSample sample = adaptive_sample(row, params.alive[i], sums.square, sums.change);
    params.alive_next[i] = sample.alive;
    params.alpha[i] = sample.alpha;
    for (int64_t item = i * tiling.tiles; item < (i + 1) * tiling.tiles; ++item) {
      update_tile(params, tiling, tiling[item], row, sample, streamed, buffers);
    }
  }
  if (streamed) end_streams();
}

void adaptive_step_sums(const AdaptiveStep& params, float* sums, int64_t begin, int64_t end) {
  const Tiling tiling(params.channels, params.pixels, View{});
  Buffers buffers;
  for (int64_t item = begin; item < end; ++item) {
    const Sums result = sums_of_segment(params, tiling, item, buffers);
    sums[2 * item] = result.square;
    sums[2 * item + 1] = result.change;
  }
}

void adaptive_step_tiles(const AdaptiveStep& params, const AdaptiveSample* samples, int64_t begin,
                         int64_t end) {
  const AdaptiveRow row = row_at<AdaptiveRow>(params.coeffs);
  const Tiling tiling(params.channels, params.pixels, params.x);
  const bool streamed = streams(params);
  Buffers buffers;
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile = tiling[item];
    update_tile(params, tiling, tile, row, samples[tile.sample], streamed, buffers);
  }
  if (streamed) end_streams();
}

void adaptive_step_dots(const AdaptiveStepBackward& params, const AdaptiveSample* samples,
                        float* sums, int64_t begin, int64_t end) {
  const AdaptiveStep& forward = params.forward;
  const AdaptiveRow row = row_at<AdaptiveRow>(forward.coeffs);
  const Tiling tiling(forward.channels, forward.pixels, View{});
  Buffer grad_buffer, x_buffer, h_buffer, lanes;
  for (int64_t item = begin; item < end; ++item) {
    memset(lanes.data, 0, sizeof(lanes.data));
    for_tiles_of_segment(tiling, item, [&](const Tile& tile) {
      const TileAccess access(tiling, tile);
      const float* h = access.read(forward.h, h_buffer);
      const Masked masked{row, samples[tile.sample], access.read(params.grad, grad_buffer),
                          access.read(forward.x, x_buffer), h};
      float* lane = lanes.data;
      for_vectors(tile.count, [=, &masked](auto at) __attribute__((always_inline)) {
        at.store(lane, Lanes<Vec>::fma(masked.load(at), at.load(h), at.load(lane)));
      });
    });
    sums[item] = sum_lanes(lanes.data);
  }
}

void adaptive_step_backward_tiles(const AdaptiveStepBackward& params, const AdaptiveSample* samples,
                                  const float* slopes, int64_t begin, int64_t end) {
  const AdaptiveStep& forward = params.forward;
  const AdaptiveRow row = row_at<AdaptiveRow>(forward.coeffs);
  const Tiling tiling(forward.channels, forward.pixels, forward.x);
  Buffer grad_buffer, x_buffer, h_buffer, ahead_buffer, outs[3];
  const View* views[] = {&params.grad_x, &params.grad_h, &params.grad_h_ahead};
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile = tiling[item];
    const TileAccess access(tiling, tile);
    const AdaptiveSample& sample = samples[tile.sample];
    const float slope = slopes[tile.sample];
    const float* h = access.read(forward.h, h_buffer);
    const float* ahead = access.read(forward.h_ahead, ahead_buffer);
    const Masked masked{row, sample, access.read(params.grad, grad_buffer),
                        access.read(forward.x, x_buffer), h};
    float* out[3];
    for (int k = 0; k < 3; ++k) out[k] = access.begin_write(*views[k], outs[k]);
    for_vectors(tile.count, [&](auto at) __attribute__((always_inline)) {
      const Vec y = masked.load(at), value = at.load(h), zero = {};
      at.store(out[0], y);
      at.store(out[1], !sample.alive
                           ? zero
                           : adaptive_gradient_h<Vec>(sample, slope, y, value, at.load(ahead)));
      at.store(out[2], !sample.alive ? zero : adaptive_gradient_h_ahead<Vec>(slope, value));
    });
    for (int k = 0; k < 3; ++k) access.finish_write(*views[k], outs[k]);
  }
}

}  // namespace coup_fast::COUP_FAST_ISA
