// Included before every file of csrc that the emulator builds: registers the ops for CPU tensors
// under coup_fast_emulated, beside the real ones, and routes the calls that need a CUDA torch to
// emulator.cpp.
#pragma once

#define USE_CUDA
#define aoti_torch_create_device_guard emulated_create_device_guard
#define aoti_torch_delete_device_guard emulated_delete_device_guard
#define aoti_torch_get_current_cuda_stream emulated_get_current_cuda_stream

#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY(ns, m) _STABLE_TORCH_LIBRARY_FRAGMENT(coup_fast_emulated, m, C10_UID)
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) \
  _STABLE_TORCH_LIBRARY_IMPL(coup_fast_emulated, CPU, m, C10_UID)
