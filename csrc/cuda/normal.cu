// normal on CUDA: the normals of math/normal.h, one Philox block a thread and turn. It writes 4
// bytes an element and reads 16 a sample, so the floor is a fill at the device's write bandwidth. A
// block takes several hundred instructions for its four elements (ten rounds, two logarithms, two
// sines and cosines), so on devices of several TB/s the floor is more likely the rate of
// instructions.
#include "calls/normal.h"
#include "cuda/per_quad.cuh"

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

void run(const Normal& params, const Tensor& keys) {
  View out;
  out.data = params.out;
  out.sample_stride = out.channel_stride = params.numel;
  out.pixel_stride = 1;
  launch_per_quad(Device(keys), "normal", Draw{params.keys, out}, out, params.batch, 1,
                  params.numel, access_of({&out}, 1, params.numel, params.batch));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CUDA, m) { m.impl("normal", TORCH_BOX(&normal<run>)); }

}  // namespace coup_fast::cuda
