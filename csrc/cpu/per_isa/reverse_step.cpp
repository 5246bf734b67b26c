// Kernels of reverse_step and its backward, compiled once per instruction set. Formulas:
// math/reverse_step.h.
#include "cpu/kernels.h"
#include "cpu/per_isa/tile.h"

namespace coup_fast::COUP_FAST_ISA {
namespace {

struct Buffers {
  Buffer x, m, s, g, r, z, out;
};

alignas(64) const float kZeros[kTile] = {};

// The inputs of a tile; zeros in place of those that it does not need, so that no loop has to ask.
struct Inputs {
  const float *x = kZeros, *m = kZeros, *s = kZeros, *g = kZeros, *r = kZeros, *z = kZeros;

  template <class At>
  __attribute__((always_inline)) StepValues<Vec> load(At at) const {
    return StepValues<Vec>{at.load(x), at.load(m), at.load(s), at.load(g), at.load(r), at.load(z)};
  }

  // The same where the compiler knows which are needed.
  template <class At>
  __attribute__((always_inline)) StepValues<Vec> load(const StepReads& reads, At at) const {
    const Vec zero = {};
    return StepValues<Vec>{reads.x ? at.load(x) : zero, reads.m ? at.load(m) : zero,
                           reads.s ? at.load(s) : zero, reads.g ? at.load(g) : zero,
                           reads.r ? at.load(r) : zero, reads.z ? at.load(z) : zero};
  }
};

// Memory works while the processor makes noise.
void prefetch(const ReverseStep& params, const StepReads& reads, const TileAccess& access) {
  if (reads.x) access.prefetch(params.x);
  if (reads.m) access.prefetch(params.m);
  if (reads.g) access.prefetch(params.g);
  if (reads.r) access.prefetch(params.r);
}

// All but the noise.
Inputs read_terms(const ReverseStep& params, const StepReads& reads, const TileAccess& access,
                  Buffers& buffers) {
  Inputs in{};
  if (reads.x) in.x = access.read(params.x, buffers.x);
  if (reads.m) in.m = access.read(params.m, buffers.m);
  if (reads.s) in.s = access.read(params.s, buffers.s);
  if (reads.g) in.g = access.read(params.g, buffers.g);
  if (reads.r) in.r = access.read(params.r, buffers.r);
  return in;
}

Inputs read_inputs(const ReverseStep& params, const StepReads& reads, const TileAccess& access,
                   const Tile& tile, Buffers& buffers) {
  const bool drawn = reads.z && params.z.data == nullptr;
  if (drawn) prefetch(params, reads, access);
  const float* z = drawn     ? noise_of(params.keys, tile, buffers.z)
                   : reads.z ? access.read(params.z, buffers.z)
                             : kZeros;
  Inputs in = read_terms(params, reads, access, buffers);
  in.z = z;
  return in;
}

// --- the step: one pass over a tile
// ---------------------------------------------------------------

// Terms that a pass asks about at every vector, and terms that the compiler knows.
struct AnyTerms {
  static StepTerms of(const StepTerms& terms) { return terms; }
};
template <bool kX0, bool kG, bool kR, bool kZ>
struct KnownTerms {
  static constexpr StepTerms kTerms = terms_of(kX0, kG, kR, kZ);
  static constexpr StepTerms of(const StepTerms&) { return kTerms; }
};

template <class Terms>
void pass(const StepRow& coefficients, const StepTerms& given, float scale, const Inputs& in,
          float* out, int count) {
  const StepRow row = coefficients;  // in registers: for all the compiler knows, out holds them
  const StepTerms terms = Terms::of(given);
  for_vectors(count, [=](auto at) __attribute__((always_inline)) {
    at.store(out, step_value<Vec>(row, terms, scale, in.load(reads_of_sum(terms), at)));
  });
}

// Whether x' is the sum itself: no bounds, times 1, plus +0. It is but at the end of a run.
bool is_bare(const StepRow& row) {
  return !bounded(row.out_lo, row.out_hi) && row.out_scale == 1.0f &&
         Lanes<float>::bits(row.out_bias) == 0;
}

// The same over a whole tile of a bare row, its noise used where it is made: 5 to 7 % faster than
// through memory, except beside x0, which leaves no registers.
template <class Terms>
void drawing_pass(const StepRow& row, float scale, const Inputs& in, float* out, NoiseKey noise,
                  uint64_t block) {
  constexpr StepTerms kTerms = Terms::kTerms;
  StepReads reads = reads_of_sum(kTerms);
  reads.z = false;
  generate(noise, block, kTile / kGroup, [=, &row](int i, Vec z) __attribute__((always_inline)) {
    const Vec zero = {};
    StepValues<Vec> values = in.load(reads, Whole{i});
    values.z = z;
    const StepFactors<Vec> factors = step_factors<Vec>(row, kTerms, scale, zero);
    // + zero: as the map would, -0 becomes +0
    store(out + i, step_sum<Vec>(row, kTerms, factors, values) + zero);
  });
}

struct Pass {
  StepTerms terms;
  decltype(&pass<AnyTerms>) plain;
  decltype(&drawing_pass<KnownTerms<false, false, false, true>>) drawing;  // or null
};

template <bool kX0, bool kG, bool kR, bool kZ>
constexpr Pass known_pass() {
  using Terms = KnownTerms<kX0, kG, kR, kZ>;
  if constexpr (kZ && !kX0) return Pass{Terms::kTerms, &pass<Terms>, &drawing_pass<Terms>};
  return Pass{Terms::kTerms, &pass<Terms>, nullptr};
}

// The steps that the methods' runs consist of, with x0 clipped or not: of an ODE, of an SDE, of
// COUP, and towards a reference. Other steps take a third longer, and those without noise up to
// twice as long.
constexpr Pass kKnownPasses[] = {
    known_pass<false, false, false, false>(), known_pass<true, false, false, false>(),
    known_pass<false, false, false, true>(),  known_pass<true, false, false, true>(),
    known_pass<false, true, false, true>(),   known_pass<true, true, false, true>(),
    known_pass<false, false, true, true>(),   known_pass<true, false, true, true>(),
};

Pass pass_for(const StepTerms& terms) {
  StepTerms wanted = terms;
  wanted.x0_clamp = wanted.out_clamp = true;
  for (const Pass& known : kKnownPasses) {
    if (memcmp(&known.terms, &wanted, sizeof(wanted)) == 0) return known;
  }
  return Pass{terms, &pass<AnyTerms>, nullptr};
}

}  // namespace

void reverse_step_tiles(const ReverseStep& params, const float* scales, int64_t begin,
                        int64_t end) {
  const StepRow row = row_at<StepRow>(params.coeffs);
  const StepTerms terms = step_terms(row, inputs_of(params));
  const StepReads reads = reads_of_sum(terms);
  const Pass pass = pass_for(terms);
  const bool draws = pass.drawing != nullptr && params.z.data == nullptr && is_bare(row);
  const Tiling tiling(params.channels, params.pixels, params.x);
  Buffers buffers;
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile = tiling[item];
    const TileAccess access(tiling, tile);
    const float scale = scales != nullptr ? scales[tile.sample] : row.c;
    float* out = access.begin_write(params.out, buffers.out);
    if (draws && tile.count == kTile) {
      prefetch(params, reads, access);
      const Inputs in = read_terms(params, reads, access, buffers);
      pass.drawing(row, scale, in, out, noise_key(params.keys, tile.sample),
                   static_cast<uint64_t>(tile.first / kBlock));
    } else {
      const Inputs in = read_inputs(params, reads, access, tile, buffers);
      pass.plain(row, terms, scale, in, out, tile.count);
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
  const StepRow row = row_at<StepRow>(forward.coeffs);
  const StepTerms terms = step_terms(row, inputs_of(forward));
  const Tiling tiling(forward.channels, forward.pixels, View{});
  const StepReads reads = reads_of_dot(terms);
  Buffers buffers;
  Buffer lanes;
  for (int64_t item = begin; item < end; ++item) {
    memset(lanes.data, 0, sizeof(lanes.data));
    for_tiles_of_segment(tiling, item, [&](const Tile& tile) {
      const TileAccess access(tiling, tile);
      const float scale = samples[tile.sample].scale;
      const float* gradient = access.read(params.grad, buffers.out);
      const Inputs in = read_inputs(forward, reads, access, tile, buffers);
      float* lane = lanes.data;
      for_vectors(tile.count, [=, &row, &terms](auto at) __attribute__((always_inline)) {
        const StepValues<Vec> values = in.load(at);
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
  const StepRow row = row_at<StepRow>(forward.coeffs);
  const StepTerms terms = step_terms(row, inputs_of(forward));
  const StepReads reads = reads_of_gradient(terms, samples != nullptr);
  const Tiling tiling(forward.channels, forward.pixels, forward.x);
  Buffers buffers, gradients;
  const View* views[] = {&params.grad_x, &params.grad_m, &params.grad_s, &params.grad_g,
                         &params.grad_r};
  Buffer* staged[] = {&gradients.x, &gradients.m, &gradients.s, &gradients.g, &gradients.r};
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile = tiling[item];
    const TileAccess access(tiling, tile);
    const float* gradient = access.read(params.grad, buffers.out);
    const Inputs in = read_inputs(forward, reads, access, tile, buffers);
    const GuidanceSample sample =
        samples != nullptr ? samples[tile.sample] : GuidanceSample{row.c, 0.0f, 0.0f};
    float* out[5];
    for (int k = 0; k < 5; ++k) out[k] = access.begin_write(*views[k], *staged[k]);
    for_vectors(tile.count, [=, &row](auto at) __attribute__((always_inline)) {
      const StepValues<Vec> values = in.load(at);
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
