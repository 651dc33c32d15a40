// Tiles of codes as rows of the matrix.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "short_vectors.h"
#include "tiles.h"

namespace rpqfx {

// Sums of entries, [G, R, 16, d], of two stages at once where codebooks are shared: as many as a cache holds.
struct Sums {
  std::vector<float> single, paired;  // [G, R, 16, d], and [R / 2, 256, d] of one shared codebook
  int64_t stages, books, d;

  explicit Sums(const Tensor& codebooks)
      : stages(codebooks.size(0)), books(codebooks.size(1)), d(codebooks.size(3)) {
    const int64_t entries = codebooks.size(2);
    single.assign(books * stages * NIBBLE * d, 0.0f);
    by_float(codebooks, [&](auto scalar) {
      using T = decltype(scalar);
      const T* from = codebooks.const_data_ptr<T>();
      for (int64_t r = 0; r < stages; ++r)
        for (int64_t g = 0; g < books; ++g)
          for (int64_t i = 0; i < entries * d; ++i)
            single[(g * stages + r) * NIBBLE * d + i] = from[(r * books + g) * entries * d + i];
    });
    if (books > 1 || stages == 1) return;
    paired.resize(stages / 2 * NIBBLE * NIBBLE * d);
    for (int64_t pair = 0; pair < stages / 2; ++pair)
      for (int64_t code = 0; code < NIBBLE * NIBBLE; ++code)
        for (int64_t i = 0; i < d; ++i)
          paired[(pair * NIBBLE * NIBBLE + code) * d + i] =
              single[(pair * 2 * NIBBLE + code % NIBBLE) * d + i] + single[((pair * 2 + 1) * NIBBLE + code / NIBBLE) * d + i];
  }
};

// One index for each vector of a tile: its code, or two stages' codes together, next to the first or to the other half.
inline void indices(const uint8_t* first, const uint8_t* second, uint8_t* to) {
  for (int64_t j = 0; j < TILE_BYTES; ++j) {
    to[j] = uint8_t((first[j] & 15) | (second ? second[j] << 4 : 0));
    to[TILE_BYTES + j] = uint8_t((first[j] >> 4) | (second ? second[j] & 0xf0 : 0));
  }
}

// One sub-vector of each vector: to[j, :] = scaled(sum of the terms' entries) * factors[j], a row every width numbers.
template <int64_t D, typename Scaled>
void add_short(const std::vector<const float*>& tables, const std::vector<uint8_t>& index, int64_t vectors,
               const float* factors, const Scaled& scaled, float* to, int64_t width) {
  const int64_t terms = int64_t(tables.size());
  for (int64_t j = 0; j < vectors; ++j, to += width) {
    auto sum = Short<D>::at(tables[0] + index[j] * D);
    for (int64_t term = 1; term < terms; ++term) sum = sum + Short<D>::at(tables[term] + index[term * TILE_VECTORS + j] * D);
    sum = scaled(sum);
    (factors ? sum * factors[j] : sum).to(to);
  }
}

// out [vectors of the tile, D], as floats, times dims [D] and a factor for each vector (each may be null); D0 is the
// length of a sub-vector, or 0.
template <int64_t D0>
void expand_tile(const Sums& sums, int64_t sub_vectors, const uint8_t* codes, int64_t vectors, const float* dims,
                 const float* factors, float* out) {
  const int64_t d = D0 ? D0 : sums.d, stages = sums.stages, width = sub_vectors * d, share = sub_vectors / sums.books;
  const int64_t pairs = sums.paired.empty() ? 0 : stages / 2, terms = stages - pairs, size = NIBBLE * NIBBLE * d;
  std::vector<uint8_t> index(terms * TILE_VECTORS);
  std::vector<const float*> tables(terms);
  for (int64_t m = 0; m < sub_vectors; ++m) {
    const uint8_t* used = codes + m * stages * TILE_BYTES;
    for (int64_t term = 0; term < terms; ++term) {
      const bool two = term < pairs;
      const int64_t r = two ? 2 * term : term + pairs;
      indices(used + r * TILE_BYTES, two ? used + (r + 1) * TILE_BYTES : nullptr, &index[term * TILE_VECTORS]);
      tables[term] = two ? sums.paired.data() + term * size : sums.single.data() + (m / share * stages + r) * NIBBLE * d;
    }
    if constexpr (Short<D0>::FAST) {
      if (dims) {
        const auto each = Short<D0>::at(dims + m * d);
        add_short<D0>(tables, index, vectors, factors, [&](const Short<D0>& sum) { return sum * each; }, out + m * d, width);
      } else {
        add_short<D0>(tables, index, vectors, factors, [](const Short<D0>& sum) { return sum; }, out + m * d, width);
      }
      continue;
    }
    for (int64_t j = 0; j < vectors; ++j) {
      float* to = out + j * width + m * d;
      const float factor = factors ? factors[j] : 1.0f;
      for (int64_t i = 0; i < d; ++i) {
        float sum = 0;
        for (int64_t term = 0; term < terms; ++term) sum += tables[term][index[term * TILE_VECTORS + j] * d + i];
        to[i] = (dims ? sum * dims[m * d + i] : sum) * factor;
      }
    }
  }
}

// Rows of the matrix from a tile on, [vectors, D].
template <typename T>
void expand_tiles(const Tiled& held, const Sums& sums, int64_t first, int64_t last, T* out) {
  const int64_t width = held.width();
  const auto floats = [](const Maybe& x) { return x ? x->to(at::kFloat) : Tensor(); };
  const Tensor dims = floats(held.dims), scale = floats(held.scale);
  const float* of_dims = held.dims ? dims.const_data_ptr<float>() : nullptr;
  const float* of_vectors = held.scale ? scale.const_data_ptr<float>() : nullptr;
  at::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> wide(std::is_same_v<T, float> ? 0 : TILE_VECTORS * width);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t vectors = held.of_tile(t);
      const float* factors = of_vectors ? of_vectors + t * TILE_VECTORS : nullptr;
      T* to = out + (t - first) * TILE_VECTORS * width;
      const auto made = [&](float* rows) {
        with_length(held.d, [&](auto length) {
          expand_tile<length.value>(sums, held.sub_vectors, held.codes(t), vectors, of_dims, factors, rows);
        });
      };
      if constexpr (std::is_same_v<T, float>) {
        made(to);
      } else {
        made(wide.data());
        for (int64_t i = 0; i < vectors * width; i += LANES) {
          const int64_t count = std::min(LANES, vectors * width - i);
          store(to + i, load(wide.data() + i, count), count);
        }
      }
    }
  });
}

}  // namespace rpqfx
