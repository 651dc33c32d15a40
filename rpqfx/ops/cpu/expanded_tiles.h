// Tiles of codes as columns of the transposed matrix.
//
// Entries are looked up within registers, for half a tile's vectors at once: the line of 16 entries (lines.h) that belongs to one
// number of a sub-vector fits in a register or two. So numbers of many vectors lie beside each other, which is the
// transposed matrix.
#pragma once

#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "lines.h"

namespace rpqfx {

inline constexpr int64_t HALF = TILE_VECTORS / 2;  // vectors that are looked up together; panels begin at multiples of it
static_assert(HALF % LANES == 0);

// One number of HALF vectors: sums of what their codes, a byte each, pick from lines of 16 floats.
#if defined(CPU_CAPABILITY_AVX512)

struct Picked {
  Vec parts[2] = {Vec(0), Vec(0)};

  static void prepare(float*) {}
  void add(const float* line, const uint8_t* codes) {
    for (int64_t part = 0; part < 2; ++part) {
      const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes) + part));
      parts[part] = parts[part] + Vec(_mm512_permutexvar_ps(index, _mm512_loadu_ps(line)));
    }
  }
  template <typename F>
  void each(const F& f) const {
    for (int64_t part = 0; part < 2; ++part) f(part, parts[part]);
  }
};

#elif defined(CPU_CAPABILITY_AVX2)

// Byte shuffles look up 32 codes at once, in each of the four bytes of the floats, which are then put together: registers
// of eight floats are permuted less fast on some machines.
struct Picked {
  __m256 parts[4] = {};  // vectors 0 to 3 and 16 to 19, then 4 to 7 and 20 to 23, ...

  // A line, in place, as its entries' first bytes, their second bytes, ...
  static void prepare(float* line) {
    uint8_t from[NIBBLE * 4], *to = reinterpret_cast<uint8_t*>(line);
    std::copy_n(to, NIBBLE * 4, from);
    for (int64_t k = 0; k < NIBBLE; ++k)
      for (int64_t byte = 0; byte < 4; ++byte) to[byte * NIBBLE + k] = from[k * 4 + byte];
  }
  void add(const float* line, const uint8_t* codes) {
    const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const auto byte = [&](int64_t i) {
      const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(line) + i);
      return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), index);
    };
    const __m256i first = byte(0), second = byte(1), third = byte(2), fourth = byte(3);
    const __m256i low[2] = {_mm256_unpacklo_epi8(first, second), _mm256_unpackhi_epi8(first, second)};
    const __m256i high[2] = {_mm256_unpacklo_epi8(third, fourth), _mm256_unpackhi_epi8(third, fourth)};
    for (int64_t half = 0; half < 2; ++half) {
      const __m256i a = _mm256_unpacklo_epi16(low[half], high[half]), b = _mm256_unpackhi_epi16(low[half], high[half]);
      parts[2 * half] = _mm256_add_ps(parts[2 * half], _mm256_castsi256_ps(a));
      parts[2 * half + 1] = _mm256_add_ps(parts[2 * half + 1], _mm256_castsi256_ps(b));
    }
  }
  template <typename F>
  void each(const F& f) const {
    f(0, Vec(_mm256_permute2f128_ps(parts[0], parts[1], 0x20)));
    f(1, Vec(_mm256_permute2f128_ps(parts[2], parts[3], 0x20)));
    f(2, Vec(_mm256_permute2f128_ps(parts[0], parts[1], 0x31)));
    f(3, Vec(_mm256_permute2f128_ps(parts[2], parts[3], 0x31)));
  }
};

#else

struct Picked {
  float parts[HALF] = {};

  static void prepare(float*) {}
  void add(const float* line, const uint8_t* codes) {
    for (int64_t j = 0; j < HALF; ++j) parts[j] += line[codes[j]];
  }
  template <typename F>
  void each(const F& f) const {
    for (int64_t part = 0; part < HALF / LANES; ++part) f(part, load(parts + part * LANES));
  }
};

#endif

// The numbers of one sub-vector, of HALF vectors: to[i, :] = sum of the stages' entries * dims[i] * factors, a row every
// `width` numbers; dims and factors may be null.
template <typename T>
void expand_sub_vector(const float* lines, int64_t stages, int64_t d, const uint8_t* codes, const float* dims,
                       const float* factors, T* to, int64_t width) {
  for (int64_t i = 0; i < d; ++i, to += width) {
    Picked sum;
    for (int64_t r = 0; r < stages; ++r) sum.add(lines + (r * d + i) * NIBBLE, codes + r * HALF);
    sum.each([&](int64_t part, Vec value) {
      if (dims) value = value * Vec(dims[i]);
      if (factors) value = value * load(factors + part * LANES);
      store(to + part * LANES, value, LANES);
    });
  }
}

// Lines of codebooks, prepared to be picked from.
inline Lines prepared(const Tensor& codebooks) {
  Lines lines(codebooks);
  for (size_t i = 0; i < lines.data.size(); i += NIBBLE) Picked::prepare(lines.data.data() + i);
  return lines;
}

// Columns first..last of the transposed matrix: out [D, width]. First is a multiple of HALF; width is one too, and columns
// that it has beyond last are finite.
template <typename T>
void expand_panel(const Tiled& held, const Lines& lines, const float* dims, const T* scale, int64_t first, int64_t last,
                  T* out, int64_t width) {
  const int64_t stages = held.stages, d = held.d, share = held.sub_vectors / lines.books;
  std::vector<uint8_t> codes(stages * HALF);
  alignas(64) float factors[HALF] = {};
  for (int64_t n = first; n < last; n += HALF) {
    const uint8_t* tile = held.codes(n / TILE_VECTORS);
    const int shift = n % TILE_VECTORS ? 4 : 0;
    if (scale)
      for (int64_t j = 0; j < std::min(HALF, last - n); ++j) factors[j] = float(scale[n + j]);
    for (int64_t m = 0; m < held.sub_vectors; ++m, tile += stages * TILE_BYTES) {
      for (int64_t j = 0; j < stages * HALF; ++j) codes[j] = tile[j] >> shift & 15;
      expand_sub_vector(lines.at(m / share), stages, d, codes.data(), dims ? dims + m * d : nullptr,
                        scale ? factors : nullptr, out + m * d * width + n - first, width);
    }
  }
}

}  // namespace rpqfx
