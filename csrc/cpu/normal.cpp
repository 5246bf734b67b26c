// normal on the CPU: checks, output, threads. The kernel is in tiles_noise.cpp.
#include "normal.h"

#include <numeric>

#include "checks.h"
#include "cpu/parallel.h"
#include "cpu/tiles.h"

namespace coup_fast {
namespace {

Tensor normal(const Tensor& keys, const std::vector<int64_t>& shape) {
  Tensor out = new_normal(keys, shape);
  NormalDraw draw{};
  Arguments arguments("normal", "keys", keys);
  draw.keys = arguments.keys(keys);
  draw.batch = keys.size(0);
  draw.numel = draw.batch == 0 ? 0 : out.numel() / draw.batch;
  draw.out = static_cast<float*>(out.data_ptr());
  const auto kernel = COUP_FAST_PICK(normal_tiles);
  parallel(num_tiles(draw.batch, draw.numel), kTileElements,
           [&](int64_t begin, int64_t end) { kernel(draw, begin, end); });
  return out;
}

}  // namespace
}  // namespace coup_fast

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CPU, m) { m.impl("normal", TORCH_BOX(&coup_fast::normal)); }
