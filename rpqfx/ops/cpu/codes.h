// What all kernels share: codes and signs as they are stored, loads and stores as float32, checks of arguments.
//
// Axes as in rpqfx/codebook/matrix.py; a use p = (r, m) is one codebook met by one sub-vector. A table [P, K, rows] holds the
// dot products of entries with rows of the batch: adding up a gathered line of it is then one vector addition. Codes
// are read as they are stored (uint8, int16 or uint16), signs as bits.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

namespace rpqfx {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using Vec = at::vec::Vectorized<float>;
inline constexpr int64_t LANES = Vec::size();
inline constexpr int64_t WIDE = 2 * LANES;                       // rows of the batch that a table serves at most
inline constexpr int64_t TILE = LANES >= 8 ? LANES / 2 : LANES;  // vectors whose sums are held in registers
inline constexpr int64_t FEW = 4;                                // up to so many rows, lanes run along the vectors
inline constexpr int64_t MOST_GROUPS = 8;                        // of threads that each keep a sum of all vectors
inline constexpr int64_t GRAIN = 1 << 15;                        // elements that are worth another thread
inline constexpr int64_t BIN_ELEMENTS = 1 << 20;                 // of bins at a time
inline constexpr int64_t BIN_BLOCKS = 2;                         // of WIDE rows that fill them at least
inline constexpr int64_t TABLE_BYTES = 1 << 20;                  // of a table that stays in a core's second-level cache

// ------------------------------------------------------------------------------------------------ loads and stores

inline Vec load(const float* p) { return Vec::loadu(p); }
inline Vec load(const float* p, int64_t count) { return Vec::loadu(p, count); }
inline Vec load(const c10::BFloat16* p, int64_t count = LANES) {
  const auto half = at::vec::Vectorized<c10::BFloat16>::loadu(p, count);
  return std::get<0>(at::vec::convert_bfloat16_float(half));
}
inline Vec load(const c10::Half* p, int64_t count = LANES) {
  return std::get<0>(at::vec::convert_half_float(at::vec::Vectorized<c10::Half>::loadu(p, count)));
}
inline void store(float* p, const Vec& x, int64_t count) { x.store(p, count); }
inline void store(c10::BFloat16* p, const Vec& x, int64_t count) {
  at::vec::convert_float_bfloat16(x, Vec(0)).store(p, count);
}

// The signs of eight vectors as factors, for every byte.
inline constexpr int64_t SIGNS_AT_ONCE = std::min<int64_t>(8, LANES);
struct Signs {
  float factors[256][8];
  constexpr Signs() : factors() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit) factors[byte][bit] = byte >> bit & 1 ? -1.0f : 1.0f;
  }
};
inline constexpr Signs SIGNS;

template <typename OfCode>
struct Codes {
  using Code = OfCode;
  const Code* codes;     // [P, N]
  const uint8_t* signs;  // [P, bytes], a set bit means minus; or null
  int64_t uses, vectors, bytes;

  const Code* at(int64_t p, int64_t n) const { return codes + p * vectors + n; }
  // Those of n and of the rest of its eight.
  const float* factors(int64_t p, int64_t n) const { return SIGNS.factors[signs[p * bytes + (n >> 3)]] + (n & 7); }
};

template <typename Code>
void check_range(const Code* codes, int64_t count, int64_t entries) {
  if (std::is_unsigned_v<Code> && entries > std::numeric_limits<Code>::max()) return;
  Code low = 0, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, codes[i]);
    high = std::max(high, codes[i]);
  }
  TORCH_CHECK_INDEX(low >= 0 && high < entries, "codes hold ", int64_t(low), " to ", int64_t(high), ", but there are ",
                    entries, " entries");
}

// Kernels read and write where codes point, so those that could point outside are looked at first.
inline void check_range(const Tensor& codes, int64_t entries) {
  const int64_t count = codes.numel();
  switch (codes.scalar_type()) {
    case at::kByte: return check_range(codes.const_data_ptr<uint8_t>(), count, entries);
    case at::kShort: return check_range(codes.const_data_ptr<int16_t>(), count, entries);
    case at::kUInt16: return check_range(codes.const_data_ptr<uint16_t>(), count, entries);
    case at::kInt: return check_range(codes.const_data_ptr<int32_t>(), count, entries);
    default: TORCH_CHECK_TYPE(false, "codes are uint8, int16, uint16 or int32, got ", codes.scalar_type());
  }
}

// Kernels read memory: a tensor of another device, or one without memory, is refused before anything is read.
inline void check_place(const char* name, const Tensor& x) {
  TORCH_CHECK_TYPE(x.device().is_cpu() && x.layout() == at::kStrided, name, " is a tensor of layout ", x.layout(), " on ",
                   x.device(), "; the kernels read plain tensors on the CPU");
}
inline void check_place(const char* name, const Maybe& x) {
  if (x) check_place(name, *x);
}

// Codes [R, M, N], of no vectors maybe, and their signs.
inline void check_codes(const Tensor& codes, const Maybe& signs) {
  check_place("codes", codes);
  TORCH_CHECK_VALUE(codes.dim() == 3 && codes.size(0) > 0 && codes.size(1) > 0, "codes are [R, M, N], got ", codes.sizes());
  check_place("signs", signs);
  TORCH_CHECK_VALUE(!signs || (signs->scalar_type() == at::kByte && signs->dim() == 3 && signs->size(0) == codes.size(0) &&
                               signs->size(1) == codes.size(1) && signs->size(2) == (codes.size(2) + 7) / 8),
                    "signs do not go with codes ", codes.sizes());
}

// Runs with the codes [R, M, N] as what they are stored as. Those of int16, none of which is below zero, are read as
// uint16: the bits are the same, and kernels are not compiled for both.
template <typename Run>
void by_code(const Tensor& given, const Maybe& given_signs, int64_t entries, const Run& run) {
  check_codes(given, given_signs);
  const Tensor codes = given.contiguous();
  check_range(codes, entries);
  const Maybe signs = given_signs ? Maybe(given_signs->contiguous()) : std::nullopt;
  const int64_t uses = codes.size(0) * codes.size(1), vectors = codes.size(2), bytes = (vectors + 7) / 8;
  const uint8_t* bits = signs ? signs->const_data_ptr<uint8_t>() : nullptr;
  const auto as = [&](auto code) {
    using Code = decltype(code);
    run(Codes<Code>{static_cast<const Code*>(codes.const_data_ptr()), bits, uses, vectors, bytes});
  };
  switch (codes.element_size()) {
    case 1: return as(uint8_t{});
    case 2: return as(uint16_t{});
    default: as(int32_t{});
  }
}

// Codebooks [R, G, K, d], none of whose sizes is zero, with codes that fit them.
inline void check_books(const Tensor& codebooks, const Tensor& codes, const Maybe& signs) {
  check_place("codebooks", codebooks);
  check_codes(codes, signs);
  const bool fit = codebooks.dim() == 4 && codebooks.numel() > 0 && codebooks.size(0) == codes.size(0) &&
                   codes.size(1) % codebooks.size(1) == 0;
  TORCH_CHECK_VALUE(fit, "codebooks ", codebooks.sizes(), " do not go with codes ", codes.sizes());
}

// A matrix [M, K, d] for each stage: a codebook for each sub-vector.
inline std::vector<Tensor> each_book(const Tensor& codebooks, int64_t sub_vectors) {
  std::vector<Tensor> books;
  const int64_t share = sub_vectors / codebooks.size(1);
  for (const Tensor& stage : codebooks.unbind(0)) {
    const Tensor each = stage.unsqueeze(1).expand({-1, share, -1, -1});
    books.push_back(each.reshape({sub_vectors, stage.size(1), stage.size(2)}));
  }
  return books;
}

inline void check_vector(const char* name, const Maybe& x, const Tensor& like, int64_t length) {
  if (!x) return;
  check_place(name, x);
  const bool fit = x->dim() == 1 && x->size(0) == length && x->scalar_type() == like.scalar_type();
  TORCH_CHECK_VALUE(fit, name, " is ", x->sizes(), " of ", x->scalar_type(), ", expected ", length, " of ",
                    like.scalar_type());
}

template <typename Run>
void by_float(const Tensor& x, const Run& run) {
  if (x.scalar_type() == at::kFloat) return run(float{});
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16, "float32 or bfloat16 is expected, got ", x.scalar_type());
  return run(c10::BFloat16{});
}

template <typename Run>
void with_flag(bool flag, const Run& run) {
  flag ? run(std::true_type{}) : run(std::false_type{});
}

// Runs with the length of a sub-vector as a constant, where it is a usual one, so that loops over it are unrolled.
template <typename Run>
void with_length(int64_t d, const Run& run) {
  switch (d) {
    case 2: return run(std::integral_constant<int64_t, 2>{});
    case 4: return run(std::integral_constant<int64_t, 4>{});
    case 6: return run(std::integral_constant<int64_t, 6>{});
    case 8: return run(std::integral_constant<int64_t, 8>{});
    case 16: return run(std::integral_constant<int64_t, 16>{});
    default: return run(std::integral_constant<int64_t, 0>{});
  }
}

// Three facts that inner loops are compiled for.
template <typename Run>
void with_shape(bool wide, bool edge, bool with_signs, const Run& run) {
  with_flag(wide, [&](auto a) {
    with_flag(edge, [&](auto b) { with_flag(with_signs, [&](auto c) { run(a, b, c); }); });
  });
}

}  // namespace rpqfx
