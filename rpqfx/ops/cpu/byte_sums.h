// Sums of looked-up bytes, for all vectors of a tile at once.
//
// Each use of a row of the input has a table of 16 dot products, as 16-bit integers with one scale for up to BLOCK_USES
// uses, in two halves of 16 bytes each: a byte shuffle looks up 16, 32 or 64 of them at once. Integers are added up
// exactly, so the only error is the rounding of the tables, at most half a scale a use. The technique is T-MAC's (Wei et
// al., 2407.00088), with entries of vectors in the place of bits.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "tiles.h"

namespace rpqfx {

inline constexpr int64_t AHEAD = 2048;  // bytes of codes that are asked for before they are needed

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

}  // namespace rpqfx
