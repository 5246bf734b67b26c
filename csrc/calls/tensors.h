// Tensors through LibTorch's stable ABI: their words for messages, and the allocation of outputs.
// Knows devices, dtypes, shapes and strides; no op.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "math/layout.h"

namespace coup_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return std::string("torch.") + torch::headeronly::toString(type);
  }
}

inline std::string sizes_text(const int64_t* sizes, int64_t ndim) {
  std::string text = "[";
  for (int64_t dim = 0; dim < ndim; ++dim) {
    text += (dim == 0 ? "" : ", ") + std::to_string(sizes[dim]);
  }
  return text + "]";
}

// Whether products of the sizes, their bytes, and those of twice the channels stay far from the end
// of int64: also where a size is 0, and nothing would be allocated.
inline bool sizes_fit(const int64_t* sizes, int64_t ndim) {
  int64_t left = (int64_t{1} << 60) - 1;
  for (int64_t dim = 0; dim < ndim; ++dim) left /= sizes[dim] > 1 ? sizes[dim] : 1;
  return left > 0;
}
constexpr const char* kSizesExpected =
    "must have fewer than 2^60 elements (a size of 0 counted as 1)";

inline std::string text_of(const Tensor& tensor) {
  return name_of(tensor.scalar_type()) + " " + sizes_text(tensor.sizes().data(), tensor.dim());
}

inline std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  const std::string type = tensor.is_cuda() ? "cuda:" : "device ";
  return type + std::to_string(tensor.get_device_index());
}

// An uninitialised tensor on the device of `like`. Straight through the C shim: a call through the
// dispatcher costs more than a small kernel.
inline Tensor new_strided(const Tensor& like, const std::vector<int64_t>& sizes,
                          const std::vector<int64_t>& strides, ScalarType type) {
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  const auto dtype =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from<ScalarType>(type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, device,
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

// A contiguous one of these sizes.
inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  dense_strides(sizes.data(), static_cast<int64_t>(sizes.size()), false, strides.data());
  return new_strided(like, sizes, strides, type);
}

// One of the shape of `like`: contiguous, or channels_last where like is that.
inline Tensor new_dense(const Tensor& like, ScalarType type) {
  const int64_t ndim = like.dim();
  const auto given = like.sizes();
  const std::vector<int64_t> sizes(given.begin(), given.end());
  const bool channels_last =
      !like.is_contiguous() && is_channels_last(sizes.data(), like.strides().data(), ndim);
  std::vector<int64_t> strides(sizes.size());
  dense_strides(sizes.data(), ndim, channels_last, strides.data());
  return new_strided(like, sizes, strides, type);
}

}  // namespace coup_fast
