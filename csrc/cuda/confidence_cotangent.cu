// confidence_cotangent and its backward on CUDA; formulas in math/confidence_cotangent.h.
//
// One warp a row: lane l holds classes l, l + 32, ..., which is the canonical order of the sums, so
// the result is the CPU's bit for bit. The row is read from memory once and then, in two more
// passes (sum, result; for the margin a third one, for the second largest logit), from L1. Bytes of
// a row of K float32 logits: 4 K read, 4 K + 4 written; backward reads 8 K + 4 and writes 4 K. With
// few rows the floor is not bytes but the K / 32 dependent additions of a lane, about 4 cycles
// each.
#include "calls/confidence_cotangent.h"
#include "cuda/launch.cuh"
#include "math/confidence_cotangent.h"

namespace coup_fast::cuda {
namespace {

constexpr unsigned kEveryLane = ~0u;
constexpr int kRowsPerBlock = kThreads / kClassLanes;

// A row of logits in the hands of a warp.
struct WarpRow {
  const View& rows;
  int64_t row;
  int classes;

  __device__ __forceinline__ float operator[](int j) const { return load_class(rows, row, j); }

  // Calls visit(j) for this lane's classes, in order.
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll 4
    for (unsigned j = threadIdx.x % kClassLanes; j < static_cast<unsigned>(classes);
         j += kClassLanes) {
      visit(static_cast<int>(j));
    }
  }
};

// Every lane gets the sum: addition commutes, so the butterfly is the halving tree in each of them.
__device__ __forceinline__ float sum_lanes(float lane) {
#pragma unroll
  for (int half = kClassLanes / 2; half > 0; half /= 2) {
    lane += __shfl_xor_sync(kEveryLane, lane, half);
  }
  return lane;
}

constexpr int kNobody = -1;

// The first of the largest logits but `skipped`; NaN is never larger. 0 if none is above -inf.
__device__ __forceinline__ int winner_of(const WarpRow& logits, int skipped, float& largest) {
  constexpr int kNone = 0x7fffffff;
  largest = -INFINITY;
  int winner = kNone;
  logits.each([&](int j) {
    const float logit = logits[j];
    if (logit > largest && j != skipped) {
      largest = logit;
      winner = j;
    }
  });
#pragma unroll
  for (int half = kClassLanes / 2; half > 0; half /= 2) {
    const float other = __shfl_xor_sync(kEveryLane, largest, half);
    const int other_winner = __shfl_xor_sync(kEveryLane, winner, half);
    if (other > largest || (other == largest && other_winner < winner)) {
      largest = other;
      winner = other_winner;
    }
  }
  return winner == kNone ? 0 : winner;
}

struct RowSums {
  ConfidenceRow row;
  float value;
  int winner;
  int anchor;  // the winner, or the first largest of the other classes
};

template <Confidence kQuantity>
__device__ __forceinline__ RowSums sums_of(const WarpRow& logits) {
  constexpr bool kMargins = kQuantity == Confidence::kMargin;
  RowSums sums{};
  float largest, second = 0.0f;
  sums.winner = sums.anchor = winner_of(logits, kNobody, largest);
  if (kMargins) sums.anchor = winner_of(logits, sums.winner, second);
  sums.row = kMargins ? margin_row(largest, second, 0.0f) : confidence_row(largest, 0.0f);
  float others = 0.0f;
  logits.each([&](int j) {
    if (j != sums.winner) others += relative_probability<float>(sums.row, logits[j]);
  });
  others = sum_lanes(others);
  sums.row = kMargins ? margin_row(largest, second, others) : confidence_row(largest, others);
  sums.value = kMargins ? margin(sums.row, largest) : log_confidence(sums.row);
  return sums;
}

__device__ __forceinline__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kClassLanes;
}

template <Confidence kQuantity>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const ConfidenceCotangent params) {
  const int64_t sample = row_of_warp();
  if (sample >= params.batch) return;  // the whole warp
  const WarpRow logits{params.logits, sample, static_cast<int>(params.classes)};
  const RowSums sums = sums_of<kQuantity>(logits);
  logits.each([&](int j) {
    const float cotangent =
        j == sums.winner ? winner_cotangent(sums.row) : -probability<float>(sums.row, logits[j]);
    store_class(params.cotangent, sample, j, cotangent);
  });
  if (threadIdx.x % kClassLanes == 0) params.value[sample] = sums.value;
}

template <Confidence kQuantity>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const ConfidenceCotangentBackward params) {
  const int64_t sample = row_of_warp();
  if (sample >= params.batch) return;  // the whole warp
  const WarpRow logits{params.logits, sample, static_cast<int>(params.classes)};
  const WarpRow grads{params.grad_cotangent, sample, static_cast<int>(params.classes)};
  const RowSums sums = sums_of<kQuantity>(logits);
  const float g_anchor = grads[sums.anchor];
  const auto probability_of = [&](int j) {
    return j == sums.winner ? winner_probability(kQuantity, sums.row)
                            : probability<float>(sums.row, logits[j]);
  };
  float dot = 0.0f;
  logits.each([&](int j) { dot = Lanes<float>::fma(probability_of(j), grads[j] - g_anchor, dot); });
  dot = sum_lanes(dot);
  const float grad_value = params.grad_value[sample];
  logits.each([&](int j) {
    const float p = probability_of(j);
    const float cotangent = j == sums.winner ? winner_cotangent(sums.row) : -p;
    const float h = grads[j] - g_anchor;
    const float grad = confidence_gradient<float>(grad_value, dot, cotangent, p, h);
    store_class(params.grad_logits, sample, j, grad);
  });
}

template <class Kernel, class Params>
void launch_rows(const Tensor& logits, const char* name, Kernel* kernel, const Params& params) {
  const int64_t blocks = (params.batch + kRowsPerBlock - 1) / kRowsPerBlock;
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "coup_fast::", name, ": too many rows, split the batch");
  Shape shape;
  shape.blocks = static_cast<unsigned>(blocks);
  launch(Device(logits), name, shape, kernel, params);
}

void run(const ConfidenceCotangent& params, const Tensor& logits) {
  const bool margins = params.quantity == Confidence::kMargin;
  launch_rows(
      logits, "confidence_cotangent",
      margins ? forward_kernel<Confidence::kMargin> : forward_kernel<Confidence::kLogProbability>,
      params);
}

void run_backward(const ConfidenceCotangentBackward& params, const Tensor& logits) {
  const bool margins = params.quantity == Confidence::kMargin;
  launch_rows(
      logits, "confidence_cotangent_backward",
      margins ? backward_kernel<Confidence::kMargin> : backward_kernel<Confidence::kLogProbability>,
      params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CUDA, m) {
  m.impl("confidence_cotangent", TORCH_BOX(&confidence_cotangent<run>));
  m.impl("confidence_cotangent_backward", TORCH_BOX(&confidence_cotangent_backward<run_backward>));
}

}  // namespace coup_fast::cuda
