// reverse_step, its in-place twin and its backward on CUDA, without a guidance norm: every element
// stands alone. Formulas in math/reverse_step.h; with a norm see reverse_step_normed.cu.
//
// Bytes of a forward call an element, float32: x read, x' written, 8, and 4 for each of m, G, r
// that the row uses (2 in 16 bits); generated noise costs none, and in place the bytes are the
// same. Backward reads grad, and of the inputs only what masks or variance depend on, and writes a
// gradient for each input. The floor is those bytes over the device's copy bandwidth, or the
// arithmetic of the noise (see normal.cu), whichever takes longer.
#include "calls/reverse_step.h"
#include "cuda/per_quad.cuh"
#include "cuda/reverse_step.cuh"

namespace coup_fast::cuda {
namespace {

template <bool kPlain, Access kAccess>
__global__ void __launch_bounds__(kThreads, 2)
    reverse_step_kernel(const ReverseStep params, const QuadGrid grid) {
  const StepConstants constants = step_constants<kPlain>(params);
  const StepReads reads = reads_of_call<kPlain>(constants.terms, false);
  each_quads<kAccess>(grid, [&](const auto& io) {
    const auto in = step_values<kPlain>(io, params, load_step(io, params, reads), nullptr);
    store_step(io, params, constants, constants.row.c, in);
  });
}

// --- the usual call: plain, with drawn noise, one layout, one type of output and guidance -------

// A loop for the terms of most rows, with G or without, and one for any others. Two thirds of the
// generic kernel's instructions, because the compiler knows terms, types and that all tensors have
// one offset.
template <DType kType, Access kAccess>
__global__ void __launch_bounds__(kThreads, kAccess == Access::kPairs ? 3 : 2)
    reverse_step_usual_kernel(const ReverseStep given, const QuadGrid grid) {
  ReverseStep params = given;
  params.m.dtype = params.g.dtype = kType;
  params.x.dtype = params.out.dtype = DType::kFloat32;
  params.x.pixel_stride = kAccess == Access::kPixels ? kStripChannels : 1;
  for (View* view : {&params.m, &params.g, &params.out}) {
    view->sample_stride = params.x.sample_stride;
    view->pixel_stride = params.x.pixel_stride;
  }
  for (const View* view : {&params.x, &params.m, &params.out}) {
    __builtin_assume(view->data != nullptr);
  }
  params.z.data = nullptr;

  const StepConstants constants = step_constants<true>(params);
  const auto steps = [&](const StepTerms& terms) {
    const StepReads reads = reads_of_call<true>(terms, false);
    each_quads<kAccess>(grid, [&](const auto& io) {
      const auto in = step_values<true>(io, params, load_step(io, params, reads), nullptr);
      store_step(io, params, {constants.row, terms}, constants.row.c, in);
    });
  };
  if (!is_usual(constants.terms)) {
    steps(constants.terms);
  } else if (constants.terms.g) {
    __builtin_assume(params.g.data != nullptr);
    steps(usual_terms(true));
  } else {
    params.g.data = nullptr;
    steps(usual_terms(false));
  }
}

bool is_usual_call(const ReverseStep& params) {
  const auto like_x = [&](const View& view) {
    return view.sample_stride == params.x.sample_stride &&
           view.pixel_stride == params.x.pixel_stride;
  };
  const bool guided = params.g.data != nullptr;
  return is_plain(params) && params.keys != nullptr && params.m.data != nullptr &&
         like_x(params.m) && like_x(params.out) &&
         (!guided || (like_x(params.g) && params.g.dtype == params.m.dtype));
}

template <bool kPlain, Access kAccess>
__global__ void __launch_bounds__(kThreads, 2)
    reverse_step_backward_kernel(const ReverseStepBackward params, const QuadGrid grid) {
  const ReverseStep& forward = params.forward;
  const StepConstants constants = step_constants<kPlain>(forward);
  const StepReads reads = reads_of_gradient(constants.terms, false);
  const GuidanceSample sample{constants.row.c, 0.0f, 0.0f};
  each_quads<kAccess>(grid, [&](const auto& io) {
    const auto raw_grad = io.load_raw(params.grad);
    const auto in = step_values<kPlain>(io, forward, load_step(io, forward, reads), nullptr);
    const auto grad = finish_load(io, params.grad, raw_grad);
    store_gradients<kPlain>(io, params, constants, sample, in,
                            sum_gradients(io, constants, sample.scale, in, grad));
  });
}

template <bool kPlain>
QuadKernels<ReverseStep> kernels() {
  return {reverse_step_kernel<kPlain, Access::kScalar>,
          reverse_step_kernel<kPlain, Access::kPacked>,
          reverse_step_kernel<kPlain, Access::kPixels>};
}

template <DType kType>
QuadKernels<ReverseStep> usual_kernels() {
  QuadKernels<ReverseStep> result = kernels<true>();
  result.pairs = reverse_step_usual_kernel<kType, Access::kPairs>;
  result.pixels = reverse_step_usual_kernel<kType, Access::kPixels>;
  return result;
}

QuadKernels<ReverseStep> kernels_for(const ReverseStep& params) {
  if (!is_plain(params)) return kernels<false>();
  if (!is_usual_call(params)) return kernels<true>();
  return params.m.dtype == DType::kFloat32   ? usual_kernels<DType::kFloat32>()
         : params.m.dtype == DType::kFloat16 ? usual_kernels<DType::kFloat16>()
                                             : usual_kernels<DType::kBFloat16>();
}

template <bool kPlain>
QuadKernels<ReverseStepBackward> backward_kernels() {
  QuadKernels<ReverseStepBackward> kernels{reverse_step_backward_kernel<kPlain, Access::kScalar>,
                                           reverse_step_backward_kernel<kPlain, Access::kPacked>,
                                           nullptr};
  if constexpr (kPlain) {  // otherwise its registers would spill
    kernels.pixels = reverse_step_backward_kernel<kPlain, Access::kPixels>;
  }
  return kernels;
}

bool is_normed(const ReverseStep& params) {
  return params.guidance_norm != GuidanceNorm::kNone && params.g.data != nullptr;
}

void run(const ReverseStep& params, const Tensor& x) {
  const Access access =
      access_of({&params.x, &params.m, &params.s, &params.g, &params.r, &params.z, &params.out},
                params.channels, params.pixels, params.batch);
  if (is_normed(params)) return run_normed(params, x, access);
  launch_per_quad(Device(x), "reverse_step", kernels_for(params), params, params.x, params.batch,
                  params.channels, params.pixels, access);
}

void run_backward(const ReverseStepBackward& params, const Tensor& x) {
  const ReverseStep& forward = params.forward;
  const Access access = access_of(
      {&forward.x, &forward.m, &forward.s, &forward.g, &forward.r, &forward.z, &params.grad,
       &params.grad_x, &params.grad_m, &params.grad_s, &params.grad_g, &params.grad_r},
      forward.channels, forward.pixels, forward.batch);
  if (is_normed(forward)) return run_normed_backward(params, x, access);
  launch_per_quad(Device(x), "reverse_step_backward",
                  is_plain(forward) ? backward_kernels<true>() : backward_kernels<false>(), params,
                  forward.x, forward.batch, forward.channels, forward.pixels, access);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CUDA, m) {
  m.impl("reverse_step", TORCH_BOX(&reverse_step<run>));
  m.impl("reverse_step_", TORCH_BOX(&reverse_step_<run>));
  m.impl("reverse_step_backward", TORCH_BOX(&reverse_step_backward<run_backward>));
}

}  // namespace coup_fast::cuda
