// normal on CUDA: the normals of math/normal.h, one Philox block a thread and turn. It writes 4
// bytes an element and reads 16 a sample, so the floor is a fill at the device's write bandwidth. A
// block takes several hundred instructions for its four elements (ten rounds, two logarithms, two
// sines and cosines), so on devices of several TB/s the floor is more likely the rate of
// instructions.
#include "checks.h"
#include "cuda/per_quad.cuh"
#include "cuda/step_quads.cuh"

namespace coup_fast::cuda {
namespace {

struct Draw {
  static constexpr bool kPixels = false;
  const int64_t* keys;
  View out;
  struct Row {};

  __device__ Row row() const { return {}; }

  template <class Io>
  __device__ void apply(const Io& io, const Row&) const {
    io.store(out, noise_at(io, keys));
  }
};

Tensor normal(const Tensor& keys, const std::vector<int64_t>& shape) {
  const Tensor out = new_normal(keys, shape);
  Arguments arguments("normal", "keys", keys);
  const int64_t batch = keys.size(0), numel = batch == 0 ? 0 : out.numel() / batch;
  View view;
  view.data = out.data_ptr();
  view.sample_stride = view.channel_stride = numel;
  view.pixel_stride = 1;
  launch_per_quad(Device(keys), "normal", Draw{arguments.keys(keys), view}, view, batch, 1, numel,
                  access_of({&view}, 1, numel, batch));
  return out;
}

}  // namespace
}  // namespace coup_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CUDA, m) {
  m.impl("normal", TORCH_BOX(&coup_fast::cuda::normal));
}
