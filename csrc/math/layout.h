// Where element i of a sample lies. Logical order is row-major over (channel, pixel) whatever the
// memory format; a View says how a tensor of [B, C, *spatial] steps through memory in that order.
// Knows raw pointers and strides only.
#pragma once

#include <cstdint>

#include "math/convert.h"
#include "math/macros.h"

namespace coup_fast {

// A tensor read or written in place. Spatial dimensions are collapsed to one pixel index.
struct View {
  void* data = nullptr;           // element (0, 0, 0), or null: the tensor is absent
  DType dtype = DType::kFloat32;  // element type
  int64_t sample_stride = 0;      // all strides in elements
  int64_t channel_stride = 0;
  int64_t pixel_stride = 0;
};

// The memory offset, in elements, of logical element i of a sample with `pixels` pixels a channel.
COUP_FAST_FN int64_t offset_of(const View& view, int64_t sample, int64_t i, int64_t pixels) {
  const int64_t channel = i / pixels;
  return sample * view.sample_stride + channel * view.channel_stride +
         (i - channel * pixels) * view.pixel_stride;
}

// Whether the sample's elements are consecutive in memory in logical order.
COUP_FAST_FN bool sample_is_dense(const View& view, int64_t channels, int64_t pixels) {
  return view.data == nullptr || ((pixels == 1 || view.pixel_stride == 1) &&
                                  (channels == 1 || view.channel_stride == pixels));
}

// The one stride that steps through dimensions [2, ndim) in order, or -1 if there is none.
// Dimensions of size 1 do not count. sizes and strides as of the tensor.
COUP_FAST_FN int64_t pixel_stride_of(const int64_t* sizes, const int64_t* strides, int64_t ndim) {
  int64_t stride = 1;  // of the innermost dimension that counts
  int64_t expected = 1;
  bool seen = false;
  for (int64_t dim = ndim - 1; dim >= 2; --dim) {
    if (sizes[dim] == 1) continue;
    if (!seen) stride = expected = strides[dim];
    if (strides[dim] != expected) return -1;
    expected *= sizes[dim];
    seen = true;
  }
  return stride;
}

// Whether a tensor [B, C, *spatial] with two or three spatial dimensions is channels_last, as torch
// defines it: strides of size-1 dimensions do not count. A contiguous tensor may be so as well.
COUP_FAST_FN bool is_channels_last(const int64_t* sizes, const int64_t* strides, int64_t ndim) {
  if (ndim != 4 && ndim != 5) return false;
  int64_t expected = 1;
  if (sizes[1] != 1 && strides[1] != expected) return false;
  expected *= sizes[1];
  for (int64_t dim = ndim - 1; dim >= 2; --dim) {
    if (sizes[dim] != 1 && strides[dim] != expected) return false;
    expected *= sizes[dim];
  }
  return sizes[0] == 1 || strides[0] == expected;
}

// Strides of a new tensor of these sizes, contiguous or channels_last.
COUP_FAST_FN void dense_strides(const int64_t* sizes, int64_t ndim, bool channels_last,
                                int64_t* strides) {
  int64_t next = 1;
  if (channels_last) {
    strides[1] = 1;
    next = sizes[1];
  }
  for (int64_t dim = ndim - 1; dim >= 0; --dim) {
    if (channels_last && dim == 1) continue;
    strides[dim] = next;
    next *= sizes[dim] > 1 || channels_last ? sizes[dim] : 1;
  }
}

}  // namespace coup_fast
