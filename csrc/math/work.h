// Which thread of a CUDA kernel works on which elements: all of its index arithmetic, here rather
// than in csrc/cuda so that tests can run it on the host.
#pragma once

#include <cstdint>

#include "math/macros.h"
#include "math/reduce.h"

namespace coup_fast::cuda {

constexpr int kQuad = 4;  // consecutive logical elements a thread holds at a time: a Philox block

// A quad of one sample.
struct Place {
  int64_t sample;
  int64_t first;    // logical index of its first element
  int count;        // elements inside the sample, 1 to 4
  int64_t channel;  // of its first element, where somebody needs them
  int64_t pixel;
};

COUP_FAST_FN int64_t quads_in(int64_t numel) { return (numel + kQuad - 1) / kQuad; }

// The order in which a kernel visits the quads of a sample.
//
// Contiguous state: logical order, so that neighbouring threads touch neighbouring vectors.
// channels_last state of C channels and P pixels, P divisible by 4: channels of the same four
// pixels first. A warp's quads then cover one span of about 4 * 32 elements, of which each of the
// four strided loads of a thread takes every fourth pixel: DRAM and L2 serve every byte once, L1
// serves it to the other three. In logical order each sector would travel from L2 once per channel.
struct Order {
  int64_t channels;
  int64_t pixels;
  bool channels_inner;
};

COUP_FAST_FN Order order_of(int64_t channels, int64_t pixels, bool channels_last) {
  return Order{channels, pixels, channels_last && channels > 1 && pixels % kQuad == 0};
}

// Item number `item` of a batch, 0 <= item < batch * quads_in(channels * pixels).
COUP_FAST_FN Place place_of(int64_t item, const Order& order) {
  const int64_t numel = order.channels * order.pixels;
  const int64_t quads = quads_in(numel);
  Place place{};
  place.sample = item / quads;
  int64_t quad = item - place.sample * quads;
  if (order.channels_inner) {
    const int64_t group = quad / order.channels;  // four pixels
    const int64_t channel = quad - group * order.channels;
    quad = channel * (order.pixels / kQuad) + group;
  }
  place.first = quad * kQuad;
  const int64_t left = numel - place.first;
  place.count = left < kQuad ? static_cast<int>(left) : kQuad;
  return place;
}

// Fills in channel and pixel, for tensors whose samples are not dense.
COUP_FAST_FN void locate(Place& place, int64_t pixels) {
  place.channel = place.first / pixels;
  place.pixel = place.first - place.channel * pixels;
}

// --- per-sample sums, in the order of math/reduce.h ---------------------------------------------
//
// A sample is cut into segments of kSegment elements. A block of kSumThreads threads sums a segment
// at a time; thread t owns lanes 4 t to 4 t + 3, so in each of its steps it reads one quad.
constexpr int kSumThreads = kReduceLanes / kQuad;
constexpr int kSumSteps = kSegment / kReduceLanes;
constexpr int kMaxCluster = 8;           // the size every device with clusters grants
constexpr int kMaxSegmentsPerBlock = 8;  // one launch serves samples of up to 64 segments, 2^20

COUP_FAST_FN int64_t sum_first(int64_t segment, int step, int thread) {
  return segment * kSegment + step * kReduceLanes + thread * kQuad;
}

// Steps in which this thread has elements of this segment.
COUP_FAST_FN int sum_steps(int64_t numel, int64_t segment, int thread) {
  const int64_t left = numel - sum_first(segment, 0, thread);
  const int64_t steps = left <= 0 ? 0 : (left - 1) / kReduceLanes + 1;
  return steps < kSumSteps ? static_cast<int>(steps) : kSumSteps;
}

COUP_FAST_FN Place sum_place(int64_t numel, int64_t sample, int64_t segment, int step, int thread) {
  Place place{};
  place.sample = sample;
  place.first = sum_first(segment, step, thread);
  const int64_t left = numel - place.first;
  place.count = left < kQuad ? static_cast<int>(left) : kQuad;
  return place;
}

// Where the quad lies in the block's staged copy, in elements. Segments go round the blocks of a
// sample: segment s is number s / blocks of block s mod blocks.
COUP_FAST_FN int64_t stage_slot(int64_t segment, int blocks, int step, int thread) {
  return sum_first(segment / blocks, step, thread);
}

// Blocks of a sample in one launch, or 0 where it takes several launches with the sums in between.
COUP_FAST_FN int blocks_in_one_launch(int64_t segments, bool has_clusters) {
  if (segments <= 1) return 1;
  if (!has_clusters || segments > int64_t{kMaxCluster} * kMaxSegmentsPerBlock) return 0;
  int blocks = 1;
  while (blocks < segments && blocks < kMaxCluster) blocks *= 2;
  return blocks;
}

}  // namespace coup_fast::cuda
