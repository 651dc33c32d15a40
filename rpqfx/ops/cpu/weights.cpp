// The operators that work on weights in codebooks (see rpqfx/ops/cpu/kernels.py, which calls them).
//
// The library has two translation units, which take about as long to compile and are compiled side by side (see
// rpqfx/ops/cpu/compiler.py): this one, and caches.cpp.

#include <torch/library.h>

#include "bins.h"
#include "contract.h"
#include "contract_t.h"
#include "gathers.h"
#include "grads.h"
#include "rows.h"
#include "tiled_products.h"
#include "whole.h"

TORCH_LIBRARY_FRAGMENT(rpqfx_cpu, m) {
  m.def("contract(Tensor x, Tensor codebooks, Tensor codes, Tensor? signs, Tensor? bias) -> Tensor");
  m.def("matmul(Tensor x, Tensor codebooks, Tensor codes, Tensor? signs, Tensor? bias) -> Tensor");
  m.def(
      "conv(Tensor x, Tensor codebooks, Tensor codes, Tensor? signs, Tensor? dim_scale, Tensor? scale,"
      " Tensor? bias, int[] weight_shape, int[] stride, int[] padding, int[] dilation, bool transposed,"
      " int[] output_padding, int groups) -> Tensor");
  m.def("contract_t(Tensor y, Tensor codebooks, Tensor codes, Tensor? signs) -> Tensor", rpqfx::contract_t);
  m.def("gather_sum(Tensor table, Tensor codes, Tensor? signs) -> Tensor", rpqfx::gather_sum);
  m.def("bin_sum(Tensor y, Tensor codes, Tensor? signs, int entries) -> Tensor", rpqfx::bin_sum);
  m.def(
      "grads(Tensor? x, Tensor y, Tensor? codebooks, Tensor codes, Tensor? signs, int books, int entries, int d)"
      " -> (Tensor, Tensor)",
      rpqfx::grads);
  m.def("expand(Tensor codebooks, Tensor codes, Tensor? scale, Tensor? signs, Tensor? ids, Tensor? dims) -> Tensor");
  m.def("collect(Tensor grad, Tensor codes, Tensor? signs, int books, int entries) -> Tensor", rpqfx::collect);
  m.def(
      "tiled(Tensor x, Tensor codebooks, Tensor tiles, int vectors, Tensor? dims, Tensor? scale, Tensor? bias, int most)"
      " -> Tensor");
  m.def(
      "tiled_many(Tensor[] xs, Tensor[] codebooks, Tensor[] tiles, int[] vectors, Tensor?[] biases, int most)"
      " -> Tensor[]");
}

// Of one device, so that compilers keep each as one step of a graph (see rpqfx/ops/cpu/kernels.py).
TORCH_LIBRARY_IMPL(rpqfx_cpu, CPU, m) {
  m.impl("contract", rpqfx::contract);
  m.impl("matmul", rpqfx::matmul);
  m.impl("conv", rpqfx::conv);
  m.impl("expand", rpqfx::expand);
  m.impl("tiled", rpqfx::tiled_product);
  m.impl("tiled_many", rpqfx::tiled_products);
}
