// Ops in which every element depends on its own inputs alone: one kernel, parametrised by an Op,
// and its launcher. A thread takes one quad at a time, which is one Philox block, in a grid-stride
// loop over all quads of the batch.
//
// An Op provides
//   Row row()              constants of the call, read from device memory once a thread
//   apply(io, row)         reads, computes and writes one quad
#pragma once

#include "cuda/launch.cuh"
#include "cuda/packed.cuh"
#include "math/work.h"

namespace coup_fast::cuda {

template <class Op, bool kPacked>
__global__ void __launch_bounds__(kThreads)
    per_quad_kernel(const Op op, const int64_t batch, const Order order, const Stride stride) {
  const typename Op::Row row = op.row();
  Cursor cursor = cursor_at(blockIdx.x * kThreads + threadIdx.x, stride);
  for (; cursor.sample < batch; advance(cursor, stride)) {
    op.apply(QuadAccess<kPacked>(place_of(cursor.sample, cursor.quad, order), order.pixels), row);
  }
}

// Runs the op over a batch. packed: every tensor of it is (see is_packed).
template <class Op>
void launch_per_quad(const Device& device, const char* name, const Op& op, int64_t batch,
                     const Order& order, bool packed) {
  const int64_t numel = int64_t{order.channels} * order.pixels;
  if (batch == 0 || numel == 0) return;
  check_sample(name, numel);
  Shape shape;
  shape.blocks = device.grid_for(batch * quads_in(numel));
  const Stride stride = stride_of(int64_t{shape.blocks} * kThreads, numel);
  const auto kernel = packed ? per_quad_kernel<Op, true> : per_quad_kernel<Op, false>;
  launch(device, name, shape, kernel, op, batch, order, stride);
}

}  // namespace coup_fast::cuda
