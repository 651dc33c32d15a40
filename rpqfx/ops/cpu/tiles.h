// Products with codes of four bits that lie in tiles, through tables that vector registers hold.
//
// A tile is the codes of 64 vectors, [M, R * 32]: byte j of a use (m, r) has the code of vector j in its low four bits
// and that of vector 32 + j in its high ones. Each use of a row of the input has a table of 16 dot products, as 16-bit
// integers with one scale for up to BLOCK_USES uses, in two halves of 16 bytes each: a byte shuffle looks up 16, 32 or
// 64 of them at once. Integers are added up exactly, so the only error is the rounding of the tables, at most half a
// scale a use. The technique is T-MAC's (Wei et al., 2407.00088), with entries of vectors in the place of bits.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <cmath>
#include <memory>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "codes.h"

namespace rpqfx {

inline constexpr int64_t TILE_VECTORS = 64;
inline constexpr int64_t TILE_BYTES = TILE_VECTORS / 2;
inline constexpr int64_t NIBBLE = 16;       // entries of a table
inline constexpr int64_t BLOCK_USES = 128;  // whose tables share a scale; their sums of bytes fit in 16 bits
inline constexpr int64_t TABLE_ROWS = 32;   // of the input up to which tables are faster than an expanded tile
inline constexpr int64_t TABLE_GRAIN = 1 << 15;  // multiply-adds of tables that are worth another thread
inline constexpr int64_t AHEAD = 2048;  // bytes of codes that are asked for before they are needed
inline constexpr int64_t PANEL_BYTES = 1 << 19;  // of expanded tiles at a time: half of a second-level cache
inline constexpr int32_t MIDDLE = 1 << 15;  // what tables are shifted by, so that their halves are unsigned bytes

// ----------------------------------------------------------------------------------- sums of one block for one tile

#if defined(__AVX2__)

// Bytes summed as 16-bit numbers: of all, where an odd byte counts 256 times, and of odd ones alone.
struct ByteSums {
  __m256i all = _mm256_setzero_si256(), odd = _mm256_setzero_si256();

  void add(__m256i bytes) {
    all = _mm256_add_epi16(all, bytes);
    odd = _mm256_add_epi16(odd, _mm256_srli_epi16(bytes, 8));
  }
  __m256i even() const { return _mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8)); }
};

// out[0..32) = low + 256 high, in the order of the bytes.
inline void join(const ByteSums& low, const ByteSums& high, int32_t* out) {
  const __m256i parts[2][2] = {{low.even(), low.odd}, {high.even(), high.odd}};
  const auto widened = [](__m128i x) { return _mm256_cvtepu16_epi32(x); };
  for (int half = 0; half < 2; ++half) {  // unpack works within 128 bits: lanes 0..7 and 16..23, then the others
    const __m256i a = half ? _mm256_unpackhi_epi16(parts[0][0], parts[0][1]) : _mm256_unpacklo_epi16(parts[0][0], parts[0][1]);
    const __m256i b = half ? _mm256_unpackhi_epi16(parts[1][0], parts[1][1]) : _mm256_unpacklo_epi16(parts[1][0], parts[1][1]);
    const __m256i first = _mm256_add_epi32(widened(_mm256_castsi256_si128(a)), _mm256_slli_epi32(widened(_mm256_castsi256_si128(b)), 8));
    const __m256i second = _mm256_add_epi32(widened(_mm256_extracti128_si256(a, 1)), _mm256_slli_epi32(widened(_mm256_extracti128_si256(b, 1)), 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + half * 8), first);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + half * 8 + 16), second);
  }
}

#if defined(__AVX512BW__)

// Bytes of two uses at once, as ByteSums.
struct WideSums {
  __m512i all = _mm512_setzero_si512(), odd = _mm512_setzero_si512();

  void add(__m512i bytes) {
    all = _mm512_add_epi16(all, bytes);
    odd = _mm512_add_epi16(odd, _mm512_srli_epi16(bytes, 8));
  }
  static __m256i folded(__m512i x) { return _mm256_add_epi16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1)); }
  void into(ByteSums& sums) const { sums.all = folded(all), sums.odd = folded(odd); }
};

// Sums of all uses but an odd last one; returns how many.
inline int64_t sum_pairs(const uint8_t* codes, const uint8_t* tables, int64_t uses, ByteSums& low_low, ByteSums& low_high,
                         ByteSums& high_low, ByteSums& high_high) {
  WideSums sums_ll, sums_lh, sums_hl, sums_hh;
  const __m512i mask = _mm512_set1_epi8(0x0f);
  int64_t u = 0;
  for (; u + 2 <= uses; u += 2) {
    const __m512i both = _mm512_loadu_si512(codes + u * TILE_BYTES), pair = _mm512_loadu_si512(tables + u * 2 * NIBBLE);
    const __m512i low = _mm512_and_si512(both, mask), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    // A pair is [first, second] of one use and of the next, 16 bytes each.
    const __m512i first = _mm512_shuffle_i64x2(pair, pair, 0xa0), second = _mm512_shuffle_i64x2(pair, pair, 0xf5);
    sums_ll.add(_mm512_shuffle_epi8(first, low));
    sums_lh.add(_mm512_shuffle_epi8(second, low));
    sums_hl.add(_mm512_shuffle_epi8(first, high));
    sums_hh.add(_mm512_shuffle_epi8(second, high));
  }
  sums_ll.into(low_low), sums_lh.into(low_high), sums_hl.into(high_low), sums_hh.into(high_high);
  return u;
}

#endif

// Sums of low and of high codes, each in the low and the high halves of tables: variables, which stay in registers.
inline void sum_block(const uint8_t* codes, const uint8_t* tables, int64_t uses, int32_t* out) {
  ByteSums low_low, low_high, high_low, high_high;
  int64_t u = 0;
#if defined(__AVX512BW__)
  u = sum_pairs(codes, tables, uses, low_low, low_high, high_low, high_high);
#endif
  const __m256i mask = _mm256_set1_epi8(0x0f);
#pragma GCC unroll 4
  for (; u < uses; ++u) {
    if (u % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(codes + u * TILE_BYTES + AHEAD), _MM_HINT_T0);
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + u * TILE_BYTES));
    const __m256i low = _mm256_and_si256(both, mask), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
    const auto* halves = reinterpret_cast<const __m128i*>(tables + u * 2 * NIBBLE);
    const __m256i first = _mm256_broadcastsi128_si256(_mm_loadu_si128(halves));
    const __m256i second = _mm256_broadcastsi128_si256(_mm_loadu_si128(halves + 1));
    low_low.add(_mm256_shuffle_epi8(first, low));
    low_high.add(_mm256_shuffle_epi8(second, low));
    high_low.add(_mm256_shuffle_epi8(first, high));
    high_high.add(_mm256_shuffle_epi8(second, high));
  }
  join(low_low, low_high, out);
  join(high_low, high_high, out + TILE_BYTES);
}

#elif defined(__aarch64__)

inline void sum_block(const uint8_t* codes, const uint8_t* tables, int64_t uses, int32_t* out) {
  for (int64_t part = 0; part < TILE_BYTES; part += NIBBLE) {  // 16 bytes, 32 vectors: eight registers of sums
    uint16x8_t sums[2][2][2];
    for (auto& code : sums)
      for (auto& half : code) half[0] = half[1] = vdupq_n_u16(0);
    for (int64_t u = 0; u < uses; ++u) {
      const uint8x16_t both = vld1q_u8(codes + u * TILE_BYTES + part);
      const uint8x16_t index[2] = {vandq_u8(both, vdupq_n_u8(0x0f)), vshrq_n_u8(both, 4)};
      for (int half = 0; half < 2; ++half) {
        const uint8x16_t table = vld1q_u8(tables + (u * 2 + half) * NIBBLE);
        for (int code = 0; code < 2; ++code) {
          const uint8x16_t bytes = vqtbl1q_u8(table, index[code]);
          sums[code][half][0] = vaddw_u8(sums[code][half][0], vget_low_u8(bytes));
          sums[code][half][1] = vaddw_high_u8(sums[code][half][1], bytes);
        }
      }
    }
    for (int code = 0; code < 2; ++code)
      for (int eight = 0; eight < 2; ++eight) {
        const uint16x8_t low = sums[code][0][eight], high = sums[code][1][eight];
        uint32_t* to = reinterpret_cast<uint32_t*>(out + code * TILE_BYTES + part + eight * 8);
        vst1q_u32(to, vaddq_u32(vmovl_u16(vget_low_u16(low)), vshll_n_u16(vget_low_u16(high), 8)));
        vst1q_u32(to + 4, vaddq_u32(vmovl_u16(vget_high_u16(low)), vshll_n_u16(vget_high_u16(high), 8)));
      }
  }
}

#else

inline void sum_block(const uint8_t* codes, const uint8_t* tables, int64_t uses, int32_t* out) {
  std::fill_n(out, TILE_VECTORS, 0);
  for (int64_t u = 0; u < uses; ++u)
    for (int64_t j = 0; j < TILE_VECTORS; ++j) {
      const int code = codes[u * TILE_BYTES + j % TILE_BYTES] >> (j < TILE_BYTES ? 0 : 4) & 15;
      out[j] += tables[u * 2 * NIBBLE + code] + 256 * tables[(u * 2 + 1) * NIBBLE + code];
    }
}

#endif

// ------------------------------------------------------------------------------------------------ the tables

// Codebooks [R, G, K, d] as float lines over entries, [G, R, d, 16]: entries that are not there are zero.
struct Lines {
  std::vector<float> data;
  int64_t stages, books, d;

  explicit Lines(const Tensor& codebooks)
      : stages(codebooks.size(0)), books(codebooks.size(1)), d(codebooks.size(3)) {
    const int64_t entries = codebooks.size(2);
    data.assign(stages * books * d * NIBBLE, 0.0f);
    by_float(codebooks, [&](auto scalar) {
      using T = decltype(scalar);
      const T* from = codebooks.const_data_ptr<T>();
      for (int64_t r = 0; r < stages; ++r)
        for (int64_t g = 0; g < books; ++g)
          for (int64_t k = 0; k < entries; ++k)
            for (int64_t i = 0; i < d; ++i)
              data[((g * stages + r) * d + i) * NIBBLE + k] = from[((r * books + g) * entries + k) * d + i];
    });
  }
  const float* at(int64_t g) const { return data.data() + g * stages * d * NIBBLE; }
};

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

// ------------------------------------------------------------------------------------------------ expanded tiles

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
    for (int64_t j = 0; j < vectors; ++j) {
      float* __restrict to = out + j * width + m * d;
      const float factor = factors ? factors[j] : 1.0f;
      float sum[D0 ? D0 : 1];
      if constexpr (D0 != 0) {
        const float* first = tables[0] + index[j] * d;
        for (int64_t i = 0; i < d; ++i) sum[i] = first[i];
        for (int64_t term = 1; term < terms; ++term) {
          const float* entry = tables[term] + index[term * TILE_VECTORS + j] * d;
          for (int64_t i = 0; i < d; ++i) sum[i] += entry[i];
        }
        for (int64_t i = 0; i < d; ++i) to[i] = (dims ? sum[i] * dims[m * d + i] : sum[i]) * factor;
      } else {
        for (int64_t i = 0; i < d; ++i) {
          sum[0] = 0;
          for (int64_t term = 0; term < terms; ++term) sum[0] += tables[term][index[term * TILE_VECTORS + j] * d + i];
          to[i] = (dims ? sum[0] * dims[m * d + i] : sum[0]) * factor;
        }
      }
    }
  }
}

// --------------------------------------------------------------------------------------------------- operators

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

// A product of a few rows: y [B, N] = x [B, D] @ W.T, with a bias or without.
template <typename T>
struct Job {
  const Tiled& held;
  const T* x;
  const T* bias;
  T* y;
};

// Products through tables. All of them together are one piece of work for the threads: with one row, a product alone is
// too short to be shared out evenly.
template <typename T>
struct TableProducts {
  struct Made {
    Lines lines;
    Tables shape;
    int64_t tables, scales, first_block, first_tile;  // where its parts begin
  };
  const std::vector<Job<T>>& jobs;
  const int64_t rows;
  std::vector<Made> made;
  int64_t bytes = 0, scales = 0, blocks = 0, tiles = 0, table_work = 0, sum_work = 0;

  TableProducts(const std::vector<Job<T>>& jobs, int64_t rows) : jobs(jobs), rows(rows) {
    made.reserve(jobs.size());
    for (const Job<T>& job : jobs) {
      Lines lines(job.held.codebooks);
      const Tables shape(job.held.sub_vectors, lines);
      made.push_back({std::move(lines), shape, bytes, scales, blocks, tiles});
      bytes += rows * shape.bytes(), scales += rows * shape.blocks, blocks += rows * shape.blocks, tiles += job.held.count();
      table_work += rows * NIBBLE * job.held.width() * job.held.stages;
      sum_work += rows * job.held.count() * job.held.sub_vectors * job.held.stages * 8;
    }
  }

  void run() const {
    const std::unique_ptr<uint8_t[]> tables(new uint8_t[bytes]);  // not a tensor, whose allocation takes longer
    std::vector<float> factors(scales);
    at::parallel_for(0, blocks, grain(blocks, table_work, TABLE_GRAIN), [&](int64_t begin, int64_t end) {
      each(&Made::first_block, begin, end, [&](int64_t job, int64_t task) { fill(job, task, tables.get(), factors.data()); });
    });
    at::parallel_for(0, tiles, grain(tiles, sum_work, GRAIN), [&](int64_t begin, int64_t end) {
      each(&Made::first_tile, begin, end, [&](int64_t job, int64_t t) { sum(job, t, tables.get(), factors.data()); });
    });
  }

 private:
  static int64_t grain(int64_t tasks, int64_t work, int64_t least) { return std::max<int64_t>(1, least * tasks / (work + 1)); }

  // Calls f with a job and a task of it, for tasks of all jobs in a row.
  template <typename F>
  void each(int64_t Made::* first, int64_t begin, int64_t end, const F& f) const {
    int64_t job = int64_t(made.size()) - 1;
    while (made[job].*first > begin) --job;
    for (int64_t task = begin; task < end; ++task) {
      while (job + 1 < int64_t(made.size()) && made[job + 1].*first <= task) ++job;
      f(job, task - made[job].*first);
    }
  }
  void fill(int64_t job, int64_t task, uint8_t* tables, float* factors) const {
    const Made& of = made[job];
    const Tiled& held = jobs[job].held;
    const int64_t row = task / of.shape.blocks, block = task % of.shape.blocks;
    uint8_t* to = tables + of.tables + row * of.shape.bytes() + of.shape.first(block) * of.shape.stages * 2 * NIBBLE;
    const T* dims = held.template factors<T>(held.dims);
    of.shape.template fill<T>(of.lines, block, jobs[job].x + row * held.width(), dims, to, factors + of.scales + task);
  }
  void sum(int64_t job, int64_t t, const uint8_t* tables, const float* factors) const {
    const Made& of = made[job];
    const Tiled& held = jobs[job].held;
    const T* scale = held.template factors<T>(held.scale);
    const T* bias = jobs[job].bias;
    alignas(64) float sums[TILE_VECTORS];
    for (int64_t row = 0; row < rows; ++row) {
      sum_tile(of.shape, held.codes(t), tables + of.tables + row * of.shape.bytes(), factors + of.scales + row * of.shape.blocks, sums);
      const int64_t n = t * TILE_VECTORS, count = held.of_tile(t);
      for (int64_t j = 0; j < count; j += LANES) {
        const int64_t some = std::min(LANES, count - j);
        Vec value = load(sums + j, some);
        if (scale) value = value * load(scale + n + j, some);
        if (bias) value = value + load(bias + n + j, some);
        store(jobs[job].y + row * held.vectors + n + j, value, some);
      }
    }
  }
};

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

// An input of a product, contiguous, once it fits.
inline Tensor check_input(const Tensor& input, const Tiled& held) {
  TORCH_CHECK(!input._fw_grad(0).defined(), "forward-mode differentiation does not reach compiled kernels");
  check_place("x", input);
  const Tensor& books = held.codebooks;
  TORCH_CHECK_VALUE(input.dim() > 0 && input.size(-1) == held.width() && input.scalar_type() == books.scalar_type(), "x ",
                    input.sizes(), " of ", input.scalar_type(), " does not go with codebooks ", books.sizes(), " of ",
                    books.scalar_type(), " and tiles ", held.tiles.sizes());
  return input.contiguous();
}

inline Tensor empty_product(const Tensor& x, const Tiled& held) {
  c10::DimVector shape(x.sizes());
  shape.back() = held.vectors;
  return at::empty(shape, x.options());
}

// Up to `most` rows (below zero: as many as that is faster for) go through tables.
inline bool by_tables(int64_t rows, int64_t most) { return rows <= (most < 0 ? TABLE_ROWS : most); }

// x [..., D] @ W.T + bias: [..., N], through tables, or through expanded tiles, a panel at a time.
inline Tensor tiled_product(const Tensor& input, const Tensor& codebooks, const Tensor& tiles, int64_t vectors,
                            const Maybe& dims, const Maybe& scale, const Maybe& given_bias, int64_t most) {
  const Tiled held(codebooks, tiles, vectors, dims, scale);
  const Tensor x = check_input(input, held);
  check_vector("bias", given_bias, input, vectors);
  const Maybe bias = given_bias ? Maybe(given_bias->contiguous()) : std::nullopt;
  Tensor y = empty_product(x, held);
  const int64_t rows = x.numel() / held.width();
  if (rows == 0) return y;
  by_float(x, [&](auto scalar) {
    using T = decltype(scalar);
    if (by_tables(rows, most)) {
      const T* shift = bias ? bias->const_data_ptr<T>() : nullptr;
      TableProducts<T>({{held, x.const_data_ptr<T>(), shift, y.data_ptr<T>()}}, rows).run();
      return;
    }
    at::AutoDispatchBelowAutograd guard;
    // Panels of one size, so that threads and products have equal parts.
    const int64_t most_tiles = std::max<int64_t>(1, PANEL_BYTES / (TILE_VECTORS * held.width() * int64_t(sizeof(T)))) * at::get_num_threads();
    const int64_t panels = (held.count() + most_tiles - 1) / most_tiles, panel = (held.count() + panels - 1) / panels;
    const Tensor made = at::empty({panel * TILE_VECTORS, held.width()}, x.options());
    const Tensor flat = y.view({rows, vectors}), input_rows = x.view({rows, held.width()});
    const Sums sums(held.codebooks);
    for (int64_t t = 0; t < held.count(); t += panel) {
      const int64_t last = std::min(t + panel, held.count()), n = t * TILE_VECTORS;
      const int64_t some = std::min(last * TILE_VECTORS, vectors) - n;
      expand_tiles<T>(held, sums, t, last, made.data_ptr<T>());
      Tensor part = flat.narrow(1, n, some);
      const Tensor weight = made.narrow(0, 0, some).t();
      if (bias) at::addmm_out(part, bias->narrow(0, n, some), input_rows, weight);
      else at::mm_out(part, input_rows, weight);
    }
  });
  return y;
}

// The same of several inputs, each with a matrix of its own, as one piece of work where they go through tables.
inline std::vector<Tensor> tiled_products(at::TensorList inputs, at::TensorList codebooks, at::TensorList tiles,
                                          at::IntArrayRef vectors, const c10::List<Maybe>& given_biases, int64_t most) {
  const size_t count = inputs.size();
  const bool fit = count > 0 && codebooks.size() == count && tiles.size() == count && vectors.size() == count &&
                   given_biases.size() == count;
  TORCH_CHECK_VALUE(fit, count, " inputs, ", codebooks.size(), " codebooks, ", tiles.size(), " tiles, ", vectors.size(),
                    " numbers of vectors and ", given_biases.size(), " biases");
  std::vector<Tiled> held;
  std::vector<Tensor> xs, ys;
  std::vector<Maybe> biases;
  bool together = true;
  held.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    held.emplace_back(codebooks[i], tiles[i], vectors[i], std::nullopt, std::nullopt);
    xs.push_back(check_input(inputs[i], held[i]));
    const Maybe bias = given_biases.get(i);
    check_vector("bias", bias, xs[i], vectors[i]);
    biases.push_back(bias ? Maybe(bias->contiguous()) : std::nullopt);
    const int64_t rows = xs[i].numel() / held[i].width();
    together = together && rows * held[0].width() == xs[0].numel() && by_tables(rows, most) && xs[i].scalar_type() == xs[0].scalar_type();
  }
  if (!together) {
    for (size_t i = 0; i < count; ++i)
      ys.push_back(tiled_product(xs[i], codebooks[i], tiles[i], vectors[i], std::nullopt, std::nullopt, biases[i], most));
    return ys;
  }
  for (size_t i = 0; i < count; ++i) ys.push_back(empty_product(xs[i], held[i]));
  by_float(xs[0], [&](auto scalar) {
    using T = decltype(scalar);
    std::vector<Job<T>> jobs;
    for (size_t i = 0; i < count; ++i) {
      const T* shift = biases[i] ? biases[i]->const_data_ptr<T>() : nullptr;
      jobs.push_back({held[i], xs[i].const_data_ptr<T>(), shift, ys[i].data_ptr<T>()});
    }
    if (xs[0].numel() > 0) TableProducts<T>(jobs, xs[0].numel() / held[0].width()).run();
  });
  return ys;
}

}  // namespace rpqfx
