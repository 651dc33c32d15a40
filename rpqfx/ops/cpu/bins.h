// Sums into bins, one for each entry: the adjoint of sums of gathers.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "codes.h"

namespace rpqfx {

// bins[code(p, n), :rows] += sign * y[n, :rows] over all vectors, for up to WIDE rows.
template <int V, bool EDGE, bool SIGNED, typename T, typename Code>
void scatter_lines(const T* y, int64_t stride, const Codes<Code>& codes, int64_t p, int64_t rows, float* bins,
                   int64_t bins_line) {
  const Code* code = codes.at(p, 0);
  for (int64_t n = 0; n < codes.vectors; ++n) {
    float* bin = bins + static_cast<int64_t>(code[n]) * bins_line;
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
void scatter(const T* y, int64_t stride, const Codes<Code>& codes, int64_t p, int64_t rows, float* bins,
             int64_t bins_line) {
  with_shape(rows > LANES, rows % LANES != 0, codes.signs != nullptr, [&](auto wide, auto edge, auto with_signs) {
    scatter_lines<decltype(wide)::value + 1, decltype(edge)::value, decltype(with_signs)::value>(
        y, stride, codes, p, rows, bins, bins_line);
  });
}

// Lines of a [samples, N, length] tensor, summed into bins by codes.
template <typename T, typename Code>
void fill_bins(const T* y, int64_t samples, int64_t line, int64_t length, const Codes<Code>& codes, int64_t entries,
               float* bins, int64_t bins_sample, int64_t bins_line) {
  const int64_t blocks = (length + WIDE - 1) / WIDE;
  at::parallel_for(0, samples * blocks * codes.uses, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / (blocks * codes.uses), from = task / codes.uses % blocks * WIDE;
      const int64_t rows = std::min(WIDE, length - from), width = rows > LANES ? WIDE : LANES, p = task % codes.uses;
      const T* first = y + sample * codes.vectors * line + from;
      float* out = bins + sample * bins_sample + p * entries * bins_line + from;
      if (rows == width) {
        for (int64_t k = 0; k < entries; ++k) std::fill_n(out + k * bins_line, width, 0.0f);
        scatter(first, line, codes, p, rows, out, bins_line);
      } else {  // whole vectors would reach into the next line
        sums.assign(entries * width, 0.0f);
        scatter(first, line, codes, p, rows, sums.data(), width);
        for (int64_t k = 0; k < entries; ++k) std::copy_n(sums.data() + k * width, rows, out + k * bins_line);
      }
    }
  });
}

// y [B, N, L] summed into bins by codes: [B, R, M, K, L], float32.
inline Tensor bin_sum(const Tensor& y, const Tensor& codes, const Maybe& signs, int64_t entries) {
  check_codes(codes, signs);
  check_place("y", y);
  TORCH_CHECK_VALUE(entries > 0 && y.dim() == 3 && y.is_contiguous() && y.size(1) == codes.size(2), "y ", y.sizes(),
                    " does not go with codes ", codes.sizes(), " and ", entries, " entries");
  const int64_t samples = y.size(0), length = y.size(2), uses = codes.size(0) * codes.size(1);
  Tensor bins = at::empty({samples, codes.size(0), codes.size(1), entries, length}, y.options().dtype(at::kFloat));
  by_float(y, [&](auto scalar) {
    by_code(codes, signs, entries, [&](auto held) {
      fill_bins(y.const_data_ptr<decltype(scalar)>(), samples, length, length, held, entries, bins.data_ptr<float>(),
                uses * entries * length, length);
    });
  });
  return bins;
}

// y [B, N] as lines [ceil(B / WIDE), N, WIDE] of float32, zero past the last row.
template <typename T>
void turn(const T* y, int64_t rows, int64_t vectors, float* lines) {
  const int64_t tiles = (vectors + LANES - 1) / LANES, blocks = (rows + WIDE - 1) / WIDE;
  at::parallel_for(0, blocks * tiles, 16, [&](int64_t begin, int64_t end) {
    alignas(64) float part[LANES * LANES];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / tiles, n = task % tiles * LANES, count = std::min(LANES, vectors - n);
      for (int64_t from = 0; from < WIDE; from += LANES) {
        for (int64_t i = 0; i < LANES; ++i) {
          const int64_t row = block * WIDE + from + i;
          (row < rows ? load(y + row * vectors + n, count) : Vec(0)).store(part + i * LANES);
        }
        float* out = lines + (block * vectors + n) * WIDE + from;
        at::vec::transpose_mxn<float>(part, LANES, out, WIDE, LANES, count);
      }
    }
  });
}

// Rows [B, N] of a batch summed into bins by codes, some rows at a time, in memory that serves them all.
class RowBins {
 public:
  RowBins(const Tensor& codes, const Maybe& signs, int64_t entries, int64_t rows)
      : codes_(codes), signs_(signs), entries_(entries), uses_(codes.size(0) * codes.size(1)) {
    const int64_t fit = std::max(BIN_ELEMENTS / (uses_ * entries * WIDE), BIN_BLOCKS);
    const int64_t blocks = std::min(fit, (rows + WIDE - 1) / WIDE);
    at_once = blocks * WIDE;
    const auto floats = codes.options().dtype(at::kFloat);
    lines_ = at::empty({codes.size(2) * at_once}, floats);
    bins_ = at::empty({uses_ * entries * (at_once + LANES)}, floats);  // lines are apart, so as not to share cache sets
  }

  // y [b, N], b up to at_once: [R, M, K, b].
  Tensor fill(const Tensor& y) {
    const int64_t rows = y.size(0), vectors = y.size(1), blocks = (rows + WIDE - 1) / WIDE;
    const int64_t line = blocks * WIDE + LANES;
    by_float(y, [&](auto scalar) {
      turn(y.const_data_ptr<decltype(scalar)>(), rows, vectors, lines_.data_ptr<float>());
    });
    by_code(codes_, signs_, entries_, [&](auto held) {
      fill_bins(lines_.const_data_ptr<float>(), blocks, WIDE, WIDE, held, entries_, bins_.data_ptr<float>(), WIDE,
                line);
    });
    const Tensor filled = bins_.narrow(0, 0, uses_ * entries_ * line);
    return filled.view({codes_.size(0), codes_.size(1), entries_, line}).narrow(3, 0, rows);
  }

  int64_t at_once;

 private:
  const Tensor& codes_;
  const Maybe& signs_;
  int64_t entries_, uses_;
  Tensor lines_, bins_;
};

}  // namespace rpqfx
