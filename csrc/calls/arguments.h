// The only validation of tensors: turns the arguments of an op into Views and pointers, or raises
// an error that names the argument, what was given and what was expected. Knows devices, dtypes,
// shapes and strides; no kernel, and not what an op computes.
// coup_fast/_torch/fakes.py says the same where there are no values; a test holds the two together.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "calls/tensors.h"
#include "math/layout.h"

namespace coup_fast {

// Checks the arguments of one call against its state, a tensor [B, C, *spatial], and keeps alive
// the copies it had to make of tensors whose strides no View can express.
class Arguments {
 public:
  // state: the tensor that sets device and shape, called `name` in messages.
  Arguments(const char* op, const char* name, const Tensor& state)
      : op_(op),
        name_(name),
        state_(given(op, name, state)),
        sizes_(state.sizes()),
        on_cpu_(state.is_cpu()) {
    require(sizes_.size() >= 2, name, "must be [B, C, ...] with two dimensions or more, got ",
            state);
    if (!sizes_fit(sizes_.data(), state.dim())) {
      require(false, name, kSizesExpected + std::string(", got "), state);
    }
    batch = sizes_[0];
    channels = sizes_[1];
    pixels = 1;
    for (size_t dim = 2; dim < sizes_.size(); ++dim) pixels *= sizes_[dim];
  }

  int64_t batch, channels, pixels;
  const char* op() const { return op_; }
  bool empty() const { return batch * channels * pixels == 0; }

  // The state itself, which has to be float32 for most ops.
  View float32_state() {
    require(state_.scalar_type() == ScalarType::Float, name_,
            "must be float32 (coup_fast.reference takes float64), got ", state_);
    return view(name_, state_, channels);
  }

  View any_float_state() { return view(name_, state_, channels); }

  // A tensor of the shape of the state, of any of the three types; absent stays absent.
  View same_shape(const char* name, const MaybeTensor& tensor) {
    return tensor ? shaped(name, *tensor, channels) : View{};
  }

  // The model output: channels as the state or twice as many, of which the last become `variance`.
  View model_out(const MaybeTensor& tensor, View& variance) {
    variance = View{};
    if (!tensor) return View{};
    const bool learned = tensor->dim() >= 2 && tensor->size(1) == 2 * channels && channels > 0;
    View out = shaped("model_out", *tensor, learned ? 2 * channels : channels);
    if (learned) variance = last_half(out);
    return out;
  }

  // The second half of the channels of a view of 2C channels.
  View last_half(const View& whole) const {
    View half = whole;
    half.data =
        static_cast<char*>(whole.data) + channels * whole.channel_stride * size_of(whole.dtype);
    return half;
  }

  // Where an op writes: the view of a tensor that new_dense made, or of a dense state.
  View output(const Tensor& tensor) { return view("output", tensor, tensor.size(1)); }

  const int64_t* keys(const MaybeTensor& tensor) {
    if (!tensor) return nullptr;
    const bool right = tensor->scalar_type() == ScalarType::Long && tensor->dim() == 2 &&
                       tensor->size(0) == batch && tensor->size(1) == 2;
    if (!right) {  // the text takes longer than a small kernel
      const std::string shape = "int64 [" + std::to_string(batch) + ", 2]";
      require(false, "keys", "must be " + shape + " (one row for each sample), got ", *tensor);
    }
    return static_cast<const int64_t*>(contiguous("keys", *tensor));
  }

  // A row of coefficients.
  const float* row(const Tensor& tensor, int64_t columns) {
    given(op_, "coeffs", tensor);
    const bool right =
        tensor.scalar_type() == ScalarType::Float && tensor.dim() == 1 && tensor.size(0) == columns;
    if (!right) {
      const std::string shape = "float32 [" + std::to_string(columns) + "]";
      require(false, "coeffs", "must be one row, " + shape + ", got ", tensor);
    }
    return static_cast<const float*>(contiguous("coeffs", tensor));
  }

  // One float32 for each sample.
  const float* per_sample(const char* name, const Tensor& tensor) {
    given(op_, name, tensor);
    const bool right =
        tensor.scalar_type() == ScalarType::Float && tensor.dim() == 1 && tensor.size(0) == batch;
    if (!right) {
      require(false, name, "must be float32 [" + std::to_string(batch) + "], got ", tensor);
    }
    return static_cast<const float*>(contiguous(name, tensor));
  }

  // For ops that write over the state.
  void require_dense_state() const {
    const bool dense =
        state_.is_contiguous() ||
        is_channels_last(state_.sizes().data(), state_.strides().data(), state_.dim());
    if (dense) return;
    const std::string strides = sizes_text(state_.strides().data(), state_.dim());
    require(false, name_,
            "must be contiguous or channels_last to be written in place, got a view "
            "with strides " +
                strides + ", ",
            state_);
  }

  // One bool for each sample.
  const bool* flags(const char* name, const Tensor& tensor) {
    given(op_, name, tensor);
    const bool right =
        tensor.scalar_type() == ScalarType::Bool && tensor.dim() == 1 && tensor.size(0) == batch;
    if (!right) {
      const std::string shape = "bool [" + std::to_string(batch) + "]";
      require(false, name, "must be " + shape + " (one for each sample), got ", tensor);
    }
    return static_cast<const bool*>(contiguous(name, tensor));
  }

  // The elements of a tensor on the state's device in row-major order: where they are, or in a copy
  // that lives as long as this object.
  const void* contiguous(const char* name, const Tensor& tensor) {
    same_device(name, tensor);
    if (tensor.is_contiguous()) return tensor.data_ptr();
    kept_.push_back(torch::stable::contiguous(tensor));
    return kept_.back().data_ptr();
  }

  // The tensor itself; PyTorch lets None pass for one.
  static const Tensor& given(const char* op, const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.defined(), "coup_fast::", op, ": ", name, " must be a tensor, got None");
    return tensor;
  }

  void require(bool condition, const char* name, std::string_view expected,
               const Tensor& given) const {
    STD_TORCH_CHECK(condition, "coup_fast::", op_, ": ", name, " ", expected, text_of(given));
  }

 private:
  void same_device(const char* name, const Tensor& tensor) const {
    const bool same = tensor.is_cpu() == on_cpu_ &&
                      (on_cpu_ || (tensor.is_cuda() == state_.is_cuda() &&
                                   tensor.get_device_index() == state_.get_device_index()));
    STD_TORCH_CHECK(same, "coup_fast::", op_, ": ", name, " is on ", device_of(tensor), ", but ",
                    name_, " is on ", device_of(state_), "; they must be on the same device");
  }

  View shaped(const char* name, const Tensor& tensor, int64_t expected_channels) {
    given(op_, name, tensor);
    const auto sizes = tensor.sizes();
    bool same = sizes.size() == sizes_.size() && sizes[1] == expected_channels;
    for (size_t dim = 0; same && dim < sizes_.size(); ++dim) {
      same = dim == 1 || sizes[dim] == sizes_[dim];
    }
    if (!same) {
      std::string expected = "must have the shape of " + std::string(name_) + ", " +
                             sizes_text(sizes_.data(), state_.dim());
      if (std::string(name) == "model_out") expected += ", or twice its channels";
      require(false, name, expected + ", got ", tensor);
    }
    return view(name, tensor, expected_channels);
  }

  View view(const char* name, const Tensor& given, int64_t expected_channels) {
    same_device(name, given);
    View out;
    switch (given.scalar_type()) {
      case ScalarType::Float:
        out.dtype = DType::kFloat32;
        break;
      case ScalarType::Half:
        out.dtype = DType::kFloat16;
        break;
      case ScalarType::BFloat16:
        out.dtype = DType::kBFloat16;
        break;
      default:
        require(false, name, "must be float32, float16 or bfloat16, got ", given);
    }
    const Tensor* tensor = &given;
    int64_t pixel_stride =
        pixel_stride_of(given.sizes().data(), given.strides().data(), given.dim());
    if (pixel_stride < 0) {
      kept_.push_back(torch::stable::contiguous(given));
      tensor = &kept_.back();
      pixel_stride = 1;
    }
    const auto strides = tensor->strides();
    out.data = tensor->data_ptr();
    out.sample_stride = strides[0];
    out.channel_stride = expected_channels == 1 ? pixels : strides[1];
    out.pixel_stride = pixel_stride;
    return out;
  }

  const char* op_;
  const char* name_;
  const Tensor& state_;
  const torch::headeronly::IntHeaderOnlyArrayRef sizes_;  // of the state
  const bool on_cpu_;                                     // the state
  std::vector<Tensor> kept_;
};

}  // namespace coup_fast
