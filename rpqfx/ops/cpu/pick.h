// Scores of the rows of a head through tables, and the adjoint: masses of the rows summed into bins.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>

#include <vector>

#include "slots.h"

namespace rpqfx {

inline constexpr int64_t BIN_TOKENS = 8 * TOKENS;      // whose masses are turned at a time: they stay in the first-level cache
inline constexpr int64_t BIN_PART = 4096;              // tokens that are worth bins of their own, where slots are few
inline constexpr int64_t PICK_TOKENS = 8 * TOKENS;     // that go through some slots' tables before the next ones are met
inline constexpr int64_t PICK_BYTES = 1 << 17;         // of those tables: a part of the second-level cache
inline constexpr int64_t SLOTS_TOGETHER = 4;           // whose bins are filled in turns
inline constexpr int64_t SMALL = 1 << 20;              // multiplications that are worth another thread
inline constexpr int64_t BIN_TASKS = 4;                // for each thread at least

// sums[j] += sum over slots of table[slot, code(slot, j)], for N tokens.
template <int W, int N, typename Code>
void pick_lines(const float* table, int64_t slot, const Code* codes, int64_t stride, int64_t slots, float* sums) {
  Row<W> sum[N];
  for (int64_t j = 0; j < N; ++j) sum[j] = row<W>(sums + j * W);
  for (int64_t s = 0; s < slots; ++s, table += slot, codes += stride) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < N; ++j) sum[j] += row<W>(table + static_cast<int64_t>(codes[j]) * W);
  }
  for (int64_t j = 0; j < N; ++j) row<W>(sums + j * W) = sum[j];
}

// table[s, k, :] = books[which[s], k] . parts[s, :, :] for all slots, the rows beside each other.
inline Tensor slot_tables(const Tensor& given_parts, const Tensor& given_books, c10::IntArrayRef which) {
  check_place("queries", given_parts);
  check_place("codebooks", given_books);
  TORCH_CHECK_VALUE(given_parts.dim() == 4 && given_books.dim() == 3, "queries ", given_parts.sizes(),
                    " do not go with codebooks ", given_books.sizes());
  const Tensor parts = given_parts.contiguous(), books = given_books.contiguous();
  const int64_t batch = parts.size(0), slots = parts.size(1), rows = parts.size(2), d = books.size(2);
  TORCH_CHECK_VALUE(parts.size(3) == d && int64_t(which.size()) == slots &&
                        parts.scalar_type() == at::kFloat && books.scalar_type() == at::kFloat,
                    "queries ", parts.sizes(), " do not go with codebooks ", books.sizes());
  for (const int64_t book : which) TORCH_CHECK_INDEX(book >= 0 && book < books.size(0), "codebook ", book);
  const int64_t entries = books.size(1);
  Tensor table = at::empty({batch, slots, entries, row_width(rows)}, parts.options());
  by_rows(rows, [&](auto lanes) {
    constexpr int W = decltype(lanes)::value;
    at::parallel_for(0, batch * slots, std::max<int64_t>(1, SMALL / (entries * d + 1)), [&](int64_t begin, int64_t end) {
      std::vector<float> turned(d * W, 0.0f);
      for (int64_t line = begin; line < end; ++line) {
        const float* part = parts.const_data_ptr<float>() + line * rows * d;
        const float* book = books.const_data_ptr<float>() + which[line % slots] * entries * d;
        float* out = table.data_ptr<float>() + line * entries * W;
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < d; ++j) turned[j * W + i] = part[i * d + j];
        for (int64_t k = 0; k < entries; ++k) {
          Row<W> sum{};
          for (int64_t j = 0; j < d; ++j) sum += book[k * d + j] * row<W>(&turned[j * W]);
          row<W>(out + k * W) = sum;
        }
      }
    });
  });
  return table;
}

// sums[s, row, :] = sum over k of bins[s, k, row] * books[which[s], k, :] for all slots: the adjoint of slot_tables.
inline Tensor slot_sums(const Tensor& given_bins, int64_t rows, const Tensor& given_books, c10::IntArrayRef which) {
  check_place("bins", given_bins);
  check_place("codebooks", given_books);
  TORCH_CHECK_VALUE(given_bins.dim() == 4 && given_books.dim() == 3, "bins ", given_bins.sizes(),
                    " do not go with codebooks ", given_books.sizes());
  const Tensor bins = given_bins.contiguous(), books = given_books.contiguous();
  const int64_t batch = bins.size(0), slots = bins.size(1), entries = bins.size(2), d = books.size(2);
  TORCH_CHECK_VALUE(books.size(1) == entries && int64_t(which.size()) == slots &&
                        bins.size(3) == row_width(rows) && bins.scalar_type() == at::kFloat &&
                        books.scalar_type() == at::kFloat,
                    "bins ", bins.sizes(), " do not go with codebooks ", books.sizes());
  for (const int64_t book : which) TORCH_CHECK_INDEX(book >= 0 && book < books.size(0), "codebook ", book);
  Tensor sums = at::empty({batch, slots, rows, d}, bins.options());
  by_rows(rows, [&](auto lanes) {
    constexpr int W = decltype(lanes)::value;
    at::parallel_for(0, batch * slots, std::max<int64_t>(1, SMALL / (entries * d + 1)), [&](int64_t begin, int64_t end) {
      std::vector<float> turned(d * W);
      for (int64_t line = begin; line < end; ++line) {
        const float* bin = bins.const_data_ptr<float>() + line * entries * W;
        const float* book = books.const_data_ptr<float>() + which[line % slots] * entries * d;
        std::fill(turned.begin(), turned.end(), 0.0f);
        for (int64_t k = 0; k < entries; ++k)
          for (int64_t j = 0; j < d; ++j) row<W>(&turned[j * W]) += book[k * d + j] * row<W>(bin + k * W);
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < d; ++j) sums.data_ptr<float>()[(line * rows + i) * d + j] = turned[j * W + i];
      }
    });
  });
  return sums;
}

// Adds up what some slots pick for some tokens, into sums [tokens, W].
template <int W, typename Code>
void pick_block(const float* table, int64_t slot, const Code* codes, int64_t stride, int64_t slots, int64_t tokens, float* sums) {
  constexpr int64_t N = TOGETHER<W>;
  int64_t t = 0;
  for (; t + N <= tokens; t += N) pick_lines<W, N>(table, slot, codes + t, stride, slots, sums + t * W);
  for (; t < tokens; ++t) pick_lines<W, 1>(table, slot, codes + t, stride, slots, sums + t * W);
}

// scale[t] * sums + shift, as lines y[row, t].
template <int W>
void finish(float* sums, int64_t tokens, const c10::Half* scale, const float* shift, int64_t rows, float* y, int64_t y_stride) {
  if (scale)
    for (int64_t t = 0; t < tokens; ++t) row<W>(sums + t * W) *= static_cast<float>(scale[t]);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t t = 0; t < tokens; ++t) y[i * y_stride + t] = sums[t * W + i] + (shift ? shift[i] : 0.0f);
}

// table [B, S, K, W]: scale * sums over a head's slots + shift [B, H, rows], as y [B, H, rows, T].
inline void pick_sum(const Tensor& table, const Tensor& codes, int64_t width, const Maybe& scale, const Maybe& shift,
                     c10::IntArrayRef heads, Tensor& y) {
  Packed::checked(codes);
  check_place("scores", y);
  check_place("the table", table);
  check_place("the shift", shift);
  TORCH_CHECK_VALUE(y.dim() == 4 && y.scalar_type() == at::kFloat && y.size(0) == codes.size(0) &&
                        y.size(1) + 1 == int64_t(heads.size()) && (y.size(3) < 2 || y.stride(3) == 1),
                    "scores ", y.sizes(), " do not go with codes ", codes.sizes());
  const int64_t rows = y.size(2), tokens = y.size(3);
  const int64_t batch = codes.size(0), slots = codes.size(1), count = int64_t(heads.size()) - 1;
  check_heads(heads, slots);
  TORCH_CHECK_VALUE(table.dim() == 4 && table.is_contiguous() && table.size(0) == batch && table.size(1) == slots &&
                        table.scalar_type() == at::kFloat && table.size(3) == row_width(rows),
                    "a table ", table.sizes(), " does not go with codes ", codes.sizes(), " and ", rows, " rows");
  TORCH_CHECK_VALUE(!shift || (shift->is_contiguous() && shift->numel() == batch * count * rows &&
                               shift->scalar_type() == at::kFloat), "a shift does not go with the table");
  const Packed packed(codes, width, table.size(2), tokens);
  const Scales scales(scale, batch, count, tokens);
  const int64_t blocks = (tokens + PICK_TOKENS - 1) / PICK_TOKENS;
  const float* lines = table.const_data_ptr<float>();
  const float* shifts = shift ? shift->const_data_ptr<float>() : nullptr;
  float* out = y.data_ptr<float>();
  by_rows(rows, [&](auto lanes) {
    constexpr int W = decltype(lanes)::value;
    const int64_t line = packed.entries * W, group = std::max<int64_t>(1, PICK_BYTES / (line * int64_t(sizeof(float))));
    by_width(width, [&](auto code) {
      using Code = decltype(code);
      at::parallel_for(0, batch * count * blocks, 2, [&](int64_t begin, int64_t end) {
        std::vector<Code> room;
        std::vector<float> sums(PICK_TOKENS * W);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t b = task / (count * blocks), h = task / blocks % count, first = task % blocks * PICK_TOKENS;
          const int64_t left = std::min(PICK_TOKENS, tokens - first), head = b * count + h;
          std::fill_n(sums.data(), left * W, 0.0f);
          for (int64_t s = heads[h]; s < heads[h + 1]; s += group) {
            const int64_t some = std::min(group, heads[h + 1] - s);
            for (int64_t t = 0; t < left; t += TOKENS) {
              int64_t stride;
              packed.prefetch(b, s, some, first + t + TOKENS);
              const int64_t few = std::min(TOKENS, left - t);
              const Code* held = packed.unpack(b, s, some, first + t, few, room, stride);
              pick_block<W>(lines + (b * slots + s) * line, line, held, stride, some, few, sums.data() + t * W);
            }
          }
          finish<W>(sums.data(), left, scales.at(b, h, first), shifts ? shifts + head * rows : nullptr, rows,
                    out + b * y.stride(0) + h * y.stride(1) + first, y.stride(2));
        }
      });
    });
  });
}

// bins[slot, code(slot, j)] += masses[j] for some tokens and N slots: sums into one wait for each other, so they take turns.
template <int W, int N, typename Code>
void bin_lines(const Code* codes, int64_t stride, const float* masses, int64_t tokens, float* bins, int64_t slot) {
  constexpr int64_t P = std::min<int64_t>(W, LANES);  // of a register: halves of rows would be copied through memory here
  for (int64_t t = 0; t < tokens; ++t) {
    Row<P> mass[W / P];
    for (int64_t p = 0; p < W / P; ++p) mass[p] = row<P>(masses + t * W + p * P);
#pragma GCC unroll 4
    for (int64_t i = 0; i < N; ++i) {
      float* bin = bins + i * slot + static_cast<int64_t>(codes[i * stride + t]) * W;
      for (int64_t p = 0; p < W / P; ++p) row<P>(bin + p * P) += mass[p];
    }
  }
}

// p[row, t] * scale[t] of some tokens, the rows beside each other.
template <int W>
void turn_masses(const float* p, int64_t stride, int64_t rows, const c10::Half* scale, int64_t tokens, float* masses) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t t = 0; t < tokens; ++t) masses[t * W + i] = p[i * stride + t];
  if (scale)
    for (int64_t t = 0; t < tokens; ++t) row<W>(masses + t * W) *= static_cast<float>(scale[t]);
}

// p [B, H, rows, T] times scale, summed into bins by the codes of each head's slots: [B, S, K, W].
inline Tensor bin_masses(const Tensor& p, const Tensor& codes, int64_t width, const Maybe& scale, c10::IntArrayRef heads,
                  int64_t entries) {
  Packed::checked(codes);
  check_place("masses", p);
  const int64_t batch = codes.size(0), slots = codes.size(1), count = int64_t(heads.size()) - 1;
  check_heads(heads, slots);
  TORCH_CHECK_VALUE(p.dim() == 4 && p.size(0) == batch && p.size(1) == count && p.scalar_type() == at::kFloat &&
                        (p.size(3) < 2 || p.stride(3) == 1),
                    "masses ", p.sizes(), " do not go with codes ", codes.sizes());
  const int64_t rows = p.size(2), tokens = p.size(3), wanted = BIN_TASKS * at::get_num_threads();
  const Packed packed(codes, width, entries, tokens);
  const Scales scales(scale, batch, count, tokens);
  std::vector<int64_t> head_of(slots);
  for (int64_t h = 0; h < count; ++h) std::fill(head_of.data() + heads[h], head_of.data() + heads[h + 1], h);
  const int64_t lines = batch * slots, most = (tokens + BIN_PART - 1) / BIN_PART;
  const int64_t parts = std::clamp<int64_t>(lines ? (wanted + lines - 1) / lines : 1, 1, std::max<int64_t>(1, most));
  const int64_t share = ((tokens + parts - 1) / parts + BIN_TOKENS - 1) / BIN_TOKENS * BIN_TOKENS;
  Tensor bins = at::empty({parts, batch, slots, entries, row_width(rows)}, p.options());
  by_rows(rows, [&](auto lanes) {
    constexpr int W = decltype(lanes)::value;
    by_width(width, [&](auto code) {
      using Code = decltype(code);
      at::parallel_for(0, parts * lines, 1, [&](int64_t begin, int64_t end) {
        std::vector<Code> room;
        std::vector<float> masses(BIN_TOKENS * W, 0.0f);
        for (int64_t task = begin; task < end;) {  // slots of the same head share the masses
          const int64_t part = task / lines, b = task % lines / slots, s = task % slots, h = head_of[s];
          const int64_t some = std::min(heads[h + 1] - s, end - task), last = std::min(tokens, (part + 1) * share);
          float* first = bins.data_ptr<float>() + task * entries * W;
          std::fill_n(first, some * entries * W, 0.0f);
          for (int64_t from = part * share; from < last; from += BIN_TOKENS) {
            const int64_t left = std::min(BIN_TOKENS, last - from);
            turn_masses<W>(p.const_data_ptr<float>() + b * p.stride(0) + h * p.stride(1) + from, p.stride(2), rows,
                           scales.at(b, h, from), left, masses.data());
            for (int64_t i = 0; i < some;) {
              const int64_t at_once = some - i < SLOTS_TOGETHER ? 1 : SLOTS_TOGETHER;
              for (int64_t t = 0; t < left; t += TOKENS) {
                int64_t stride;
                const int64_t few = std::min(TOKENS, left - t);
                packed.prefetch(b, s + i + at_once, std::min(at_once, some - i - at_once), from + t);
                const Code* held = packed.unpack(b, s + i, at_once, from + t, few, room, stride);
                float* out = first + i * entries * W;
                if (at_once == 1) bin_lines<W, 1>(held, stride, masses.data() + t * W, few, out, entries * W);
                else bin_lines<W, SLOTS_TOGETHER>(held, stride, masses.data() + t * W, few, out, entries * W);
              }
              i += at_once;
            }
          }
          task += some;
        }
      });
    });
  });
  return parts == 1 ? bins.select(0, 0) : bins.sum(0);
}

}  // namespace rpqfx
