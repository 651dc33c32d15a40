// Rows of the matrix, and the adjoint of making them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "codes.h"
#include "strips.h"

namespace rpqfx {

// What rows are made of, and what they are multiplied by: factors of vectors [N] and of columns [D], each maybe null.
template <typename T, typename Code>
struct Rows {
  const Tensor& codebooks;
  const Codes<Code>& codes;
  const T* scale;
  const float* columns;

  int64_t stages() const { return codebooks.size(0); }
  int64_t books() const { return codebooks.size(1); }
  int64_t entries() const { return codebooks.size(2); }
  int64_t sub_vectors() const { return codes.uses / stages(); }
  float factor(int64_t n) const { return scale ? static_cast<float>(scale[n]) : 1.0f; }
  // The codebook of a stage for sub-vector m.
  const T* book(int64_t r, int64_t m) const {
    const int64_t share = sub_vectors() / books();
    return codebooks.const_data_ptr<T>() + (r * books() + m / share) * entries() * codebooks.size(3);
  }
};

// Sub-vectors first..M of rows begin..end, of a length that is known.
template <int64_t D, typename T, typename Code>
void expand_short(const Rows<T, Code>& rows, int64_t first, int64_t begin, int64_t end, T* out) {
  const int64_t sub_vectors = rows.sub_vectors();
  const Codes<Code>& codes = rows.codes;
  for (int64_t m = first; m < sub_vectors; ++m)
    for (int64_t n = begin; n < end; ++n) {
      float sum[D] = {};
      for (int64_t r = 0; r < rows.stages(); ++r) {
        const int64_t p = r * sub_vectors + m;
        const T* entry = rows.book(r, m) + int64_t(*codes.at(p, n)) * D;
        const float sign = codes.signs ? *codes.factors(p, n) : 1.0f;
        for (int64_t i = 0; i < D; ++i) sum[i] += sign * static_cast<float>(entry[i]);
      }
      const float factor = rows.factor(n);
      for (int64_t i = 0; i < D; ++i) {
        const float value = sum[i] * factor;
        out[(n * sub_vectors + m) * D + i] = static_cast<T>(rows.columns ? value * rows.columns[m * D + i] : value);
      }
    }
}

#if defined(__AVX2__)

// The same without signs, as many sub-vectors at a time as fill a register; returns how many there were.
template <int64_t D, typename Code>
int64_t expand_strips(const Rows<float, Code>& rows, int64_t begin, int64_t end, float* out) {
  constexpr int64_t COUNT = Strip<D>::COUNT;
  const int64_t sub_vectors = rows.sub_vectors(), stages = rows.stages();
  std::vector<const float*> books(stages * COUNT);
  std::vector<const Code*> codes(stages * COUNT);
  int64_t m = 0;
  for (; m + COUNT <= sub_vectors; m += COUNT) {
    for (int64_t use = 0; use < stages * COUNT; ++use) {
      const int64_t r = use / COUNT, of = m + use % COUNT;
      books[use] = rows.book(r, of);
      codes[use] = rows.codes.at(r * sub_vectors + of, 0);
    }
    const __m256 columns = rows.columns ? _mm256_loadu_ps(rows.columns + m * D) : _mm256_set1_ps(1.0f);
    for (int64_t n = begin; n < end; ++n) {
      __m256 sum = Strip<D>::at(books.data(), codes.data(), n);
      for (int64_t use = COUNT; use < stages * COUNT; use += COUNT)
        sum = _mm256_add_ps(sum, Strip<D>::at(books.data() + use, codes.data() + use, n));
      const __m256 scaled = rows.scale ? _mm256_mul_ps(sum, _mm256_set1_ps(rows.scale[n])) : sum;
      _mm256_storeu_ps(out + (n * sub_vectors + m) * D, _mm256_mul_ps(scaled, columns));
    }
  }
  return m;
}

#endif

// Rows of short sub-vectors, a few rows at a time: their codes lie side by side, and what is written stays in a cache.
template <int64_t D, typename T, typename Code>
void expand_by_length(const Rows<T, Code>& rows, int64_t begin, int64_t end, T* out) {
  constexpr int64_t AT_ONCE = 16;
  for (int64_t from = begin; from < end; from += AT_ONCE) {
    const int64_t to = std::min(from + AT_ONCE, end);
    int64_t done = 0;
#if defined(__AVX2__)
    if constexpr (std::is_same_v<T, float>)
      if (!rows.codes.signs) done = expand_strips<D>(rows, from, to, out);
#endif
    expand_short<D>(rows, done, from, to, out);
  }
}

// out[i, :] = scale[n] * columns * sum over stages of sign * entries, n = ids[i] (or i, without ids), for a part of the
// rows.
template <typename T, typename Code>
void expand_rows(const Rows<T, Code>& rows, const int64_t* ids, int64_t begin, int64_t end, T* out) {
  const Tensor& codebooks = rows.codebooks;
  const Codes<Code>& codes = rows.codes;
  const int64_t stages = rows.stages(), books = rows.books(), entries = rows.entries(), d = codebooks.size(3);
  const int64_t sub_vectors = rows.sub_vectors(), share = sub_vectors / books;
  if (!ids && d == 2) return expand_by_length<2>(rows, begin, end, out);
  if (!ids && d == 4) return expand_by_length<4>(rows, begin, end, out);
  const T* first = codebooks.const_data_ptr<T>();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = ids ? ids[i] : i;
    const Vec factor(rows.factor(n));
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
        if (rows.scale) sum = sum * factor;
        if (rows.columns) sum = sum * load(rows.columns + m * d + from, count);
        store(to + from, sum, count);
      }
    }
  }
}

// Factors of columns as floats, each for as many columns in a row as come to it: [D], or nothing.
inline std::vector<float> factors_of_columns(const Maybe& dims, const Tensor& codebooks, int64_t width) {
  if (!dims) return {};
  const int64_t count = dims->numel();
  TORCH_CHECK_VALUE(count > 0 && width % count == 0, "dims ", dims->sizes(), " of ", width, " columns");
  check_vector("dims", dims, codebooks, count);
  const Tensor given = dims->contiguous();
  std::vector<float> columns(width);
  by_float(given, [&](auto scalar) {
    const auto* from = given.const_data_ptr<decltype(scalar)>();
    for (int64_t i = 0; i < width; ++i) columns[i] = static_cast<float>(from[i / (width / count)]);
  });
  return columns;
}

// W[ids] [..., D], or all of W [N, D], times dims, a factor for each so many columns in a row.
inline Tensor expand(const Tensor& entries, const Tensor& codes, const Maybe& given_scale, const Maybe& signs,
                     const Maybe& which, const Maybe& dims) {
  check_books(entries, codes, signs);
  const std::vector<float> columns = factors_of_columns(dims, entries, codes.size(1) * entries.size(3));
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
        const Rows<T, typename decltype(held)::Code> made{codebooks, held, factors, dims ? columns.data() : nullptr};
        expand_rows(made, ids, begin, end, out.data_ptr<T>());
      });
    });
  });
  return out;
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
