// x @ W.T through tables of dot products.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "gathers.h"

namespace rpqfx {

// y[row, n] = sums[n, row] + bias[n], for up to LANES vectors.
template <typename T>
void write_rows(const float* sums, int64_t width, int64_t vectors, int64_t rows, const T* bias, T* y, int64_t stride) {
  alignas(64) float turned[LANES * LANES];
  const Vec shift = bias ? load(bias, vectors) : Vec(0);
  for (int64_t row = 0; row < rows; row += LANES) {
    const int64_t count = std::min(LANES, rows - row);
    at::vec::transpose_mxn<float>(sums + row, width, turned, LANES, vectors, count);
    for (int64_t i = 0; i < count; ++i)
      store(y + (row + i) * stride, load(turned + i * LANES, vectors) + shift, vectors);
  }
}

// y = x @ W.T + bias for a block of up to WIDE rows, through tables of as many uses as fit in the cache.
template <typename T, typename Code>
void contract_block(const Tensor& x, int64_t real, const std::vector<Tensor>& books, const Codes<Code>& codes,
                    const T* bias, T* y) {
  const int64_t rows = x.size(0), sub_vectors = books[0].size(0), entries = books[0].size(1), d = books[0].size(2);
  const int64_t width = rows > LANES ? WIDE : LANES, tiles = (codes.vectors + LANES - 1) / LANES;
  const int64_t group = std::clamp<int64_t>(TABLE_BYTES / (entries * rows * int64_t(sizeof(T))), 1, sub_vectors);
  const bool grouped = group < codes.uses;
  const Tensor table = at::empty({group, entries, rows}, x.options());
  const Tensor kept = at::empty({grouped ? tiles * LANES * width : 0}, x.options().dtype(at::kFloat));
  const Tensor parts = x.view({rows, sub_vectors, d}).permute({1, 2, 0});
  for (size_t stage = 0; stage < books.size(); ++stage) {
    for (int64_t m = 0; m < sub_vectors; m += group) {
      const int64_t uses = std::min(group, sub_vectors - m), first = stage * sub_vectors + m;
      Tensor some = table.narrow(0, 0, uses);
      at::bmm_out(some, books[stage].narrow(0, m, uses), parts.narrow(0, m, uses));
      const Table<T> part{some.const_data_ptr<T>(), entries, rows, first, uses};
      at::parallel_for(0, tiles, 16, [&](int64_t begin, int64_t end) {
        alignas(64) float tile[LANES * WIDE];
        for (int64_t n = begin * LANES; n < std::min(end * LANES, codes.vectors); n += LANES) {
          float* sums = grouped ? kept.data_ptr<float>() + n * width : tile;
          const int64_t vectors = std::min(LANES, codes.vectors - n);
          for (int64_t j = 0; j < vectors; j += TILE) gather(part, codes, n + j, rows, sums + j * width);
          if (first + uses == codes.uses)
            write_rows<T>(sums, width, vectors, real, bias ? bias + n : nullptr, y + n, codes.vectors);
        }
      });
    }
  }
}

// lines[row, k] = x[row, :] . book[k, :] for all entries, LANES of them at a time.
template <typename T>
void dot_lines(const T* book, int64_t entries, int64_t d, const T* x, int64_t x_stride, int64_t rows, float* lines) {
  alignas(64) float sums[LANES * LANES], turned[LANES * LANES];
  for (int64_t row = 0; row < rows; ++row) {
    const T* part = x + row * x_stride;
    for (int64_t k = 0; k < entries; k += LANES) {
      const int64_t some = std::min(LANES, entries - k);
      for (int64_t j = 0; j < some; ++j) {
        const T* entry = book + (k + j) * d;
        Vec even(0), odd(0);
        int64_t i = 0;
        for (; i + 2 * LANES <= d; i += 2 * LANES) {
          even = at::vec::fmadd(load(entry + i), load(part + i), even);
          odd = at::vec::fmadd(load(entry + i + LANES), load(part + i + LANES), odd);
        }
        for (; i < d; i += LANES) {
          const int64_t count = std::min(LANES, d - i);
          even = at::vec::fmadd(load(entry + i, count), load(part + i, count), even);
        }
        (even + odd).store(sums + j * LANES);
      }
      at::vec::transpose_mxn<float>(sums, LANES, turned, LANES, some, LANES);
      Vec total = load(turned, some);
      for (int64_t i = 1; i < LANES; ++i) total = total + load(turned + i * LANES, some);
      store(lines + row * entries + k, total, some);
    }
  }
}

// sums[n] += sign * line[code(p, n)] for all vectors; reads ahead in what is used next.
template <typename Code>
void pick_line(const float* line, const Codes<Code>& codes, int64_t p, const char* next, int64_t bytes, float* sums) {
  const Code* code = codes.at(p, 0);
  const int64_t whole = codes.vectors / LANES * LANES, ahead = bytes / std::max<int64_t>(1, whole / LANES) + 64;
  for (int64_t n = 0; n < whole; n += LANES) {
    for (int64_t byte = 0; byte < ahead; byte += 64) __builtin_prefetch(next + n / LANES * ahead + byte, 0, 2);
    int32_t index[LANES];
    for (int64_t j = 0; j < LANES; ++j) index[j] = code[n + j];
    Vec term = at::vec::gather<sizeof(float)>(line, at::vec::Vectorized<int32_t>::loadu(index));
    if (codes.signs) {
      float factors[LANES];
      for (int64_t j = 0; j < LANES; j += SIGNS_AT_ONCE)
        std::copy_n(codes.factors(p, n + j), SIGNS_AT_ONCE, factors + j);
      term = term * load(factors);
    }
    (load(sums + n) + term).store(sums + n);
  }
  for (int64_t n = whole; n < codes.vectors; ++n)
    sums[n] += (codes.signs ? *codes.factors(p, n) : 1.0f) * line[code[n]];
}

// y = x @ W.T + bias for a few rows. A thread takes some uses, from reading their codebook (which is what takes the
// time) to picking their terms, with lanes along the vectors; the threads' sums are added up last.
template <typename T, typename Code>
void contract_few(const Tensor& x, const Tensor& codebooks, const Codes<Code>& codes, const T* bias, T* y) {
  const int64_t rows = x.size(0), width = x.size(1), vectors = codes.vectors;
  const int64_t stages = codebooks.size(0), books = codebooks.size(1);
  const int64_t entries = codebooks.size(2), d = codebooks.size(3);
  const int64_t sub_vectors = codes.uses / stages, share = sub_vectors / books;
  const int64_t groups = std::min<int64_t>({codes.uses, at::get_num_threads(), MOST_GROUPS});
  const Tensor sums = at::empty({groups, rows, vectors}, x.options().dtype(at::kFloat));
  const auto book = [&](int64_t p) {
    return codebooks.const_data_ptr<T>() + (p / sub_vectors * books + p % sub_vectors / share) * entries * d;
  };
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> lines(rows * entries);
    for (int64_t group = begin; group < end; ++group) {
      float* own = sums.data_ptr<float>() + group * rows * vectors;
      std::fill_n(own, rows * vectors, 0.0f);
      const int64_t last = codes.uses * (group + 1) / groups;
      for (int64_t p = codes.uses * group / groups; p < last; ++p) {
        const T* part = x.const_data_ptr<T>() + p % sub_vectors * d;
        dot_lines<T>(book(p), entries, d, part, width, rows, lines.data());
        for (int64_t row = 0; row < rows; ++row) {  // a share of the next codebook with each row
          const int64_t bytes = entries * d * int64_t(sizeof(T)) / rows;
          const char* next = reinterpret_cast<const char*>(book(std::min(p + 1, last - 1))) + row * bytes;
          pick_line(lines.data() + row * entries, codes, p, next, bytes, own + row * vectors);
        }
      }
    }
  });
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / (vectors + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t n = 0; n < vectors; n += LANES) {
        const int64_t count = std::min(LANES, vectors - n);
        Vec sum = bias ? load(bias + n, count) : Vec(0);
        for (int64_t group = 0; group < groups; ++group)
          sum = sum + load(sums.const_data_ptr<float>() + (group * rows + row) * vectors + n, count);
        store(y + row * vectors + n, sum, count);
      }
  });
}

// x [..., D] @ W.T + bias: [..., N].
inline Tensor contract(const Tensor& input, const Tensor& entries, const Tensor& codes, const Maybe& signs,
                       const Maybe& given_bias) {
  TORCH_CHECK(!input._fw_grad(0).defined(), "forward-mode differentiation does not reach compiled kernels");
  check_books(entries, codes, signs);
  check_place("x", input);
  TORCH_CHECK_VALUE(input.dim() > 0 && input.size(-1) == codes.size(1) * entries.size(3) &&
                        input.scalar_type() == entries.scalar_type(),
                    "x ", input.sizes(), " does not go with codebooks ", entries.sizes(), " and codes ", codes.sizes());
  check_vector("bias", given_bias, input, codes.size(2));
  const Maybe bias = given_bias ? Maybe(given_bias->contiguous()) : std::nullopt;
  const Tensor x = input.reshape({-1, input.size(-1)}).contiguous(), codebooks = entries.contiguous();
  const int64_t rows = x.size(0), vectors = codes.size(2);
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = vectors;
  Tensor y = at::empty(shape, x.options());
  by_float(x, [&](auto scalar) {
    using T = decltype(scalar);
    by_code(codes, signs, codebooks.size(2), [&](auto held) {
      const T* shift = bias ? bias->const_data_ptr<T>() : nullptr;
      if (rows <= FEW && codebooks.size(3) >= LANES) {
        contract_few<T>(x, codebooks, held, shift, y.data_ptr<T>());
        return;
      }
      const std::vector<Tensor> books = each_book(codebooks, codes.size(1));
      const int64_t blocks = (rows + WIDE - 1) / WIDE;
      const auto run = [&](int64_t begin, int64_t end) {
        at::AutoDispatchBelowAutograd guard;
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first = block * WIDE, count = std::min(WIDE, rows - first), fill = -count & (LANES - 1);
          Tensor some = x.narrow(0, first, count);
          if (fill) some = at::constant_pad_nd(some, {0, 0, 0, fill});
          contract_block<T>(some, count, books, held, shift, y.data_ptr<T>() + first * vectors);
        }
      };
      if (blocks >= at::get_num_threads()) at::parallel_for(0, blocks, 1, run);
      else run(0, blocks);
    });
  });
  return y;
}

}  // namespace rpqfx
