// Kernels of reverse_step and its backward, compiled once per instruction set. Formulas:
// math/step.h.
#include "cpu/tile.h"
#include "cpu/tiles.h"

namespace coup_fast::COUP_FAST_ISA {
namespace {

struct Buffers {
  Buffer x, m, s, g, r, z, out;
};

// The inputs of a tile that the row's terms need; the others are null.
struct Inputs {
  const float *x, *m, *s, *g, *r, *z;

  template <class At>
  __attribute__((always_inline)) StepValues<Vec> load(const StepTerms& terms, At at) const {
    const Vec zero = {};
    return StepValues<Vec>{x != nullptr ? at.load(x) : zero,  m != nullptr ? at.load(m) : zero,
                           terms.learned ? at.load(s) : zero, terms.g ? at.load(g) : zero,
                           terms.r ? at.load(r) : zero,       z != nullptr ? at.load(z) : zero};
  }
};

Inputs read_inputs(const ReverseStep& params, const StepTerms& terms, const TileAccess& access,
                   const Tile& tile, bool noisy, Buffers& buffers) {
  const bool reads_x = terms.x || (terms.x0 && terms.x0_x);
  const bool reads_m = terms.m || (terms.x0 && terms.x0_m);
  Inputs in{};
  if (noisy && params.z.data == nullptr) {
    // Memory works while the processor makes noise.
    if (reads_x) access.prefetch(params.x);
    if (reads_m) access.prefetch(params.m);
    if (terms.g) access.prefetch(params.g);
    if (terms.r) access.prefetch(params.r);
    in.z = noise_of(params.keys, tile, buffers.z);
  } else if (noisy) {
    in.z = access.read(params.z, buffers.z);
  }
  if (reads_x) in.x = access.read(params.x, buffers.x);
  if (reads_m) in.m = access.read(params.m, buffers.m);
  if (terms.learned) in.s = access.read(params.s, buffers.s);
  if (terms.g) in.g = access.read(params.g, buffers.g);
  if (terms.r) in.r = access.read(params.r, buffers.r);
  return in;
}

}  // namespace

// One pass over a tile with the terms known to the compiler: x0 and x, or x and m, and of G, r and
// z those that are named. Bounds are applied even where they are infinite, which changes nothing.
template <bool kX0, bool kG, bool kR, bool kZ>
static void pass(const StepRow& row, const StepTerms&, float scale, const Inputs& in, float* out,
                 int count) {
  for_vectors(count, [=, &row](auto at) __attribute__((always_inline)) {
    constexpr StepTerms kTerms{kX0, kX0, kX0, true, !kX0, kG, kR, kZ, true, true, false};
    const Vec zero = {};
    const StepValues<Vec> values{at.load(in.x),
                                 at.load(in.m),
                                 zero,
                                 kG ? at.load(in.g) : zero,
                                 kR ? at.load(in.r) : zero,
                                 kZ ? at.load(in.z) : zero};
    at.store(out, step_value<Vec>(row, kTerms, scale, values));
  });
}

// The same for any terms, asked about at every vector.
static void any_pass(const StepRow& row, const StepTerms& terms, float scale, const Inputs& in,
                     float* out, int count) {
  for_vectors(count, [=, &row, &terms](auto at) __attribute__((always_inline)) {
    at.store(out, step_value<Vec>(row, terms, scale, in.load(terms, at)));
  });
}

using Pass = decltype(&any_pass);

template <bool kX0>
static Pass pass_for(const StepTerms& terms) {
  static constexpr Pass kPasses[] = {
      &pass<kX0, false, false, false>, &pass<kX0, false, false, true>,
      &pass<kX0, false, true, false>,  &pass<kX0, false, true, true>,
      &pass<kX0, true, false, false>,  &pass<kX0, true, false, true>,
      &pass<kX0, true, true, false>,   &pass<kX0, true, true, true>};
  return kPasses[(terms.g ? 4 : 0) + (terms.r ? 2 : 0) + (terms.z ? 1 : 0)];
}

static Pass pass_for(const StepTerms& terms) {
  if (terms.learned || !terms.x) return &any_pass;
  if (terms.x0 && terms.x0_x && terms.x0_m && !terms.m) return pass_for<true>(terms);
  if (!terms.x0 && terms.m) return pass_for<false>(terms);
  return &any_pass;
}

void reverse_step_tiles(const ReverseStep& params, const float* scales, int64_t begin,
                        int64_t end) {
  const StepRow row = step_row(params.coeffs);
  const StepTerms terms = step_terms(row, inputs_of(params));
  const Pass pass = pass_for(terms);
  const Tiling tiling(params.channels, params.pixels, params.x);
  Buffers buffers;
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile = tiling[item];
    const TileAccess access(tiling, tile);
    const Inputs in = read_inputs(params, terms, access, tile, terms.z, buffers);
    const float scale = scales != nullptr ? scales[tile.sample] : row.c;
    float* out = access.begin_write(params.out, buffers.out);
    pass(row, terms, scale, in, out, tile.count);
    access.finish_write(params.out, buffers.out);
  }
}

void guidance_square_segments(const ReverseStep& params, float* sums, int64_t begin, int64_t end) {
  const Tiling tiling(params.channels, params.pixels, View{});
  const int64_t segments = num_segments(params.channels * params.pixels);
  constexpr int64_t kTilesPerSegment = kSegment / kTile;
  Buffer buffer, lanes;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / segments, segment = item - sample * segments;
    const int64_t last = (segment + 1) * kTilesPerSegment;
    memset(lanes.data, 0, sizeof(lanes.data));
    for (int64_t t = segment * kTilesPerSegment; t < last && t < tiling.tiles; ++t) {
      const Tile tile = tiling.at(sample, t);
      const float* g = TileAccess(tiling, tile).read(params.g, buffer);
      add_products(g, g, tile.count, lanes.data);
    }
    sums[item] = sum_lanes(lanes.data);
  }
}

void guidance_dot_segments(const ReverseStepBackward& params, const GuidanceSample* samples,
                           float* sums, int64_t begin, int64_t end) {
  const ReverseStep& forward = params.forward;
  const StepRow row = step_row(forward.coeffs);
  const StepTerms terms = step_terms(row, inputs_of(forward));
  const Tiling tiling(forward.channels, forward.pixels, View{});
  const int64_t segments = num_segments(forward.channels * forward.pixels);
  constexpr int64_t kTilesPerSegment = kSegment / kTile;
  const bool noisy = terms.z && terms.out_clamp;
  Buffers buffers;
  Buffer lanes;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / segments, segment = item - sample * segments;
    const int64_t last = (segment + 1) * kTilesPerSegment;
    const float scale = samples[sample].scale;
    memset(lanes.data, 0, sizeof(lanes.data));
    for (int64_t t = segment * kTilesPerSegment; t < last && t < tiling.tiles; ++t) {
      const Tile tile = tiling.at(sample, t);
      const TileAccess access(tiling, tile);
      const float* gradient = access.read(params.grad, buffers.out);
      const Inputs in = read_inputs(forward, terms, access, tile, noisy, buffers);
      float* lane = lanes.data;
      for_vectors(tile.count, [=, &row, &terms](auto at) __attribute__((always_inline)) {
        const StepValues<Vec> values = in.load(terms, at);
        const StepFactors<Vec> factors = step_factors<Vec>(row, terms, scale, values.s);
        const Vec y = sum_gradient<Vec>(row, terms, factors, values, at.load(gradient));
        const Vec along = guided_gradient<Vec>(terms, factors, y);
        at.store(lane, Lanes<Vec>::fma(values.g, along, at.load(lane)));
      });
    }
    sums[item] = sum_lanes(lanes.data);
  }
}

void reverse_step_backward_tiles(const ReverseStepBackward& params, const GuidanceSample* samples,
                                 int64_t begin, int64_t end) {
  const ReverseStep& forward = params.forward;
  const StepRow row = step_row(forward.coeffs);
  const StepTerms terms = step_terms(row, inputs_of(forward));
  const Tiling tiling(forward.channels, forward.pixels, forward.x);
  Buffers buffers, gradients;
  const View* views[] = {&params.grad_x, &params.grad_m, &params.grad_s, &params.grad_g,
                         &params.grad_r};
  Buffer* staged[] = {&gradients.x, &gradients.m, &gradients.s, &gradients.g, &gradients.r};
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile = tiling[item];
    const TileAccess access(tiling, tile);
    const float* gradient = access.read(params.grad, buffers.out);
    const Inputs in =
        read_inputs(forward, terms, access, tile, gradient_needs_noise(terms), buffers);
    const GuidanceSample sample =
        samples != nullptr ? samples[tile.sample] : GuidanceSample{row.c, 0.0f};
    float* out[5];
    for (int k = 0; k < 5; ++k) out[k] = access.begin_write(*views[k], *staged[k]);
    for_vectors(tile.count, [&](auto at) __attribute__((always_inline)) {
      const StepValues<Vec> values = in.load(terms, at);
      const StepFactors<Vec> factors = step_factors<Vec>(row, terms, sample.scale, values.s);
      const Vec y = sum_gradient<Vec>(row, terms, factors, values, at.load(gradient));
      const StepGradients<Vec> grads = step_gradients<Vec>(row, terms, sample, factors, values, y);
      const Vec all[] = {grads.x, grads.m, grads.s, grads.g, grads.r};
      for (int k = 0; k < 5; ++k) at.store(out[k], all[k]);
    });
    for (int k = 0; k < 5; ++k) access.finish_write(*views[k], *staged[k]);
  }
}

}  // namespace coup_fast::COUP_FAST_ISA
