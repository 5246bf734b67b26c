// How every CUDA op reaches the device: a guard for the tensor's device, the stream that is current
// there at this call, and one launch whose failure becomes a sentence. Nothing here waits for the
// device or allocates. Knows no op.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#if !defined(USE_CUDA)
#error "compile csrc/cuda with -DUSE_CUDA: torch's stable headers declare the stream call under it"
#endif

namespace coup_fast::cuda {

using torch::stable::Tensor;

constexpr int kThreads = 256;

// The device of a tensor made current for a scope, and what a launch needs to know about it.
class Device {
 public:
  explicit Device(const Tensor& tensor)
      : index_(tensor.get_device_index()), guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int index() const { return index_; }
  cudaStream_t stream() const { return stream_; }

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, index_);
    STD_TORCH_CHECK(error == cudaSuccess, "coup_fast: CUDA device ", index_,
                    " can't be queried: ", cudaGetErrorString(error));
    return value;
  }

  // The architecture whose code the device runs for a kernel, 10 major + minor: a device may be
  // newer than all that the library was built for.
  template <typename... Params>
  int compiled_for(void (*kernel)(Params...)) const {
    return prepared(kernel).compiled_for;
  }

  // Lets a kernel have as much shared memory as a block of the device may ask for.
  template <typename... Params>
  cudaError_t allow_shared_memory(void (*kernel)(Params...)) const {
    return prepared(kernel).error;
  }

  // Blocks of a grid-stride loop over `items`: enough to fill the device, no more than needed.
  unsigned grid_for(int64_t items) const {
    constexpr int64_t kBlocksPerMultiprocessor =
        16;  // 8 resident at 256 threads; twice for balance
    const int64_t wanted = (items + kThreads - 1) / kThreads;
    return static_cast<unsigned>(std::min<int64_t>(
        wanted, kBlocksPerMultiprocessor * attribute(cudaDevAttrMultiProcessorCount)));
  }

 private:
  struct Prepared {
    cudaError_t error = cudaSuccess;
    int compiled_for = 0;
  };

  // What is settled once for a kernel on a device, at the first launch that needs it. The bound of
  // its shared memory is the device's: one that followed each call's sample would let a thread
  // lower it between another thread's setting and its launch.
  template <typename... Params>
  Prepared prepared(void (*kernel)(Params...)) const {
    static std::mutex mutex;
    static std::map<std::pair<int, const void*>, Prepared> known;
    int device = index_;
    (void)cudaGetDevice(&device);
    const std::lock_guard<std::mutex> lock(mutex);
    const auto place = std::make_pair(device, reinterpret_cast<const void*>(kernel));
    const auto found = known.find(place);
    if (found != known.end()) return found->second;
    Prepared result;
    cudaFuncAttributes attributes{};
    result.error = cudaFuncGetAttributes(&attributes, kernel);
    if (result.error != cudaSuccess)
      return result;  // to be asked again, and reported by the launch
    result.compiled_for = attributes.ptxVersion;
    result.error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    if (result.error == cudaSuccess) known.emplace(place, result);
    return result;
  }

  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

struct Shape {
  unsigned blocks = 1;
  unsigned threads = kThreads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks that share memory (compute capability 9.0 on)
};

template <typename... Params, typename... Args>
void launch(const Device& device, const char* op, const Shape& shape, void (*kernel)(Params...),
            const Args&... args) {
  constexpr size_t kSharedWithoutAsking = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > kSharedWithoutAsking) error = device.allow_shared_memory(kernel);
  cudaLaunchAttribute cluster[1];
  cluster[0].id = cudaLaunchAttributeClusterDimension;
  cluster[0].val.clusterDim.x = shape.cluster;
  cluster[0].val.clusterDim.y = 1;
  cluster[0].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = device.stream();
  config.attrs = cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, Params(args)...);
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // the error has been reported: don't report it again elsewhere
  STD_TORCH_CHECK(false, "coup_fast::", op, " could not start on CUDA device ", device.index(),
                  " (compute capability ", device.attribute(cudaDevAttrComputeCapabilityMajor), ".",
                  device.attribute(cudaDevAttrComputeCapabilityMinor),
                  "): ", cudaGetErrorString(error),
                  ". Either an earlier kernel failed (run with CUDA_LAUNCH_BLOCKING=1), or the "
                  "extension was not built for this device (set TORCH_CUDA_ARCH_LIST, reinstall)");
}

}  // namespace coup_fast::cuda
