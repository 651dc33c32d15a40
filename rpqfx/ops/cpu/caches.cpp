// The operators that find the codes of vectors, and that read a cache of keys and values which are held in codes (see
// rpqfx/ops/cpu/kernels.py, which calls them, and weights.cpp).

#include <torch/library.h>

#include "beam.h"
#include "columns.h"
#include "nearest.h"
#include "pick.h"
#include "rotated.h"

TORCH_LIBRARY_FRAGMENT(rpqfx_cpu, m) {
  m.def("nearest(Tensor points, Tensor centres) -> (Tensor, Tensor)", rpqfx::nearest);
  m.def("beam_search(Tensor points, Tensor books, int beam) -> (Tensor, Tensor)", rpqfx::beam_search);
  m.def(
      "column_search(Tensor matrix, Tensor books, int[] groups, Tensor to_metric, Tensor upper, int beam)"
      " -> (Tensor, Tensor)",
      rpqfx::column_search);
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
