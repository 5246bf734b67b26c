// perturb and its backward from tensors to parameters, for any device: checks the arguments,
// makes the outputs, calls run(params, images), which is a device's kernels; images tells which
// device. Knows no kernel.
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

template <auto run>
Tensor perturb(const Tensor& images, const Tensor& coeffs, const MaybeTensor& keys,
               const MaybeTensor& noise) {
  Arguments arguments("perturb", "images", images);
  Perturb params = perturb_params(arguments, coeffs, keys, noise);
  const Tensor out = new_dense(images, ScalarType::Float);
  params.out = arguments.output(out);
  if (!arguments.empty()) run(params, images);
  return out;
}

template <auto run>
Tensor perturb_backward(const Tensor& grad, const Tensor& images, const Tensor& coeffs,
                        const MaybeTensor& keys, const MaybeTensor& noise) {
  Arguments arguments("perturb_backward", "images", images);
  PerturbBackward params{};
  params.forward = perturb_params(arguments, coeffs, keys, noise);
  params.grad = arguments.same_shape("grad", grad);
  const Tensor grad_images = new_dense(images, images.scalar_type());
  params.grad_images = arguments.output(grad_images);
  if (!arguments.empty()) run(params, images);
  return grad_images;
}

}  // namespace coup_fast
