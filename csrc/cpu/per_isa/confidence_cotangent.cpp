// Kernels of confidence_cotangent and its backward, compiled once per instruction set. Formulas and
// order of the sums: math/confidence_cotangent.h. A row is widened to float32 once, padded with
// -inf to whole vectors, so that every loop runs over whole vectors and padding adds exact zeros.
// Its exponentials then take its place.
#include "math/confidence_cotangent.h"

#include <memory>

#include "cpu/kernels.h"
#include "cpu/per_isa/vectors.h"
#include "math/reduce.h"

namespace coup_fast::COUP_FAST_ISA {
namespace {

constexpr int kParts = kClassLanes / kWidth;  // vectors that hold the lanes of a sum

// The floats of one row.
class Row {
 public:
  explicit Row(int64_t classes)
      : classes_(classes),
        padded_((classes + kWidth - 1) / kWidth * kWidth),
        data_(new float[static_cast<size_t>(padded_)]) {}

  void read(const View& view, int64_t row, float padding) {
    if (consecutive(view)) {
      memcpy(data(), first(view, row), sizeof(float) * static_cast<size_t>(classes_));
    } else {
      for (int64_t j = 0; j < classes_; ++j) data_[j] = load_class(view, row, j);
    }
    for (int64_t j = classes_; j < padded_; ++j) data_[j] = padding;
  }
  void write(const View& view, int64_t row) const {
    if (consecutive(view)) {
      memcpy(first(view, row), data(), sizeof(float) * static_cast<size_t>(classes_));
    } else {
      for (int64_t j = 0; j < classes_; ++j) store_class(view, row, j, data_[j]);
    }
  }

  float& operator[](int64_t j) { return data_[j]; }
  float* data() const { return data_.get(); }
  int64_t padded() const { return padded_; }

 private:
  bool consecutive(const View& view) const {
    return view.dtype == DType::kFloat32 && (view.channel_stride == 1 || classes_ == 1);
  }
  static float* first(const View& view, int64_t row) {
    return static_cast<float*>(view.data) + row * view.sample_stride;
  }

  int64_t classes_, padded_;
  std::unique_ptr<float[]> data_;
};

// The sum of term(j) over the vectors at j, in canonical order; term(j, lanes so far) adds.
template <class Term>
__attribute__((always_inline)) inline float sum_classes(const Row& row, Term term) {
  Vec lanes[kParts] = {};
  int64_t j = 0;
  for (; j + kClassLanes <= row.padded(); j += kClassLanes) {
    for (int part = 0; part < kParts; ++part) {
      lanes[part] = term(j + part * kWidth, lanes[part]);
    }
  }
  for (int part = 0; j < row.padded(); j += kWidth, ++part) lanes[part] = term(j, lanes[part]);
  for (int width = kParts / 2; width > 0; width /= 2) {
    for (int part = 0; part < width; ++part) lanes[part] += lanes[part + width];
  }
  float scratch[kWidth];
  store(scratch, lanes[0]);
  return halving_tree(scratch, kWidth);
}

// The first of the largest logits; NaN is never larger. 0 if there is none above -inf.
int64_t winner_of(const Row& logits) {
  Vec largest = Lanes<Vec>::set(-INFINITY);
  VecI index = {}, at;  // of each lane's first largest
  for (int lane = 0; lane < kWidth; ++lane) at[lane] = lane;
  for (int64_t j = 0; j < logits.padded(); j += kWidth) {
    const Vec value = load(logits.data() + j);
    const VecI larger = value > largest;
    largest = larger ? value : largest;
    index = larger ? at : index;
    at += kWidth;
  }
  float best = largest[0];
  int winner = index[0];
  for (int lane = 1; lane < kWidth; ++lane) {  // no branch: none could be predicted
    const bool first = (largest[lane] == best) & (index[lane] < winner);
    const bool better = (largest[lane] > best) | first;
    best = better ? largest[lane] : best;
    winner = better ? index[lane] : winner;
  }
  return winner;
}

struct RowSums {
  ConfidenceRow row;
  float value;
  int64_t winner;
  int64_t anchor;  // the winner, or the first largest of the other classes
};

// What the row's elements need to know. Leaves the relative probabilities in place of the logits,
// and for the winner 0.
RowSums sums_of(Row& logits, Confidence quantity) {
  const bool margins = quantity == Confidence::kMargin;
  const int64_t winner = winner_of(logits);
  const float largest = logits[winner];
  logits[winner] = -INFINITY;
  const int64_t anchor = margins ? winner_of(logits) : winner;
  const float second = logits[anchor];
  const ConfidenceRow unsummed =
      margins ? margin_row(largest, second, 0.0f) : confidence_row(largest, 0.0f);
  float* data = logits.data();
  const float others = sum_classes(logits, [=](int64_t j, Vec lane) __attribute__((always_inline)) {
    const Vec relative = relative_probability<Vec>(unsummed, load(data + j));
    store(data + j, relative);
    return lane + relative;
  });
  if (margins) {
    const ConfidenceRow row = margin_row(largest, second, others);
    return RowSums{row, margin(row, largest), winner, anchor};
  }
  const ConfidenceRow row = confidence_row(largest, others);
  return RowSums{row, log_confidence(row), winner, anchor};
}

}  // namespace

void confidence_cotangent_rows(const ConfidenceCotangent& params, int64_t begin, int64_t end) {
  Row row(params.classes);
  for (int64_t i = begin; i < end; ++i) {
    row.read(params.logits, i, -INFINITY);
    const RowSums sums = sums_of(row, params.quantity);
    float* data = row.data();
    for (int64_t j = 0; j < row.padded(); j += kWidth) {
      store(data + j, -normalised<Vec>(sums.row, load(data + j)));
    }
    row[sums.winner] = winner_cotangent(sums.row);
    row.write(params.cotangent, i);
    params.value[i] = sums.value;
  }
}

void confidence_cotangent_backward_rows(const ConfidenceCotangentBackward& params, int64_t begin,
                                        int64_t end) {
  Row row(params.classes), grads(params.classes);
  for (int64_t i = begin; i < end; ++i) {
    row.read(params.logits, i, -INFINITY);
    grads.read(params.grad_cotangent, i, 0.0f);
    const RowSums sums = sums_of(row, params.quantity);
    row[sums.winner] = params.quantity == Confidence::kMargin ? 0.0f : 1.0f;
    float* data = row.data();
    const float* g = grads.data();
    const float g_anchor = grads[sums.anchor];
    const auto relative = [=](int64_t j) __attribute__((always_inline)) {
      return load(g + j) - Lanes<Vec>::set(g_anchor);
    };
    const float dot = sum_classes(row, [&](int64_t j, Vec lane) __attribute__((always_inline)) {
      return Lanes<Vec>::fma(normalised<Vec>(sums.row, load(data + j)), relative(j), lane);
    });
    const float grad_value = params.grad_value[i];
    const float at_winner = confidence_gradient<float>(
        grad_value, dot, winner_cotangent(sums.row), winner_probability(params.quantity, sums.row),
        grads[sums.winner] - g_anchor);
    for (int64_t j = 0; j < row.padded(); j += kWidth) {
      const Vec p = normalised<Vec>(sums.row, load(data + j));
      store(data + j, confidence_gradient<Vec>(grad_value, dot, -p, p, relative(j)));
    }
    row[sums.winner] = at_winner;
    row.write(params.grad_logits, i);
  }
}

}  // namespace coup_fast::COUP_FAST_ISA
