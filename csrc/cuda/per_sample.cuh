// Ops that need sums over a whole sample before they can update it: two kernels, parametrised by an
// Op, and their launcher. Sums are in the canonical order of math/reduce.h, so they equal the CPU's
// bit for bit.
//
// Samples of up to 3072 elements (3x32x32): a block of 256 threads each, everything in registers.
// All loads are issued at once, noise is drawn while they are under way, every byte is read once.
//
// Larger ones: a block of up to three groups, each summing a segment, keeps the vector that both
// sums and update need in shared memory in between (a segment is 64 KB); above three segments a
// cluster of up to 8 such blocks, which exchange segment sums through distributed shared memory
// (compute capability 9.0 on). One launch; every tensor is read once up to 24 segments (3x362x362),
// beyond that, up to 2^20 elements, the rest of the staged vector is read again, most of it from
// L2. Two rounds of sums read what the second needs twice. Older devices above three segments, and
// all above 2^20 elements, take one launch a round of sums and one for the update, with the sums in
// a workspace.
//
// An Op provides
//   kRounds, kProducts        rounds of sums, each of up to kProducts sums
//   kRegisters                whether it has registers for whole small samples
//   kGroups                   of a block, as many as its registers allow
//   kSumSteps, kUpdateSteps   quads a thread sums and updates at a time: 1, 2 or 4
//   State begin(sample)       what is known before any sum
//   View staged()             the vector that is kept
//   Inputs<n> load<phase>(io, state)          the other tensors of a phase: a round of sums,
//                                             kRounds for the update, kAllPhases for all of them
//   products<round>(io, state, quads, inputs, lanes)   adds the products to lanes[product]
//   finish<round>(state, sums)                sums to state
//   update(io, state, quads, inputs)          writes the outputs
//   update_sample(sample, state)              writes outputs of one value a sample
// where io loads and stores quads and quads are the staged vector's.
#pragma once

#include <utility>

#include "cuda/index.h"
#include "cuda/launch.cuh"
#include "cuda/quads.cuh"
#include "cuda/sample_sums.cuh"

namespace coup_fast::cuda {

constexpr int kAllPhases = -1;

__host__ __device__ constexpr bool is_phase(int phase, int which) {
  return phase == kAllPhases || phase == which;
}

struct PerSample {
  int numel;         // elements of a sample
  int pixels;        // of a channel
  int segments;      // of a sample
  int blocks;        // of a sample
  int groups;        // of a block
  int stage_floats;  // of shared memory, for the first turn of the groups
  int phase;         // kAllPhases, or the round to sum, or kRounds for the update
  bool cluster;      // the blocks of a sample are a cluster
  float* workspace;  // [batch, rounds, products, segments] where there are several launches
};

// --- samples in registers -----------------------------------------------------------------------

template <class Op, int... kRound>
__device__ __forceinline__ void run_in_registers(const Op& op, const PerSample& job,
                                                 std::integer_sequence<int, kRound...>) {
  using Io = StripAccess<kRegisterSteps, kReduceLanes>;
  using Shared = SharedLayout<Op>;
  const int64_t sample = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const int steps = sum_steps(job.numel, 0, thread);
  const bool works = steps > 0;
  const Io io{sample, thread * kQuad, steps, job.pixels};
  typename Op::State state = op.begin(sample);
  RawQuads<Io::kCount> raw{};
  typename Op::template Inputs<Io::kCount> inputs{};
  if (works) {
    raw = io.load_raw(op.staged());
    inputs = op.template load<kAllPhases>(io, state);
  }
  const auto staged = finish_load(io, op.staged(), raw);
  const auto round = [&](auto number) {
    constexpr int kNumber = decltype(number)::value;
    Quad lanes[Op::kProducts] = {};
    if (works) op.template products<kNumber>(io, state, staged, inputs, lanes);
    sum_products<Op>(lanes, 0, thread,
                     [&](int product, float sum) { *Shared::own(kNumber, product, 0) = sum; });
    __syncthreads();
    float sums[Op::kProducts];
#pragma unroll
    for (int product = 0; product < Op::kProducts; ++product) {
      sums[product] = 0.0f + *Shared::own(kNumber, product, 0);
    }
    op.template finish<kNumber>(state, sums);
  };
  (round(std::integral_constant<int, kRound>{}), ...);
  if (works) op.update(io, state, staged, inputs);
  if (thread == 0) op.update_sample(sample, state);
}

template <class Op>
__global__ void __launch_bounds__(kSumThreads, 2)
    register_sample_kernel(const Op op, const PerSample job) {
  run_in_registers(op, job, std::make_integer_sequence<int, Op::kRounds>{});
}

// --- larger samples -----------------------------------------------------------------------------

template <class Op, bool kPacked>
struct PerSampleKernel {
  using Shared = SharedLayout<Op>;
  using State = typename Op::State;
  // Steps of a sum at a time: their loads are under way together.
  static constexpr int kSumSteps = kPacked ? Op::kSumSteps : 1;
  static constexpr int kUpdateSteps = kPacked ? Op::kUpdateSteps : 1;
  const Op& op;
  const PerSample& job;
  int64_t sample;
  int rank;    // of this block among those of the sample
  int group;   // of this thread in the block
  int thread;  // in the group

  __device__ int turns() const {
    const int slots = job.blocks * job.groups;
    const int first = rank * job.groups;  // the segment of the first group
    return first < job.segments ? (job.segments - first + slots - 1) / slots : 0;
  }
  __device__ int segment(int turn) const { return (turn * job.blocks + rank) * job.groups + group; }

  // Calls visit(io, step) for this thread's quads of a segment, kSteps at a time.
  template <int kSteps, class Visit>
  __device__ void each_step(int turn, Visit visit) const {
    const int steps = sum_steps(job.numel, segment(turn), thread);
#pragma unroll 1
    for (int step = 0; step < steps; step += kSteps) {
      const int first = sum_first(segment(turn), step, thread);
      if constexpr (kPacked) {
        using Io = StripAccess<kSteps, kReduceLanes>;
        const int left = steps - step;
        visit(Io{sample, first, left < kSteps ? left : kSteps, job.pixels}, step);
      } else {
        visit(ScalarAccess(place_at(sample, first, job.numel), job.pixels), step);
      }
    }
  }

  // The staged vector, from memory the first time and then, as far as it is kept, from there. All
  // quads of a strip are kept, or none.
  template <class Io>
  __device__ Quads<Io::kCount> staged(const Io& io, int turn, int step, bool first) const {
    const int slot = sum_first(group, step, thread);
    const bool kept = turn == 0 && slot < job.stage_floats;
    Quad* place = reinterpret_cast<Quad*>(Shared::stage(job.groups) + slot);
    Quads<Io::kCount> quads = {};
    if (!kept || first) quads = load(io, op.staged());
    if (!kept) return quads;
#pragma unroll
    for (int q = 0; q < Io::kCount; ++q) {
      if (!io.holds(q, 0)) continue;
      if (first) {
        place[q * kSumThreads] = quads.quad[q];
      } else {
        quads.quad[q] = place[q * kSumThreads];
      }
    }
    return quads;
  }

  template <int kRound>
  __device__ void sum_segment(int turn, const State& state) const {
    Quad lanes[Op::kProducts] = {};
    each_step<kSumSteps>(turn, [&](const auto& io, int step) {
      const auto inputs = op.template load<kRound>(io, state);
      op.template products<kRound>(io, state, staged(io, turn, step, kRound == 0), inputs, lanes);
    });
    sum_products<Op>(lanes, group, thread, [&](int product, float sum) {
      if (segment(turn) >= job.segments) return;
      if (job.phase == kAllPhases) {
        *Shared::own(kRound, product, turn * job.groups + group) = sum;
      } else {
        workspace(kRound, product)[segment(turn)] = sum;
      }
    });
    __syncthreads();
  }

  __device__ float* workspace(int round, int product) const {
    const int64_t row = (sample * Op::kRounds + round) * Op::kProducts + product;
    return job.workspace + row * job.segments;
  }

  // The sums of all segments, from the blocks that have them to this one's shared memory.
  template <int kRound>
  __device__ void gather() const {
    const int slots = job.blocks * job.groups;
    for (int i = static_cast<int>(threadIdx.x); i < Op::kProducts * job.segments;
         i += static_cast<int>(blockDim.x)) {
      const int product = i / job.segments;
      const int wanted = i - product * job.segments;
      const int turn = wanted / slots;
      const int owner = (wanted - turn * slots) / job.groups;
      float* sum = Shared::own(kRound, product, turn * job.groups + wanted % job.groups);
      Shared::all(product)[wanted] = job.cluster ? *in_block(sum, owner) : *sum;
    }
    __syncthreads();
  }

  template <int kRound>
  __device__ void round(State& state) const {
    if (is_phase(job.phase, kRound)) {
      for (int turn = 0; turn < turns(); ++turn) sum_segment<kRound>(turn, state);
    }
    const bool whole = job.phase == kAllPhases;
    if (!whole && job.phase <= kRound) return;
    if (whole) {
      if (job.cluster) {
        cluster_arrive();
        cluster_wait();
      }
      gather<kRound>();
    }
    float sums[Op::kProducts];
#pragma unroll
    for (int product = 0; product < Op::kProducts; ++product) {
      const float* all = whole ? Shared::all(product) : workspace(kRound, product);
      sums[product] = 0.0f;
#pragma unroll 8
      for (int i = 0; i < job.segments; ++i) sums[product] += all[i];
    }
    op.template finish<kRound>(state, sums);
  }

  template <int... kRound>
  __device__ void run(std::integer_sequence<int, kRound...>) const {
    State state = op.begin(sample);
    (round<kRound>(state), ...);
    if (job.cluster) cluster_arrive();  // this block has read all sums that it needs
    if (is_phase(job.phase, Op::kRounds)) {
      for (int turn = 0; turn < turns(); ++turn) {
        each_step<kUpdateSteps>(turn, [&](const auto& io, int step) {
          const auto inputs = op.template load<Op::kRounds>(io, state);
          op.update(io, state, staged(io, turn, step, false), inputs);
        });
      }
      if (rank == 0 && threadIdx.x == 0) op.update_sample(sample, state);
    }
    if (job.cluster) cluster_wait();  // others may still be reading this block's sums
  }
};

template <class Op, bool kPacked>
__global__ void __launch_bounds__(kSumThreads* Op::kGroups, 1)
    per_sample_kernel(const Op op, const PerSample job) {
  const unsigned blocks = static_cast<unsigned>(job.blocks);
  const unsigned sample = blockIdx.x / blocks;
  const int rank = static_cast<int>(blockIdx.x - sample * blocks);
  const int group = static_cast<int>(threadIdx.x) / kSumThreads;
  const int thread = static_cast<int>(threadIdx.x) % kSumThreads;
  PerSampleKernel<Op, kPacked>{op, job, sample, rank, group, thread}.run(
      std::make_integer_sequence<int, Op::kRounds>{});
}

// --- launch -------------------------------------------------------------------------------------

// Whether the register kernel can take all tensors: the strip of a thread's three quads is that of
// three channels of 1024 pixels.
inline bool fits_registers(Access access, int64_t numel, int64_t pixels) {
  return numel <= kRegisterSample &&
         (access == Access::kPacked || (access == Access::kPixels && pixels == kReduceLanes));
}

// Runs the op over a batch; access: what all its tensors allow. `like` gives the device and the
// allocator of the workspace.
template <class Op>
void launch_per_sample(const Device& device, const char* name, const Op& op, const Tensor& like,
                       int64_t batch, int64_t channels, int64_t pixels, Access access) {
  const int64_t numel = channels * pixels;
  if (batch == 0) return;  // no elements but samples: their sums are 0
  check_sample(name, numel);
  const auto kernel =
      access == Access::kPacked ? per_sample_kernel<Op, true> : per_sample_kernel<Op, false>;
  const bool registers = Op::kRegisters && fits_registers(access, numel, pixels);
  PerSample job{};
  job.numel = static_cast<int>(numel);
  job.pixels = static_cast<int>(pixels);
  job.segments = static_cast<int>(num_segments(numel));
  const bool has_clusters = job.segments > Op::kGroups && device.compiled_for(kernel) >= 90;
  const Team team = team_of(job.segments, Op::kGroups, has_clusters);
  const bool one_launch = team.blocks > 0;
  job.phase = kAllPhases;
  job.cluster = team.blocks > 1;
  job.groups = team.groups;
  job.blocks = one_launch ? team.blocks : std::min(job.segments, 1024);
  if (one_launch && !registers) {
    constexpr int kBatch = 4 * kReduceLanes;  // of a strip: it is kept whole or not at all
    const int most = device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) /
                         static_cast<int>(sizeof(float)) -
                     SharedLayout<Op>::fixed(job.groups);
    const int wanted = std::min(quads_in(numel) * kQuad, job.groups * static_cast<int>(kSegment));
    job.stage_floats = wanted <= most ? wanted : most / kBatch * kBatch;
  }
  STD_TORCH_CHECK(batch <= 0x7fffffff / job.blocks, "coup_fast::", name, ": ", batch,
                  " samples are too many for one launch; split the batch");

  Shape shape;
  shape.blocks = static_cast<unsigned>(batch * job.blocks);
  shape.threads = static_cast<unsigned>(kSumThreads * job.groups);
  shape.cluster = job.cluster ? static_cast<unsigned>(job.blocks) : 1;
  shape.shared_bytes =
      sizeof(float) * static_cast<size_t>(SharedLayout<Op>::fixed(job.groups) + job.stage_floats);
  if constexpr (Op::kRegisters) {
    if (registers) return launch(device, name, shape, register_sample_kernel<Op>, op, job);
  }
  if (one_launch) return launch(device, name, shape, kernel, op, job);

  const int64_t sizes[] = {batch, Op::kRounds, Op::kProducts, job.segments};
  const Tensor workspace =
      torch::stable::new_empty(like, {sizes, 4}, torch::headeronly::ScalarType::Float);
  job.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  for (job.phase = 0; job.phase <= Op::kRounds; ++job.phase) {
    launch(device, name, shape, kernel, op, job);
  }
}

}  // namespace coup_fast::cuda
