// adaptive_step and its backward from tensors to parameters, for any device: checks the arguments,
// makes the outputs, calls run(params, x), which is a device's kernels; x tells which device.
// Knows no kernel.
#pragma once

#include <tuple>

#include "calls/arguments.h"
#include "params/adaptive_step.h"

namespace coup_fast {

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

inline AdaptiveStep adaptive_inputs(Arguments& arguments, const Tensor& h, const Tensor& h_ahead,
                                    const Tensor& alive, const Tensor& coeffs) {
  AdaptiveStep params{};
  params.x = arguments.float32_state();
  params.h = arguments.same_shape("h", h);
  params.h_ahead = arguments.same_shape("h_ahead", h_ahead);
  params.alive = arguments.flags("alive", alive);
  params.coeffs = arguments.row(coeffs, kAdaptiveColumns);
  params.batch = arguments.batch;
  params.channels = arguments.channels;
  params.pixels = arguments.pixels;
  return params;
}

template <auto run>
ThreeTensors adaptive_step(const Tensor& x, const Tensor& h, const Tensor& h_ahead,
                           const Tensor& alive, const Tensor& coeffs) {
  Arguments arguments("adaptive_step", "x", x);
  AdaptiveStep params = adaptive_inputs(arguments, h, h_ahead, alive, coeffs);
  const Tensor x_next = new_dense(x, ScalarType::Float);
  const Tensor alive_next = new_empty(x, {params.batch}, ScalarType::Bool);
  const Tensor alpha = new_empty(x, {params.batch}, ScalarType::Float);
  params.x_next = arguments.output(x_next);
  params.alive_next = static_cast<bool*>(alive_next.data_ptr());
  params.alpha = static_cast<float*>(alpha.data_ptr());
  run(params, x);
  return {x_next, alive_next, alpha};
}

template <auto run>
ThreeTensors adaptive_step_backward(const Tensor& grad, const Tensor& x, const Tensor& h,
                                    const Tensor& h_ahead, const Tensor& alive,
                                    const Tensor& coeffs) {
  Arguments arguments("adaptive_step_backward", "x", x);
  AdaptiveStepBackward params{};
  params.forward = adaptive_inputs(arguments, h, h_ahead, alive, coeffs);
  params.grad = arguments.same_shape("grad", grad);
  const Tensor grad_x = new_dense(x, x.scalar_type());
  const Tensor grad_h = new_dense(h, h.scalar_type());
  const Tensor grad_h_ahead = new_dense(h_ahead, h_ahead.scalar_type());
  params.grad_x = arguments.output(grad_x);
  params.grad_h = arguments.output(grad_h);
  params.grad_h_ahead = arguments.output(grad_h_ahead);
  run(params, x);
  return {grad_x, grad_h, grad_h_ahead};
}

}  // namespace coup_fast
