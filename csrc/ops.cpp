// Schemas of all ops, and what this library is. Knows no kernel: csrc/cpu and csrc/cuda register
// implementations, coup_fast/_torch/fakes.py shapes, coup_fast/_torch/autograd.py gradients.
#include <torch/csrc/stable/library.h>

#include <string>

#include "build_config.h"

namespace {

std::string build_config() { return coup_fast::kBuildConfig; }

}  // namespace

STABLE_TORCH_LIBRARY(coup_fast, m) {
  m.def("normal(Tensor keys, SymInt[] shape) -> Tensor");
  m.def("perturb(Tensor images, Tensor coeffs, Tensor? keys=None, Tensor? noise=None) -> Tensor");
  m.def(
      "perturb_backward(Tensor grad, Tensor images, Tensor coeffs, Tensor? keys, Tensor? noise) "
      "-> Tensor");
  m.def(
      "reverse_step(Tensor x, Tensor? model_out, Tensor coeffs, Tensor? keys=None, "
      "Tensor? guidance=None, Tensor? reference=None, Tensor? noise=None, "
      "str guidance_norm=\"none\", Tensor? margin=None) -> Tensor");
  m.def(
      "reverse_step_(Tensor(a!) x, Tensor? model_out, Tensor coeffs, Tensor? keys=None, "
      "Tensor? guidance=None, Tensor? reference=None, Tensor? noise=None, "
      "str guidance_norm=\"none\", Tensor? margin=None) -> ()");
  m.def(
      "reverse_step_backward(Tensor grad, Tensor x, Tensor? model_out, Tensor coeffs, "
      "Tensor? keys, Tensor? guidance, Tensor? reference, Tensor? noise, str guidance_norm, "
      "Tensor? margin=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "adaptive_step(Tensor x, Tensor h, Tensor h_ahead, Tensor alive, Tensor coeffs) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "adaptive_step_backward(Tensor grad, Tensor x, Tensor h, Tensor h_ahead, Tensor alive, "
      "Tensor coeffs) -> (Tensor, Tensor, Tensor)");
  m.def("confidence_cotangent(Tensor logits, str quantity=\"log_confidence\") -> (Tensor, Tensor)");
  m.def(
      "confidence_cotangent_backward(Tensor grad_value, Tensor grad_cotangent, Tensor logits, "
      "str quantity=\"log_confidence\") -> Tensor");
  m.def("cpu_capability() -> str");
  m.def("build_config() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(coup_fast, CompositeExplicitAutograd, m) {
  m.impl("build_config", TORCH_BOX(&build_config));
}
