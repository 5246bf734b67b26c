// perturb and its backward from tensors to parameters, once for CPU and CUDA: checks the arguments,
// makes the output, calls run(params). Knows no kernel.
#pragma once

#include "calls/arguments.h"
#include "params/perturb.h"

namespace coup_fast {

// All but the output.
inline Perturb perturb_params(Arguments& arguments, const Tensor& coeffs, const MaybeTensor& keys,
                              const MaybeTensor& noise) {
  Perturb params{};
  params.images = arguments.any_float_state();
  params.noise = arguments.same_shape("noise", noise);
  params.keys = arguments.keys(keys);
  params.coeffs = arguments.row(coeffs, kPerturbColumns);
  params.batch = arguments.batch;
  params.channels = arguments.channels;
  params.pixels = arguments.pixels;
  return params;
}

template <class Run>
Tensor perturb_call(const Tensor& images, const Tensor& coeffs, const MaybeTensor& keys,
                    const MaybeTensor& noise, const Run& run) {
  Arguments arguments("perturb", "images", images);
  Perturb params = perturb_params(arguments, coeffs, keys, noise);
  const Tensor out = new_dense(images, ScalarType::Float);
  params.out = arguments.output(out);
  if (!arguments.empty()) run(params);
  return out;
}

template <class Run>
Tensor perturb_backward_call(const Tensor& grad, const Tensor& images, const Tensor& coeffs,
                             const MaybeTensor& keys, const MaybeTensor& noise, const Run& run) {
  Arguments arguments("perturb_backward", "images", images);
  PerturbBackward params{};
  params.forward = perturb_params(arguments, coeffs, keys, noise);
  params.grad = arguments.same_shape("grad", grad);
  const Tensor grad_images = new_dense(images, images.scalar_type());
  params.grad_images = arguments.output(grad_images);
  if (!arguments.empty()) run(params);
  return grad_images;
}

}  // namespace coup_fast
