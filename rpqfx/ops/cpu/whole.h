// Products and convolutions through the expanded matrix, each in one call: what a layer does around its kernel takes
// longer than a small kernel.
#pragma once

#include <ATen/ops/convolution.h>
#include <ATen/ops/linear.h>

#include "rows.h"

namespace rpqfx {

// x [..., D] @ W.T + bias.
inline Tensor matmul(const Tensor& x, const Tensor& codebooks, const Tensor& codes, const Maybe& signs, const Maybe& bias) {
  TORCH_CHECK(!x._fw_grad(0).defined(), "forward-mode differentiation does not reach compiled kernels");
  check_place("x", x);
  check_place("bias", bias);
  at::AutoDispatchBelowAutograd guard;
  return at::linear(x, expand(codebooks, codes, std::nullopt, signs, std::nullopt, std::nullopt), bias);
}

// A convolution of x [B, C, *spatial], or a transposed one, whose filters are the vectors, times scale [N] and dim_scale
// [D / share], a factor for each so many columns in a row.
inline Tensor conv(const Tensor& x, const Tensor& codebooks, const Tensor& codes, const Maybe& signs,
                   const Maybe& dim_scale, const Maybe& scale, const Maybe& bias, at::IntArrayRef weight_shape, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                   int64_t groups) {
  TORCH_CHECK(!x._fw_grad(0).defined(), "forward-mode differentiation does not reach compiled kernels");
  check_place("x", x);
  check_place("bias", bias);
  at::AutoDispatchBelowAutograd guard;
  const Tensor weight = expand(codebooks, codes, scale, signs, std::nullopt, dim_scale);
  const Tensor y = at::convolution(x, weight.view(weight_shape), bias, stride, padding, dilation, transposed, output_padding, groups);
  return y.contiguous();
}

}  // namespace rpqfx
