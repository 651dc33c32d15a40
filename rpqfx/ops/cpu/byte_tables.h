// The tables that a row of the input has for the codebooks of tiles, and the sums that codes pick from them.
#pragma once

#include <cmath>
#include <vector>

#include "byte_sums.h"
#include "lines.h"

namespace rpqfx {

inline constexpr int64_t BLOCK_USES = 128;      // whose tables share a scale; their sums of bytes fit in 16 bits
inline constexpr int32_t MIDDLE = 1 << 15;      // what tables are shifted by, so that their halves are unsigned bytes

// Of one row of the input: tables [uses, 2, 16] in blocks of whole sub-vectors, and the scale of each block.
struct Tables {
  int64_t sub_vectors, stages, share, per_block, blocks;

  Tables(int64_t sub_vectors, const Lines& lines)
      : sub_vectors(sub_vectors), stages(lines.stages), share(sub_vectors / lines.books) {
    const int64_t most = std::max<int64_t>(1, BLOCK_USES / stages), least = (sub_vectors + most - 1) / most;
    per_block = (sub_vectors + least - 1) / least;
    blocks = (sub_vectors + per_block - 1) / per_block;
  }

  int64_t bytes() const { return sub_vectors * stages * 2 * NIBBLE; }
  int64_t first(int64_t block) const { return block * per_block; }
  int64_t count(int64_t block) const { return std::min(per_block, sub_vectors - first(block)); }

  // Makes the tables of a block; x is the row.
  template <typename T>
  void fill(const Lines& lines, int64_t block, const T* x, const T* dims, uint8_t* tables, float* scale) const {
    const int64_t d = lines.d, begin = first(block), uses = count(block) * stages;
    alignas(64) float dots[BLOCK_USES * NIBBLE];
    std::vector<float> many(uses > BLOCK_USES ? uses * NIBBLE : 0), values(d);
    float* made = uses > BLOCK_USES ? many.data() : dots;
    Vec most(0);
    for (int64_t m = begin; m < begin + count(block); ++m) {
      for (int64_t i = 0; i < d; ++i) values[i] = float(x[m * d + i]) * (dims ? float(dims[m * d + i]) : 1.0f);
      with_length(d, [&](auto length) {
        most = at::vec::maximum(most, dot<length.value>(lines.at(m / share), values.data(), d, made + (m - begin) * stages * NIBBLE));
      });
    }
    float each[LANES], top = 0;
    most.store(each);
    for (float value : each) top = std::isnan(value) || std::isnan(top) ? NAN : std::max(top, value);
    // What is infinite or no number has no integers: the scale carries it into every sum that it is in.
    const bool finite = std::isfinite(top);
    *scale = finite ? top / (MIDDLE - 1) : NAN;
    const float inverse = finite && top > 0 ? (MIDDLE - 1) / top : 0.0f;
    if (!std::isfinite(inverse)) return tiny(made, uses, top, tables, scale);
    quantise(made, uses, inverse, finite, tables);
  }

 private:
  // Dot products of a sub-vector with the entries of each stage; returns the largest of each lane, without its sign.
  template <int64_t D0>
  Vec dot(const float* line, const float* values, int64_t length, float* made) const {
    constexpr int64_t PARTS = NIBBLE / std::min<int64_t>(LANES, NIBBLE);
    const int64_t d = D0 ? D0 : length;
    Vec most(0);
    for (int64_t r = 0; r < stages; ++r, line += d * NIBBLE, made += NIBBLE)
      for (int64_t part = 0; part < PARTS; ++part) {
        Vec sum = load(line + part * LANES) * Vec(values[0]);
        for (int64_t i = 1; i < d; ++i) sum = at::vec::fmadd(load(line + i * NIBBLE + part * LANES), Vec(values[i]), sum);
        sum.store(made + part * LANES);
        most = at::vec::maximum(most, sum.abs());
      }
    return most;
  }
  // Two numbers of eight bits each for every dot product: what it is in units of the scale, shifted to be positive.
  static void quantise(const float* dots, int64_t uses, float inverse, bool finite, uint8_t* tables) {
    for (int64_t u = 0; u < uses; ++u) {
      const float* from = dots + u * NIBBLE;
      uint8_t* to = tables + u * 2 * NIBBLE;
#if defined(__AVX2__)
      if (finite) {
        const __m256 unit = _mm256_set1_ps(inverse);
        const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from), unit));
        const __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8), unit));
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
        const __m256i shifted = _mm256_xor_si256(packed, _mm256_set1_epi16(int16_t(-MIDDLE)));
        const __m256i low = _mm256_and_si256(shifted, _mm256_set1_epi16(255)), high = _mm256_srli_epi16(shifted, 8);
        const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
        continue;
      }
#endif
      for (int64_t k = 0; k < NIBBLE; ++k) {
        const int32_t value = finite ? int32_t(std::nearbyint(from[k] * inverse)) + MIDDLE : MIDDLE;
        to[k] = uint8_t(value & 255);
        to[NIBBLE + k] = uint8_t(value >> 8);
      }
    }
  }
  // Numbers so small that their inverse is infinite.
  static void tiny(float* dots, int64_t uses, float top, uint8_t* tables, float* scale) {
    for (int64_t i = 0; i < uses * NIBBLE; ++i) dots[i] /= top;
    quantise(dots, uses, MIDDLE - 1, true, tables);
    *scale = top / (MIDDLE - 1);
  }
};

// sums [64] = the sums of all blocks for one tile, of one row whose tables these are.
inline void sum_tile(const Tables& shape, const uint8_t* codes, const uint8_t* tables, const float* scales, float* sums) {
  alignas(64) int32_t counted[TILE_VECTORS];
  std::fill_n(sums, TILE_VECTORS, 0.0f);
  for (int64_t block = 0; block < shape.blocks; ++block) {
    const int64_t begin = shape.first(block) * shape.stages;
    for (int64_t at = 0, left = shape.count(block) * shape.stages; left > 0; at += BLOCK_USES, left -= BLOCK_USES) {
      const int64_t uses = std::min(left, BLOCK_USES);
      sum_block(codes + (begin + at) * TILE_BYTES, tables + (begin + at) * 2 * NIBBLE, uses, counted);
      const float factor = scales[block];
      const int32_t shift = int32_t(uses) * MIDDLE;
      for (int64_t j = 0; j < TILE_VECTORS; ++j) sums[j] += factor * float(counted[j] - shift);
    }
  }
}

}  // namespace rpqfx
