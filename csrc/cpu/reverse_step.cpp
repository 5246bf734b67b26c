// reverse_step, its in-place twin and its backward on the CPU: threads and the order of the passes.
// The kernels are in per_isa/reverse_step.cpp.
#include "calls/reverse_step.h"

#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace coup_fast {
namespace {

bool needs_norm(const ReverseStep& params) {
  return params.guidance_norm != GuidanceNorm::kNone && params.g.data != nullptr &&
         row_at<StepRow>(params.coeffs).c != 0.0f;
}

// One sum for each sample: fill(sums, begin, end) gives those of its segments, added here in order.
template <class Fill>
std::vector<float> sum_samples(const ReverseStep& params, const Fill& fill) {
  const int64_t segments = num_segments(params.channels * params.pixels);
  std::vector<float> parts(static_cast<size_t>(params.batch * segments));
  parallel(params.batch * segments, kSegment,
           [&](int64_t begin, int64_t end) { fill(parts.data(), begin, end); });
  std::vector<float> sums(static_cast<size_t>(params.batch), 0.0f);
  for (size_t sample = 0; sample < sums.size(); ++sample) {
    for (int64_t k = 0; k < segments; ++k) {
      sums[sample] += parts[sample * static_cast<size_t>(segments) + static_cast<size_t>(k)];
    }
  }
  return sums;
}

std::vector<float> guidance_squares(const ReverseStep& params) {
  const auto kernel = COUP_FAST_PICK(reverse_step_squares);
  return sum_samples(
      params, [&](float* sums, int64_t begin, int64_t end) { kernel(params, sums, begin, end); });
}

void run(const ReverseStep& params, const Tensor&) {
  const auto kernel = COUP_FAST_PICK(reverse_step_tiles);
  std::vector<float> scales;
  if (needs_norm(params)) {
    scales = guidance_squares(params);
    const StepRow row = row_at<StepRow>(params.coeffs);
    for (size_t i = 0; i < scales.size(); ++i) {
      const float margin = margin_of(params, static_cast<int64_t>(i));
      scales[i] = guidance_scale(row, params.guidance_norm, scales[i], margin);
    }
  }
  const float* scale_of = scales.empty() ? nullptr : scales.data();
  parallel(num_tiles(params.batch, params.channels * params.pixels), kTile,
           [&](int64_t begin, int64_t end) { kernel(params, scale_of, begin, end); });
}

// The GuidanceSample of each sample, in two rounds: a may need c_i.
std::vector<GuidanceSample> guidance_samples(const ReverseStepBackward& params) {
  const ReverseStep& forward = params.forward;
  const StepRow row = row_at<StepRow>(forward.coeffs);
  const std::vector<float> squares = guidance_squares(forward);
  std::vector<GuidanceSample> samples(squares.size());
  const auto sample = [&](size_t i, float dot) {
    const float margin = margin_of(forward, static_cast<int64_t>(i));
    return guidance_sample(row, forward.guidance_norm, squares[i], dot, margin);
  };
  for (size_t i = 0; i < samples.size(); ++i) samples[i] = sample(i, 0.0f);
  const auto kernel = COUP_FAST_PICK(reverse_step_dots);
  const std::vector<float> dots =
      sum_samples(forward, [&](float* sums, int64_t begin, int64_t end) {
        kernel(params, samples.data(), sums, begin, end);
      });
  for (size_t i = 0; i < samples.size(); ++i) samples[i] = sample(i, dots[i]);
  return samples;
}

void run_backward(const ReverseStepBackward& params, const Tensor&) {
  std::vector<GuidanceSample> samples;
  if (needs_norm(params.forward)) samples = guidance_samples(params);
  const GuidanceSample* sample_of = samples.empty() ? nullptr : samples.data();
  if (params.grad_margin != nullptr) {
    for (int64_t i = 0; i < params.forward.batch; ++i) {
      params.grad_margin[i] = sample_of == nullptr ? 0.0f : sample_of[i].grad_margin;
    }
  }
  const auto kernel = COUP_FAST_PICK(reverse_step_backward_tiles);
  parallel(num_tiles(params.forward.batch, params.forward.channels * params.forward.pixels), kTile,
           [&](int64_t begin, int64_t end) { kernel(params, sample_of, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CPU, m) {
  m.impl("reverse_step", TORCH_BOX(&reverse_step<run>));
  m.impl("reverse_step_", TORCH_BOX(&reverse_step_<run>));
  m.impl("reverse_step_backward", TORCH_BOX(&reverse_step_backward<run_backward>));
}

}  // namespace coup_fast
