// What the sums over a sample share: the layout of a block's shared memory, the sum of a group's
// lanes in the canonical order of math/reduce.h, and the meetings of a cluster. Knows no tensor.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "cuda/index.h"
#include "cuda/quads.cuh"

namespace coup_fast::cuda {

__device__ __forceinline__ float* shared_floats() {
#if defined(__CUDACC__)
  extern __shared__ uint4 dynamic_shared[];
  return reinterpret_cast<float*>(dynamic_shared);
#else
  return static_cast<float*>(emulator::shared_memory(-1));
#endif
}

// --- what blocks of a cluster do together; nothing where the architecture has none ---------------
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cluster_arrive() {
  (void)cooperative_groups::this_cluster().barrier_arrive();
}
__device__ __forceinline__ void cluster_wait() {
  cooperative_groups::this_cluster().barrier_wait();
}
__device__ __forceinline__ const float* in_block(float* address, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(address, rank);
}
#else
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ const float* in_block(float* address, int) { return address; }
#endif

// Shared memory: sums of this block's segments, sums of all, lanes of the segments being summed
// (kLanes floats a group), the staged vector.
template <class Sums>
struct SharedLayout {
  static constexpr int kOwn = Sums::kRounds * Sums::kProducts * kMaxOwn;
  static constexpr int kAll = Sums::kProducts * kMaxSegments;
  static constexpr int kLanes = Sums::kProducts * kReduceLanes;

  static constexpr int fixed(int groups) { return kOwn + kAll + groups * kLanes; }

  __device__ static float* own(int round, int product, int number) {
    return shared_floats() + (round * Sums::kProducts + product) * kMaxOwn + number;
  }
  __device__ static float* all(int product) {
    return shared_floats() + kOwn + product * kMaxSegments;
  }
  __device__ static float* lanes(int group, int product) {
    return shared_floats() + kOwn + kAll + group * kLanes + product * kReduceLanes;
  }
  __device__ static float* stage(int groups) {
    return shared_floats() + kOwn + kAll + groups * kLanes;
  }
};

// Sum over the kReduceLanes lanes of a group by halving: lane l takes lane l + 512, l + 256, ...,
// l + 1. By one warp, valid in all of it.
__device__ __forceinline__ float sum_lanes(const float* lanes) {
  constexpr int kWarp = 32;
  constexpr int kWarps = kSumThreads / kWarp;
  const Quad* quads = reinterpret_cast<const Quad*>(lanes) + threadIdx.x % kWarp;
  Quad part[kWarps];
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) part[warp] = quads[warp * kWarp];
#pragma unroll
  for (int half = kWarps / 2; half > 0; half /= 2) {
#pragma unroll
    for (int warp = 0; warp < half; ++warp) {
#pragma unroll
      for (int k = 0; k < kQuad; ++k) part[warp].at[k] += part[warp + half].at[k];
    }
  }
  Quad own = part[0];
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) own.at[k] += __shfl_xor_sync(~0u, own.at[k], half);
  }
  return (own.at[0] + own.at[2]) + (own.at[1] + own.at[3]);
}

// Sums the lanes of a group, product by product, one warp each. What `lanes` held before must have
// been read by all; put(product, sum) is called by one thread, and the block has to meet before
// others see what it wrote.
template <class Sums, class Put>
__device__ __forceinline__ void sum_products(const Quad (&lanes)[Sums::kProducts], int group,
                                             int thread, Put put) {
  constexpr int kWarp = 32;
  using Shared = SharedLayout<Sums>;
#pragma unroll
  for (int product = 0; product < Sums::kProducts; ++product) {
    reinterpret_cast<Quad*>(Shared::lanes(group, product))[thread] = lanes[product];
  }
  __syncthreads();
  const int product = thread / kWarp;
  if (product < Sums::kProducts) {
    const float sum = sum_lanes(Shared::lanes(group, product));
    if (thread % kWarp == 0) put(product, sum);
  }
}

}  // namespace coup_fast::cuda
