// log max softmax of a row of logits and its gradient, the guidance of COUP (arXiv 2408.05900,
// section 4): with w the first largest logit and S = sum over j != w of exp(l_j - l_w),
//   log p_w = -log1p(S),   d log p_w / d l_j = [j = w] - p_j,   p_j = exp(l_j - l_w) / (1 + S).
// Keeping w out of the sum keeps S, and with it 1 - p_w = S / (1 + S), to full relative precision
// when the classifier is all but certain: where 1 - p_w would cancel, the guidance keeps its
// direction. NaN anywhere, or an infinite largest logit, makes the row NaN, as in torch.
//
// Or the margin and its gradient, with v the first largest logit but w, and T the sum over j != w
// of exp(l_j - l_v):
//   m = l_w - l_v - log T,   dm / d l_w = 1,   dm / d l_j = -q_j = -exp(l_j - l_v) / T.
// Then log p_w = -log(1 + e^-m), and the first gradient is the second times 1 - p_w. There an
// infinite l_v makes the row NaN as well.
//
// Sums over classes are in canonical order: class j goes to lane j mod 32, lanes add in order of j,
// then lane l takes lane l + 16, l + 8, ..., l + 1.
#pragma once

#include "math/elementary.h"
#include "math/layout.h"

namespace coup_fast {

constexpr int kClassLanes = 32;

// Logit j of a row of a view whose channels are the classes.
COUP_FAST_FN float load_class(const View& view, int64_t row, int64_t j) {
  return load_as_float(view.data, view.dtype, row * view.sample_stride + j * view.channel_stride);
}

COUP_FAST_FN void store_class(const View& view, int64_t row, int64_t j, float value) {
  store_from_float(view.data, view.dtype, row * view.sample_stride + j * view.channel_stride,
                   value);
}

enum class Confidence : int32_t { kLogProbability = 0, kMargin = 1 };

// What the elements of a row need to know about it.
struct ConfidenceRow {
  float anchor;  // l_w, or l_v for the margin
  float others;  // S, or T
  float total;   // 1 + S, or T; or NaN
};

COUP_FAST_FN ConfidenceRow confidence_row(float largest, float others) {
  const float one = 1.0f + (largest - largest);  // NaN for an infinite or NaN largest logit
  return ConfidenceRow{largest, others, one + others};
}

COUP_FAST_FN ConfidenceRow margin_row(float largest, float second, float others) {
  const float zero = (largest - largest) + (second - second);  // NaN, as above
  return ConfidenceRow{second, others, zero + others};
}

// log p_w
COUP_FAST_FN float log_confidence(const ConfidenceRow& row) {
  if (!(row.total == row.total)) return row.total;
  return -log_1p(row.others);
}

// m
COUP_FAST_FN float margin(const ConfidenceRow& row, float largest) {
  if (!(row.total == row.total)) return row.total;
  return (largest - row.anchor) - log_positive<float>(row.total);
}

// exp(l_j - l_w), which is 1 for the winner; or exp(l_j - l_v), which is not for the winner
template <class F>
COUP_FAST_FN F relative_probability(const ConfidenceRow& row, F logit) {
  return exp<F>(logit - Lanes<F>::set(row.anchor));
}

// p_j, or q_j, of the relative probability or of the logit
template <class F>
COUP_FAST_FN F normalised(const ConfidenceRow& row, F relative) {
  return relative / Lanes<F>::set(row.total);
}

template <class F>
COUP_FAST_FN F probability(const ConfidenceRow& row, F logit) {
  return normalised<F>(row, relative_probability<F>(row, logit));
}

// p_w, or 0: the margin's cotangent has no probability for the winner
COUP_FAST_FN float winner_probability(Confidence quantity, const ConfidenceRow& row) {
  return normalised<float>(row, quantity == Confidence::kMargin ? 0.0f : 1.0f);
}

// The cotangent of the winner, 1 for the margin; that of every other class is -probability.
COUP_FAST_FN float winner_cotangent(const ConfidenceRow& row) { return row.others / row.total; }

// Gradient of grad_value log p_w + sum_j g_j cotangent_j with respect to one logit:
//   grad_value cotangent_j + p_j (dot - h_j),   h_j = g_j - g_w,   dot = sum_j p_j h_j.
// The same without g_w, which cancels; but all that is left of dot when the classifier is all but
// certain is what the other classes add, and p_w g_w would drown it. For the margin the same with
// q_j, 0 for w, and with g_v in the place of g_w.
template <class F>
COUP_FAST_FN F confidence_gradient(float grad_value, float dot, F cotangent, F p, F h) {
  using L = Lanes<F>;
  return L::fma(p, L::set(dot) - h, L::set(grad_value) * cotangent);
}

}  // namespace coup_fast
