// Codes of a cache: [B, S, bytes], slot after slot, each packed along its tokens (rpqfx/codebook/packing.py) at the same width.
//
// A head has some slots that follow each other, and rows that meet it (queries, say): up to MOST_ROWS, which lie beside
// each other, filled up to 4, 8 or 16, so that one vector instruction serves them all.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>

#include "codes.h"

namespace rpqfx {

inline constexpr int64_t MOST_ROWS = 16;
inline constexpr int64_t TOKENS = 128;  // whose codes are unpacked at a time; fills whole bytes at every width
// Tokens whose sums, W floats each, are held in registers.
template <int W>
inline constexpr int64_t TOGETHER = W > LANES ? 4 : 8;

// Unaligned vectors of W floats: of what a register holds at most, or of two halves, since compilers keep arrays of wider
// vectors in memory.
template <int W>
struct Halves;
template <int W>
struct RowOf {
  typedef float type __attribute__((vector_size(4 * W), aligned(4)));
};
template <int W>
  requires(W > LANES)
struct RowOf<W> {
  using type = Halves<W>;
};
template <int W>
using Row = typename RowOf<W>::type;

template <int W>
struct Halves {
  Row<W / 2> low, high;

  Halves& operator+=(const Halves& other) { return low += other.low, high += other.high, *this; }
  Halves& operator*=(float factor) { return low *= factor, high *= factor, *this; }
  Halves operator+(const Halves& other) const { return {low + other.low, high + other.high}; }
  Halves operator+(float shift) const { return {low + shift, high + shift}; }
  Halves operator*(const Halves& other) const { return {low * other.low, high * other.high}; }
  friend Halves operator*(float factor, const Halves& x) { return {factor * x.low, factor * x.high}; }
  float operator[](int64_t i) const { return i < W / 2 ? low[i] : high[i - W / 2]; }
};

template <int W>
inline Row<W>& row(float* p) { return *reinterpret_cast<Row<W>*>(p); }
template <int W>
inline const Row<W>& row(const float* p) { return *reinterpret_cast<const Row<W>*>(p); }

inline int64_t row_width(int64_t rows) { return rows <= 4 ? 4 : rows <= 8 ? 8 : 16; }

template <typename Run>
void by_rows(int64_t rows, const Run& run) {
  TORCH_CHECK_VALUE(rows >= 1 && rows <= MOST_ROWS, "1 to ", MOST_ROWS, " rows are expected, got ", rows);
  if (rows <= 4) return run(std::integral_constant<int, 4>{});
  if (rows <= 8) return run(std::integral_constant<int, 8>{});
  run(std::integral_constant<int, 16>{});
}

struct Packed {
  const uint8_t* data;
  int64_t sample, slot, bytes;  // strides, and the bytes of a slot
  int64_t width, entries, tokens;

  Packed(const Tensor& codes, int64_t width, int64_t entries, int64_t tokens)
      : data(checked(codes).const_data_ptr<uint8_t>()), sample(codes.stride(0)), slot(codes.stride(1)),
        bytes(codes.size(2)), width(width), entries(entries), tokens(tokens) {
    TORCH_CHECK_VALUE(width >= 1 && width <= 16 && entries >= 1 && entries <= int64_t(1) << width && tokens >= 0 &&
                          (tokens * width + 7) / 8 <= bytes,
                      tokens, " codes of ", width, " bits do not go with ", codes.sizes());
  }

  // Codes whose memory can be read as it lies.
  static const Tensor& checked(const Tensor& codes) {
    check_place("codes", codes);
    TORCH_CHECK_VALUE(codes.dim() == 3 && codes.scalar_type() == at::kByte && (codes.size(2) < 2 || codes.stride(2) == 1),
                      "codes are bytes [B, S, bytes] that lie beside each other, got ", codes.sizes(), " of ",
                      codes.scalar_type());
    return codes;
  }

  // Codes of `count` slots, of up to TOKENS tokens from `from` on; bytes as they lie, others unpacked into `room`.
  template <typename Code>
  const Code* unpack(int64_t b, int64_t s, int64_t count, int64_t from, int64_t left, std::vector<Code>& room,
                     int64_t& stride) const {
    const uint8_t* first = data + b * sample + s * slot;
    if constexpr (sizeof(Code) == 1) {
      if (width == 8) {
        stride = slot;
        for (int64_t i = 0; i < count; ++i) check(first + i * slot + from, left);
        return first + from;
      }
    }
    room.resize(count * TOKENS);
    stride = TOKENS;
    for (int64_t i = 0; i < count; ++i) {
      Code* out = room.data() + i * TOKENS;
      for (int64_t t = 0; t < left; t += 8) eight(first + i * slot, from + t, out + t);
      check(out, left);
    }
    return room.data();
  }

  // Asks for the codes of some slots, of TOKENS tokens from `from` on: they lie apart, where nothing foresees them.
  void prefetch(int64_t b, int64_t s, int64_t count, int64_t from) const {
    const uint8_t* first = data + b * sample + s * slot + from * width / 8;
    for (int64_t i = 0; i < count && from < tokens; ++i)
      for (int64_t byte = 0; byte < TOKENS * width / 8; byte += 64) __builtin_prefetch(first + i * slot + byte, 0, 2);
  }

 private:
  // Eight codes, which fill `width` bytes: in two halves of 64 bits at most.
  template <typename Code>
  void eight(const uint8_t* line, int64_t token, Code* out) const {
    const uint64_t mask = (uint64_t(1) << width) - 1;
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t bit = (token + 4 * half) * width, byte = bit / 8;
      uint64_t word = 0;
      if (byte + 8 <= bytes) std::memcpy(&word, line + byte, 8);
      else if (byte < bytes) std::memcpy(&word, line + byte, bytes - byte);
      word >>= bit % 8;
      for (int64_t j = 0; j < 4; ++j) out[4 * half + j] = static_cast<Code>(word >> (j * width) & mask);
    }
  }

  template <typename Code>
  void check(const Code* codes, int64_t count) const {
    if (entries == int64_t(1) << width) return;
    Code high = 0;
    for (int64_t i = 0; i < count; ++i) high = std::max(high, codes[i]);
    TORCH_CHECK_INDEX(high < entries, "codes hold ", int64_t(high), ", but there are ", entries, " entries");
  }
};

// Runs with what codes are unpacked to.
template <typename Run>
void by_width(int64_t width, const Run& run) {
  width <= 8 ? run(uint8_t{}) : run(uint16_t{});
}

// First slots of heads, the last of them the number of slots.
inline void check_heads(c10::IntArrayRef heads, int64_t slots) {
  bool fit = heads.size() >= 2 && heads.front() == 0 && heads.back() == slots;
  for (size_t h = 1; h < heads.size(); ++h) fit = fit && heads[h - 1] <= heads[h];
  TORCH_CHECK_VALUE(fit, "slots of heads are ", heads, ", of ", slots);
}

// Scales [B, H, T] of float16, whose tokens lie beside each other; or none.
struct Scales {
  const c10::Half* data = nullptr;
  int64_t sample = 0, head = 0;

  Scales(const Maybe& scale, int64_t batch, int64_t heads, int64_t tokens) {
    if (!scale) return;
    check_place("the scale", scale);
    TORCH_CHECK_VALUE(scale->dim() == 3 && scale->size(0) == batch && scale->size(1) == heads &&
                          scale->size(2) == tokens && scale->scalar_type() == at::kHalf &&
                          (tokens < 2 || scale->stride(2) == 1),
                      "scales ", scale->sizes(), " of ", scale->scalar_type(), " are not ", batch, " x ", heads, " x ",
                      tokens, " of float16");
    data = scale->const_data_ptr<c10::Half>();
    sample = scale->stride(0);
    head = scale->stride(1);
  }

  const c10::Half* at(int64_t b, int64_t h, int64_t t) const { return data ? data + b * sample + h * head + t : nullptr; }
};

}  // namespace rpqfx
