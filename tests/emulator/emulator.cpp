// Runs the threads of a launch as fibers, one cluster of blocks at a time, in an order shuffled by
// COUP_FAST_EMULATOR_SEED, and stands in for the few symbols a CUDA build of torch would provide.
// A launch that a device would refuse, a barrier not every thread reaches, or a thread that ends
// while others wait for it, is an error.
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

emulator::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kDefaultSharedBytes = 48 * 1024;
constexpr unsigned kWarp = 32;
constexpr unsigned kMaxCluster = 8;

struct Barrier {
  unsigned members = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Block {
  Index index;
  std::vector<char> shared;
  Barrier barrier;
  std::vector<Barrier> warp_barriers;
  std::vector<uint32_t> exchange;  // one word a thread, for shuffles
  unsigned exited;                 // threads that have ended
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Index thread;
  unsigned block;
  bool done;
  const Barrier* waiting;
  uint64_t waiting_for;
  uint64_t cluster_phase;  // the generation of the cluster's barrier at which this thread arrived
  bool arrived;
};

ucontext_t scheduler;
std::vector<Fiber> fibers;
std::vector<Block> blocks;
Barrier cluster;
unsigned blocks_in_cluster = 1;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
std::map<std::pair<int, const void*>, int> shared_limits;  // of a kernel on a device
cudaError_t last_error = cudaSuccess;
uint64_t loaded_bytes = 0;  // by vectors
uint64_t settings = 0;
std::set<const void*> kernels_run;
std::map<const void*, Translation> translations;

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "emulator: %s (block %u,%u thread %u)\n", message, blockIdx.x, blockIdx.y,
               threadIdx.x);
  std::abort();
}

// The generation that completes what this thread's arrival is part of.
uint64_t arrive_at(Barrier& barrier) {
  const uint64_t wanted = barrier.generation + 1;
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  return wanted;
}

void wait_for(Barrier& barrier, uint64_t generation) {
  if (barrier.generation >= generation) return;
  current->waiting = &barrier;
  current->waiting_for = generation;
  swapcontext(&current->context, &scheduler);
}

void wait_at(Barrier& barrier) { wait_for(barrier, arrive_at(barrier)); }

void fiber_main() {
  (*body)();
  if (current->arrived) fail("a thread ends between arrival and wait");
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

void enter(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread;
  blockIdx = blocks[fiber.block].index;
  swapcontext(&scheduler, &fiber.context);
}

void start(Fiber& fiber, unsigned block, unsigned thread) {
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
  fiber.block = block;
  fiber.thread = {thread, 0, 0};
  fiber.done = false;
  fiber.waiting = nullptr;
  fiber.arrived = false;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

void run_fibers(size_t count, std::mt19937& random) {
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  size_t left = count;
  while (left > 0) {
    bool progress = false;
    for (size_t i : order) {
      Fiber& fiber = fibers[i];
      if (fiber.done) continue;
      if (fiber.waiting != nullptr && fiber.waiting->generation < fiber.waiting_for) continue;
      fiber.waiting = nullptr;
      progress = true;
      enter(fiber);
      left -= fiber.done;
      blocks[fiber.block].exited += fiber.done;
    }
    if (!progress) fail("deadlock: a barrier that not every thread reaches");
  }
}

void prepare(Block& block, unsigned threads, size_t shared_bytes) {
  block.shared.resize(shared_bytes + 16);
  std::memset(block.shared.data(), 0xff, block.shared.size());  // NaN: nothing may rely on zeros
  block.barrier = {threads, 0, 0};
  block.warp_barriers.assign((threads + kWarp - 1) / kWarp, {kWarp, 0, 0});
  if (threads % kWarp != 0) block.warp_barriers.back().members = threads % kWarp;
  block.exchange.assign(threads, 0);
  block.exited = 0;
}

bool refused(const Launch& launch) {
  const unsigned threads = launch.block.x;
  int device = 0;
  cudaGetDevice(&device);
  const auto limit = shared_limits.find({device, launch.kernel});
  const size_t shared_limit = limit == shared_limits.end() ? kDefaultSharedBytes : limit->second;
  return std::getenv("COUP_FAST_EMULATOR_REFUSE") != nullptr || launch.grid.x == 0 ||
         launch.grid.x > 0x7fffffffu || launch.grid.y == 0 || launch.grid.y > 65535 ||
         launch.grid.z != 1 || threads == 0 || threads > 1024 || launch.block.y != 1 ||
         launch.block.z != 1 || launch.shared_bytes > shared_limit || launch.cluster == 0 ||
         launch.cluster > kMaxCluster || launch.grid.x % launch.cluster != 0;
}

}  // namespace

uint64_t executed[kExecutedKinds] = {};

// Of compute capability 9.0, or of 7.5, the least of those torch supports.
int max_shared_bytes() {
  return (std::getenv("COUP_FAST_EMULATOR_SMALL") != nullptr ? 64 : 227) * 1024;
}

int run(const Launch& launch, const std::function<void()>& thread_body) {
  if (refused(launch)) return last_error = cudaErrorInvalidValue;
  const char* seed = std::getenv("COUP_FAST_EMULATOR_SEED");
  std::mt19937 random(seed != nullptr ? std::atoi(seed) : 0);
  kernels_run.insert(launch.kernel);
  const unsigned threads = launch.block.x;
  body = &thread_body;
  blocks_in_cluster = launch.cluster;
  blockDim = {threads, 1, 1};
  gridDim = {launch.grid.x, launch.grid.y, 1};
  blocks.resize(blocks_in_cluster);
  fibers.resize(std::max(fibers.size(), size_t{blocks_in_cluster} * threads));
  for (unsigned y = 0; y < launch.grid.y; ++y) {
    for (unsigned x = 0; x < launch.grid.x; x += blocks_in_cluster) {
      cluster = {blocks_in_cluster * threads, 0, 0};
      for (unsigned b = 0; b < blocks_in_cluster; ++b) {
        blocks[b].index = {x + b, y, 0};
        prepare(blocks[b], threads, launch.shared_bytes);
        for (unsigned t = 0; t < threads; ++t) start(fibers[b * threads + t], b, t);
      }
      run_fibers(size_t{blocks_in_cluster} * threads, random);
    }
  }
  return last_error = cudaSuccess;
}

Translation translation(const void* kernel) {
  if (translations.empty()) return nullptr;
  const auto found = translations.find(kernel);
  if (found == translations.end()) fail("a kernel without PTX is launched");
  return found->second;
}

void block_barrier() { wait_at(blocks[current->block].barrier); }
void warp_barrier() { wait_at(blocks[current->block].warp_barriers[current->thread.x / kWarp]); }
void cluster_arrive() {
  if (std::exchange(current->arrived, true)) fail("two arrivals without a wait");
  current->cluster_phase = arrive_at(cluster);
}
void cluster_wait() {
  if (!std::exchange(current->arrived, false)) fail("a wait without arrival");
  wait_for(cluster, current->cluster_phase);
}
void count_load(size_t bytes) { loaded_bytes += bytes; }
unsigned cluster_rank() { return current->block; }
unsigned cluster_size() { return blocks_in_cluster; }
unsigned lane() { return current->thread.x % kWarp; }

void* shared_memory(int rank) {
  if (rank >= static_cast<int>(blocks_in_cluster)) fail("no such block in the cluster");
  const unsigned owner = rank < 0 ? current->block : static_cast<unsigned>(rank);
  // What a device would read then is anything.
  if (owner != current->block && blocks[owner].exited > 0) fail("a block's memory after its end");
  char* start = blocks[owner].shared.data();
  return start + (16 - reinterpret_cast<uintptr_t>(start) % 16) % 16;
}

uint32_t shuffle(uint32_t value, unsigned source_lane) {
  Block& block = blocks[current->block];
  const unsigned first = current->thread.x / kWarp * kWarp;
  if (source_lane >= block.warp_barriers[first / kWarp].members) fail("shuffle from no lane");
  block.exchange[current->thread.x] = value;
  warp_barrier();
  const uint32_t result = block.exchange[first + source_lane];
  warp_barrier();
  return result;
}

}  // namespace emulator

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument (emulated device)";
}
cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }
// The first digits of the compute capability: 9, unless the environment says otherwise.
static int major_capability() {
  const char* capability = std::getenv("COUP_FAST_EMULATOR_CAPABILITY");
  return capability != nullptr ? std::atoi(capability) : 9;
}

// A device of each kind that the environment can ask for: launchers keep what they know of one.
cudaError_t cudaGetDevice(int* device) {
  *device = 1000 * major_capability() + emulator::max_shared_bytes() / 1024;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;  // so that grids are short and their loops turn more than once
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = major_capability();
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulator::max_shared_bytes();
      break;
  }
  return cudaSuccess;
}

cudaError_t emulated_attributes(cudaFuncAttributes* attributes) {
  attributes->ptxVersion = 10 * major_capability();
  return cudaSuccess;
}

cudaError_t emulated_set_shared_bytes(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > emulator::max_shared_bytes()) return cudaErrorInvalidValue;
  ++emulator::settings;
  int device = 0;
  cudaGetDevice(&device);
  emulator::shared_limits[{device, kernel}] =
      std::max(bytes, static_cast<int>(emulator::kDefaultSharedBytes));
  return cudaSuccess;
}

// For tests: calls of cudaFuncSetAttribute since the last call.
extern "C" __attribute__((visibility("default"))) uint64_t emulated_settings() {
  return std::exchange(emulator::settings, uint64_t{0});
}

// For tests: bytes that vector loads have read since the last call.
extern "C" __attribute__((visibility("default"))) uint64_t emulated_loaded_bytes() {
  return std::exchange(emulator::loaded_bytes, uint64_t{0});
}

// For tests: whether the kernel at this address has run.
extern "C" __attribute__((visibility("default"))) bool emulated_has_run(const void* kernel) {
  return emulator::kernels_run.count(kernel) != 0;
}

// For ptx.py: what runs from now on in the place of the kernel at this address.
extern "C" __attribute__((visibility("default"))) void emulated_translate(
    const void* kernel, emulator::Translation translation) {
  emulator::translations[kernel] = translation;
}

// For tests: PTX instructions of a kind that have been executed since the last call.
extern "C" __attribute__((visibility("default"))) uint64_t emulated_executed(int kind) {
  return std::exchange(emulator::executed[kind], uint64_t{0});
}

// --- what torch_cuda would export (prelude.h renames the calls to these) ------------------------
extern "C" {
int32_t emulated_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int32_t emulated_delete_device_guard(void*) { return 0; }
int32_t emulated_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
}
