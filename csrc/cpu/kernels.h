// The kernels of cpu/per_isa, declared for every instruction set; call them through COUP_FAST_PICK.
// Each works on items [begin, end) of the count its comment gives, in any split.
#pragma once

#include "cpu/dispatch.h"
#include "math/reduce.h"
#include "params/adaptive_step.h"
#include "params/confidence_cotangent.h"
#include "params/normal.h"
#include "params/perturb.h"
#include "params/reverse_step.h"

namespace coup_fast {

// Elements of a tile: one of every lane of a reduction. Tiles of a batch are items of most kernels.
constexpr int kTile = kReduceLanes;
COUP_FAST_FN int64_t num_tiles(int64_t batch, int64_t numel) {
  return batch * ((numel + kTile - 1) / kTile);
}

// Items: tiles.
COUP_FAST_KERNEL(void normal_tiles(const Normal& draw, int64_t begin, int64_t end))
COUP_FAST_KERNEL(void perturb_tiles(const Perturb& params, int64_t begin, int64_t end))
COUP_FAST_KERNEL(void perturb_backward_tiles(const PerturbBackward& params, int64_t begin,
                                             int64_t end))

// Items: tiles. scales: c_i of each sample, or null where they all are the row's c.
COUP_FAST_KERNEL(void reverse_step_tiles(const ReverseStep& params, const float* scales,
                                         int64_t begin, int64_t end))
COUP_FAST_KERNEL(void reverse_step_backward_tiles(const ReverseStepBackward& params,
                                                  const GuidanceSample* samples, int64_t begin,
                                                  int64_t end))
// Items: segments of all samples (math/reduce.h). sums: one for each item.
// <G, G> and <G, a> (math/reverse_step.h) of the guidance.
COUP_FAST_KERNEL(void reverse_step_squares(const ReverseStep& params, float* sums, int64_t begin,
                                           int64_t end))
COUP_FAST_KERNEL(void reverse_step_dots(const ReverseStepBackward& params,
                                        const GuidanceSample* samples, float* sums, int64_t begin,
                                        int64_t end))

// The whole step. Items: samples, of one segment each.
COUP_FAST_KERNEL(void adaptive_step_samples(const AdaptiveStep& params, int64_t begin, int64_t end))
// Items: segments of all samples. sums: two for each item, <h, h> and <h, h - h_ahead>.
COUP_FAST_KERNEL(void adaptive_step_sums(const AdaptiveStep& params, float* sums, int64_t begin,
                                         int64_t end))
// Items: segments. sums: one for each item, <y, h> with y the masked gradient
// (math/adaptive_step.h).
COUP_FAST_KERNEL(void adaptive_step_dots(const AdaptiveStepBackward& params,
                                         const AdaptiveSample* samples, float* sums, int64_t begin,
                                         int64_t end))
// Items: tiles. samples, slopes: one for each sample.
COUP_FAST_KERNEL(void adaptive_step_tiles(const AdaptiveStep& params, const AdaptiveSample* samples,
                                          int64_t begin, int64_t end))
COUP_FAST_KERNEL(void adaptive_step_backward_tiles(const AdaptiveStepBackward& params,
                                                   const AdaptiveSample* samples,
                                                   const float* slopes, int64_t begin, int64_t end))

// Items: rows.
COUP_FAST_KERNEL(void confidence_cotangent_rows(const ConfidenceCotangent& params, int64_t begin,
                                                int64_t end))
COUP_FAST_KERNEL(void confidence_cotangent_backward_rows(const ConfidenceCotangentBackward& params,
                                                         int64_t begin, int64_t end))

}  // namespace coup_fast
