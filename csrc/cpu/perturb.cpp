// perturb and its backward on the CPU: threads over tiles. The kernels are in per_isa/perturb.cpp.
#include "calls/perturb.h"

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace coup_fast {
namespace {

void run(const Perturb& params, const Tensor&) {
  const auto kernel = COUP_FAST_PICK(perturb_tiles);
  parallel(num_tiles(params.batch, params.channels * params.pixels), kTile,
           [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

void run_backward(const PerturbBackward& params, const Tensor&) {
  const Perturb& forward = params.forward;
  const auto kernel = COUP_FAST_PICK(perturb_backward_tiles);
  parallel(num_tiles(forward.batch, forward.channels * forward.pixels), kTile,
           [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CPU, m) {
  m.impl("perturb", TORCH_BOX(&perturb<run>));
  m.impl("perturb_backward", TORCH_BOX(&perturb_backward<run_backward>));
}

}  // namespace coup_fast
