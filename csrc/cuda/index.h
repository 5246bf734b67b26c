// Which thread of a CUDA kernel works on which elements: all of its index arithmetic. Knows no
// CUDA, so that tests can run it on the host. Indices inside a sample are 32-bit, which keeps
// 64-bit division, a function call on a GPU, out of the loops; offsets in memory are 64-bit.
#pragma once

#include <cstdint>

#include "math/layout.h"
#include "math/macros.h"
#include "math/reduce.h"

namespace coup_fast::cuda {

constexpr int kQuad = 4;  // consecutive logical elements a thread holds at a time: a Philox block
constexpr int64_t kMaxSample = int64_t{1} << 30;  // elements of a sample

// A quad of one sample.
struct Place {
  int64_t sample;
  int first;    // logical index of its first element
  int count;    // elements inside the sample, 1 to 4
  int channel;  // of its first element, where somebody needs them
  int pixel;
};

COUP_FAST_FN int quads_in(int64_t numel) { return static_cast<int>((numel + kQuad - 1) / kQuad); }

COUP_FAST_FN Place place_at(int64_t sample, int first, int numel) {
  const int left = numel - first;
  return Place{sample, first, left < kQuad ? left : kQuad, 0, 0};
}

// Fills in channel and pixel, for tensors whose samples are not dense.
COUP_FAST_FN void locate(Place& place, int pixels) {
  const unsigned channel = static_cast<unsigned>(place.first) / static_cast<unsigned>(pixels);
  place.channel = static_cast<int>(channel);
  place.pixel = place.first - place.channel * pixels;
}

// --- one quad after another ---------------------------------------------------------------------
//
// The quads of a batch, in the order in which the threads of a grid take them.
//
// Contiguous state: logical order, so that neighbouring threads touch neighbouring vectors.
// channels_last state of C channels and P pixels, P divisible by 4, where no vectors fit (three
// channels have PixelsAccess): channels of the same four pixels first. A warp's quads then cover
// one span of about 4 * 32 elements, of which each of the four strided loads of a thread takes
// every fourth pixel: DRAM and L2 serve every byte once, L1 serves it to the other three. In
// logical order each sector would travel from L2 once per channel.
struct Order {
  int channels;
  int pixels;
  bool channels_inner;
};

COUP_FAST_FN Order order_of(const View& state, int64_t channels, int64_t pixels) {
  const bool channels_last = state.channel_stride == 1 && state.pixel_stride == channels;
  return Order{static_cast<int>(channels), static_cast<int>(pixels),
               channels_last && channels > 1 && pixels > 1 && pixels % kQuad == 0};
}

COUP_FAST_FN Place place_of(int64_t sample, int quad, const Order& order) {
  if (order.channels_inner) {
    const int group = static_cast<int>(static_cast<unsigned>(quad) /
                                       static_cast<unsigned>(order.channels));  // of four pixels
    quad = (quad - group * order.channels) * (order.pixels / kQuad) + group;
  }
  return place_at(sample, quad * kQuad, order.channels * order.pixels);
}

// Where a thread of a grid-stride loop is: it takes items thread, thread + threads, ... of the
// batch's quads, sample by sample.
struct Cursor {
  int64_t sample;
  int quad;
};

// How far one turn of the loop moves it.
struct Stride {
  int64_t samples;
  int quads;  // fewer than quads_in_sample
  int quads_in_sample;
};

COUP_FAST_FN Stride stride_of(int64_t threads, int64_t numel) {
  const int quads = quads_in(numel);
  return Stride{threads / quads, static_cast<int>(threads % quads), quads};
}

COUP_FAST_FN Cursor cursor_at(unsigned thread, const Stride& stride) {
  const unsigned sample = thread / static_cast<unsigned>(stride.quads_in_sample);
  return Cursor{sample, static_cast<int>(thread - sample * stride.quads_in_sample)};
}

COUP_FAST_FN void advance(Cursor& cursor, const Stride& stride) {
  cursor.sample += stride.samples;
  cursor.quad += stride.quads;
  if (cursor.quad >= stride.quads_in_sample) {
    cursor.quad -= stride.quads_in_sample;
    ++cursor.sample;
  }
}

// --- per-sample sums, in the order of math/reduce.h ---------------------------------------------
//
// A group of kSumThreads threads sums a segment at a time; thread t of it owns lanes 4 t to 4 t +
// 3, so in each of its steps it reads one quad. A block is one to three groups, a sample one or
// more blocks: with n groups in all, group g of the sample takes segments g, g + n, ..., which are
// its turns 0, 1, ...
constexpr int kSumThreads = kReduceLanes / kQuad;
constexpr int kSumSteps = static_cast<int>(kSegment) / kReduceLanes;
constexpr int kMaxCluster = 8;     // blocks: the size that every device with clusters grants
constexpr int kMaxSegments = 64;   // of a sample in one launch: 2^20 elements
constexpr int kMaxOwn = 12;        // segments of a block, no fewer than its groups times turns
constexpr int kRegisterSteps = 3;  // steps whose quads a thread keeps in registers
constexpr int kRegisterSample = kRegisterSteps * kReduceLanes;  // elements of a sample kept so

// The first element of a thread's quad in a segment, or in the block's staged copy of it (group).
COUP_FAST_FN int sum_first(int segment, int step, int thread) {
  return segment * static_cast<int>(kSegment) + step * kReduceLanes + thread * kQuad;
}

// Steps in which this thread has elements of this segment.
COUP_FAST_FN int sum_steps(int numel, int segment, int thread) {
  const int left = numel - sum_first(segment, 0, thread);
  const int steps = (left + kReduceLanes - 1) / kReduceLanes;
  return left <= 0 ? 0 : steps < kSumSteps ? steps : kSumSteps;
}

// How a sample is shared out.
struct Team {
  int blocks;  // 0: it takes several launches, with the sums in between
  int groups;  // of a block
};

// most_groups: what the registers of a kernel allow. As few blocks as hold all segments at once, so
// that everything stays in shared memory; the largest cluster, turn by turn, where none does.
COUP_FAST_FN Team team_of(int64_t segments, int most_groups, bool has_clusters) {
  const int groups =
      segments < most_groups ? (segments < 1 ? 1 : static_cast<int>(segments)) : most_groups;
  if (segments <= groups) return Team{1, groups};
  if (!has_clusters || segments > kMaxSegments) return Team{0, 1};
  int blocks = 2;
  while (blocks * groups < segments && blocks < kMaxCluster) blocks *= 2;
  const int64_t enough = (segments + blocks - 1) / blocks;  // groups for one turn
  return Team{blocks, enough < groups ? static_cast<int>(enough) : groups};
}

}  // namespace coup_fast::cuda
