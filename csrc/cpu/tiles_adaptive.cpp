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

void adaptive_change_segments(const AdaptiveStep& params, float* sums, int64_t begin, int64_t end) {
  const Tiling tiling(params.channels, params.pixels, View{});
  Buffer h_buffer, ahead_buffer, square, change;
  for (int64_t item = begin; item < end; ++item) {
    memset(square.data, 0, sizeof(square.data));
    memset(change.data, 0, sizeof(change.data));
    for_tiles_of_segment(tiling, item, [&](const Tile& tile) {
      const TileAccess access(tiling, tile);
      const float* h = access.read(params.h, h_buffer);
      const float* ahead = access.read(params.h_ahead, ahead_buffer);
      float *squares = square.data, *changes = change.data;
      for_vectors(tile.count, [=](auto at) __attribute__((always_inline)) {
        const Vec value = at.load(h);
        at.store(squares, Lanes<Vec>::fma(value, value, at.load(squares)));
        at.store(changes, Lanes<Vec>::fma(value, value - at.load(ahead), at.load(changes)));
      });
    });
    sums[2 * item] = sum_lanes(square.data);
    sums[2 * item + 1] = sum_lanes(change.data);
  }
}

void adaptive_step_tiles(const AdaptiveStep& params, const AdaptiveSample* samples, int64_t begin,
                         int64_t end) {
  const AdaptiveRow row = adaptive_row(params.coeffs);
  const Tiling tiling(params.channels, params.pixels, params.x);
  Buffer x_buffer, h_buffer, out_buffer;
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile = tiling[item];
    const TileAccess access(tiling, tile);
    const AdaptiveSample& sample = samples[tile.sample];
    const float* x = access.read(params.x, x_buffer);
    float* out = access.begin_write(params.x_next, out_buffer);
    if (sample.alive) {
      const float* h = access.read(params.h, h_buffer);
      for_vectors(tile.count, [=, &row](auto at) __attribute__((always_inline)) {
        at.store(out, adaptive_update<Vec>(row, sample.alpha, at.load(x), at.load(h)));
      });
    } else {
      memcpy(out, x, sizeof(float) * static_cast<size_t>(tile.count));
    }
    access.finish_write(params.x_next, out_buffer);
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
