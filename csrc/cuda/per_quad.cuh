// Ops in which every element depends on its own inputs alone: how the threads of a grid go over the
// quads of a batch, over its pairs of quads, or, with PixelsAccess, over its groups of four pixels,
// and the launch of such a kernel. A kernel is a template over the access, of a call's parameters
// and a QuadGrid.
#pragma once

#include "cuda/index.h"
#include "cuda/launch.cuh"
#include "cuda/quads.cuh"

namespace coup_fast::cuda {

struct QuadGrid {
  int64_t batch;
  Order order;    // of the quads of a sample
  Stride stride;  // of a thread from one turn of its loop to the next
};

// Calls visit(io) for all quads of this thread; io loads and stores them.
template <Access kAccess, class Visit>
__device__ __forceinline__ void each_quads(const QuadGrid& grid, Visit visit) {
  const int pixels = grid.order.pixels;
  Cursor cursor = cursor_at(blockIdx.x * kThreads + threadIdx.x, grid.stride);
  for (; cursor.sample < grid.batch; advance(cursor, grid.stride)) {
    if constexpr (kAccess == Access::kScalar) {
      visit(ScalarAccess(place_of(cursor.sample, cursor.quad, grid.order), pixels));
    } else if constexpr (kAccess == Access::kPacked) {
      visit(PackedAccess{cursor.sample, cursor.quad * kQuad, 1, pixels});
    } else if constexpr (kAccess == Access::kPairs) {
      const int half = grid.stride.quads_in_sample * kQuad;
      visit(PairAccess{cursor.sample, cursor.quad * kQuad, 2, half});
    } else {
      visit(PixelsAccess{cursor.sample, cursor.quad * kQuad, kStripChannels, pixels});
    }
  }
}

// A kernel's instances.
template <class Params>
struct QuadKernels {
  void (*scalar)(Params, QuadGrid);
  void (*packed)(Params, QuadGrid);
  void (*pixels)(Params, QuadGrid);           // null where it has no registers for it
  void (*pairs)(Params, QuadGrid) = nullptr;  // in the place of packed, where there is one
};

// Runs a kernel over a batch, in the order that suits the state; access: what all tensors allow.
template <class Params>
void launch_per_quad(const Device& device, const char* name, const QuadKernels<Params>& kernels,
                     const Params& params, const View& state, int64_t batch, int64_t channels,
                     int64_t pixels, Access access) {
  if (access == Access::kPixels && kernels.pixels == nullptr) access = Access::kScalar;
  const int64_t numel = channels * pixels;
  check_sample(name, numel);
  int64_t items = numel;  // elements that one quad of each thread covers
  if (access == Access::kPacked && kernels.pairs != nullptr && numel % (2 * kQuad) == 0) {
    access = Access::kPairs;
    items = numel / 2;
  } else if (access == Access::kPixels) {
    items = pixels;
  }
  Shape shape;
  shape.blocks = device.grid_for(batch * quads_in(items));
  const QuadGrid grid{batch, order_of(state, channels, pixels),
                      stride_of(int64_t{shape.blocks} * kThreads, items)};
  const auto kernel = access == Access::kScalar   ? kernels.scalar
                      : access == Access::kPacked ? kernels.packed
                      : access == Access::kPairs  ? kernels.pairs
                                                  : kernels.pixels;
  launch(device, name, shape, kernel, params, grid);
}

}  // namespace coup_fast::cuda
