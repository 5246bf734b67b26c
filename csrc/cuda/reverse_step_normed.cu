// reverse_step and its backward on CUDA with a guidance norm or the stable step, whose factor is
// one for each sample: <G, G> of a sample first, in backward <G, a> as well, then the elements.
// Formulas in math/reverse_step.h, how a sample is summed in per_sample.cuh, which keeps G in
// between. Bytes: as in reverse_step.cu.
#include "cuda/per_sample.cuh"
#include "cuda/reverse_step.cuh"

namespace coup_fast::cuda {
namespace {

// <a, b> of some quads.
template <class Io>
__device__ __forceinline__ void add_products(const Io& io, const Quads<Io::kCount>& a,
                                             const Quads<Io::kCount>& b, Quad& lanes) {
  each(io, [&](int q, int k) {
    float& lane = lanes.at[k];
    if (io.holds(q, k)) lane = Lanes<float>::fma(a.quad[q].at[k], b.quad[q].at[k], lane);
  });
}

// --- forward ------------------------------------------------------------------------------------

template <bool kPlain>
struct Squares : Sums<1, 1> {
  static constexpr int kGroups = 3;
  static constexpr int kSumSteps = 4;
  static constexpr int kUpdateSteps = kPlain ? 2 : 1;
};

template <bool kPlain, Keeping kKeeping>
__global__ void __launch_bounds__(threads_of<Squares<kPlain>>(kKeeping), blocks_of(kKeeping))
    normed_step_kernel(const ReverseStep params, const SampleJob job) {
  const StepConstants constants = step_constants<kPlain>(params);
  const auto load = [&](const auto& io, auto phase) {
    StepReads reads{};
    if (phase.updates()) reads = reads_of_call<kPlain>(constants.terms, true);
    return load_step(io, params, reads);
  };
  const auto sample = open_sample<Squares<kPlain>, kKeeping>(job, params.g, load);

  float square[1];
  const auto squares = [&](const auto& io, const auto& g, const auto&, auto& lanes) {
    add_products(io, g, g, lanes[0]);
  };
  if (!sample.template sum<0>(squares, square)) return;
  const float scale = guidance_scale(constants.row, params.guidance_norm, square[0],
                                     margin_of(params, sample.number()));

  sample.update([&](const auto& io, const auto& g, const auto& raw) {
    store_step(io, params, constants, scale, step_values<kPlain>(io, params, raw, &g));
  });
}

template <bool kPlain>
SampleKernels<ReverseStep> kernels() {
  SampleKernels<ReverseStep> kernels{normed_step_kernel<kPlain, Keeping::kScalars>,
                                     normed_step_kernel<kPlain, Keeping::kVectors>, nullptr};
  if constexpr (kPlain) {  // otherwise its registers would spill
    kernels.registers = normed_step_kernel<kPlain, Keeping::kRegisters>;
  }
  return kernels;
}

// --- backward -----------------------------------------------------------------------------------

struct SquaresAndDots : Sums<2, 1> {
  static constexpr int kGroups = 2;
  static constexpr int kSumSteps = 1;
  static constexpr int kUpdateSteps = 1;
};

template <int kCount>
struct BackwardInputs {
  RawStep<kCount> step;
  RawQuads<kCount> grad;
};

template <Keeping kKeeping>
__global__ void __launch_bounds__(threads_of<SquaresAndDots>(kKeeping), blocks_of(kKeeping))
    normed_backward_kernel(const ReverseStepBackward params, const SampleJob job) {
  const ReverseStep& forward = params.forward;
  const StepConstants constants = step_constants<false>(forward);
  const StepTerms& terms = constants.terms;
  const auto load = [&](const auto& io, auto phase) {
    BackwardInputs<std::decay_t<decltype(io)>::kCount> in{};
    if (!phase.sums(1) && !phase.updates()) return in;
    StepReads reads = phase.updates() ? reads_of_gradient(terms, true) : reads_of_dot(terms);
    reads.g = false;  // it is kept
    in.grad = io.load_raw(params.grad);
    in.step = load_step(io, forward, reads);
    return in;
  };
  const auto sample = open_sample<SquaresAndDots, kKeeping>(job, forward.g, load);

  float square[1], dot[1];
  const auto squares = [&](const auto& io, const auto& g, const auto&, auto& lanes) {
    add_products(io, g, g, lanes[0]);
  };
  if (!sample.template sum<0>(squares, square)) return;
  const float margin = margin_of(forward, sample.number());
  const float scale = guidance_scale(constants.row, forward.guidance_norm, square[0], margin);

  const auto sum_gradient_of = [&](const auto& io, const auto& values, const auto& in) {
    return sum_gradients(io, constants, scale, values, finish_load(io, params.grad, in.grad));
  };
  const auto dots = [&](const auto& io, const auto& g, const auto& in, auto& lanes) {
    const auto values = step_values<false>(io, forward, in.step, &g);
    auto along = sum_gradient_of(io, values, in);
    each(io, [&](int q, int k) {
      const StepFactors<float> factors =
          step_factors<float>(constants.row, terms, scale, values.s.quad[q].at[k]);
      float& at = along.quad[q].at[k];
      at = guided_gradient<float>(terms, factors, at);
    });
    add_products(io, g, along, lanes[0]);
  };
  if (!sample.template sum<1>(dots, dot)) return;
  const GuidanceSample guidance =
      guidance_sample(constants.row, forward.guidance_norm, square[0], dot[0], margin);
  if (params.grad_margin != nullptr && sample.leads()) {
    params.grad_margin[sample.number()] = guidance.grad_margin;
  }

  sample.update([&](const auto& io, const auto& g, const auto& in) {
    const auto values = step_values<false>(io, forward, in.step, &g);
    store_gradients<false>(io, params, constants, guidance, values,
                           sum_gradient_of(io, values, in));
  });
}

}  // namespace

void run_normed(const ReverseStep& params, const Tensor& x, Access access) {
  const Batch batch{params.batch, params.channels, params.pixels, access};
  if (is_plain(params)) {
    launch_per_sample<Squares<true>>("reverse_step", kernels<true>(), params, x, batch);
  } else {
    launch_per_sample<Squares<false>>("reverse_step", kernels<false>(), params, x, batch);
  }
}

void run_normed_backward(const ReverseStepBackward& params, const Tensor& x, Access access) {
  const ReverseStep& forward = params.forward;
  const SampleKernels<ReverseStepBackward> kernels{normed_backward_kernel<Keeping::kScalars>,
                                                   normed_backward_kernel<Keeping::kVectors>,
                                                   nullptr};  // its registers would spill
  launch_per_sample<SquaresAndDots>("reverse_step_backward", kernels, params, x,
                                    {forward.batch, forward.channels, forward.pixels, access});
}

}  // namespace coup_fast::cuda
