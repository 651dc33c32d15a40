// Codes of four bits in tiles, as kernels read them.
//
// A tile is the codes of 64 vectors, [M, R * 32]: byte j of a use (m, r) has the code of vector j in its low four bits
// and that of vector 32 + j in its high ones.
#pragma once

#include "codes.h"

namespace rpqfx {

inline constexpr int64_t TILE_VECTORS = 64;
inline constexpr int64_t TILE_BYTES = TILE_VECTORS / 2;
inline constexpr int64_t NIBBLE = 16;  // entries of a codebook, those that are not there included

struct Tiled {
  Tensor codebooks, tiles;
  Maybe dims, scale;
  int64_t vectors, sub_vectors, stages, d;

  Tiled(const Tensor& books, const Tensor& given, int64_t vectors, const Maybe& given_dims, const Maybe& given_scale)
      : vectors(vectors) {
    check_place("codebooks", books);
    check_place("tiles", given);
    TORCH_CHECK_TYPE(given.scalar_type() == at::kByte, "tiles are uint8, got ", given.scalar_type());
    const bool fit = books.dim() == 4 && books.numel() > 0 && books.size(2) <= NIBBLE && given.dim() == 3 && vectors > 0 &&
                     given.size(0) == (vectors + TILE_VECTORS - 1) / TILE_VECTORS && given.size(1) > 0 &&
                     given.size(1) % books.size(1) == 0 && given.size(2) == books.size(0) * TILE_BYTES;
    TORCH_CHECK_VALUE(fit, "codebooks ", books.sizes(), " do not go with tiles ", given.sizes(), " of ", vectors, " vectors");
    codebooks = books.contiguous();
    tiles = given.contiguous();
    sub_vectors = tiles.size(1), stages = codebooks.size(0), d = codebooks.size(3);
    check_vector("dims", given_dims, books, sub_vectors * d);
    check_vector("scale", given_scale, books, vectors);
    if (given_dims) dims = given_dims->contiguous();
    if (given_scale) scale = given_scale->contiguous();
  }
  int64_t width() const { return sub_vectors * d; }
  int64_t count() const { return tiles.size(0); }
  int64_t of_tile(int64_t t) const { return std::min(TILE_VECTORS, vectors - t * TILE_VECTORS); }
  const uint8_t* codes(int64_t t) const { return tiles.const_data_ptr<uint8_t>() + t * sub_vectors * stages * TILE_BYTES; }
  template <typename T>
  const T* factors(const Maybe& x) const { return x ? x->const_data_ptr<T>() : nullptr; }
};

}  // namespace rpqfx
