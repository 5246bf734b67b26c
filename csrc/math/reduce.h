// The canonical order of a sample's dot product, so that every path sums alike, bit for bit.
// The sample is cut into segments of kSegment logical elements. In a segment element i belongs to
// lane i mod kReduceLanes; a lane adds its products in order with fma, then a halving tree adds the
// lanes (lane j takes lane j + w for w = kReduceLanes / 2 ... 1). Segment sums are added in order.
// Lanes beyond the end hold 0, so a short segment is a full one with zeros.
#pragma once

#include <cstdint>

#include "math/lanes.h"

namespace coup_fast {

constexpr int64_t kSegment = 16384;
constexpr int kReduceLanes = 1024;

COUP_FAST_FN int64_t num_segments(int64_t numel) { return (numel + kSegment - 1) / kSegment; }

// The sum of `lanes` (a power of two) lanes, which it uses as scratch. Indexing is all it needs.
template <class Lane>
COUP_FAST_FN float halving_tree(Lane lane, int lanes) {
  for (int width = lanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
  }
  return lane[0];
}

// The order spelled out: <a, b> of one sample, scalar. scratch: kReduceLanes floats.
COUP_FAST_FN float canonical_dot(const float* a, const float* b, int64_t numel, float* scratch) {
  float total = 0.0f;
  for (int64_t begin = 0; begin < numel; begin += kSegment) {
    const int64_t end = begin + kSegment < numel ? begin + kSegment : numel;
    for (int j = 0; j < kReduceLanes; ++j) scratch[j] = 0.0f;
    for (int64_t i = begin; i < end; ++i) {
      float& lane = scratch[(i - begin) % kReduceLanes];
      lane = Lanes<float>::fma(a[i], b[i], lane);
    }
    total += halving_tree(scratch, kReduceLanes);
  }
  return total;
}

}  // namespace coup_fast
