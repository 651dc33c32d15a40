// The operators of rpqfx's compiled CPU backend (see rpqfx/ops/cpu/kernels.py, which calls them).

#include <torch/library.h>

#include "beam.h"
#include "bins.h"
#include "contract.h"
#include "contract_t.h"
#include "nearest.h"
#include "pick.h"
#include "rotated.h"
#include "rows.h"
#include "tiles.h"
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
  m.def("nearest(Tensor points, Tensor centres) -> (Tensor, Tensor)", rpqfx::nearest);
  m.def("beam_search(Tensor points, Tensor books, int beam) -> (Tensor, Tensor)", rpqfx::beam_search);
  m.def("slot_tables(Tensor parts, Tensor books, int[] which) -> Tensor", rpqfx::slot_tables);
  m.def("slot_sums(Tensor bins, int rows, Tensor books, int[] which) -> Tensor", rpqfx::slot_sums);
  m.def(
      "pick_sum(Tensor table, Tensor codes, int width, Tensor? scale, Tensor? shift, int[] heads, Tensor(a!) y) -> ()",
      rpqfx::pick_sum);
  m.def("bin_masses(Tensor p, Tensor codes, int width, Tensor? scale, int[] heads, int entries) -> Tensor", rpqfx::bin_masses);
  m.def(
      "rotated_scores(Tensor q, Tensor books, int[] which, int[] groups, int[] heads, Tensor codes, int width,"
      " int tokens, Tensor? scale, Tensor? basis, Tensor? mean, Tensor cos, Tensor sin) -> Tensor",
      rpqfx::rotated_scores);
}

// Of one device, so that compilers keep each as one step of a graph (see rpqfx/ops/cpu/kernels.py).
TORCH_LIBRARY_IMPL(rpqfx_cpu, CPU, m) {
  m.impl("contract", rpqfx::contract);
  m.impl("matmul", rpqfx::matmul);
  m.impl("conv", rpqfx::conv);
  m.impl("expand", rpqfx::expand);
  m.impl("tiled", rpqfx::tiled_product);
}
