// The kernels of tiles_confidence.cpp, declared for every instruction set; see tiles.h.
#pragma once

#include "confidence_cotangent.h"
#include "cpu/dispatch.h"

namespace coup_fast {

// Items: rows.
COUP_FAST_TILES(void confidence_rows(const ConfidenceCotangent& params, int64_t begin, int64_t end))
COUP_FAST_TILES(void confidence_backward_rows(const ConfidenceCotangentBackward& params,
                                              int64_t begin, int64_t end))

}  // namespace coup_fast
