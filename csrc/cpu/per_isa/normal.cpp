// Kernel of normal, compiled once per instruction set. Formula: math/normal.h.
#include "cpu/kernels.h"
#include "cpu/per_isa/tile.h"

namespace coup_fast::COUP_FAST_ISA {

void normal_tiles(const Normal& draw, int64_t begin, int64_t end) {
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

}  // namespace coup_fast::COUP_FAST_ISA
