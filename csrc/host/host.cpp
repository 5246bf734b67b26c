// _host: csrc/math and csrc/cuda/index.h seen from Python, scalar and torch-free, so that tests can
// hold the mathematics and the index arithmetic against NumPy and float64. Functions of numbers
// work on arrays elementwise. Nothing in the package uses it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "math/confidence_cotangent.h"
#include "math/layout.h"
#include "math/normal.h"
#include "math/reduce.h"
#include "math/reverse_step.h"
#include "math/stable_guidance.h"

namespace py = pybind11;

namespace coup_fast {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Sizes = std::vector<int64_t>;

// Words of blocks: counters [N, 4] and keys [N, 2], lowest word first.
Array<uint32_t> philox_words(const Array<uint32_t>& counters, const Array<uint32_t>& keys) {
  const py::ssize_t count = counters.shape(0);
  if (counters.ndim() != 2 || counters.shape(1) != 4 || keys.ndim() != 2 || keys.shape(1) != 2 ||
      keys.shape(0) != count) {
    throw std::invalid_argument("counters must be [N, 4] and keys [N, 2]");
  }
  Array<uint32_t> out({count, py::ssize_t{4}});
  for (py::ssize_t i = 0; i < count; ++i) {
    const uint32_t* c = counters.data(i, 0);
    const uint64_t key = *keys.data(i, 0) | uint64_t{*keys.data(i, 1)} << 32;
    const Words<float> words = philox<float>(c[0], c[1], c[2], c[3], philox_keys<float>(key));
    for (int k = 0; k < kBlock; ++k) *out.mutable_data(i, k) = words.word[k];
  }
  return out;
}

// The first `numel` normals of a sample.
Array<float> normals(uint64_t key, uint64_t offset, int64_t numel) {
  Array<float> out(numel);
  float* data = out.mutable_data();
  for (int64_t i = 0; i < numel; ++i) {
    data[i] =
        normal_block(NoiseKey{key, offset}, static_cast<uint64_t>(i / kBlock)).value[i % kBlock];
  }
  return out;
}

std::tuple<Array<float>, Array<float>> box_muller_pairs(const Array<uint32_t>& word0,
                                                        const Array<uint32_t>& word1) {
  if (word0.size() != word1.size()) throw std::invalid_argument("as many words as words");
  Array<float> z0(word0.size()), z1(word0.size());
  for (py::ssize_t i = 0; i < word0.size(); ++i) {
    box_muller<float>(word0.data()[i], word1.data()[i], z0.mutable_data()[i], z1.mutable_data()[i]);
  }
  return {z0, z1};
}

float dot(const Array<float>& a, const Array<float>& b) {
  if (a.size() != b.size()) throw std::invalid_argument("arrays of one size expected");
  std::vector<float> scratch(kReduceLanes);
  return canonical_dot(a.data(), b.data(), a.size(), scratch.data());
}

Sizes new_strides(const Sizes& sizes, bool channels_last) {
  Sizes strides(sizes.size());
  dense_strides(sizes.data(), static_cast<int64_t>(sizes.size()), channels_last, strides.data());
  return strides;
}

// Memory offsets of all logical elements of a sample, by View::offset_of.
Sizes offsets(int64_t sample, int64_t channels, int64_t pixels, const Sizes& strides) {
  const View view{nullptr, DType::kFloat32, strides.at(0), strides.at(1), strides.at(2)};
  Sizes out;
  for (int64_t i = 0; i < channels * pixels; ++i) out.push_back(offset_of(view, sample, i, pixels));
  return out;
}

bool dense_sample(int64_t channels, int64_t pixels, const Sizes& strides) {
  float element = 0.0f;
  const View view{&element, DType::kFloat32, strides.at(0), strides.at(1), strides.at(2)};
  return sample_is_dense(view, channels, pixels);
}

}  // namespace

void bind_index(py::module_& m);  // index.cpp

}  // namespace coup_fast

PYBIND11_MODULE(_host, m) {
  using namespace coup_fast;
  m.doc() = "csrc/math for tests, scalar";

  m.def("philox", &philox_words, py::arg("counters"), py::arg("keys"));
  m.def("normals", &normals, py::arg("key"), py::arg("offset"), py::arg("numel"));
  m.def("box_muller", &box_muller_pairs, py::arg("word0"), py::arg("word1"));
  m.def("uniform", py::vectorize([](uint32_t word) { return uniform<float>(word); }));
  m.def("log", py::vectorize([](float value) { return log_positive<float>(value); }));
  m.def("exp", py::vectorize([](float value) { return exp<float>(value); }));
  m.def("exp_minus_1", py::vectorize([](float value) { return exp_minus_1<float>(value); }));
  m.def("log_1p", py::vectorize([](float value) { return log_1p(value); }));
  const auto stable = [](float c, float square, float margin) {
    return stable_guidance(c, square, margin);
  };
  m.def("stable_scale", py::vectorize([=](float c, float square, float margin) {
          return stable(c, square, margin).scale;
        }));
  m.def("stable_turn", py::vectorize([=](float c, float square, float margin) {
          return stable(c, square, margin).turn;
        }));
  m.def("stable_margin_slope", py::vectorize([=](float c, float square, float margin) {
          return stable(c, square, margin).margin_slope;
        }));

  m.def("sqrt_by_reciprocal", py::vectorize(&sqrt_by_reciprocal));
  m.def("log_confidence",
        py::vectorize([](float others) { return log_confidence(confidence_row(0.0f, others)); }));

  m.def("float_of_float16", py::vectorize([](uint16_t bits) { return float_of_float16(bits); }));
  m.def("float_of_bfloat16", py::vectorize([](uint16_t bits) { return float_of_bfloat16(bits); }));
  m.def("float16_of_float", py::vectorize([](float value) { return float16_of_float(value); }));
  m.def("bfloat16_of_float", py::vectorize([](float value) { return bfloat16_of_float(value); }));

  m.def("pixel_stride", [](const Sizes& sizes, const Sizes& strides) {
    return pixel_stride_of(sizes.data(), strides.data(), static_cast<int64_t>(sizes.size()));
  });
  m.def("is_channels_last", [](const Sizes& sizes, const Sizes& strides) {
    return is_channels_last(sizes.data(), strides.data(), static_cast<int64_t>(sizes.size()));
  });
  m.def("dense_strides", &new_strides, py::arg("sizes"), py::arg("channels_last"));
  m.def("offsets", &offsets, py::arg("sample"), py::arg("channels"), py::arg("pixels"),
        py::arg("strides"));
  m.def("sample_is_dense", &dense_sample, py::arg("channels"), py::arg("pixels"),
        py::arg("strides"));

  bind_index(m);
  m.def("canonical_dot", &dot);
  m.attr("segment") = kSegment;
  m.attr("reduce_lanes") = kReduceLanes;

  // Names of the columns of a row, in order: those of StepRow and PerturbRow.
  m.attr("step_columns") = std::vector<std::string>{
      "p",     "q",          "x0_lo",      "x0_hi",  "u",      "v",         "w",
      "c",     "e",          "d",          "out_lo", "out_hi", "out_scale", "out_bias",
      "g_max", "log_var_lo", "log_var_hi", "x_var",  "z_var"};
  m.attr("perturb_columns") = std::vector<std::string>{"scale", "bias", "std",       "sign_std",
                                                       "lo",    "hi",   "out_scale", "out_bias"};
}
