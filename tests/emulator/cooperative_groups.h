// The part of <cooperative_groups.h> that csrc/cuda uses, for the emulator.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  int barrier_arrive() const { return emulator::cluster_arrive(), 0; }
  void barrier_wait() const { emulator::cluster_wait(); }
  unsigned block_rank() const { return emulator::cluster_rank(); }
  unsigned num_blocks() const { return emulator::cluster_size(); }
  template <typename T>
  T* map_shared_rank(T* address, int rank) const {
    const auto offset = reinterpret_cast<const char*>(address) -
                        static_cast<const char*>(emulator::shared_memory(-1));
    return reinterpret_cast<T*>(static_cast<char*>(emulator::shared_memory(rank)) + offset);
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
