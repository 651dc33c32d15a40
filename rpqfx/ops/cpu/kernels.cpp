// Sums of gathers, sums into bins, and rows of a matrix held in codebooks.
//
// Axes as in rpqfx/codebook.py; a use p = (r, m) is one codebook met by one sub-vector. A table [P, K, rows] holds the
// dot products of entries with rows of the batch: adding up a gathered line of it is then one vector addition. Codes
// are read as they are stored (uint8, int16 or uint16), signs as bits.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();
constexpr int64_t WIDE = 2 * LANES;                       // rows of the batch that a table serves at most
constexpr int64_t TILE = LANES >= 8 ? LANES / 2 : LANES;  // vectors whose sums are held in registers
constexpr int64_t FEW = 4;                                // up to so many rows, lanes run along the vectors
constexpr int64_t MOST_GROUPS = 8;                        // of threads that each keep a sum of all vectors
constexpr int64_t GRAIN = 1 << 15;                        // elements that are worth another thread
constexpr int64_t TABLE_BYTES = 1 << 20;                  // of a table that stays in a core's second-level cache

// ------------------------------------------------------------------------------------------------ loads and stores

inline Vec load(const float* p) { return Vec::loadu(p); }
inline Vec load(const float* p, int64_t count) { return Vec::loadu(p, count); }
inline Vec load(const c10::BFloat16* p, int64_t count = LANES) {
  const auto half = at::vec::Vectorized<c10::BFloat16>::loadu(p, count);
  return std::get<0>(at::vec::convert_bfloat16_float(half));
}
inline void store(float* p, const Vec& x, int64_t count) { x.store(p, count); }
inline void store(c10::BFloat16* p, const Vec& x, int64_t count) {
  at::vec::convert_float_bfloat16(x, Vec(0)).store(p, count);
}

// The signs of eight vectors as factors, for every byte.
constexpr int64_t SIGNS_AT_ONCE = std::min<int64_t>(8, LANES);
struct Signs {
  float factors[256][8];
  constexpr Signs() : factors() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit) factors[byte][bit] = byte >> bit & 1 ? -1.0f : 1.0f;
  }
};
constexpr Signs SIGNS;

template <typename Code>
struct Codes {
  const Code* codes;     // [P, N]
  const uint8_t* signs;  // [P, bytes], a set bit means minus; or null
  int64_t uses, vectors, bytes;

  const Code* at(int64_t p, int64_t n) const { return codes + p * vectors + n; }
  // Those of n and of the rest of its eight.
  const float* factors(int64_t p, int64_t n) const { return SIGNS.factors[signs[p * bytes + (n >> 3)]] + (n & 7); }
};

template <typename Run>
auto by_code(const Tensor& codes, const std::optional<Tensor>& signs, const Run& run) {
  const uint8_t* bits = signs ? signs->const_data_ptr<uint8_t>() : nullptr;
  const int64_t uses = codes.size(0) * codes.size(1), vectors = codes.size(2), bytes = (vectors + 7) / 8;
  const void* data = codes.const_data_ptr();
  switch (codes.scalar_type()) {
    case at::kByte: return run(Codes<uint8_t>{static_cast<const uint8_t*>(data), bits, uses, vectors, bytes});
    case at::kShort: return run(Codes<int16_t>{static_cast<const int16_t*>(data), bits, uses, vectors, bytes});
    case at::kInt: return run(Codes<int32_t>{static_cast<const int32_t*>(data), bits, uses, vectors, bytes});
    case at::kUInt16: return run(Codes<uint16_t>{static_cast<const uint16_t*>(data), bits, uses, vectors, bytes});
    default: TORCH_CHECK(false, "codes are uint8, int16, uint16 or int32, got ", codes.scalar_type());
  }
}

template <typename Run>
auto by_float(const Tensor& x, const Run& run) {
  if (x.scalar_type() == at::kFloat) return run(float{});
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "float32 or bfloat16 is expected, got ", x.scalar_type());
  return run(c10::BFloat16{});
}

template <typename Run>
void with_flag(bool flag, const Run& run) {
  flag ? run(std::true_type{}) : run(std::false_type{});
}

// Three facts that inner loops are compiled for.
template <typename Run>
void with_shape(bool wide, bool edge, bool with_signs, const Run& run) {
  with_flag(wide, [&](auto a) {
    with_flag(edge, [&](auto b) { with_flag(with_signs, [&](auto c) { run(a, b, c); }); });
  });
}

// --------------------------------------------------------------------------------------------------- sums of gathers

template <typename T>
struct Table {
  const T* data;  // [uses, entries, stride], the table of the uses first, first + 1, ...
  int64_t entries, stride, first, uses;
};

// sums[j, :] (+)= sum over the table's uses p of table[p, code(p, n + j), :rows], for `left` vectors from n on.
// EDGE: rows do not fill the lanes, or vectors the tile.
template <int V, bool EDGE, bool SIGNED, typename T, typename Code>
void gather_tile(const Table<T>& table, const Codes<Code>& codes, int64_t n, int64_t left, int64_t rows, float* sums) {
  Vec sum[TILE][V];
  for (int64_t j = 0; j < TILE; ++j)
    for (int64_t v = 0; v < V; ++v) sum[j][v] = table.first ? load(sums + (j * V + v) * LANES) : Vec(0);
  for (int64_t p = 0; p < table.uses; ++p) {
    const T* lines = table.data + p * table.entries * table.stride;
    const Code* code = codes.at(table.first + p, n);
    const float* factors = SIGNED ? codes.factors(table.first + p, n) : nullptr;
#pragma GCC unroll 16
    for (int64_t j = 0; j < TILE; ++j) {
      const int64_t which = EDGE ? std::min(j, left - 1) : j;
      const T* line = lines + static_cast<int64_t>(code[which]) * table.stride;
      const Vec sign(SIGNED ? factors[which] : 1.0f);
#pragma GCC unroll 2
      for (int64_t v = 0; v < V; ++v) {
        const Vec term = EDGE ? load(line + v * LANES, std::clamp<int64_t>(rows - v * LANES, 0, LANES))
                              : load(line + v * LANES);
        sum[j][v] = SIGNED ? at::vec::fmadd(term, sign, sum[j][v]) : sum[j][v] + term;
      }
    }
  }
  for (int64_t j = 0; j < TILE; ++j)
    for (int64_t v = 0; v < V; ++v) sum[j][v].store(sums + (j * V + v) * LANES);
}

template <typename T, typename Code>
void gather(const Table<T>& table, const Codes<Code>& codes, int64_t n, int64_t rows, float* sums) {
  const int64_t left = std::min(TILE, codes.vectors - n);
  const bool edge = rows % LANES != 0 || left < TILE;
  with_shape(rows > LANES, edge, codes.signs != nullptr, [&](auto wide, auto edge, auto with_signs) {
    gather_tile<decltype(wide)::value + 1, decltype(edge)::value, decltype(with_signs)::value>(
        table, codes, n, left, rows, sums);
  });
}

// y[row, n] = sums[n, row] + bias[n], for up to LANES vectors.
template <typename T>
void write_rows(const float* sums, int64_t width, int64_t vectors, int64_t rows, const T* bias, T* y, int64_t stride) {
  alignas(64) float turned[LANES * LANES];
  const Vec shift = bias ? load(bias, vectors) : Vec(0);
  for (int64_t row = 0; row < rows; row += LANES) {
    const int64_t count = std::min(LANES, rows - row);
    at::vec::transpose_mxn<float>(sums + row, width, turned, LANES, vectors, count);
    for (int64_t i = 0; i < count; ++i)
      store(y + (row + i) * stride, load(turned + i * LANES, vectors) + shift, vectors);
  }
}

// y = x @ W.T + bias for a block of up to WIDE rows, through tables of as many uses as fit in the cache.
template <typename T, typename Code>
void contract_block(const Tensor& x, int64_t real, const std::vector<Tensor>& books, const Codes<Code>& codes, const T* bias, T* y) {
  const int64_t rows = x.size(0), sub_vectors = books[0].size(0), entries = books[0].size(1), d = books[0].size(2);
  const int64_t width = rows > LANES ? WIDE : LANES, tiles = (codes.vectors + LANES - 1) / LANES;
  const int64_t group = std::clamp<int64_t>(TABLE_BYTES / (entries * rows * int64_t(sizeof(T))), 1, sub_vectors);
  const bool grouped = group < codes.uses;
  const Tensor table = at::empty({group, entries, rows}, x.options());
  const Tensor kept = at::empty({grouped ? tiles * LANES * width : 0}, x.options().dtype(at::kFloat));
  const Tensor parts = x.view({rows, sub_vectors, d}).permute({1, 2, 0});
  for (size_t stage = 0; stage < books.size(); ++stage) {
    for (int64_t m = 0; m < sub_vectors; m += group) {
      const int64_t uses = std::min(group, sub_vectors - m), first = stage * sub_vectors + m;
      Tensor some = table.narrow(0, 0, uses);
      at::bmm_out(some, books[stage].narrow(0, m, uses), parts.narrow(0, m, uses));
      const Table<T> part{some.const_data_ptr<T>(), entries, rows, first, uses};
      at::parallel_for(0, tiles, 16, [&](int64_t begin, int64_t end) {
        alignas(64) float tile[LANES * WIDE];
        for (int64_t n = begin * LANES; n < std::min(end * LANES, codes.vectors); n += LANES) {
          float* sums = grouped ? kept.data_ptr<float>() + n * width : tile;
          const int64_t vectors = std::min(LANES, codes.vectors - n);
          for (int64_t j = 0; j < vectors; j += TILE) gather(part, codes, n + j, rows, sums + j * width);
          if (first + uses == codes.uses)
            write_rows<T>(sums, width, vectors, real, bias ? bias + n : nullptr, y + n, codes.vectors);
        }
      });
    }
  }
}

// lines[row, k] = x[row, :] . book[k, :] for all entries, LANES of them at a time.
template <typename T>
void dot_lines(const T* book, int64_t entries, int64_t d, const T* x, int64_t x_stride, int64_t rows, float* lines) {
  alignas(64) float sums[LANES * LANES], turned[LANES * LANES];
  for (int64_t row = 0; row < rows; ++row) {
    const T* part = x + row * x_stride;
    for (int64_t k = 0; k < entries; k += LANES) {
      const int64_t some = std::min(LANES, entries - k);
      for (int64_t j = 0; j < some; ++j) {
        const T* entry = book + (k + j) * d;
        Vec even(0), odd(0);
        int64_t i = 0;
        for (; i + 2 * LANES <= d; i += 2 * LANES) {
          even = at::vec::fmadd(load(entry + i), load(part + i), even);
          odd = at::vec::fmadd(load(entry + i + LANES), load(part + i + LANES), odd);
        }
        for (; i < d; i += LANES) {
          const int64_t count = std::min(LANES, d - i);
          even = at::vec::fmadd(load(entry + i, count), load(part + i, count), even);
        }
        (even + odd).store(sums + j * LANES);
      }
      at::vec::transpose_mxn<float>(sums, LANES, turned, LANES, some, LANES);
      Vec total = load(turned, some);
      for (int64_t i = 1; i < LANES; ++i) total = total + load(turned + i * LANES, some);
      store(lines + row * entries + k, total, some);
    }
  }
}

// sums[n] += sign * line[code(p, n)] for all vectors; reads ahead in what is used next.
template <typename Code>
void pick_line(const float* line, const Codes<Code>& codes, int64_t p, const char* next, int64_t bytes, float* sums) {
  const Code* code = codes.at(p, 0);
  const int64_t whole = codes.vectors / LANES * LANES, ahead = bytes / std::max<int64_t>(1, whole / LANES) + 64;
  for (int64_t n = 0; n < whole; n += LANES) {
    for (int64_t byte = 0; byte < ahead; byte += 64) __builtin_prefetch(next + n / LANES * ahead + byte, 0, 2);
    int32_t index[LANES];
    for (int64_t j = 0; j < LANES; ++j) index[j] = code[n + j];
    Vec term = at::vec::gather<sizeof(float)>(line, at::vec::Vectorized<int32_t>::loadu(index));
    if (codes.signs) {
      float factors[LANES];
      for (int64_t j = 0; j < LANES; j += SIGNS_AT_ONCE) std::copy_n(codes.factors(p, n + j), SIGNS_AT_ONCE, factors + j);
      term = term * load(factors);
    }
    (load(sums + n) + term).store(sums + n);
  }
  for (int64_t n = whole; n < codes.vectors; ++n) sums[n] += (codes.signs ? *codes.factors(p, n) : 1.0f) * line[code[n]];
}

// y = x @ W.T + bias for a few rows. A thread takes some uses, from reading their codebook (which is what takes the
// time) to picking their terms, with lanes along the vectors; the threads' sums are added up last.
template <typename T, typename Code>
void contract_few(const Tensor& x, const Tensor& codebooks, const Codes<Code>& codes, const T* bias, T* y) {
  const int64_t rows = x.size(0), width = x.size(1), vectors = codes.vectors;
  const int64_t stages = codebooks.size(0), books = codebooks.size(1), entries = codebooks.size(2), d = codebooks.size(3);
  const int64_t sub_vectors = codes.uses / stages, share = sub_vectors / books;
  const int64_t groups = std::min<int64_t>({codes.uses, at::get_num_threads(), MOST_GROUPS});
  const Tensor sums = at::empty({groups, rows, vectors}, x.options().dtype(at::kFloat));
  const auto book = [&](int64_t p) {
    return codebooks.const_data_ptr<T>() + (p / sub_vectors * books + p % sub_vectors / share) * entries * d;
  };
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> lines(rows * entries);
    for (int64_t group = begin; group < end; ++group) {
      float* own = sums.data_ptr<float>() + group * rows * vectors;
      std::fill_n(own, rows * vectors, 0.0f);
      const int64_t last = codes.uses * (group + 1) / groups;
      for (int64_t p = codes.uses * group / groups; p < last; ++p) {
        const T* part = x.const_data_ptr<T>() + p % sub_vectors * d;
        dot_lines<T>(book(p), entries, d, part, width, rows, lines.data());
        for (int64_t row = 0; row < rows; ++row) {  // a share of the next codebook with each row
          const int64_t bytes = entries * d * int64_t(sizeof(T)) / rows;
          const char* next = reinterpret_cast<const char*>(book(std::min(p + 1, last - 1))) + row * bytes;
          pick_line(lines.data() + row * entries, codes, p, next, bytes, own + row * vectors);
        }
      }
    }
  });
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / vectors), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t n = 0; n < vectors; n += LANES) {
        const int64_t count = std::min(LANES, vectors - n);
        Vec sum = bias ? load(bias + n, count) : Vec(0);
        for (int64_t group = 0; group < groups; ++group)
          sum = sum + load(sums.const_data_ptr<float>() + (group * rows + row) * vectors + n, count);
        store(y + row * vectors + n, sum, count);
      }
  });
}

// x [..., D] @ W.T + bias: [..., N].
Tensor contract(const Tensor& input, const Tensor& entries, const Tensor& codes, const std::optional<Tensor>& signs,
                const std::optional<Tensor>& bias) {
  TORCH_CHECK(!input._fw_grad(0).defined(), "forward-mode differentiation does not reach compiled kernels");
  const Tensor x = input.reshape({-1, input.size(-1)}).contiguous(), codebooks = entries.contiguous();
  const int64_t rows = x.size(0), vectors = codes.size(2), sub_vectors = codes.size(1);
  std::vector<int64_t> shape = input.sizes().vec();
  shape.back() = vectors;
  Tensor y = at::empty(shape, x.options());
  by_float(x, [&](auto scalar) {
    using T = decltype(scalar);
    by_code(codes, signs, [&](auto held) {
      const T* shift = bias ? bias->const_data_ptr<T>() : nullptr;
      if (rows <= FEW && codebooks.size(3) >= LANES) {
        contract_few<T>(x, codebooks, held, shift, y.data_ptr<T>());
        return;
      }
      std::vector<Tensor> books;
      const int64_t share = sub_vectors / codebooks.size(1);
      for (const Tensor& stage : codebooks.unbind(0)) {  // a codebook for each sub-vector
        const Tensor each = stage.unsqueeze(1).expand({-1, share, -1, -1});
        books.push_back(each.reshape({sub_vectors, stage.size(1), stage.size(2)}));
      }
      const int64_t blocks = (rows + WIDE - 1) / WIDE;
      const auto run = [&](int64_t begin, int64_t end) {
        at::AutoDispatchBelowAutograd guard;
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first = block * WIDE, count = std::min(WIDE, rows - first), fill = -count & (LANES - 1);
          Tensor some = x.narrow(0, first, count);
          if (fill) some = at::constant_pad_nd(some, {0, 0, 0, fill});
          contract_block<T>(some, count, books, held, shift, y.data_ptr<T>() + first * vectors);
        }
      };
      if (blocks >= at::get_num_threads()) at::parallel_for(0, blocks, 1, run);
      else run(0, blocks);
    });
  });
  return y;
}

// table [B, R, M, K, L] summed by codes: [B, N, L].
Tensor gather_sum(const Tensor& table, const Tensor& codes, const std::optional<Tensor>& signs) {
  const int64_t entries = table.size(3), length = table.size(4), vectors = codes.size(2);
  Tensor y = at::empty({table.size(0), vectors, length}, table.options());
  by_float(table, [&](auto scalar) {
    using T = decltype(scalar);
    by_code(codes, signs, [&](auto held) {
      const int64_t blocks = (length + WIDE - 1) / WIDE, tiles = (vectors + TILE - 1) / TILE;
      at::parallel_for(0, table.size(0) * blocks * tiles, 8, [&](int64_t begin, int64_t end) {
        alignas(64) float sums[TILE * WIDE];
        for (int64_t task = begin; task < end; ++task) {
          const int64_t sample = task / (blocks * tiles), from = task / tiles % blocks * WIDE, n = task % tiles * TILE;
          const int64_t rows = std::min(WIDE, length - from), width = rows > LANES ? WIDE : LANES;
          const T* first = table.const_data_ptr<T>() + sample * held.uses * entries * length + from;
          gather(Table<T>{first, entries, length, 0, held.uses}, held, n, rows, sums);
          for (int64_t j = 0; j < std::min(TILE, vectors - n); ++j)
            for (int64_t v = 0; v < rows; v += LANES)
              store(y.data_ptr<T>() + (sample * vectors + n + j) * length + from + v, load(sums + j * width + v),
                    std::min(LANES, rows - v));
        }
      });
    });
  });
  return y;
}

// ------------------------------------------------------------------------------------------------------ sums into bins

// bins[code(p, n), :rows] += sign * y[n, :rows] over all vectors, for up to WIDE rows.
template <int V, bool EDGE, bool SIGNED, typename T, typename Code>
void scatter_lines(const T* y, int64_t stride, const Codes<Code>& codes, int64_t p, int64_t rows, float* bins) {
  const Code* code = codes.at(p, 0);
  for (int64_t n = 0; n < codes.vectors; ++n) {
    float* bin = bins + static_cast<int64_t>(code[n]) * V * LANES;
    const Vec sign(SIGNED ? *codes.factors(p, n) : 1.0f);
    for (int64_t v = 0; v < V; ++v) {
      const T* line = y + n * stride + v * LANES;
      const Vec term = EDGE ? load(line, std::clamp<int64_t>(rows - v * LANES, 0, LANES)) : load(line);
      const Vec sum = load(bin + v * LANES);
      (SIGNED ? at::vec::fmadd(term, sign, sum) : sum + term).store(bin + v * LANES);
    }
  }
}

template <typename T, typename Code>
void scatter(const T* y, int64_t stride, const Codes<Code>& codes, int64_t p, int64_t rows, float* bins) {
  with_shape(rows > LANES, rows % LANES != 0, codes.signs != nullptr, [&](auto wide, auto edge, auto with_signs) {
    scatter_lines<decltype(wide)::value + 1, decltype(edge)::value, decltype(with_signs)::value>(
        y, stride, codes, p, rows, bins);
  });
}

// Lines of a [samples, N, length] tensor, summed into bins by codes.
template <typename T, typename Code>
void fill_bins(const T* y, int64_t samples, int64_t line, int64_t length, const Codes<Code>& codes, int64_t entries,
               float* bins, int64_t bins_sample, int64_t bins_line) {
  const int64_t blocks = (length + WIDE - 1) / WIDE;
  at::parallel_for(0, samples * blocks * codes.uses, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(entries * WIDE);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / (blocks * codes.uses), from = task / codes.uses % blocks * WIDE;
      const int64_t rows = std::min(WIDE, length - from), width = rows > LANES ? WIDE : LANES, p = task % codes.uses;
      std::fill_n(sums.begin(), entries * width, 0.0f);
      scatter(y + sample * codes.vectors * line + from, line, codes, p, rows, sums.data());
      float* out = bins + sample * bins_sample + p * entries * bins_line + from;
      for (int64_t k = 0; k < entries; ++k) std::copy_n(sums.data() + k * width, rows, out + k * bins_line);
    }
  });
}

// y [B, N, L] summed into bins by codes: [B, R, M, K, L], float32.
Tensor bin_sum(const Tensor& y, const Tensor& codes, const std::optional<Tensor>& signs, int64_t entries) {
  const int64_t samples = y.size(0), length = y.size(2), uses = codes.size(0) * codes.size(1);
  Tensor bins = at::empty({samples, codes.size(0), codes.size(1), entries, length}, y.options().dtype(at::kFloat));
  by_float(y, [&](auto scalar) {
    by_code(codes, signs, [&](auto held) {
      fill_bins(y.const_data_ptr<decltype(scalar)>(), samples, length, length, held, entries, bins.data_ptr<float>(),
                uses * entries * length, length);
    });
  });
  return bins;
}

// y [B, N] as lines of WIDE rows of the batch: [ceil(B / WIDE), N, WIDE], float32, zero past the last row.
Tensor turn(const Tensor& y) {
  const int64_t rows = y.size(0), vectors = y.size(1), blocks = (rows + WIDE - 1) / WIDE;
  const int64_t tiles = (vectors + LANES - 1) / LANES;
  Tensor lines = at::empty({blocks, vectors, WIDE}, y.options().dtype(at::kFloat));
  by_float(y, [&](auto scalar) {
    using T = decltype(scalar);
    at::parallel_for(0, blocks * tiles, 16, [&](int64_t begin, int64_t end) {
      alignas(64) float part[LANES * LANES];
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task / tiles, n = task % tiles * LANES, count = std::min(LANES, vectors - n);
        for (int64_t from = 0; from < WIDE; from += LANES) {
          for (int64_t i = 0; i < LANES; ++i) {
            const int64_t row = block * WIDE + from + i;
            (row < rows ? load(y.const_data_ptr<T>() + row * vectors + n, count) : Vec(0)).store(part + i * LANES);
          }
          float* out = lines.data_ptr<float>() + (block * vectors + n) * WIDE + from;
          at::vec::transpose_mxn<float>(part, LANES, out, WIDE, LANES, count);
        }
      }
    });
  });
  return lines;
}
// y [B, N] summed into bins by codes: [R, M, K, ceil(B / WIDE) * WIDE], float32, zero past the last row.
Tensor bin_rows(const Tensor& y, const Tensor& codes, const std::optional<Tensor>& signs, int64_t entries) {
  const Tensor lines = turn(y);
  const int64_t blocks = lines.size(0);
  Tensor bins = at::empty({codes.size(0), codes.size(1), entries, blocks * WIDE}, lines.options());
  by_code(codes, signs, [&](auto held) {
    fill_bins(lines.const_data_ptr<float>(), blocks, WIDE, WIDE, held, entries, bins.data_ptr<float>(), WIDE,
              blocks * WIDE);
  });
  return bins;
}

// bins[code(p, n)] += sign * y[n] for all vectors; reads ahead in what is used next.
template <typename Code>
void fill_line(const float* y, const Codes<Code>& codes, int64_t p, const char* next, int64_t bytes, float* bins) {
  const Code* code = codes.at(p, 0);
  const int64_t lines = (codes.vectors + LANES - 1) / LANES, ahead = bytes / lines + 64;
  for (int64_t n = 0; n < codes.vectors; n += LANES) {
    for (int64_t byte = 0; byte < ahead; byte += 64) __builtin_prefetch(next + n / LANES * ahead + byte, 0, 2);
    const int64_t end = std::min(n + LANES, codes.vectors);
    if (codes.signs)
      for (int64_t j = n; j < end; ++j) bins[code[j]] += *codes.factors(p, j) * y[j];
    else
      for (int64_t j = n; j < end; ++j) bins[code[j]] += y[j];
  }
}

// sums[row, :] += bins[row, k] * book[k, :] over all entries.
template <typename T>
void add_entries(const T* book, int64_t entries, int64_t d, const float* bins, int64_t rows, float* sums) {
  for (int64_t k = 0; k < entries; ++k) {
    const T* entry = book + k * d;
    for (int64_t row = 0; row < rows; ++row) {
      const Vec bin(bins[row * entries + k]);
      float* sum = sums + row * d;
      int64_t i = 0;
      for (; i + LANES <= d; i += LANES) at::vec::fmadd(load(entry + i), bin, load(sum + i)).store(sum + i);
      if (i < d) at::vec::fmadd(load(entry + i, d - i), bin, load(sum + i, d - i)).store(sum + i, d - i);
    }
  }
}

// x = y @ W for a few rows. Each sub-vector of x is one thread's: y summed into bins, and the entries by their bins.
template <typename T, typename Code>
void contract_t_few(const Tensor& y, const Tensor& codebooks, const Codes<Code>& codes, T* x) {
  const int64_t rows = y.size(0), vectors = codes.vectors;
  const int64_t stages = codebooks.size(0), books = codebooks.size(1), entries = codebooks.size(2), d = codebooks.size(3);
  const int64_t sub_vectors = codes.uses / stages, share = sub_vectors / books;
  const Tensor values = y.to(at::kFloat);
  const int64_t grain = std::max<int64_t>(1, GRAIN / (stages * (entries * d + vectors)));
  at::parallel_for(0, sub_vectors, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> bins(rows * entries), sums(rows * d);
    for (int64_t m = begin; m < end; ++m) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t r = 0; r < stages; ++r) {
        std::fill(bins.begin(), bins.end(), 0.0f);
        const T* book = codebooks.const_data_ptr<T>() + (r * books + m / share) * entries * d;
        for (int64_t row = 0; row < rows; ++row) {  // a share of the codebook with each row
          const int64_t bytes = entries * d * int64_t(sizeof(T)) / rows;
          const char* next = reinterpret_cast<const char*>(book) + row * bytes;
          const float* part = values.const_data_ptr<float>() + row * vectors;
          fill_line(part, codes, r * sub_vectors + m, next, bytes, &bins[row * entries]);
        }
        add_entries(book, entries, d, bins.data(), rows, sums.data());
      }
      for (int64_t row = 0; row < rows; ++row) {
        T* to = x + (row * sub_vectors + m) * d;
        for (int64_t i = 0; i < d; i += LANES) {
          const int64_t count = std::min(LANES, d - i);
          store(to + i, load(&sums[row * d + i], count), count);
        }
      }
    }
  });
}

// y [B, N] @ W for a few rows: [B, D].
Tensor contract_t(const Tensor& y, const Tensor& codebooks, const Tensor& codes, const std::optional<Tensor>& signs) {
  TORCH_CHECK(!y._fw_grad(0).defined(), "forward-mode differentiation does not reach compiled kernels");
  Tensor x = at::empty({y.size(0), codes.size(1) * codebooks.size(3)}, y.options());
  by_float(y, [&](auto scalar) {
    using T = decltype(scalar);
    by_code(codes, signs, [&](auto held) { contract_t_few<T>(y, codebooks, held, x.data_ptr<T>()); });
  });
  return x;
}

// ------------------------------------------------------------------------------------------------- rows of the matrix

// out[i, :] = scale[n] * sum over stages of sign * entries, n = ids[i] (or i, without ids), for a part of the rows.
template <typename T, typename Code>
void expand_rows(const Tensor& codebooks, const Codes<Code>& codes, const T* scale, const int64_t* ids, int64_t begin,
                 int64_t end, T* out) {
  const int64_t stages = codebooks.size(0), books = codebooks.size(1), entries = codebooks.size(2), d = codebooks.size(3);
  const int64_t sub_vectors = codes.uses / stages, share = sub_vectors / books;
  const T* first = codebooks.const_data_ptr<T>();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = ids ? ids[i] : i;
    const Vec factor(scale ? static_cast<float>(scale[n]) : 1.0f);
    for (int64_t m = 0; m < sub_vectors; ++m) {
      T* to = out + (i * sub_vectors + m) * d;
      for (int64_t from = 0; from < d; from += LANES) {
        const int64_t count = std::min(LANES, d - from);
        Vec sum(0);
        for (int64_t r = 0; r < stages; ++r) {
          const int64_t p = r * sub_vectors + m, entry = (r * books + m / share) * entries + *codes.at(p, n);
          const Vec term = load(first + entry * d + from, count);
          sum = codes.signs ? at::vec::fmadd(term, Vec(*codes.factors(p, n)), sum) : sum + term;
        }
        store(to + from, scale ? sum * factor : sum, count);
      }
    }
  }
}

// W[ids], or all of W: [rows, D].
Tensor expand(const Tensor& codebooks, const Tensor& codes, const std::optional<Tensor>& scale,
              const std::optional<Tensor>& signs, const std::optional<Tensor>& ids) {
  const int64_t rows = ids ? ids->numel() : codes.size(2), dim = codes.size(1) * codebooks.size(3);
  const int64_t* which = ids ? ids->const_data_ptr<int64_t>() : nullptr;
  for (int64_t i = 0; ids && i < rows; ++i)
    TORCH_CHECK_INDEX(which[i] >= 0 && which[i] < codes.size(2), "row ", which[i], " of ", codes.size(2));
  Tensor out = at::empty({rows, dim}, codebooks.options());
  by_float(codebooks, [&](auto scalar) {
    using T = decltype(scalar);
    by_code(codes, signs, [&](auto held) {
      const T* factors = scale ? scale->const_data_ptr<T>() : nullptr;
      at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / dim), [&](int64_t begin, int64_t end) {
        expand_rows<T>(codebooks, held, factors, which, begin, end, out.data_ptr<T>());
      });
    });
  });
  return out;
}

// The adjoint of expand: grad [N, D] summed into the entries that it used, [R, G, K, d] float32.
Tensor collect(const Tensor& grad, const Tensor& codes, const std::optional<Tensor>& signs, int64_t books,
               int64_t entries) {
  const int64_t stages = codes.size(0), sub_vectors = codes.size(1), d = grad.size(1) / sub_vectors;
  const int64_t share = sub_vectors / books, parts = stages * books < 8 ? std::min<int64_t>(share, 8) : 1;
  const int64_t size = entries * d;
  Tensor sums = at::zeros({stages, books, parts, entries, d}, grad.options().dtype(at::kFloat));
  by_float(grad, [&](auto scalar) {
    using T = decltype(scalar);
    by_code(codes, signs, [&](auto held) {
      at::parallel_for(0, stages * books * parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t r = task / parts / books, g = task / parts % books, part = task % parts;
          float* out = sums.data_ptr<float>() + task * size;
          for (int64_t m = g * share + share * part / parts; m < g * share + share * (part + 1) / parts; ++m) {
            const int64_t p = r * sub_vectors + m;
            for (int64_t n = 0; n < held.vectors; ++n) {
              const T* from = grad.const_data_ptr<T>() + (n * sub_vectors + m) * d;
              float* to = out + static_cast<int64_t>(*held.at(p, n)) * d;
              const Vec sign(held.signs ? *held.factors(p, n) : 1.0f);
              for (int64_t i = 0; i < d; i += LANES) {
                const int64_t count = std::min(LANES, d - i);
                store(to + i, at::vec::fmadd(load(from + i, count), sign, load(to + i, count)), count);
              }
            }
          }
        }
      });
    });
  });
  return parts == 1 ? sums.squeeze(2) : sums.sum(2);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rpqfx_cpu, m) {
  m.def("contract(Tensor x, Tensor codebooks, Tensor codes, Tensor? signs, Tensor? bias) -> Tensor", contract);
  m.def("contract_t(Tensor y, Tensor codebooks, Tensor codes, Tensor? signs) -> Tensor", contract_t);
  m.def("gather_sum(Tensor table, Tensor codes, Tensor? signs) -> Tensor", gather_sum);
  m.def("bin_sum(Tensor y, Tensor codes, Tensor? signs, int entries) -> Tensor", bin_sum);
  m.def("bin_rows(Tensor y, Tensor codes, Tensor? signs, int entries) -> Tensor", bin_rows);
  m.def("expand(Tensor codebooks, Tensor codes, Tensor? scale, Tensor? signs, Tensor? ids) -> Tensor", expand);
  m.def("collect(Tensor grad, Tensor codes, Tensor? signs, int books, int entries) -> Tensor", collect);
}
