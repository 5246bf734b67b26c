// confidence_cotangent and its backward on CUDA; formulas in math/confidence_cotangent.h.
//
// One warp a row: lane l holds classes l, l + 32, ..., which is the canonical order of the sums, so
// the result is the CPU's bit for bit. The row is read from memory once and then, in two more
// passes (sum, result), from L1. Bytes of a row of K float32 logits: 4 K read, 4 K + 4 written;
// backward reads 8 K + 4 and writes 4 K. With few rows the floor is not bytes but the K / 32
// dependent additions of a lane, about 4 cycles each.
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

// The first of the largest logits; NaN is never larger. 0 if there is none above -inf.
__device__ __forceinline__ int winner_of(const WarpRow& logits, float& largest) {
  constexpr int kNone = 0x7fffffff;
  largest = -INFINITY;
  int winner = kNone;
  logits.each([&](int j) {
    const float logit = logits[j];
    if (logit > largest) {
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

__device__ __forceinline__ ConfidenceRow row_of(const WarpRow& logits, int& winner) {
  float largest;
  winner = winner_of(logits, largest);
  const ConfidenceRow unsummed = confidence_row(largest, 0.0f);
  float others = 0.0f;
  logits.each([&](int j) {
    if (j != winner) others += relative_probability<float>(unsummed, logits[j]);
  });
  return confidence_row(largest, sum_lanes(others));
}

__device__ __forceinline__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kClassLanes;
}

__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const ConfidenceCotangent params) {
  const int64_t sample = row_of_warp();
  if (sample >= params.batch) return;  // the whole warp
  const WarpRow logits{params.logits, sample, static_cast<int>(params.classes)};
  int winner;
  const ConfidenceRow row = row_of(logits, winner);
  logits.each([&](int j) {
    const float cotangent =
        j == winner ? winner_cotangent(row) : -probability<float>(row, logits[j]);
    store_class(params.cotangent, sample, j, cotangent);
  });
  if (threadIdx.x % kClassLanes == 0) params.log_confidence[sample] = log_confidence(row);
}

__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const ConfidenceCotangentBackward params) {
  const int64_t sample = row_of_warp();
  if (sample >= params.batch) return;  // the whole warp
  const WarpRow logits{params.logits, sample, static_cast<int>(params.classes)};
  const WarpRow grads{params.grad_cotangent, sample, static_cast<int>(params.classes)};
  int winner;
  const ConfidenceRow row = row_of(logits, winner);
  const float g_winner = grads[winner];
  float dot = 0.0f;
  logits.each([&](int j) {
    dot = Lanes<float>::fma(probability<float>(row, logits[j]), grads[j] - g_winner, dot);
  });
  dot = sum_lanes(dot);
  const float grad_log = params.grad_log_confidence[sample];
  logits.each([&](int j) {
    const float p = probability<float>(row, logits[j]);
    const float cotangent = j == winner ? winner_cotangent(row) : -p;
    const float h = grads[j] - g_winner;
    const float grad = confidence_gradient<float>(grad_log, dot, cotangent, p, h);
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
  launch_rows(logits, "confidence_cotangent", forward_kernel, params);
}

void run_backward(const ConfidenceCotangentBackward& params, const Tensor& logits) {
  launch_rows(logits, "confidence_cotangent_backward", backward_kernel, params);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CUDA, m) {
  m.impl("confidence_cotangent", TORCH_BOX(&confidence_cotangent<run>));
  m.impl("confidence_cotangent_backward", TORCH_BOX(&confidence_cotangent_backward<run_backward>));
}

}  // namespace coup_fast::cuda
