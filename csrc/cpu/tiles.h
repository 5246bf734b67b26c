// The kernels of tiles*.cpp, declared for every instruction set; call them through COUP_FAST_PICK.
// Each works on items [begin, end) of the count its comment gives, in any split.
#pragma once

#include "cpu/dispatch.h"
#include "math/reduce.h"
#include "normal.h"
#include "perturb.h"
#include "reverse_step.h"

namespace coup_fast {

// Elements of a tile; tiles of a batch are items of most kernels.
constexpr int64_t kTileElements = kReduceLanes;
COUP_FAST_FN int64_t num_tiles(int64_t batch, int64_t numel) {
  return batch * ((numel + kTileElements - 1) / kTileElements);
}

// Items: tiles.
COUP_FAST_TILES(void normal_tiles(const NormalDraw& draw, int64_t begin, int64_t end))
COUP_FAST_TILES(void perturb_tiles(const Perturb& params, int64_t begin, int64_t end))
COUP_FAST_TILES(void perturb_backward_tiles(const PerturbBackward& params, int64_t begin,
                                            int64_t end))

// Items: tiles. scales: c_i of each sample, or null where they all are the row's c.
COUP_FAST_TILES(void reverse_step_tiles(const ReverseStep& params, const float* scales,
                                        int64_t begin, int64_t end))
COUP_FAST_TILES(void reverse_step_backward_tiles(const ReverseStepBackward& params,
                                                 const GuidanceSample* samples, int64_t begin,
                                                 int64_t end))

// Items: segments of all samples (math/reduce.h). sums: one for each item.
// <G, G> and <G, a> (math/step.h) of the guidance.
COUP_FAST_TILES(void guidance_square_segments(const ReverseStep& params, float* sums, int64_t begin,
                                              int64_t end))
COUP_FAST_TILES(void guidance_dot_segments(const ReverseStepBackward& params,
                                           const GuidanceSample* samples, float* sums,
                                           int64_t begin, int64_t end))

}  // namespace coup_fast
