// adaptive_step and its backward on the CPU. A small sample is summed and updated while it is in
// the cache. Else: sums over segments, what they say about each sample, then the update of tiles,
// each stage parallel over its items, so that one large sample uses all threads. Results don't
// depend on how many there are, nor on the way.
#include "calls/adaptive_step.h"

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace coup_fast {
namespace {

// The total of sample `sample` from the sums of its segments, in order, every `step`-th from
// `sums`.
float total(const std::vector<float>& sums, int64_t segments, int64_t sample, int64_t step,
            int64_t which) {
  float result = 0.0f;
  for (int64_t segment = 0; segment < segments; ++segment) {
    result += sums[static_cast<size_t>((sample * segments + segment) * step + which)];
  }
  return result;
}

std::vector<AdaptiveSample> samples_of(const AdaptiveStep& params) {
  const int64_t segments = num_segments(params.channels * params.pixels);
  std::vector<float> sums(static_cast<size_t>(2 * params.batch * segments));
  const auto kernel = COUP_FAST_PICK(adaptive_step_sums);
  parallel(params.batch * segments, kSegment,
           [&](int64_t begin, int64_t end) { kernel(params, sums.data(), begin, end); });
  const AdaptiveRow row = row_at<AdaptiveRow>(params.coeffs);
  std::vector<AdaptiveSample> samples(static_cast<size_t>(params.batch));
  for (int64_t i = 0; i < params.batch; ++i) {
    samples[static_cast<size_t>(i)] = adaptive_sample(
        row, params.alive[i], total(sums, segments, i, 2, 0), total(sums, segments, i, 2, 1));
  }
  return samples;
}

void run(const AdaptiveStep& params, const Tensor&) {
  const int64_t numel = params.channels * params.pixels;
  if (numel > 0 && num_segments(numel) == 1) {
    const auto kernel = COUP_FAST_PICK(adaptive_step_samples);
    parallel(params.batch, numel, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
    return;
  }
  const std::vector<AdaptiveSample> samples = samples_of(params);
  for (int64_t i = 0; i < params.batch; ++i) {
    params.alive_next[i] = samples[static_cast<size_t>(i)].alive;
    params.alpha[i] = samples[static_cast<size_t>(i)].alpha;
  }
  const auto kernel = COUP_FAST_PICK(adaptive_step_tiles);
  parallel(num_tiles(params.batch, numel), kTile,
           [&](int64_t begin, int64_t end) { kernel(params, samples.data(), begin, end); });
}

void run_backward(const AdaptiveStepBackward& params, const Tensor&) {
  const AdaptiveStep& forward = params.forward;
  const int64_t numel = forward.channels * forward.pixels, segments = num_segments(numel);
  const std::vector<AdaptiveSample> samples = samples_of(forward);
  std::vector<float> sums(static_cast<size_t>(forward.batch * segments));
  const auto dot_kernel = COUP_FAST_PICK(adaptive_step_dots);
  parallel(forward.batch * segments, kSegment, [&](int64_t begin, int64_t end) {
    dot_kernel(params, samples.data(), sums.data(), begin, end);
  });
  std::vector<float> slopes(samples.size());
  for (int64_t i = 0; i < forward.batch; ++i) {
    slopes[static_cast<size_t>(i)] =
        adaptive_alpha_slope(samples[static_cast<size_t>(i)], total(sums, segments, i, 1, 0));
  }
  const auto kernel = COUP_FAST_PICK(adaptive_step_backward_tiles);
  parallel(num_tiles(forward.batch, numel), kTile, [&](int64_t begin, int64_t end) {
    kernel(params, samples.data(), slopes.data(), begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CPU, m) {
  m.impl("adaptive_step", TORCH_BOX(&adaptive_step<run>));
  m.impl("adaptive_step_backward", TORCH_BOX(&adaptive_step_backward<run_backward>));
}

}  // namespace coup_fast
