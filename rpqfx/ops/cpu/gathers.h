// Sums of gathers: lines of a table, picked by codes.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "codes.h"

namespace rpqfx {

template <typename T>
struct Table {
  const T* data;  // [uses, entries, stride], the table of the uses first, first + 1, ...
  int64_t entries, stride, first, uses;
};

// sums[j, :] (+)= sum over the table's uses p of table[p, code(p, n + j), :rows], for `left` vectors from n on.
// EDGE: rows do not fill the lanes, or vectors the tile.
template <int V, bool EDGE, bool SIGNED, typename T, typename Code>
void gather_tile(const Table<T>& table, const Codes<Code>& codes, int64_t n, int64_t left, int64_t rows, float* sums) {
  Vec sum[TILE][V];
  for (int64_t j = 0; j < TILE; ++j)
    for (int64_t v = 0; v < V; ++v) sum[j][v] = table.first ? load(sums + (j * V + v) * LANES) : Vec(0);
  for (int64_t p = 0; p < table.uses; ++p) {
    const T* lines = table.data + p * table.entries * table.stride;
    const Code* code = codes.at(table.first + p, n);
    const float* factors = SIGNED ? codes.factors(table.first + p, n) : nullptr;
#pragma GCC unroll 16
    for (int64_t j = 0; j < TILE; ++j) {
      const int64_t which = EDGE ? std::min(j, left - 1) : j;
      const T* line = lines + static_cast<int64_t>(code[which]) * table.stride;
      const Vec sign(SIGNED ? factors[which] : 1.0f);
#pragma GCC unroll 2
      for (int64_t v = 0; v < V; ++v) {
        const Vec term = EDGE ? load(line + v * LANES, std::clamp<int64_t>(rows - v * LANES, 0, LANES))
                              : load(line + v * LANES);
        sum[j][v] = SIGNED ? at::vec::fmadd(term, sign, sum[j][v]) : sum[j][v] + term;
      }
    }
  }
  for (int64_t j = 0; j < TILE; ++j)
    for (int64_t v = 0; v < V; ++v) sum[j][v].store(sums + (j * V + v) * LANES);
}

template <typename T, typename Code>
void gather(const Table<T>& table, const Codes<Code>& codes, int64_t n, int64_t rows, float* sums) {
  const int64_t left = std::min(TILE, codes.vectors - n);
  const bool edge = rows % LANES != 0 || left < TILE;
  with_shape(rows > LANES, edge, codes.signs != nullptr, [&](auto wide, auto edge, auto with_signs) {
    gather_tile<decltype(wide)::value + 1, decltype(edge)::value, decltype(with_signs)::value>(
        table, codes, n, left, rows, sums);
  });
}

// table [B, R, M, K, L] summed by codes: [B, N, L].
inline Tensor gather_sum(const Tensor& table, const Tensor& codes, const Maybe& signs) {
  check_codes(codes, signs);
  check_place("the table", table);
  TORCH_CHECK_VALUE(table.dim() == 5 && table.is_contiguous() && table.size(1) == codes.size(0) &&
                        table.size(2) == codes.size(1),
                    "a table ", table.sizes(), " does not go with codes ", codes.sizes());
  const int64_t entries = table.size(3), length = table.size(4), vectors = codes.size(2);
  Tensor y = at::empty({table.size(0), vectors, length}, table.options());
  by_float(table, [&](auto scalar) {
    using T = decltype(scalar);
    by_code(codes, signs, entries, [&](auto held) {
      const int64_t blocks = (length + WIDE - 1) / WIDE, tiles = (vectors + TILE - 1) / TILE;
      at::parallel_for(0, table.size(0) * blocks * tiles, 8, [&](int64_t begin, int64_t end) {
        alignas(64) float sums[TILE * WIDE];
        for (int64_t task = begin; task < end; ++task) {
          const int64_t sample = task / (blocks * tiles), from = task / tiles % blocks * WIDE, n = task % tiles * TILE;
          const int64_t rows = std::min(WIDE, length - from), width = rows > LANES ? WIDE : LANES;
          const T* first = table.const_data_ptr<T>() + sample * held.uses * entries * length + from;
          gather(Table<T>{first, entries, length, 0, held.uses}, held, n, rows, sums);
          for (int64_t j = 0; j < std::min(TILE, vectors - n); ++j)
            for (int64_t v = 0; v < rows; v += LANES)
              store(y.data_ptr<T>() + (sample * vectors + n + j) * length + from + v, load(sums + j * width + v),
                    std::min(LANES, rows - v));
        }
      });
    });
  });
  return y;
}

}  // namespace rpqfx
