// A stand-in for <cuda_runtime.h> with which g++ compiles csrc/cuda/*.cu, so that tests can run the
// text of the kernels and of their launchers on the CPU and compare every bit with the CPU ops.
// Threads are fibers; barriers, shuffles, clusters and shared memory behave as on a device, and a
// launch a device would refuse is refused. It says nothing about speed, code generation (unless
// ptx.py puts the kernels' PTX in the place of their text) or memory ordering between blocks that
// don't synchronise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <tuple>

#define COUP_FAST_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __builtin_assume(condition) ((condition) ? void() : __builtin_trap())

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {

struct Index {
  unsigned x, y, z;
};
void block_barrier();
void warp_barrier();
void cluster_arrive();  // the barrier of a cluster in two halves
void cluster_wait();
unsigned cluster_rank();
unsigned cluster_size();
void* shared_memory(int rank);  // of a block of this cluster; -1: this block
uint32_t shuffle(uint32_t value, unsigned source_lane);  // every lane of the warp takes part
unsigned lane();
void count_load(size_t bytes);

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  unsigned cluster;
  const void* kernel;
};
int run(const Launch& launch, const std::function<void()>& thread_body);

// A kernel's PTX, translated to C++ (ptx_translate.py): runs one thread.
using Translation = void (*)(const void* const* parameters);  // their addresses
Translation translation(const void* kernel);                  // null while no kernel has one


// PTX instructions that threads have executed, by kind, where the translation counts them.
enum Executed { kFloat, kInteger, kMemory, kOther, kExecutedKinds };
extern uint64_t executed[kExecutedKinds];

}  // namespace emulator

extern emulator::Index threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs now

// Loads marked for early eviction, as vectors are loaded; emulator.cpp counts their bytes.
template <typename T>
T __ldcs(const T* address) {
  emulator::count_load(sizeof(T));
  return *address;
}

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp(unsigned = ~0u) { emulator::warp_barrier(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  bits = emulator::shuffle(bits, emulator::lane() ^ static_cast<unsigned>(mask));
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  bits = emulator::shuffle(bits, static_cast<unsigned>(source));
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// --- the runtime API, as far as the launchers use it -------------------------------------------
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
using cudaStream_t = void*;

union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

struct cudaFuncAttributes {
  int ptxVersion;
};
cudaError_t emulated_attributes(cudaFuncAttributes* attributes);
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  return emulated_attributes(attributes);
}

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t emulated_set_shared_bytes(const void* kernel, int bytes);

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  return emulated_set_shared_bytes(reinterpret_cast<const void*>(kernel), value);
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args... args) {
  emulator::Launch launch{config->gridDim, config->blockDim, config->dynamicSmemBytes, 1,
                          reinterpret_cast<const void*>(kernel)};
  for (unsigned i = 0; i < config->numAttrs; ++i)
    launch.cluster = config->attrs[i].val.clusterDim.x;
  const std::tuple<Params...> values(args...);
  const auto run = [&](const auto&... value) {
    if (const emulator::Translation ptx = emulator::translation(launch.kernel)) {
      const void* parameters[] = {&value...};
      return emulator::run(launch, [&] { ptx(parameters); });
    }
    return emulator::run(launch, [&] { kernel(value...); });
  };
  return static_cast<cudaError_t>(std::apply(run, values));
}
