// Kernels of confidence_cotangent and its backward, compiled once per instruction set. Formulas and
// order of the sums: math/confidence.h. A row is widened to float32 once, padded with -inf to whole
// groups of kClassLanes, so that every loop runs over whole vectors and padding adds exact zeros.
#include "cpu/tiles_confidence.h"

#include <memory>

#include "cpu/simd.h"
#include "math/reduce.h"

namespace coup_fast::COUP_FAST_ISA {
namespace {

constexpr int kParts = kClassLanes / kWidth;  // vectors that hold the lanes of a sum

// The floats of one row.
class Row {
 public:
  explicit Row(int64_t classes)
      : classes_(classes),
        padded_((classes + kClassLanes - 1) / kClassLanes * kClassLanes),
        data_(new float[static_cast<size_t>(padded_)]) {}

  void read(const View& view, int64_t row, float padding) {
    for (int64_t j = 0; j < classes_; ++j) data_[j] = load_class(view, row, j);
    for (int64_t j = classes_; j < padded_; ++j) data_[j] = padding;
  }
  void write(const View& view, int64_t row) const {
    for (int64_t j = 0; j < classes_; ++j) store_class(view, row, j, data_[j]);
  }

  float& operator[](int64_t j) { return data_[j]; }
  float* data() const { return data_.get(); }
  int64_t classes() const { return classes_; }
  int64_t padded() const { return padded_; }

 private:
  int64_t classes_, padded_;
  std::unique_ptr<float[]> data_;
};

// The sum of term(j, lanes so far) over the vectors at j, in canonical order.
template <class Term>
__attribute__((always_inline)) inline float sum_classes(const Row& row, Term term) {
  Vec lanes[kParts] = {};
  for (int64_t j = 0; j < row.padded(); j += kClassLanes) {
    for (int part = 0; part < kParts; ++part) {
      lanes[part] = term(j + part * kWidth, lanes[part]);
    }
  }
  float scratch[kClassLanes];
  for (int part = 0; part < kParts; ++part) store(scratch + part * kWidth, lanes[part]);
  return halving_tree(scratch, kClassLanes);
}

// The first of the largest logits; NaN is never larger. 0 if there is none above -inf.
int64_t winner_of(Row& logits) {
  int64_t winner = 0;
  float largest = -INFINITY;
  for (int64_t j = 0; j < logits.classes(); ++j) {
    if (logits[j] > largest) {
      largest = logits[j];
      winner = j;
    }
  }
  return winner;
}

// What the row's elements need to know. Leaves -inf where the winner was.
ConfidenceRow row_of(Row& logits, int64_t winner) {
  const float largest = logits[winner];
  const ConfidenceRow unsummed = confidence_row(largest, 0.0f);
  logits[winner] = -INFINITY;
  const float* data = logits.data();
  const float others = sum_classes(logits, [&](int64_t j, Vec lane) __attribute__((always_inline)) {
    return lane + relative_probability<Vec>(unsummed, load(data + j));
  });
  return confidence_row(largest, others);
}

}  // namespace

void confidence_rows(const ConfidenceCotangent& params, int64_t begin, int64_t end) {
  Row logits(params.classes);
  for (int64_t i = begin; i < end; ++i) {
    logits.read(params.logits, i, -INFINITY);
    const int64_t winner = winner_of(logits);
    const ConfidenceRow row = row_of(logits, winner);
    float* data = logits.data();
    for (int64_t j = 0; j < logits.padded(); j += kWidth) {
      store(data + j, -probability<Vec>(row, load(data + j)));
    }
    logits[winner] = winner_cotangent(row);
    logits.write(params.cotangent, i);
    params.log_confidence[i] = log_confidence(row);
  }
}

void confidence_backward_rows(const ConfidenceCotangentBackward& params, int64_t begin,
                              int64_t end) {
  Row logits(params.classes), grads(params.classes);
  for (int64_t i = begin; i < end; ++i) {
    logits.read(params.logits, i, -INFINITY);
    grads.read(params.grad_cotangent, i, 0.0f);
    const int64_t winner = winner_of(logits);
    const ConfidenceRow row = row_of(logits, winner);
    logits[winner] = row.largest;
    float* data = logits.data();
    const float* g = grads.data();
    const float dot = sum_classes(logits, [&](int64_t j, Vec lane) __attribute__((always_inline)) {
      return Lanes<Vec>::fma(probability<Vec>(row, load(data + j)), load(g + j), lane);
    });
    const float grad_log = params.grad_log_confidence[i];
    const float p_winner = probability<float>(row, row.largest);
    const float at_winner =
        confidence_gradient<float>(grad_log, dot, winner_cotangent(row), p_winner, grads[winner]);
    for (int64_t j = 0; j < logits.padded(); j += kWidth) {
      const Vec p = probability<Vec>(row, load(data + j));
      store(data + j, confidence_gradient<Vec>(grad_log, dot, -p, p, load(g + j)));
    }
    logits[winner] = at_winner;
    logits.write(params.grad_logits, i);
  }
}

}  // namespace coup_fast::COUP_FAST_ISA
