// Sub-vectors that are shorter than a register, as registers: entries added up, and several of them side by side.
#pragma once

#include "codes.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rpqfx {

#if defined(__AVX2__)

// One of D floats, read from and written to memory that holds no more than these.
template <int64_t D>
struct Short {
  static constexpr bool FAST = D == 4 || D == 6 || D == 8;
  __m256 value;

  static Short at(const float* p) {
    if constexpr (D == 8) return {_mm256_loadu_ps(p)};
    const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(p));
    if constexpr (D == 4) return {low};
    const __m128 high = _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(p + 4)));
    return {_mm256_insertf128_ps(low, high, 1)};
  }
  Short operator+(const Short& other) const { return {_mm256_add_ps(value, other.value)}; }
  Short operator*(const Short& other) const { return {_mm256_mul_ps(value, other.value)}; }
  Short operator*(float factor) const { return {_mm256_mul_ps(value, _mm256_set1_ps(factor))}; }
  void to(float* p) const {
    if constexpr (D == 8) return _mm256_storeu_ps(p, value);
    _mm_storeu_ps(p, _mm256_castps256_ps128(value));
    if constexpr (D == 6) _mm_storel_pi(reinterpret_cast<__m64*>(p + 4), _mm256_extractf128_ps(value, 1));
  }
};

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

#else

template <int64_t D>
struct Short {
  static constexpr bool FAST = false;
};

#endif

}  // namespace rpqfx
