// y @ W: for a few rows from bins to sums in one pass, for more through the matrix products of the gradients.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "grads.h"

namespace rpqfx {

// bins[code(p, n)] += sign * y[n] for all vectors; reads ahead in what is used next.
template <typename Code>
void fill_line(const float* y, const Codes<Code>& codes, int64_t p, const char* next, int64_t bytes, float* bins) {
  const Code* code = codes.at(p, 0);
  const int64_t lines = codes.vectors / LANES + 1, ahead = bytes / lines + 64;
  for (int64_t n = 0; n < codes.vectors; n += LANES) {
    for (int64_t byte = 0; byte < ahead; byte += 64) __builtin_prefetch(next + n / LANES * ahead + byte, 0, 2);
    const int64_t end = std::min(n + LANES, codes.vectors);
    if (codes.signs)
      for (int64_t j = n; j < end; ++j) bins[code[j]] += *codes.factors(p, j) * y[j];
    else
      for (int64_t j = n; j < end; ++j) bins[code[j]] += y[j];
  }
}

// sums[row, :] += bins[row, k] * book[k, :] over all entries.
template <typename T>
void add_entries(const T* book, int64_t entries, int64_t d, const float* bins, int64_t rows, float* sums) {
  for (int64_t k = 0; k < entries; ++k) {
    const T* entry = book + k * d;
    for (int64_t row = 0; row < rows; ++row) {
      const Vec bin(bins[row * entries + k]);
      float* sum = sums + row * d;
      int64_t i = 0;
      for (; i + LANES <= d; i += LANES) at::vec::fmadd(load(entry + i), bin, load(sum + i)).store(sum + i);
      if (i < d) at::vec::fmadd(load(entry + i, d - i), bin, load(sum + i, d - i)).store(sum + i, d - i);
    }
  }
}

// x = y @ W for a few rows. Each sub-vector of x is one thread's: y summed into bins, and the entries by their bins.
template <typename T, typename Code>
void contract_t_few(const Tensor& y, const Tensor& codebooks, const Codes<Code>& codes, T* x) {
  const int64_t rows = y.size(0), vectors = codes.vectors;
  const int64_t stages = codebooks.size(0), books = codebooks.size(1);
  const int64_t entries = codebooks.size(2), d = codebooks.size(3);
  const int64_t sub_vectors = codes.uses / stages, share = sub_vectors / books;
  const Tensor values = y.to(at::kFloat);
  const int64_t grain = std::max<int64_t>(1, GRAIN / (stages * (entries * d + vectors)));
  at::parallel_for(0, sub_vectors, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> bins(rows * entries), sums(rows * d);
    for (int64_t m = begin; m < end; ++m) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t r = 0; r < stages; ++r) {
        std::fill(bins.begin(), bins.end(), 0.0f);
        const T* book = codebooks.const_data_ptr<T>() + (r * books + m / share) * entries * d;
        for (int64_t row = 0; row < rows; ++row) {  // a share of the codebook with each row
          const int64_t bytes = entries * d * int64_t(sizeof(T)) / rows;
          const char* next = reinterpret_cast<const char*>(book) + row * bytes;
          const float* part = values.const_data_ptr<float>() + row * vectors;
          fill_line(part, codes, r * sub_vectors + m, next, bytes, &bins[row * entries]);
        }
        add_entries(book, entries, d, bins.data(), rows, sums.data());
      }
      for (int64_t row = 0; row < rows; ++row) {
        T* to = x + (row * sub_vectors + m) * d;
        for (int64_t i = 0; i < d; i += LANES) {
          const int64_t count = std::min(LANES, d - i);
          store(to + i, load(&sums[row * d + i], count), count);
        }
      }
    }
  });
}

// y [..., N] @ W: [..., D].
inline Tensor contract_t(const Tensor& input, const Tensor& entries, const Tensor& codes, const Maybe& signs) {
  TORCH_CHECK(!input._fw_grad(0).defined(), "forward-mode differentiation does not reach compiled kernels");
  check_books(entries, codes, signs);
  check_place("y", input);
  TORCH_CHECK_VALUE(input.dim() > 0 && input.size(-1) == codes.size(2) && input.scalar_type() == entries.scalar_type(),
                    "y ", input.sizes(), " does not go with codebooks ", entries.sizes(), " and codes ", codes.sizes());
  const Tensor y = input.reshape({-1, input.size(-1)}).contiguous(), codebooks = entries.contiguous();
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = codes.size(1) * codebooks.size(3);
  if (y.size(0) > FEW) {
    const int64_t books = codebooks.size(1), count = codebooks.size(2), d = codebooks.size(3);
    return std::get<0>(grads(std::nullopt, y, codebooks, codes, signs, books, count, d)).view(shape);
  }
  Tensor x = at::empty(shape, y.options());
  by_float(y, [&](auto scalar) {
    using T = decltype(scalar);
    by_code(codes, signs, codebooks.size(2),
            [&](auto held) { contract_t_few<T>(y, codebooks, held, x.data_ptr<T>()); });
  });
  return x;
}

}  // namespace rpqfx
