// normal on the CPU: threads over tiles. The kernel is in per_isa/normal.cpp.
#include "calls/normal.h"

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace coup_fast {
namespace {

void run(const Normal& params, const Tensor&) {
  const auto kernel = COUP_FAST_PICK(normal_tiles);
  parallel(num_tiles(params.batch, params.numel), kTile,
           [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CPU, m) { m.impl("normal", TORCH_BOX(&normal<run>)); }

}  // namespace coup_fast
