// Ops in which every element depends on its own inputs alone: one kernel, parametrised by an Op
// and by the access that the tensors allow, and its launcher. The threads of a grid stride over all
// quads of the batch, or, with PixelsAccess, over all groups of four pixels.
//
// An Op provides
//   kPixels                whether it has registers for PixelsAccess
//   Row row()              constants of the call, read from device memory once a thread
//   apply(io, row)         reads, computes and writes the quads of one access
#pragma once

#include "cuda/index.h"
#include "cuda/launch.cuh"
#include "cuda/quads.cuh"

namespace coup_fast::cuda {

template <class Op, Access kAccess>
__global__ void __launch_bounds__(kThreads, 2)
    per_quad_kernel(const Op op, const int64_t batch, const Order order, const Stride stride) {
  const typename Op::Row row = op.row();
  Cursor cursor = cursor_at(blockIdx.x * kThreads + threadIdx.x, stride);
  for (; cursor.sample < batch; advance(cursor, stride)) {
    if constexpr (kAccess == Access::kScalar) {
      op.apply(ScalarAccess(place_of(cursor.sample, cursor.quad, order), order.pixels), row);
    } else if constexpr (kAccess == Access::kPacked) {
      op.apply(PackedAccess{cursor.sample, cursor.quad * kQuad, 1, order.pixels}, row);
    } else {
      op.apply(PixelsAccess{cursor.sample, cursor.quad * kQuad, kStripChannels, order.pixels}, row);
    }
  }
}

// Runs the op over a batch, in the order that suits the state; access: what all its tensors allow.
template <class Op>
void launch_per_quad(const Device& device, const char* name, const Op& op, const View& state,
                     int64_t batch, int64_t channels, int64_t pixels, Access access) {
  if (access == Access::kPixels && !Op::kPixels) access = Access::kScalar;
  const int64_t numel = channels * pixels;
  if (batch == 0 || numel == 0) return;
  check_sample(name, numel);
  const Order order = order_of(state, channels, pixels);
  const int64_t items = access == Access::kPixels ? pixels : numel;  // four times those
  Shape shape;
  shape.blocks = device.grid_for(batch * quads_in(items));
  const Stride stride = stride_of(int64_t{shape.blocks} * kThreads, items);
  auto kernel = access == Access::kScalar ? per_quad_kernel<Op, Access::kScalar>
                                          : per_quad_kernel<Op, Access::kPacked>;
  if constexpr (Op::kPixels) {
    if (access == Access::kPixels) kernel = per_quad_kernel<Op, Access::kPixels>;
  }
  launch(device, name, shape, kernel, op, batch, order, stride);
}

}  // namespace coup_fast::cuda
