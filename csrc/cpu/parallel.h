// Threads: torch's own pool, over independent items. Small calls stay on the calling thread.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace coup_fast {

constexpr int64_t kElementsPerThread = 16384;  // at least: about what waking a thread costs

// Calls body(begin, end) on ranges that cover [0, items). Results must not depend on the ranges.
template <class Body>
void parallel(int64_t items, int64_t elements_per_item, const Body& body) {
  if (items == 0) return;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / elements_per_item);
  if (items <= grain) return body(int64_t{0}, items);
  torch::stable::parallel_for(0, items, grain, body);
}

}  // namespace coup_fast
