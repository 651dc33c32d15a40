// The gradients of x @ W.T: bins of the result's gradient, some rows of the batch at a time, and two matrix products.

#pragma once

#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "bins.h"

namespace rpqfx {

// total [R, G, K, d] += bins [R, M, K, b] times the sub-vectors of x [b, M * d].
inline void add_books(const Tensor& bins, const Tensor& x, Tensor& total) {
  const int64_t sub_vectors = bins.size(1), d = total.size(3), share = sub_vectors / total.size(1);
  const Tensor parts = x.to(at::kFloat).view({x.size(0), sub_vectors, d}).transpose(0, 1);
  for (int64_t r = 0; r < bins.size(0); ++r) {
    Tensor stage = total.select(0, r);
    if (share == 1) {
      stage.baddbmm_(bins.select(0, r), parts);
    } else {
      const Tensor each = at::bmm(bins.select(0, r), parts);
      stage.add_(each.view({total.size(1), share, each.size(1), d}).sum(1));
    }
  }
}

// For y [B, N], the gradient of the result: y @ W [B, D] where there are codebooks, and the codebooks' own gradient
// [R, G, K, d] in float32 where there is x [B, D]. What is not asked for is empty.
inline std::tuple<Tensor, Tensor> grads(const Maybe& x, const Tensor& y, const Maybe& codebooks, const Tensor& codes,
                                        const Maybe& signs, int64_t books, int64_t entries, int64_t d) {
  check_codes(codes, signs);
  check_place("x", x);
  check_place("y", y);
  const int64_t stages = codes.size(0), sub_vectors = codes.size(1), width = sub_vectors * d;
  TORCH_CHECK_VALUE(y.dim() == 2 && y.is_contiguous() && y.size(1) == codes.size(2), "y ", y.sizes(),
                    " does not go with codes ", codes.sizes());
  const int64_t rows = y.size(0);
  TORCH_CHECK_VALUE(books > 0 && entries > 0 && d > 0 && sub_vectors % books == 0, books, " codebooks of ", entries,
                    " entries of ", d, " elements do not go with codes ", codes.sizes());
  TORCH_CHECK_VALUE(!x || (x->dim() == 2 && x->is_contiguous() && x->size(0) == rows && x->size(1) == width),
                    "x does not go with y ", y.sizes(), " and codes ", codes.sizes());
  std::vector<Tensor> each;
  if (codebooks) {
    check_books(*codebooks, codes, signs);
    TORCH_CHECK_VALUE(codebooks->size(1) == books && codebooks->size(2) == entries && codebooks->size(3) == d, "codebooks are ", codebooks->sizes());
    each = each_book(codebooks->to(at::kFloat), sub_vectors);
  }
  Tensor grad_x = at::empty({codebooks ? rows : 0, width}, y.options());
  Tensor total = at::zeros({x ? stages : 0, books, entries, d}, y.options().dtype(at::kFloat));
  RowBins sums(codes, signs, entries, rows);
  for (int64_t first = 0; first < rows; first += sums.at_once) {
    const int64_t count = std::min(sums.at_once, rows - first);
    const Tensor bins = sums.fill(y.narrow(0, first, count));
    if (codebooks) {
      Tensor found = at::bmm(bins.select(0, 0).transpose(1, 2), each[0]);
      for (int64_t r = 1; r < stages; ++r) found.baddbmm_(bins.select(0, r).transpose(1, 2), each[r]);
      grad_x.narrow(0, first, count).view({count, sub_vectors, d}).copy_(found.transpose(0, 1));
    }
    if (x) add_books(bins, x->narrow(0, first, count), total);
  }
  return {grad_x, total};
}

}  // namespace rpqfx
