// Kernels of reverse_step and its backward, compiled once per instruction set. Formulas:
// math/reverse_step.h.
#include "cpu/kernels.h"
#include "cpu/per_isa/tile.h"

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

bool reads_x(const StepTerms& terms) { return terms.x || (terms.x0 && terms.x0_x); }
bool reads_m(const StepTerms& terms) { return terms.m || (terms.x0 && terms.x0_m); }

// Memory works while the processor makes noise.
void prefetch(const ReverseStep& params, const StepTerms& terms, const TileAccess& access) {
  if (reads_x(terms)) access.prefetch(params.x);
  if (reads_m(terms)) access.prefetch(params.m);
  if (terms.g) access.prefetch(params.g);
  if (terms.r) access.prefetch(params.r);
}

// All but the noise.
Inputs read_terms(const ReverseStep& params, const StepTerms& terms, const TileAccess& access,
                  Buffers& buffers) {
  Inputs in{};
  if (reads_x(terms)) in.x = access.read(params.x, buffers.x);
  if (reads_m(terms)) in.m = access.read(params.m, buffers.m);
  if (terms.learned) in.s = access.read(params.s, buffers.s);
  if (terms.g) in.g = access.read(params.g, buffers.g);
  if (terms.r) in.r = access.read(params.r, buffers.r);
  return in;
}

Inputs read_inputs(const ReverseStep& params, const StepTerms& terms, const TileAccess& access,
                   const Tile& tile, bool noisy, Buffers& buffers) {
  const bool drawn = noisy && params.z.data == nullptr;
  if (drawn) prefetch(params, terms, access);
  const float* z = drawn   ? noise_of(params.keys, tile, buffers.z)
                   : noisy ? access.read(params.z, buffers.z)
                           : nullptr;
  Inputs in = read_terms(params, terms, access, buffers);
  in.z = z;
  return in;
}

}  // namespace

// Whether x' is the sum itself: no bounds, times 1, plus +0.
static bool is_bare(const StepRow& row) {
  return !bounded(row.out_lo, row.out_hi) && row.out_scale == 1.0f &&
         Lanes<float>::bits(row.out_bias) == 0;
}

// x' of one vector with the terms known to the compiler: x0 and x, or x and m, and of G, r and z
// those that are named. kBare: see is_bare(). Other bounds are applied even where they are
// infinite, which changes nothing.
template <bool kX0, bool kG, bool kR, bool kZ, bool kBare, class At>
static inline __attribute__((always_inline)) Vec value_of(const StepRow& row, float scale,
                                                          const Inputs& in, At at, Vec z) {
  constexpr StepTerms kTerms{kX0, kX0, kX0, true, !kX0, kG, kR, kZ, true, true, false};
  const Vec zero = {};
  const StepValues<Vec> values{
      at.load(in.x), at.load(in.m), zero, kG ? at.load(in.g) : zero, kR ? at.load(in.r) : zero, z};
  if (!kBare) return step_value<Vec>(row, kTerms, scale, values);
  const StepFactors<Vec> factors = step_factors<Vec>(row, kTerms, scale, zero);
  return step_sum<Vec>(row, kTerms, factors, values) + zero;  // as the map would: -0 becomes +0
}

// One pass over a tile.
template <bool kX0, bool kG, bool kR, bool kZ>
static void pass(const StepRow& coefficients, const StepTerms&, float scale, const Inputs& in,
                 float* out, int count) {
  const StepRow row = coefficients;  // in registers: for all the compiler knows, out holds them
  for_vectors(count, [=](auto at) __attribute__((always_inline)) {
    const Vec z = kZ ? at.load(in.z) : Vec{};
    at.store(out, value_of<kX0, kG, kR, kZ, false>(row, scale, in, at, z));
  });
}

// The same over a whole tile, its noise used where it is made.
template <bool kX0, bool kG, bool kR, bool kBare>
static void drawing_pass(const StepRow& row, float scale, const Inputs& in, float* out,
                         NoiseKey noise, uint64_t block) {
  generate(noise, block, kTile / kGroup, [=, &row](int i, Vec z) __attribute__((always_inline)) {
    store(out + i, value_of<kX0, kG, kR, true, kBare>(row, scale, in, Whole{i}, z));
  });
}

// pass() for any terms, asked about at every vector.
static void any_pass(const StepRow& row, const StepTerms& terms, float scale, const Inputs& in,
                     float* out, int count) {
  for_vectors(count, [=, &row, &terms](auto at) __attribute__((always_inline)) {
    at.store(out, step_value<Vec>(row, terms, scale, in.load(terms, at)));
  });
}

// The passes for the terms of a call. drawing: null where the noise is not drawn, or the terms are
// unusual.
struct Passes {
  decltype(&any_pass) plain;
  decltype(&drawing_pass<false, false, false, false>) drawing;
};

template <bool kX0, bool kG, bool kR, bool kBare>
static Passes passes_for(bool noisy) {
  if (noisy) return Passes{&pass<kX0, kG, kR, true>, &drawing_pass<kX0, kG, kR, kBare>};
  return Passes{&pass<kX0, kG, kR, false>, nullptr};
}

template <bool kX0, bool kBare>
static Passes passes_for(const StepTerms& terms) {
  if (terms.g && terms.r) return passes_for<kX0, true, true, kBare>(terms.z);
  if (terms.g) return passes_for<kX0, true, false, kBare>(terms.z);
  if (terms.r) return passes_for<kX0, false, true, kBare>(terms.z);
  return passes_for<kX0, false, false, kBare>(terms.z);
}

static Passes passes_for(const ReverseStep& params, const StepRow& row, const StepTerms& terms) {
  Passes passes{&any_pass, nullptr};
  if (terms.learned || !terms.x) return passes;
  const bool bare = is_bare(row);
  if (terms.x0 && terms.x0_x && terms.x0_m && !terms.m) {
    passes = bare ? passes_for<true, true>(terms) : passes_for<true, false>(terms);
  }
  if (!terms.x0 && terms.m) {
    passes = bare ? passes_for<false, true>(terms) : passes_for<false, false>(terms);
  }
  if (params.z.data != nullptr) passes.drawing = nullptr;
  return passes;
}

void reverse_step_tiles(const ReverseStep& params, const float* scales, int64_t begin,
                        int64_t end) {
  const StepRow row = step_row(params.coeffs);
  const StepTerms terms = step_terms(row, inputs_of(params));
  const Passes passes = passes_for(params, row, terms);
  const Tiling tiling(params.channels, params.pixels, params.x);
  Buffers buffers;
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile = tiling[item];
    const TileAccess access(tiling, tile);
    const float scale = scales != nullptr ? scales[tile.sample] : row.c;
    float* out = access.begin_write(params.out, buffers.out);
    if (passes.drawing != nullptr && tile.count == kTile) {
      prefetch(params, terms, access);
      const Inputs in = read_terms(params, terms, access, buffers);
      passes.drawing(row, scale, in, out, noise_key(params.keys, tile.sample),
                     static_cast<uint64_t>(tile.first / kBlock));
    } else {
      const Inputs in = read_inputs(params, terms, access, tile, terms.z, buffers);
      passes.plain(row, terms, scale, in, out, tile.count);
    }
    access.finish_write(params.out, buffers.out);
  }
}

void reverse_step_squares(const ReverseStep& params, float* sums, int64_t begin, int64_t end) {
  const Tiling tiling(params.channels, params.pixels, View{});
  Buffer buffer, lanes;
  for (int64_t item = begin; item < end; ++item) {
    memset(lanes.data, 0, sizeof(lanes.data));
    for_tiles_of_segment(tiling, item, [&](const Tile& tile) {
      const float* g = TileAccess(tiling, tile).read(params.g, buffer);
      add_products(g, g, tile.count, lanes.data);
    });
    sums[item] = sum_lanes(lanes.data);
  }
}

void reverse_step_dots(const ReverseStepBackward& params, const GuidanceSample* samples,
                       float* sums, int64_t begin, int64_t end) {
  const ReverseStep& forward = params.forward;
  const StepRow row = step_row(forward.coeffs);
  const StepTerms terms = step_terms(row, inputs_of(forward));
  const Tiling tiling(forward.channels, forward.pixels, View{});
  const bool noisy = terms.z && terms.out_clamp;
  Buffers buffers;
  Buffer lanes;
  for (int64_t item = begin; item < end; ++item) {
    memset(lanes.data, 0, sizeof(lanes.data));
    for_tiles_of_segment(tiling, item, [&](const Tile& tile) {
      const TileAccess access(tiling, tile);
      const float scale = samples[tile.sample].scale;
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
    });
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
