// Scores of keys that were put into codes before their rotary embedding: each token's key is made, turned and used while
// it is in the first-level cache.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <vector>

#include "slots.h"

namespace rpqfx {

inline constexpr int64_t KEYS = 32;  // that are alive at a time

// The slots of a head in the order of their groups, so that each sub-vector is summed in registers. `some` leaves out
// groups without slots, and y is the others, one after the other: what is zero need not be multiplied.
struct Sorted {
  std::vector<int64_t> slots, first, groups;  // slots, from the head's first on; where each group begins among them

  Sorted(const int64_t* group, int64_t count, int64_t all, bool some) : slots(count), first(1, 0) {
    for (int64_t s = 0; s < count; ++s) slots[s] = s;
    std::stable_sort(slots.begin(), slots.end(), [&](int64_t a, int64_t b) { return group[a] < group[b]; });
    std::vector<int64_t> numbers(all, 0);
    for (int64_t s = 0; s < count; ++s) ++numbers[group[s]];
    for (int64_t g = 0; g < all; ++g) {
      if (some && !numbers[g]) continue;
      groups.push_back(g);
      first.push_back(first.back() + numbers[g]);
    }
  }
};

// y[t, group * d + i] = sum of book[code(slot, t), i] over the group's slots, for N tokens and W elements of each entry.
template <int W, int N, typename Code>
void sum_group(const float* books, int64_t entries, int64_t d, const int64_t* which, const int64_t* slots,
               const int64_t* end, const Code* codes, int64_t stride, float* y, int64_t line) {
  Row<W> sum[N];
  for (int64_t j = 0; j < N; ++j) sum[j] = Row<W>{};
  for (; slots != end; ++slots) {
    const float* book = books + which[*slots] * entries * d;
    const Code* code = codes + *slots * stride;
#pragma GCC unroll 4
    for (int64_t j = 0; j < N; ++j) sum[j] += row<W>(book + static_cast<int64_t>(code[j]) * d);
  }
  for (int64_t j = 0; j < N; ++j) row<W>(y + j * line) = sum[j];
}

// The sub-vectors that the slots of a head add up to.
template <typename Code>
void sum_slots(const float* books, int64_t entries, int64_t d, const int64_t* which, const Sorted& sorted,
               const Code* codes, int64_t stride, int64_t tokens, float* y, int64_t line) {
  const auto sum = [&](auto lanes) {
    constexpr int W = decltype(lanes)::value;
    for (size_t g = 0; g < sorted.groups.size(); ++g) {
      const int64_t *slots = sorted.slots.data() + sorted.first[g], *end = sorted.slots.data() + sorted.first[g + 1];
      for (int64_t i = 0; i < d; i += W) {
        float* to = y + g * d + i;
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4)
          sum_group<W, 4>(books + i, entries, d, which, slots, end, codes + t, stride, to + t * line, line);
        for (; t < tokens; ++t)
          sum_group<W, 1>(books + i, entries, d, which, slots, end, codes + t, stride, to + t * line, line);
      }
    }
  };
  if (d % 16 == 0) sum(std::integral_constant<int, 16>{});
  else if (d % 8 == 0) sum(std::integral_constant<int, 8>{});
  else if (d % 4 == 0) sum(std::integral_constant<int, 4>{});
  else sum(std::integral_constant<int, 1>{});
}

// x[t, :] = y[t, :] @ basis for four tokens at a time and C registers of columns; lines of x and basis are multiples of 16
// long.
template <int C>
void times_basis(const float* y, int64_t line, int64_t length, const float* basis, int64_t wide, int64_t tokens,
                 float* x) {
  for (int64_t t = 0; t < tokens; t += 4) {
    Row<LANES> sum[4][C];
    for (int64_t j = 0; j < 4; ++j)
      for (int64_t c = 0; c < C; ++c) sum[j][c] = Row<LANES>{};
    for (int64_t i = 0; i < length; ++i)
      for (int64_t c = 0; c < C; ++c) {
        const Row<LANES> part = row<LANES>(basis + i * wide + c * LANES);
#pragma GCC unroll 4
        for (int64_t j = 0; j < 4; ++j) sum[j][c] += y[(t + j) * line + i] * part;
      }
    for (int64_t j = 0; j < 4; ++j)
      for (int64_t c = 0; c < C; ++c) row<LANES>(x + (t + j) * wide + c * LANES) = sum[j][c];
  }
}

// The rotary embedding of one key, whose first 2 * half elements it turns: Su et al., "RoFormer", 2021; halves, not
// neighbours, are a pair.
template <typename T>
void turn_key(float* x, int64_t half, const T* cos, const T* sin) {
  for (int64_t i = 0; i < half; i += LANES) {
    const int64_t count = std::min(LANES, half - i);
    const Vec c = load(cos + i, count), s = load(sin + i, count), a = load(x + i, count), b = load(x + half + i, count);
    store(x + i, a * c - b * s, count);
    store(x + half + i, b * c + a * s, count);
  }
}

// sums[t] = sum over j of x[t, j] * q[j, :], for N tokens; lines of x and q are multiples of 16 elements long.
template <int W, int N>
void dot_rows(const float* x, int64_t wide, const float* q, Row<W>* sums) {
  if constexpr (W == 4) {  // elements of x that fill a register, each beside itself four times
    typedef int Lanes __attribute__((vector_size(4 * LANES)));
    Lanes spread{};
    for (int64_t i = 0; i < LANES; ++i) spread[i] = i / 4;
    Row<LANES> sum[N];
    for (int64_t t = 0; t < N; ++t) sum[t] = Row<LANES>{};
    for (int64_t j = 0; j < wide; j += LANES) {
      Row<LANES> part[4];
      for (int64_t k = 0; k < 4; ++k) part[k] = row<LANES>(q + j * 4 + k * LANES);
#pragma GCC unroll 8
      for (int64_t t = 0; t < N; ++t) {
        const Row<LANES> some = row<LANES>(x + t * wide + j);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) sum[t] += __builtin_shuffle(some, spread + k * int(LANES / 4)) * part[k];
      }
    }
    for (int64_t t = 0; t < N; ++t) {
      sums[t] = Row<4>{};
      for (int64_t i = 0; i < LANES; ++i) sums[t][i % 4] += sum[t][i];
    }
  } else {
    Row<W> sum[N];
    for (int64_t t = 0; t < N; ++t) sum[t] = Row<W>{};
    for (int64_t j = 0; j < wide; ++j) {
      const Row<W> part = row<W>(q + j * W);
#pragma GCC unroll 8
      for (int64_t t = 0; t < N; ++t) sum[t] += x[t * wide + j] * part;
    }
    for (int64_t t = 0; t < N; ++t) sums[t] = sum[t];
  }
}

// out[row, t] = x[t, :] . q[row, :] for up to KEYS tokens of a head; q has its rows beside each other, out lines apart.
template <int W>
void score_keys(const float* x, int64_t wide, int64_t tokens, const float* q, int64_t rows, float* out, int64_t line) {
  Row<W> sums[TOGETHER<W>];
  for (int64_t t = 0; t < tokens; t += TOGETHER<W>) {
    dot_rows<W, TOGETHER<W>>(x + t * wide, wide, q, sums);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < std::min(TOGETHER<W>, tokens - t); ++j) out[i * line + t + j] = sums[j][i];
  }
}

struct Keys {
  const float *books, *basis, *mean;  // [P, K, d]; [H, length, wide] or null; [H, wide] or null
  int64_t entries, d, length, dim, wide, half;
};

// The keys of some tokens of a head, turned: x[t, :]. Whole blocks of KEYS are written, whatever lies past the tokens.
template <typename Code, typename T>
void make_keys(const Keys& keys, int64_t head, const int64_t* which, const Sorted& sorted, const Code* codes,
               int64_t stride, int64_t tokens, const c10::Half* scale, const T* cos, const T* sin,
               float* y, float* x) {
  const int64_t wide = keys.wide, line = keys.basis ? keys.length : wide;
  sum_slots(keys.books, keys.entries, keys.d, which, sorted, codes, stride, tokens, keys.basis ? y : x, line);
  for (int64_t c = 0; keys.basis && c < wide;) {
    const float* some = keys.basis + head * keys.length * wide + c;
    const int64_t length = int64_t(sorted.groups.size()) * keys.d;
    constexpr int MOST = LANES < 16 ? 16 : 64, FEWEST = 16 / LANES;  // columns whose sums fit into registers
    if (c + MOST <= wide) times_basis<MOST / LANES>(y, line, length, some, wide, KEYS, x + c);
    else times_basis<FEWEST>(y, line, length, some, wide, KEYS, x + c);
    c += c + MOST <= wide ? MOST : 16;
  }
  for (int64_t t = 0; t < tokens; ++t) {
    float* key = x + t * wide;
    const Row<16> factor = Row<16>{} + (scale ? static_cast<float>(scale[t]) : 1.0f);
    for (int64_t i = 0; i < wide; i += 16)
      row<16>(key + i) = row<16>(key + i) * factor + (keys.mean ? row<16>(keys.mean + head * wide + i) : Row<16>{});
    turn_key(key, keys.half, cos + t * keys.half, sin + t * keys.half);
  }
}

inline Tensor padded(const Tensor& x, int64_t wide) {
  return at::constant_pad_nd(x, {0, wide - x.size(-1)}).contiguous();
}

// Lines of each head's basis [H, length, wide] for the groups that have slots, one after the other.
inline Tensor used_lines(const Tensor& basis, const std::vector<Sorted>& sorted, int64_t d) {
  Tensor used = at::empty_like(basis);
  const int64_t length = basis.size(1), block = d * basis.size(2);
  for (int64_t h = 0; h < basis.size(0); ++h)
    for (size_t g = 0; g < sorted[h].groups.size(); ++g)
      std::copy_n(basis.const_data_ptr<float>() + h * length / d * block + sorted[h].groups[g] * block, block,
                  used.data_ptr<float>() + h * length / d * block + g * block);
  return used;
}

// q [B, H, rows, D] . rotary(scale * (y @ basis) + mean): [B, H, rows, T]; y is what slots add up to, in their groups.
inline Tensor rotated_scores(const Tensor& q, const Tensor& books, c10::IntArrayRef which, c10::IntArrayRef groups,
                             c10::IntArrayRef heads, const Tensor& codes, int64_t width, int64_t tokens,
                             const Maybe& scale, const Maybe& basis, const Maybe& mean, const Tensor& cos,
                             const Tensor& sin) {
  Packed::checked(codes);
  check_place("queries", q);
  check_place("codebooks", books);
  check_place("the basis", basis);
  check_place("the mean", mean);
  check_place("cos", cos);
  check_place("sin", sin);
  TORCH_CHECK_VALUE(q.dim() == 4 && books.dim() == 3 && books.size(2) > 0 && cos.dim() == 3 && (!basis || basis->dim() == 3),
                    "queries ", q.sizes(), ", codebooks ", books.sizes(), ", cos ", cos.sizes(),
                    " and the basis do not go together");
  const int64_t batch = codes.size(0), slots = codes.size(1), count = int64_t(heads.size()) - 1;
  const int64_t rows = q.size(2), dim = q.size(3), lanes = row_width(rows), wide = (dim + 15) / 16 * 16;
  check_heads(heads, slots);
  const auto is_float = [](const Tensor& x) { return x.scalar_type() == at::kFloat; };
  TORCH_CHECK_VALUE(q.size(0) == batch && q.size(1) == count && is_float(q) &&
                        is_float(books) && int64_t(which.size()) == slots && int64_t(groups.size()) == slots,
                    "queries ", q.sizes(), " and codebooks ", books.sizes(), " do not go with codes ", codes.sizes());
  const int64_t length = basis ? basis->size(1) : dim, d = books.size(2), half = cos.size(2);
  for (int64_t s = 0; s < slots; ++s)
    TORCH_CHECK_INDEX(which[s] >= 0 && which[s] < books.size(0) && groups[s] >= 0 && (groups[s] + 1) * d <= length,
                      "slot ", s, " is of codebook ", which[s], " and sub-vector ", groups[s]);
  TORCH_CHECK_VALUE(length % d == 0 && (!basis || (is_float(*basis) && basis->sizes() == c10::IntArrayRef({count, length, dim}))) &&
                        (!mean || (is_float(*mean) && mean->sizes() == c10::IntArrayRef({count, dim}))),
                    "basis or mean do not go with ", count, " heads of ", dim);
  TORCH_CHECK_VALUE(cos.sizes() == sin.sizes() && (cos.size(0) == 1 || cos.size(0) == batch) &&
                        cos.size(1) == tokens && 2 * half <= dim && cos.scalar_type() == sin.scalar_type() &&
                        cos.stride(2) == 1 && cos.stride(1) == half && sin.strides() == cos.strides(),
                    "cos ", cos.sizes(), " and sin ", sin.sizes(), " do not go with ", tokens, " tokens");
  const Packed packed(codes, width, books.size(1), tokens);
  const Scales scales(scale, batch, count, tokens);
  const Tensor entries = books.contiguous();
  std::vector<Sorted> sorted;
  for (int64_t h = 0; h < count; ++h)
    sorted.emplace_back(groups.data() + heads[h], heads[h + 1] - heads[h], length / d, basis.has_value());
  const Maybe columns = basis ? Maybe(used_lines(padded(*basis, wide), sorted, d)) : std::nullopt;
  const Maybe shift = mean ? Maybe(padded(*mean, wide)) : std::nullopt;
  const Keys keys{entries.const_data_ptr<float>(), columns ? columns->const_data_ptr<float>() : nullptr,
                  shift ? shift->const_data_ptr<float>() : nullptr, books.size(1), d, length, dim, wide, half};
  const Tensor queries = at::constant_pad_nd(q.transpose(2, 3), {0, lanes - rows, 0, wide - dim}).contiguous();
  Tensor scores = at::empty({batch, count, rows, tokens}, q.options());
  const int64_t blocks = (tokens + TOKENS - 1) / TOKENS, turns = cos.size(0) == 1 ? 0 : cos.stride(0);
  decltype(&score_keys<4>) score = nullptr;  // chosen here, so that all around it is compiled for any number of rows
  by_rows(rows, [&](auto width) { score = score_keys<decltype(width)::value>; });
  const auto run = [&](auto code, auto angle) {
    using Code = decltype(code);
    using T = decltype(angle);
    const T *cosines = cos.const_data_ptr<T>(), *sines = sin.const_data_ptr<T>();
    at::parallel_for(0, batch * count * blocks, 1, [&](int64_t begin, int64_t end) {
      std::vector<Code> room;
      std::vector<float> y(KEYS * length, 0.0f), x(KEYS * wide, 0.0f);
      for (int64_t task = begin; task < end; ++task) {  // heads of the same tokens, which share their angles, in a row
        const int64_t b = task / (count * blocks), h = task % count, from = task / count % blocks * TOKENS;
        const int64_t left = std::min(TOKENS, tokens - from), own = heads[h + 1] - heads[h];
        int64_t stride;
        packed.prefetch(b, heads[h], own, from + TOKENS);
        const Code* held = packed.unpack(b, heads[h], own, from, left, room, stride);
        const float* asked = queries.const_data_ptr<float>() + (b * count + h) * wide * lanes;
        float* out = scores.data_ptr<float>() + (b * count + h) * rows * tokens + from;
        for (int64_t t = 0; t < left; t += KEYS) {
          const int64_t some = std::min(KEYS, left - t), angles = b * turns + (from + t) * half;
          make_keys(keys, h, which.data() + heads[h], sorted[h], held + t, stride, some,
                    scales.at(b, h, from + t), cosines + angles, sines + angles, y.data(), x.data());
          score(x.data(), wide, some, asked, rows, out + t, tokens);
        }
      }
    });
  };
  by_width(width, [&](auto code) {
    if (cos.scalar_type() == at::kHalf) run(code, c10::Half{});
    else by_float(cos, [&](auto angle) { run(code, angle); });
  });
  return scores;
}

}  // namespace rpqfx
