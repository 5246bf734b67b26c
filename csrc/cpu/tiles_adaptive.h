// The kernels of tiles_adaptive.cpp, declared for every instruction set; see tiles.h.
#pragma once

#include "adaptive_step.h"
#include "cpu/dispatch.h"

namespace coup_fast {

// The whole step. Items: samples, of one segment each.
COUP_FAST_TILES(void adaptive_samples(const AdaptiveStep& params, int64_t begin, int64_t end))

// Items: segments of all samples (math/reduce.h). sums: two for each item, <h, h> and
// <h, h - h_ahead>.
COUP_FAST_TILES(void adaptive_change_segments(const AdaptiveStep& params, float* sums,
                                              int64_t begin, int64_t end))
// Items: segments. sums: one for each item, <y, h> with y the masked gradient (math/adaptive.h).
COUP_FAST_TILES(void adaptive_dot_segments(const AdaptiveStepBackward& params,
                                           const AdaptiveSample* samples, float* sums,
                                           int64_t begin, int64_t end))

// Items: tiles. samples, slopes: one for each sample.
COUP_FAST_TILES(void adaptive_step_tiles(const AdaptiveStep& params, const AdaptiveSample* samples,
                                         int64_t begin, int64_t end))
COUP_FAST_TILES(void adaptive_backward_tiles(const AdaptiveStepBackward& params,
                                             const AdaptiveSample* samples, const float* slopes,
                                             int64_t begin, int64_t end))

}  // namespace coup_fast
