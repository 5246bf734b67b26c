// Kernels that need sums over a whole sample before they can update it: what such a kernel calls,
// and its launch. Sums are in the canonical order of math/reduce.h, so they equal the CPU's bit for
// bit. A kernel reads from top to bottom as what it does with one sample:
//
//   const auto sample = open_sample<Limits, kKeeping>(job, kept, load);
//   float square[1];                                          // as many as a round has products
//   if (!sample.template sum<0>(add_products, square)) return;
//   ... what the sums say about the sample; further rounds ...
//   sample.update(write_quads);
//   if (sample.leads()) ...  // one thread writes the outputs of one value for sample.number()
//
// kept is the vector that both sums and update need. load(io, phase) loads the other tensors of
// some quads, as far as the phase needs them; add_products(io, quads of kept, inputs, lanes) and
// write_quads(io, quads of kept, inputs) get them. sum() returns false where this launch ends.
//
// Limits, a struct derived from Sums<rounds, products>, says what the kernel's registers allow:
//   kGroups                   groups of a block
//   kSumSteps, kUpdateSteps   quads a thread sums and updates at a time: 1, 2 or 4
//
// Samples of up to 3072 elements (3x32x32): a block of 256 threads each, everything in registers.
// All loads are issued at once, noise is drawn while they are under way, every byte is read once.
//
// Larger ones: a block of up to three groups, each summing a segment, keeps the vector in shared
// memory (a segment is 64 KB); above three segments a cluster of up to 8 such blocks, which
// exchange segment sums through distributed shared memory (compute capability 9.0 on). One launch;
// every tensor is read once up to 24 segments (3x362x362), beyond that, up to 2^20 elements, the
// rest of the kept vector is read again, most of it from L2. Two rounds of sums read what the
// second needs twice. Older devices above three segments, and all above 2^20 elements, take one
// launch a round of sums and one for the update, with the sums in a workspace.
#pragma once

#include <type_traits>

#include "cuda/index.h"
#include "cuda/launch.cuh"
#include "cuda/quads.cuh"
#include "cuda/sample_sums.cuh"

namespace coup_fast::cuda {

template <int rounds, int products>
struct Sums {
  static constexpr int kRounds = rounds;      // one after the other
  static constexpr int kProducts = products;  // of each
};

constexpr int kAllPhases = -1;

// A phase of the work on a sample, known to the compiler: a round of sums, the update, or all.
template <int kRounds, int kPhase>
struct Phase {
  COUP_FAST_FN constexpr bool sums(int round) { return kPhase == kAllPhases || kPhase == round; }
  COUP_FAST_FN constexpr bool updates() { return sums(kRounds); }
};

// Where a kernel keeps a sample between its sums and its update.
enum class Keeping {
  kRegisters,  // all inputs; samples of up to kRegisterSample elements
  kVectors,    // the kept vector, in shared memory; loads by vectors
  kScalars     // the same with tensors that no vector fits
};

template <class Limits>
constexpr int threads_of(Keeping keeping) {
  return keeping == Keeping::kRegisters ? kSumThreads : kSumThreads * Limits::kGroups;
}
constexpr int blocks_of(Keeping keeping) { return keeping == Keeping::kRegisters ? 2 : 1; }

struct SampleJob {
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

template <class Limits, class Load>
struct RegisterSample {
  using Shared = SharedLayout<Limits>;
  using Io = StripAccess<kRegisterSteps, kReduceLanes>;
  using All = Phase<Limits::kRounds, kAllPhases>;
  using Inputs = decltype(std::declval<const Load&>()(std::declval<const Io&>(), All{}));

  Io io;
  bool works;  // this thread has elements
  Quads<Io::kCount> kept;
  Inputs inputs;

  __device__ __forceinline__ RegisterSample(const SampleJob& job, const View& view,
                                            const Load& load)
      : io{blockIdx.x, static_cast<int>(threadIdx.x) * kQuad,
           sum_steps(job.numel, 0, static_cast<int>(threadIdx.x)), job.pixels},
        works(io.quads > 0),
        inputs{} {
    RawQuads<Io::kCount> raw{};
    if (works) {
      raw = io.load_raw(view);
      inputs = load(io, All{});
    }
    kept = finish_load(io, view, raw);
  }

  template <int kRound, class Products>
  __device__ __forceinline__ bool sum(const Products& products,
                                      float (&sums)[Limits::kProducts]) const {
    Quad lanes[Limits::kProducts] = {};
    if (works) products(io, kept, inputs, lanes);
    sum_products<Limits>(lanes, 0, static_cast<int>(threadIdx.x),
                         [&](int product, float sum) { *Shared::own(kRound, product, 0) = sum; });
    __syncthreads();
#pragma unroll
    for (int product = 0; product < Limits::kProducts; ++product) {
      sums[product] = 0.0f + *Shared::own(kRound, product, 0);
    }
    return true;
  }

  template <class Update>
  __device__ __forceinline__ void update(const Update& write) const {
    if (works) write(io, kept, inputs);
  }

  __device__ __forceinline__ int64_t number() const { return io.sample(); }
  __device__ __forceinline__ bool leads() const { return threadIdx.x == 0; }
};

// --- larger samples -----------------------------------------------------------------------------

template <class Limits, bool kVectors, class Load>
struct SharedSample {
  using Shared = SharedLayout<Limits>;
  // Steps of a sum at a time: their loads are under way together.
  static constexpr int kSumSteps = kVectors ? Limits::kSumSteps : 1;
  static constexpr int kUpdateSteps = kVectors ? Limits::kUpdateSteps : 1;

  const SampleJob& job;
  const View& view;  // the kept vector
  const Load& load;
  int64_t sample;
  int rank;    // of this block among those of the sample
  int group;   // of this thread in the block
  int thread;  // in the group

  __device__ __forceinline__ SharedSample(const SampleJob& job_, const View& view_,
                                          const Load& load_)
      : job(job_),
        view(view_),
        load(load_),
        sample(blockIdx.x / static_cast<unsigned>(job.blocks)),
        rank(static_cast<int>(blockIdx.x % static_cast<unsigned>(job.blocks))),
        group(static_cast<int>(threadIdx.x) / kSumThreads),
        thread(static_cast<int>(threadIdx.x) % kSumThreads) {}

  template <int kRound, class Products>
  __device__ __forceinline__ bool sum(const Products& products,
                                      float (&sums)[Limits::kProducts]) const {
    const bool whole = job.phase == kAllPhases;
    if (whole || job.phase == kRound) {
      for (int turn = 0; turn < turns(); ++turn) sum_segment<kRound>(turn, products);
    }
    if (!whole && job.phase <= kRound) return false;
    if (whole) {
      if (job.cluster) {
        cluster_arrive();
        cluster_wait();
      }
      gather<kRound>();
    }
#pragma unroll
    for (int product = 0; product < Limits::kProducts; ++product) {
      const float* all = whole ? Shared::all(product) : workspace(kRound, product);
      sums[product] = 0.0f;
#pragma unroll 8
      for (int i = 0; i < job.segments; ++i) sums[product] += all[i];
    }
    return true;
  }

  template <class Update>
  __device__ __forceinline__ void update(const Update& write) const {
    if (job.cluster) cluster_arrive();  // this block has read all sums that it needs
    for (int turn = 0; turn < turns(); ++turn) {
      each_step<kUpdateSteps>(turn, [&](const auto& io, int step) {
        const auto inputs = load(io, Phase<Limits::kRounds, Limits::kRounds>{});
        write(io, quads(io, turn, step, false), inputs);
      });
    }
    if (job.cluster) cluster_wait();  // others may still be reading this block's sums
  }

  __device__ __forceinline__ int64_t number() const { return sample; }
  __device__ __forceinline__ bool leads() const { return rank == 0 && threadIdx.x == 0; }

 private:
  __device__ __forceinline__ int turns() const {
    const int slots = job.blocks * job.groups;
    const int first = rank * job.groups;  // the segment of the first group
    return first < job.segments ? (job.segments - first + slots - 1) / slots : 0;
  }
  __device__ __forceinline__ int segment(int turn) const {
    return (turn * job.blocks + rank) * job.groups + group;
  }

  // Calls visit(io, step) for this thread's quads of a segment, kSteps at a time.
  template <int kSteps, class Visit>
  __device__ __forceinline__ void each_step(int turn, const Visit& visit) const {
    const int steps = sum_steps(job.numel, segment(turn), thread);
#pragma unroll 1
    for (int step = 0; step < steps; step += kSteps) {
      const int first = sum_first(segment(turn), step, thread);
      if constexpr (kVectors) {
        using Io = StripAccess<kSteps, kReduceLanes>;
        const int left = steps - step;
        visit(Io{sample, first, left < kSteps ? left : kSteps, job.pixels}, step);
      } else {
        visit(ScalarAccess(place_at(sample, first, job.numel), job.pixels), step);
      }
    }
  }

  // Quads of the kept vector, from memory the first time and then, as far as it is kept, from
  // there. All quads of a strip are kept, or none.
  template <class Io>
  __device__ __forceinline__ Quads<Io::kCount> quads(const Io& io, int turn, int step,
                                                     bool first) const {
    const int slot = sum_first(group, step, thread);
    const bool kept = turn == 0 && slot < job.stage_floats;
    Quad* place = reinterpret_cast<Quad*>(Shared::stage(job.groups) + slot);
    Quads<Io::kCount> quads = {};
    if (!kept || first) quads = cuda::load(io, view);
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

  template <int kRound, class Products>
  __device__ __forceinline__ void sum_segment(int turn, const Products& products) const {
    Quad lanes[Limits::kProducts] = {};
    each_step<kSumSteps>(turn, [&](const auto& io, int step) {
      const auto inputs = load(io, Phase<Limits::kRounds, kRound>{});
      products(io, quads(io, turn, step, kRound == 0), inputs, lanes);
    });
    sum_products<Limits>(lanes, group, thread, [&](int product, float sum) {
      if (segment(turn) >= job.segments) return;
      if (job.phase == kAllPhases) {
        *Shared::own(kRound, product, turn * job.groups + group) = sum;
      } else {
        workspace(kRound, product)[segment(turn)] = sum;
      }
    });
    __syncthreads();
  }

  __device__ __forceinline__ float* workspace(int round, int product) const {
    const int64_t row = (sample * Limits::kRounds + round) * Limits::kProducts + product;
    return job.workspace + row * job.segments;
  }

  // The sums of all segments, from the blocks that have them to this one's shared memory.
  template <int kRound>
  __device__ __forceinline__ void gather() const {
    const int slots = job.blocks * job.groups;
    for (int i = static_cast<int>(threadIdx.x); i < Limits::kProducts * job.segments;
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
};

template <class Limits, Keeping kKeeping, class Load>
__device__ __forceinline__ auto open_sample(const SampleJob& job, const View& kept,
                                            const Load& load) {
  if constexpr (kKeeping == Keeping::kRegisters) {
    return RegisterSample<Limits, Load>(job, kept, load);
  } else {
    return SharedSample < Limits, kKeeping == Keeping::kVectors, Load > (job, kept, load);
  }
}

// --- launch -------------------------------------------------------------------------------------

// A kernel's instances.
template <class Params>
struct SampleKernels {
  void (*scalars)(Params, SampleJob);
  void (*vectors)(Params, SampleJob);
  void (*registers)(Params, SampleJob);  // null where it has not enough of them
};

struct Batch {
  int64_t size, channels, pixels;
  Access access;  // what all tensors allow
};

// Whether registers can take all tensors: the strip of a thread's three quads is that of three
// channels of 1024 pixels.
inline bool fits_registers(Access access, int64_t numel, int64_t pixels) {
  return numel <= kRegisterSample &&
         (access == Access::kPacked || (access == Access::kPixels && pixels == kReduceLanes));
}

// Runs a kernel over a batch. `like` gives the device and the allocator of the workspace.
template <class Limits, class Params>
void launch_per_sample(const char* name, const SampleKernels<Params>& kernels, const Params& params,
                       const Tensor& like, const Batch& batch) {
  const int64_t numel = batch.channels * batch.pixels;
  if (batch.size == 0) return;  // no elements but samples: their sums are 0
  check_sample(name, numel);
  const Device device(like);
  const bool registers =
      kernels.registers != nullptr && fits_registers(batch.access, numel, batch.pixels);
  const auto kernel = registers                         ? kernels.registers
                      : batch.access == Access::kPacked ? kernels.vectors
                                                        : kernels.scalars;
  SampleJob job{};
  job.numel = static_cast<int>(numel);
  job.pixels = static_cast<int>(batch.pixels);
  job.segments = static_cast<int>(num_segments(numel));
  const bool has_clusters = job.segments > Limits::kGroups && device.compiled_for(kernel) >= 90;
  const Team team = team_of(job.segments, Limits::kGroups, has_clusters);
  const bool one_launch = team.blocks > 0;
  job.phase = kAllPhases;
  job.cluster = team.blocks > 1;
  job.groups = team.groups;
  job.blocks = one_launch ? team.blocks : std::min(job.segments, 1024);
  if (one_launch && !registers) {
    constexpr int kBatch = 4 * kReduceLanes;  // of a strip: it is kept whole or not at all
    const int most = device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) /
                         static_cast<int>(sizeof(float)) -
                     SharedLayout<Limits>::fixed(job.groups);
    const int wanted = std::min(quads_in(numel) * kQuad, job.groups * static_cast<int>(kSegment));
    job.stage_floats = wanted <= most ? wanted : most / kBatch * kBatch;
  }
  STD_TORCH_CHECK(batch.size <= 0x7fffffff / job.blocks, "coup_fast::", name, ": ", batch.size,
                  " samples are too many for one launch; split the batch");

  Shape shape;
  shape.blocks = static_cast<unsigned>(batch.size * job.blocks);
  shape.threads = static_cast<unsigned>(kSumThreads * job.groups);
  shape.cluster = job.cluster ? static_cast<unsigned>(job.blocks) : 1;
  shape.shared_bytes = sizeof(float) * static_cast<size_t>(SharedLayout<Limits>::fixed(job.groups) +
                                                           job.stage_floats);
  if (one_launch) return launch(device, name, shape, kernel, params, job);

  const int64_t sizes[] = {batch.size, Limits::kRounds, Limits::kProducts, job.segments};
  const Tensor workspace =
      torch::stable::new_empty(like, {sizes, 4}, torch::headeronly::ScalarType::Float);
  job.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  for (job.phase = 0; job.phase <= Limits::kRounds; ++job.phase) {
    launch(device, name, shape, kernel, params, job);
  }
}

}  // namespace coup_fast::cuda
