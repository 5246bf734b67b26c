// reverse_step, its in-place twin and its backward from tensors to parameters, for any device:
// checks the arguments, makes the outputs, calls run(params, x), which is a device's kernels; x
// tells which device. Knows no kernel.
#pragma once

#include <string>
#include <tuple>

#include "calls/arguments.h"
#include "params/reverse_step.h"

namespace coup_fast {

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

inline GuidanceNorm guidance_norm_of(const Arguments& arguments, const std::string& text) {
  if (text == "none") return GuidanceNorm::kNone;
  if (text == "normalised") return GuidanceNorm::kNormalised;
  if (text == "clipped") return GuidanceNorm::kClipped;
  if (text == "stable") return GuidanceNorm::kStable;
  STD_TORCH_CHECK(false, "coup_fast::", arguments.op(),
                  ": guidance_norm must be none, normalised, clipped or stable, got ", text);
}

// All but the output.
inline ReverseStep reverse_step_params(Arguments& arguments, const MaybeTensor& model_out,
                                       const Tensor& coeffs, const MaybeTensor& keys,
                                       const MaybeTensor& guidance, const MaybeTensor& reference,
                                       const MaybeTensor& noise, const std::string& guidance_norm,
                                       const MaybeTensor& margin) {
  ReverseStep params{};
  params.x = arguments.float32_state();
  params.m = arguments.model_out(model_out, params.s);
  params.g = arguments.same_shape("guidance", guidance);
  params.r = arguments.same_shape("reference", reference);
  params.z = arguments.same_shape("noise", noise);
  params.keys = arguments.keys(keys);
  params.coeffs = arguments.row(coeffs, kStepColumns);
  params.guidance_norm = guidance_norm_of(arguments, guidance_norm);
  const bool stable = guidance && params.guidance_norm == GuidanceNorm::kStable;
  STD_TORCH_CHECK(stable == margin.has_value(), "coup_fast::", arguments.op(),
                  ": margin must be given where guidance is and guidance_norm is stable, and only "
                  "there, got guidance_norm ",
                  guidance_norm, guidance ? ", guidance" : ", no guidance",
                  margin ? " and a margin" : " and no margin");
  if (margin) params.margin = arguments.per_sample("margin", *margin);
  params.batch = arguments.batch;
  params.channels = arguments.channels;
  params.pixels = arguments.pixels;
  return params;
}

template <auto run>
Tensor reverse_step(const Tensor& x, const MaybeTensor& model_out, const Tensor& coeffs,
                    const MaybeTensor& keys, const MaybeTensor& guidance,
                    const MaybeTensor& reference, const MaybeTensor& noise,
                    const std::string& guidance_norm, const MaybeTensor& margin) {
  Arguments arguments("reverse_step", "x", x);
  ReverseStep params = reverse_step_params(arguments, model_out, coeffs, keys, guidance, reference,
                                           noise, guidance_norm, margin);
  const Tensor out = new_dense(x, ScalarType::Float);
  params.out = arguments.output(out);
  if (!arguments.empty()) run(params, x);
  return out;
}

template <auto run>
void reverse_step_(const Tensor& x, const MaybeTensor& model_out, const Tensor& coeffs,
                   const MaybeTensor& keys, const MaybeTensor& guidance,
                   const MaybeTensor& reference, const MaybeTensor& noise,
                   const std::string& guidance_norm, const MaybeTensor& margin) {
  Arguments arguments("reverse_step_", "x", x);
  ReverseStep params = reverse_step_params(arguments, model_out, coeffs, keys, guidance, reference,
                                           noise, guidance_norm, margin);
  arguments.require_dense_state();
  params.out = params.x;
  if (!arguments.empty()) run(params, x);
}

template <auto run>
FiveTensors reverse_step_backward(const Tensor& grad, const Tensor& x, const MaybeTensor& model_out,
                                  const Tensor& coeffs, const MaybeTensor& keys,
                                  const MaybeTensor& guidance, const MaybeTensor& reference,
                                  const MaybeTensor& noise, const std::string& guidance_norm,
                                  const MaybeTensor& margin) {
  Arguments arguments("reverse_step_backward", "x", x);
  ReverseStepBackward params{};
  params.forward = reverse_step_params(arguments, model_out, coeffs, keys, guidance, reference,
                                       noise, guidance_norm, margin);
  params.grad = arguments.same_shape("grad", grad);
  const auto like = [&](const MaybeTensor& input) {
    return input ? new_dense(*input, input->scalar_type()) : new_empty(x, {0}, ScalarType::Float);
  };
  Tensor grad_margin = new_empty(x, {margin ? params.forward.batch : 0}, ScalarType::Float);
  const auto grads =
      std::make_tuple(like(x), like(model_out), like(guidance), like(reference), grad_margin);
  params.grad_x = arguments.output(std::get<0>(grads));
  if (model_out) params.grad_m = arguments.output(std::get<1>(grads));
  if (params.forward.s.data != nullptr) params.grad_s = arguments.last_half(params.grad_m);
  if (guidance) params.grad_g = arguments.output(std::get<2>(grads));
  if (reference) params.grad_r = arguments.output(std::get<3>(grads));
  if (margin) params.grad_margin = static_cast<float*>(grad_margin.data_ptr());
  if (!arguments.empty()) {
    run(params, x);
  } else if (margin) {
    (void)torch::stable::zero_(grad_margin);
  }
  return grads;
}

}  // namespace coup_fast
