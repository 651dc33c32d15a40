// Entries that are shorter than a register, several of them side by side.
#pragma once

#include "codes.h"

#if defined(__AVX2__)
#include <immintrin.h>

namespace rpqfx {

// Entries of two or four floats that fill a register together.
template <int64_t D>
struct Strip {
  static constexpr int64_t COUNT = 8 / D;

  template <typename Code>
  static __m256 at(const float* const* books, const Code* const* codes, int64_t n) {
    const auto entry = [&](int64_t j) { return books[j] + int64_t(codes[j][n]) * D; };
    if constexpr (D == 4) return _mm256_set_m128(_mm_loadu_ps(entry(1)), _mm_loadu_ps(entry(0)));
    const auto two = [&](int64_t j) {
      const __m128d low = _mm_load_sd(reinterpret_cast<const double*>(entry(j)));
      return _mm_castpd_ps(_mm_loadh_pd(low, reinterpret_cast<const double*>(entry(j + 1))));
    };
    return _mm256_set_m128(two(2), two(0));
  }
};

}  // namespace rpqfx

#endif
