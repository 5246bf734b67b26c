// Ops that need sums over a whole sample before they can update it: the one kernel, parametrised by
// an Op, and its launcher. Sums are in the canonical order of math/reduce.h, so they equal the
// CPU's bit for bit.
//
// A sample of one segment is one block's. A larger one is shared by a cluster of up to 8 blocks,
// which exchange segment sums through distributed shared memory (compute capability 9.0 on). Either
// way it is one launch, and the vector that both sums and update need is kept in shared memory in
// between: every tensor is read once. Up to 64 KB of it are kept, so that three blocks share a
// multiprocessor; what is beyond is read again, from L2. Older devices, and samples above 2^20
// elements, take one launch a round of sums and one for the update, with the sums in a workspace.
//
// An Op provides
//   kRounds, kProducts        rounds of sums, each of up to kProducts sums
//   State begin(sample)       what is known before any sum
//   View staged()             the vector kept in shared memory
//   products<round>(io, state, quad, lanes)   adds the quad's products to lanes[product]
//   finish<round>(state, sums)                sums to state
//   update(io, state, quad)                   reads the other tensors, writes the outputs
//   update_sample(sample, state)              writes outputs of one value a sample
// where io loads and stores quads at one place.
#pragma once

#include <cooperative_groups.h>

#include <utility>

#include "cuda/launch.cuh"
#include "cuda/packed.cuh"
#include "math/work.h"

namespace coup_fast::cuda {

constexpr int kAllPasses = -1;

struct PerSample {
  int numel;         // elements of a sample
  int pixels;        // of a channel
  int segments;      // of a sample
  int blocks;        // of a sample
  int stage_floats;  // of shared memory: a segment or the whole of a smaller sample, if it fits
  int pass;          // kAllPasses, or the round to sum, or kRounds for the update
  bool cluster;      // the blocks of a sample are a cluster
  float* workspace;  // [batch, rounds, products, segments] where there are several passes
};

__device__ __forceinline__ float* shared_floats() {
#if defined(__CUDACC__)
  extern __shared__ uint4 dynamic_shared[];
  return reinterpret_cast<float*>(dynamic_shared);
#else
  return static_cast<float*>(emulator::shared_memory(-1));
#endif
}

// All blocks of a sample have come this far, and see what the others wrote to shared memory.
__device__ __forceinline__ void meet(const PerSample& job) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (job.cluster) {
    cooperative_groups::this_cluster().sync();
    return;
  }
#endif
  __syncthreads();
}

// An address of this block's shared memory, in block `rank` of the sample.
__device__ __forceinline__ const float* in_block(const PerSample& job, float* address, int rank) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (job.cluster) return cooperative_groups::this_cluster().map_shared_rank(address, rank);
#endif
  return address;
}

template <class Op>
struct SharedLayout {
  static constexpr int kScratch =
      Op::kProducts * kReduceLanes;  // lanes of the segment being summed
  static constexpr int kSums = Op::kRounds * Op::kProducts * kMaxTurns;
  static constexpr int kFixed = kScratch + kSums;  // then the staged vector

  __device__ static float* scratch() { return shared_floats(); }
  __device__ static float* sum(int round, int product, int turn) {
    return shared_floats() + kScratch + (round * Op::kProducts + product) * kMaxTurns + turn;
  }
  __device__ static float* stage() { return shared_floats() + kFixed; }
};

// Sum over the kReduceLanes lanes of a block by halving: lane l takes lane l + 512, l + 256, ..., l
// + 1. Valid in thread 0. The block must meet before scratch is written again.
__device__ __forceinline__ float sum_lanes(const Quad& lanes, float* scratch) {
  constexpr int kWarp = 32;
  constexpr int kWarps = kSumThreads / kWarp;
  const int thread = static_cast<int>(threadIdx.x);
  Quad* quads = reinterpret_cast<Quad*>(scratch);
  quads[thread] = lanes;
  __syncthreads();
  if (thread >= kWarp) return 0.0f;
  Quad part[kWarps];
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) part[warp] = quads[warp * kWarp + thread];
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

template <class Op, bool kPacked>
struct PerSampleKernel {
  using Shared = SharedLayout<Op>;
  using State = typename Op::State;
  using Io = QuadAccess<kPacked>;
  const Op& op;
  const PerSample& job;
  int64_t sample;
  int rank;  // of this block among those of the sample

  __device__ Io access(int segment, int step) const {
    return {place_at(sample, sum_first(segment, step, threadIdx.x), job.numel), job.pixels};
  }

  // The staged vector's quad: from memory the first time, then from where that left it.
  __device__ Quad staged(const Io& io, int turn, int step, bool first) const {
    const int slot = sum_first(turn, step, threadIdx.x);
    const bool kept = slot < job.stage_floats;
    Quad* place = reinterpret_cast<Quad*>(Shared::stage() + slot);
    if (kept && !first) return *place;
    const Quad quad = io.load(op.staged());
    if (kept) *place = quad;
    return quad;
  }

  template <int kRound>
  __device__ void sum_segment(int segment, int turn, const State& state) const {
    Quad lanes[Op::kProducts] = {};
    const int steps = sum_steps(job.numel, segment, threadIdx.x);
#pragma unroll 4
    for (int step = 0; step < steps; ++step) {
      const Io io = access(segment, step);
      op.template products<kRound>(io, state, staged(io, turn, step, kRound == 0), lanes);
    }
#pragma unroll
    for (int product = 0; product < Op::kProducts; ++product) {
      const float sum = sum_lanes(lanes[product], Shared::scratch() + product * kReduceLanes);
      if (threadIdx.x != 0) continue;
      if (job.pass == kAllPasses) {
        *Shared::sum(kRound, product, turn) = sum;
      } else {
        workspace(kRound, product)[segment] = sum;
      }
    }
    __syncthreads();
  }

  __device__ float* workspace(int round, int product) const {
    const int64_t row = (sample * Op::kRounds + round) * Op::kProducts + product;
    return job.workspace + row * job.segments;
  }

  __device__ float total(int round, int product) const {
    float sum = 0.0f;
    if (job.pass == kAllPasses) {
      for (int turn = 0; turn * job.blocks < job.segments; ++turn) {
        for (int block = 0; block < job.blocks; ++block) {
          if (turn * job.blocks + block >= job.segments) break;
          sum += *in_block(job, Shared::sum(round, product, turn), block);
        }
      }
    } else {
      const float* sums = workspace(round, product);
      for (int segment = 0; segment < job.segments; ++segment) sum += sums[segment];
    }
    return sum;
  }

  template <int kRound>
  __device__ void round(State& state) const {
    if (job.pass == kAllPasses || job.pass == kRound) {
      for (int segment = rank, turn = 0; segment < job.segments; segment += job.blocks, ++turn) {
        sum_segment<kRound>(segment, turn, state);
      }
    }
    if (job.pass != kAllPasses && job.pass <= kRound) return;
    if (job.pass == kAllPasses) meet(job);
    float sums[Op::kProducts];
#pragma unroll
    for (int product = 0; product < Op::kProducts; ++product)
      sums[product] = total(kRound, product);
    op.template finish<kRound>(state, sums);
  }

  template <int... kRound>
  __device__ void run(std::integer_sequence<int, kRound...>) const {
    State state = op.begin(sample);
    (round<kRound>(state), ...);
    if (job.pass != kAllPasses && job.pass != Op::kRounds) return;
    for (int segment = rank, turn = 0; segment < job.segments; segment += job.blocks, ++turn) {
      const int steps = sum_steps(job.numel, segment, threadIdx.x);
      for (int step = 0; step < steps; ++step) {
        const Io io = access(segment, step);
        op.update(io, state, staged(io, turn, step, false));
      }
    }
    if (rank == 0 && threadIdx.x == 0) op.update_sample(sample, state);
    if (job.cluster) meet(job);  // others may still be reading this block's sums
  }
};

template <class Op, bool kPacked>
__global__ void __launch_bounds__(kSumThreads, 2)
    per_sample_kernel(const Op op, const PerSample job) {
  const unsigned blocks = static_cast<unsigned>(job.blocks);
  const unsigned sample = blockIdx.x / blocks;
  const int rank = static_cast<int>(blockIdx.x - sample * blocks);
  PerSampleKernel<Op, kPacked>{op, job, sample, rank}.run(
      std::make_integer_sequence<int, Op::kRounds>{});
}

// Runs the op over a batch. `like` gives the device and the allocator of the workspace.
template <class Op>
void launch_per_sample(const Device& device, const char* name, const Op& op, const Tensor& like,
                       int64_t batch, int64_t channels, int64_t pixels, bool packed) {
  const int64_t numel = channels * pixels;
  if (batch == 0) return;  // no elements but samples: their sums are 0
  check_sample(name, numel);
  PerSample job{};
  job.numel = static_cast<int>(numel);
  job.pixels = static_cast<int>(pixels);
  job.segments = static_cast<int>(num_segments(numel));
  const auto kernel = packed ? per_sample_kernel<Op, true> : per_sample_kernel<Op, false>;
  const bool has_clusters = job.segments > 1 && device.compiled_for(kernel) >= 90;
  job.blocks = blocks_in_one_launch(job.segments, has_clusters);
  job.pass = kAllPasses;
  job.cluster = job.blocks > 1;
  const bool one_launch = job.blocks > 0;
  if (one_launch) {
    const int most = device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) /
                         static_cast<int>(sizeof(Quad)) * kQuad -
                     SharedLayout<Op>::kFixed;
    job.stage_floats = std::min({quads_in(numel) * kQuad, static_cast<int>(kSegment), most});
  } else {
    job.blocks = std::min(job.segments, 1024);
  }
  STD_TORCH_CHECK(batch <= 0x7fffffff / job.blocks, "coup_fast::", name, ": ", batch,
                  " samples are too many for one launch; split the batch");

  Shape shape;
  shape.blocks = static_cast<unsigned>(batch * job.blocks);
  shape.threads = kSumThreads;
  shape.cluster = job.cluster ? static_cast<unsigned>(job.blocks) : 1;
  shape.shared_bytes =
      sizeof(float) * static_cast<size_t>(SharedLayout<Op>::kFixed + job.stage_floats);
  if (one_launch) return launch(device, name, shape, kernel, op, job);

  const int64_t sizes[] = {batch, Op::kRounds, Op::kProducts, job.segments};
  const Tensor workspace =
      torch::stable::new_empty(like, {sizes, 4}, torch::headeronly::ScalarType::Float);
  job.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  for (job.pass = 0; job.pass <= Op::kRounds; ++job.pass) {
    launch(device, name, shape, kernel, op, job);
  }
}

}  // namespace coup_fast::cuda
