// Kernels of adaptive_step and its backward, compiled once per instruction set. Formulas:
// math/adaptive.h.
#include "cpu/tiles_adaptive.h"

#include "cpu/tile.h"

namespace coup_fast::COUP_FAST_ISA {
namespace {

constexpr int64_t kTilesPerSegment = kSegment / kTile;

// Calls visit(tile) for the tiles of segment number `item` of the batch, in order.
template <class Visit>
void for_tiles_of_segment(const Tiling& tiling, int64_t item, Visit visit) {
  const int64_t segments = num_segments(tiling.channels * tiling.pixels);
  const int64_t sample = item / segments, segment = item - sample * segments;
  const int64_t last = (segment + 1) * kTilesPerSegment;
  for (int64_t t = segment * kTilesPerSegment; t < last && t < tiling.tiles; ++t) {
    visit(tiling.at(sample, t));
  }
}

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

}  // namespace

namespace {

struct Buffers {
  Buffer x, h, h_ahead, out, square, change;
};

// <h, h> and <h, h - h_ahead> over the elements of a segment.
struct Sums {
  float square, change;
};

Sums sums_of_segment(const AdaptiveStep& params, const Tiling& tiling, int64_t item,
                     Buffers& buffers) {
  float *squares = buffers.square.data, *changes = buffers.change.data;
  bool first = true;
  for_tiles_of_segment(tiling, item, [&](const Tile& tile) {
    const TileAccess access(tiling, tile);
    access.prefetch(params.x);  // the update will want it
    const float* h = access.read(params.h, buffers.h);
    const float* ahead = access.read(params.h_ahead, buffers.h_ahead);
    if (first && tile.count < kTile) {
      memset(squares, 0, sizeof(buffers.square.data));
      memset(changes, 0, sizeof(buffers.change.data));
    }
    const bool add = !first || tile.count < kTile;
    const Vec zero = {};
    for_vectors(tile.count, [=](auto at) __attribute__((always_inline)) {
      const Vec value = at.load(h);
      const Vec square = add ? at.load(squares) : zero, change = add ? at.load(changes) : zero;
      at.store(squares, Lanes<Vec>::fma(value, value, square));
      at.store(changes, Lanes<Vec>::fma(value, value - at.load(ahead), change));
    });
    first = false;
  });
  return Sums{sum_lanes(squares), sum_lanes(changes)};
}

void update_tile(const AdaptiveStep& params, const Tiling& tiling, const Tile& tile,
                 const AdaptiveRow& row, const AdaptiveSample& sample, Buffers& buffers) {
  const TileAccess access(tiling, tile);
  const float* x = access.read(params.x, buffers.x);
  float* out = access.begin_write(params.x_next, buffers.out);
  if (sample.alive) {
    const float* h = access.read(params.h, buffers.h);
    const float alpha = sample.alpha;
    for_vectors(tile.count, [=, &row](auto at) __attribute__((always_inline)) {
      at.store(out, adaptive_update<Vec>(row, alpha, at.load(x), at.load(h)));
    });
  } else {
    memcpy(out, x, sizeof(float) * static_cast<size_t>(tile.count));
  }
  access.finish_write(params.x_next, buffers.out);
}

}  // namespace

void adaptive_samples(const AdaptiveStep& params, int64_t begin, int64_t end) {
  const AdaptiveRow row = adaptive_row(params.coeffs);
  const Tiling logical(params.channels, params.pixels, View{});
  const Tiling tiling(params.channels, params.pixels, params.x);
  Buffers buffers;
  for (int64_t i = begin; i < end; ++i) {
    const Sums sums = sums_of_segment(params, logical, i, buffers);
    const AdaptiveSample sample = adaptive_sample(row, params.alive[i], sums.square, sums.change);
    params.alive_next[i] = sample.alive;
    params.alpha[i] = sample.alpha;
    for (int64_t item = i * tiling.tiles; item < (i + 1) * tiling.tiles; ++item) {
      update_tile(params, tiling, tiling[item], row, sample, buffers);
    }
  }
}

void adaptive_change_segments(const AdaptiveStep& params, float* sums, int64_t begin, int64_t end) {
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
  const AdaptiveRow row = adaptive_row(params.coeffs);
  const Tiling tiling(params.channels, params.pixels, params.x);
  Buffers buffers;
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile = tiling[item];
    update_tile(params, tiling, tile, row, samples[tile.sample], buffers);
  }
}

void adaptive_dot_segments(const AdaptiveStepBackward& params, const AdaptiveSample* samples,
                           float* sums, int64_t begin, int64_t end) {
  const AdaptiveStep& forward = params.forward;
  const AdaptiveRow row = adaptive_row(forward.coeffs);
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

void adaptive_backward_tiles(const AdaptiveStepBackward& params, const AdaptiveSample* samples,
                             const float* slopes, int64_t begin, int64_t end) {
  const AdaptiveStep& forward = params.forward;
  const AdaptiveRow row = adaptive_row(forward.coeffs);
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
