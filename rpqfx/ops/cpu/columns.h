// Codes of a matrix, sub-vector after sub-vector: the columns that are still open take over the error of each.
#pragma once

#include <ATen/ops/matmul.h>

#include "beam.h"

namespace rpqfx {

inline constexpr int64_t BLOCK_ROWS = 16;             // that a sub-vector's corrections are read for at a time
inline constexpr int64_t CENTRE_FLOATS = 1 << 20;     // of codebooks in the metrics of sub-vectors that are kept at a time

// open[at..] -= error [d] @ upper [d, width], for one row.
inline void take_over(const float* error, int64_t d, const float* upper, int64_t width, int64_t count, float* open) {
  int64_t j = 0;
  for (; j + LANES <= count; j += LANES) {
    Floats value = load_as<Floats>(open + j);
    for (int64_t k = 0; k < d; ++k) value -= load_as<Floats>(upper + k * width + j) * error[k];
    __builtin_memcpy(open + j, &value, sizeof(value));
  }
  for (; j < count; ++j)
    for (int64_t k = 0; k < d; ++k) open[j] -= upper[k * width + j] * error[k];
}

// Codes [N, C, R] of a matrix [N, C * d], and the matrix as it was when each sub-vector's turn came. Sub-vector c is
// searched for after a product with to_metric[c], among books[:, groups[c]] after the same.
inline std::tuple<Tensor, Tensor> column_search(const Tensor& matrix, const Tensor& books, at::IntArrayRef groups,
                                                const Tensor& to_metric, const Tensor& upper, int64_t most) {
  for (const Tensor& x : {matrix, books, to_metric, upper}) {
    check_place("matrix, codebooks and metric", x);
    TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "matrix, codebooks and metric are float32, got ", x.scalar_type());
  }
  const int64_t count = groups.size();
  const bool fit = matrix.dim() == 2 && books.dim() == 4 && to_metric.dim() == 3 && upper.dim() == 2 && books.numel() > 0 &&
                   books.size(2) < std::numeric_limits<int32_t>::max() - LANES && most > 0 &&
                   matrix.size(1) == count * books.size(3) && to_metric.size(0) == count &&
                   to_metric.size(1) == books.size(3) && to_metric.size(2) == books.size(3) &&
                   upper.size(0) == matrix.size(1) && upper.size(1) == matrix.size(1);
  TORCH_CHECK_VALUE(fit, "a matrix ", matrix.sizes(), " does not go with codebooks ", books.sizes(), ", ", count,
                    " groups, metrics ", to_metric.sizes(), " and ", upper.sizes(), ", and a beam of ", most);
  const int64_t rows = matrix.size(0), width = matrix.size(1), stages = books.size(0), d = books.size(3);
  Tensor open = matrix.clone(at::MemoryFormat::Contiguous);
  Tensor codes = at::empty({rows, count, stages}, matrix.options().dtype(at::kLong));
  const Tensor factor = upper.contiguous(), metric = to_metric.contiguous();
  const int64_t step = std::max<int64_t>(1, CENTRE_FLOATS / (stages * books.size(2) * (d + 1)));
  int64_t sums = 1;  // as in beam_search
  for (int64_t r = 1; r < stages && sums < most; ++r) sums *= books.size(2);
  most = std::min(most, sums);
  decltype(&beam_of<0>) search = nullptr;
  by_length(d, [&](auto length) { search = beam_of<length.value>; });
  for (int64_t first = 0; first < count; first += step) {
    const int64_t last = std::min(first + step, count);
    std::vector<std::vector<Centres>> centres;
    for (int64_t c = first; c < last; ++c) {
      TORCH_CHECK_VALUE(groups[c] >= 0 && groups[c] < books.size(1), "group ", groups[c], " of ", books.size(1));
      centres.emplace_back();
      for (const Tensor& book : at::matmul(books.select(1, groups[c]), metric[c]).unbind(0)) centres.back().emplace_back(book);
    }
    at::parallel_for(0, rows, BLOCK_ROWS, [&](int64_t begin, int64_t end) {
      Paths paths(most, stages, d);
      std::vector<float> seen(d), errors(BLOCK_ROWS * d);
      float distance;
      for (int64_t block = begin; block < end; block += BLOCK_ROWS) {
        const int64_t some = std::min(BLOCK_ROWS, end - block);
        for (int64_t c = first; c < last; ++c) {
          const float* turn = metric.const_data_ptr<float>() + c * d * d;
          for (int64_t n = 0; n < some; ++n) {
            const float* from = open.const_data_ptr<float>() + (block + n) * width + c * d;
            for (int64_t i = 0; i < d; ++i) {
              seen[i] = 0;
              for (int64_t k = 0; k < d; ++k) seen[i] += from[k] * turn[k * d + i];
            }
            int64_t* to = codes.data_ptr<int64_t>() + ((block + n) * count + c) * stages;
            search(seen.data(), centres[c - first], most, paths, to, &distance);
            std::copy_n(paths.rests.data(), d, &errors[n * d]);
          }
          const int64_t next = (c + 1) * d;
          const float* gain = factor.const_data_ptr<float>() + c * d * width + next;
          for (int64_t n = 0; n < some; ++n)
            take_over(&errors[n * d], d, gain, width, width - next, open.data_ptr<float>() + (block + n) * width + next);
        }
      }
    });
  }
  return {codes, open};
}

}  // namespace rpqfx
