// Kernels of perturb and its backward, compiled once per instruction set. Formulas: math/perturb.h.
#include "cpu/kernels.h"
#include "cpu/per_isa/tile.h"

namespace coup_fast::COUP_FAST_ISA {

// The noise of a tile, given or generated; null where the row or the call has none.
static const float* perturb_noise(const Perturb& params, const PerturbRow& row,
                                  const TileAccess& access, const Tile& tile, Buffer& buffer) {
  if (!perturb_is_noisy(row)) return nullptr;
  if (params.noise.data != nullptr) return access.read(params.noise, buffer);
  return params.keys == nullptr ? nullptr : noise_of(params.keys, tile, buffer);
}

void perturb_tiles(const Perturb& params, int64_t begin, int64_t end) {
  const PerturbRow row = row_at<PerturbRow>(params.coeffs);
  const Tiling tiling(params.channels, params.pixels, params.images);
  Buffer image_buffer, noise_buffer, out_buffer;
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile = tiling[item];
    const TileAccess access(tiling, tile);
    const float* u = access.read(params.images, image_buffer);
    const float* z = perturb_noise(params, row, access, tile, noise_buffer);
    float* out = access.begin_write(params.out, out_buffer);
    for_vectors(tile.count, [=, &row](auto at) {
      const Vec noise = z != nullptr ? at.load(z) : Vec{};
      at.store(out, perturb_value<Vec>(row, z != nullptr, at.load(u), noise));
    });
    access.finish_write(params.out, out_buffer);
  }
}

void perturb_backward_tiles(const PerturbBackward& params, int64_t begin, int64_t end) {
  const Perturb& forward = params.forward;
  const PerturbRow row = row_at<PerturbRow>(forward.coeffs);
  const bool masked = bounded(row.lo, row.hi);
  const Tiling tiling(forward.channels, forward.pixels, forward.images);
  Buffer grad_buffer, image_buffer, noise_buffer, out_buffer;
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile = tiling[item];
    const TileAccess access(tiling, tile);
    const float* gradient = access.read(params.grad, grad_buffer);
    const float* u = access.read(forward.images, image_buffer);
    const float* z = masked ? perturb_noise(forward, row, access, tile, noise_buffer) : nullptr;
    float* out = access.begin_write(params.grad_images, out_buffer);
    for_vectors(tile.count, [=, &row](auto at) {
      const Vec noise = z != nullptr ? at.load(z) : Vec{};
      at.store(out, perturb_gradient<Vec>(row, z != nullptr, at.load(u), noise, at.load(gradient)));
    });
    access.finish_write(params.grad_images, out_buffer);
  }
}

}  // namespace coup_fast::COUP_FAST_ISA
