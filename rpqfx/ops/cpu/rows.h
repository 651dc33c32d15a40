// Rows of the matrix, and the adjoint of making them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "codes.h"

namespace rpqfx {

// Rows begin..end of the matrix, of sub-vectors that are shorter than a register: loops of known length, unrolled, over a
// few rows at a time, whose codes lie side by side.
template <int64_t D, typename T, typename Code>
void expand_short(const Tensor& codebooks, const Codes<Code>& codes, const T* scale, int64_t begin, int64_t end, T* out) {
  constexpr int64_t ROWS = 16;
  const int64_t stages = codebooks.size(0), books = codebooks.size(1), entries = codebooks.size(2);
  const int64_t sub_vectors = codes.uses / stages, share = sub_vectors / books;
  const T* first = codebooks.const_data_ptr<T>();
  for (int64_t from = begin; from < end; from += ROWS) {
    const int64_t to = std::min(from + ROWS, end);
    for (int64_t m = 0; m < sub_vectors; ++m) {
      const T* book = first + m / share * entries * D;
      for (int64_t n = from; n < to; ++n) {
        float sum[D] = {};
        for (int64_t r = 0; r < stages; ++r) {
          const int64_t p = r * sub_vectors + m;
          const T* entry = book + (r * books * entries + *codes.at(p, n)) * D;
          const float sign = codes.signs ? *codes.factors(p, n) : 1.0f;
          for (int64_t i = 0; i < D; ++i) sum[i] += sign * static_cast<float>(entry[i]);
        }
        const float factor = scale ? static_cast<float>(scale[n]) : 1.0f;
        for (int64_t i = 0; i < D; ++i) out[(n * sub_vectors + m) * D + i] = static_cast<T>(sum[i] * factor);
      }
    }
  }
}

// out[i, :] = scale[n] * sum over stages of sign * entries, n = ids[i] (or i, without ids), for a part of the rows.
template <typename T, typename Code>
void expand_rows(const Tensor& codebooks, const Codes<Code>& codes, const T* scale, const int64_t* ids, int64_t begin,
                 int64_t end, T* out) {
  const int64_t stages = codebooks.size(0), books = codebooks.size(1);
  const int64_t entries = codebooks.size(2), d = codebooks.size(3);
  const int64_t sub_vectors = codes.uses / stages, share = sub_vectors / books;
  if (!ids && d == 2) return expand_short<2>(codebooks, codes, scale, begin, end, out);
  if (!ids && d == 4) return expand_short<4>(codebooks, codes, scale, begin, end, out);
  const T* first = codebooks.const_data_ptr<T>();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = ids ? ids[i] : i;
    const Vec factor(scale ? static_cast<float>(scale[n]) : 1.0f);
    // A row that is picked has its codes and its entries anywhere: ask for all before the first is used.
    for (int64_t p = 0; ids && p < codes.uses; ++p) __builtin_prefetch(codes.at(p, n));
    for (int64_t p = 0; ids && p < codes.uses; ++p) {
      const int64_t entry = (p / sub_vectors * books + p % sub_vectors / share) * entries + *codes.at(p, n);
      for (int64_t from = 0; from < d; from += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(first + entry * d + from, 0, 2);
    }
    for (int64_t m = 0; m < sub_vectors; ++m) {
      T* to = out + (i * sub_vectors + m) * d;
      for (int64_t from = 0; from < d; from += LANES) {
        const int64_t count = std::min(LANES, d - from);
        Vec sum(0);
        for (int64_t r = 0; r < stages; ++r) {
          const int64_t p = r * sub_vectors + m, entry = (r * books + m / share) * entries + *codes.at(p, n);
          const Vec term = load(first + entry * d + from, count);
          sum = codes.signs ? at::vec::fmadd(term, Vec(*codes.factors(p, n)), sum) : sum + term;
        }
        store(to + from, scale ? sum * factor : sum, count);
      }
    }
  }
}

// W[ids] [..., D], or all of W [N, D], times dims [D].
inline Tensor expand(const Tensor& entries, const Tensor& codes, const Maybe& given_scale, const Maybe& signs,
                     const Maybe& which, const Maybe& dims) {
  check_books(entries, codes, signs);
  check_vector("dims", dims, entries, codes.size(1) * entries.size(3));
  check_vector("scale", given_scale, entries, codes.size(2));
  const Maybe scale = given_scale ? Maybe(given_scale->contiguous()) : std::nullopt;
  check_place("ids", which);
  TORCH_CHECK_TYPE(!which || which->scalar_type() == at::kLong, "ids are int64");
  const Tensor codebooks = entries.contiguous();
  const Maybe picked = which ? Maybe(which->contiguous()) : std::nullopt;
  const int64_t* ids = picked ? picked->const_data_ptr<int64_t>() : nullptr;
  const int64_t rows = picked ? picked->numel() : codes.size(2), dim = codes.size(1) * codebooks.size(3);
  for (int64_t i = 0; ids && i < rows; ++i)
    TORCH_CHECK_INDEX(ids[i] >= 0 && ids[i] < codes.size(2), "row ", ids[i], " of ", codes.size(2));
  std::vector<int64_t> shape = picked ? picked->sizes().vec() : std::vector<int64_t>{rows};
  shape.push_back(dim);
  Tensor out = at::empty(shape, codebooks.options());
  by_float(codebooks, [&](auto scalar) {
    using T = decltype(scalar);
    by_code(codes, signs, codebooks.size(2), [&](auto held) {
      const T* factors = scale ? scale->const_data_ptr<T>() : nullptr;
      at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / dim), [&](int64_t begin, int64_t end) {
        expand_rows<T>(codebooks, held, factors, ids, begin, end, out.data_ptr<T>());
      });
    });
  });
  return dims ? out.mul_(*dims) : out;
}

// The adjoint of expand: grad [N, D] summed into the entries that it used, [R, G, K, d] float32.
inline Tensor collect(const Tensor& grad, const Tensor& codes, const Maybe& signs, int64_t books,
               int64_t entries) {
  check_codes(codes, signs);
  check_place("the gradient", grad);
  TORCH_CHECK_VALUE(entries > 0 && grad.dim() == 2 && grad.is_contiguous() && grad.size(0) == codes.size(2) &&
                        grad.size(1) % codes.size(1) == 0 && books > 0 && codes.size(1) % books == 0,
                    "a gradient ", grad.sizes(), " does not go with codes ", codes.sizes(), " and ", books,
                    " codebooks of ", entries, " entries");
  const int64_t stages = codes.size(0), sub_vectors = codes.size(1), d = grad.size(1) / sub_vectors;
  const int64_t share = sub_vectors / books, parts = stages * books < 8 ? std::min<int64_t>(share, 8) : 1;
  const int64_t size = entries * d;
  Tensor sums = at::zeros({stages, books, parts, entries, d}, grad.options().dtype(at::kFloat));
  by_float(grad, [&](auto scalar) {
    using T = decltype(scalar);
    by_code(codes, signs, entries, [&](auto held) {
      at::parallel_for(0, stages * books * parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t r = task / parts / books, g = task / parts % books, part = task % parts;
          float* out = sums.data_ptr<float>() + task * size;
          for (int64_t m = g * share + share * part / parts; m < g * share + share * (part + 1) / parts; ++m) {
            const int64_t p = r * sub_vectors + m;
            for (int64_t n = 0; n < held.vectors; ++n) {
              const T* from = grad.const_data_ptr<T>() + (n * sub_vectors + m) * d;
              float* to = out + static_cast<int64_t>(*held.at(p, n)) * d;
              const Vec sign(held.signs ? *held.factors(p, n) : 1.0f);
              for (int64_t i = 0; i < d; i += LANES) {
                const int64_t count = std::min(LANES, d - i);
                store(to + i, at::vec::fmadd(load(from + i, count), sign, load(to + i, count)), count);
              }
            }
          }
        }
      });
    });
  });
  return parts == 1 ? sums.squeeze(2) : sums.sum(2);
}

}  // namespace rpqfx
