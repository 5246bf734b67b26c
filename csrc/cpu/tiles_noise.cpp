// Kernels of normal and perturb, compiled once per instruction set. Formulas: math/normal.h,
// step.h.
#include "cpu/tile.h"
#include "cpu/tiles.h"

namespace coup_fast::COUP_FAST_ISA {

void normal_tiles(const NormalDraw& draw, int64_t begin, int64_t end) {
  const Tiling tiling(1, draw.numel, View{});
  Buffer buffer;
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile = tiling[item];
    float* out = draw.out + tile.sample * draw.numel + tile.first;
    if (tile.count == kTile) {
      generate(noise_key(draw.keys, tile.sample), static_cast<uint64_t>(tile.first / kBlock),
               kTile / (kBlock * kWidth), out);
    } else {
      memcpy(out, noise_of(draw.keys, tile, buffer),
             sizeof(float) * static_cast<size_t>(tile.count));
    }
  }
}

// The noise of a tile, given or generated; null where the row or the call has none.
static const float* perturb_noise(const Perturb& params, const PerturbRow& row,
                                  const TileAccess& access, const Tile& tile, Buffer& buffer) {
  if (!perturb_is_noisy(row)) return nullptr;
  if (params.noise.data != nullptr) return access.read(params.noise, buffer);
  return params.keys == nullptr ? nullptr : noise_of(params.keys, tile, buffer);
}

void perturb_tiles(const Perturb& params, int64_t begin, int64_t end) {
  const PerturbRow row = perturb_row(params.coeffs);
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
  const PerturbRow row = perturb_row(forward.coeffs);
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
