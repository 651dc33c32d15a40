// Products with codes in tiles: through tables where rows are few, else through the expanded matrix, a panel at a time.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ThreadLocalState.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <memory>

#include "byte_tables.h"
#include "expanded_tiles.h"

namespace rpqfx {

inline constexpr int64_t TABLE_ROWS = 32;        // of the input up to which tables are faster than an expanded tile
inline constexpr int64_t TABLE_GRAIN = 1 << 15;  // multiply-adds of tables that are worth another thread
inline constexpr int64_t PANEL_BYTES = 1 << 21;  // of a thread's panel: a product goes through all of x for each

// A product of a few rows: y [B, N] = x [B, D] @ W.T, with a bias or without.
template <typename T>
struct Job {
  const Tiled& held;
  const T* x;
  const T* bias;
  T* y;
};

// Products through tables. All of them together are one piece of work for the threads: with one row, a product alone is
// too short to be shared out evenly.
template <typename T>
struct TableProducts {
  struct Made {
    Lines lines;
    Tables shape;
    int64_t tables, scales, first_block, first_tile;  // where its parts begin
  };
  const std::vector<Job<T>>& jobs;
  const int64_t rows;
  std::vector<Made> made;
  int64_t bytes = 0, scales = 0, blocks = 0, tiles = 0, table_work = 0, sum_work = 0;

  TableProducts(const std::vector<Job<T>>& jobs, int64_t rows) : jobs(jobs), rows(rows) {
    made.reserve(jobs.size());
    for (const Job<T>& job : jobs) {
      Lines lines(job.held.codebooks);
      const Tables shape(job.held.sub_vectors, lines);
      made.push_back({std::move(lines), shape, bytes, scales, blocks, tiles});
      bytes += rows * shape.bytes(), scales += rows * shape.blocks, blocks += rows * shape.blocks, tiles += job.held.count();
      table_work += rows * NIBBLE * job.held.width() * job.held.stages;
      sum_work += rows * job.held.count() * job.held.sub_vectors * job.held.stages * 8;
    }
  }

  void run() const {
    const std::unique_ptr<uint8_t[]> tables(new uint8_t[bytes]);  // not a tensor, whose allocation takes longer
    std::vector<float> factors(scales);
    at::parallel_for(0, blocks, grain(blocks, table_work, TABLE_GRAIN), [&](int64_t begin, int64_t end) {
      each(&Made::first_block, begin, end, [&](int64_t job, int64_t task) { fill(job, task, tables.get(), factors.data()); });
    });
    at::parallel_for(0, tiles, grain(tiles, sum_work, GRAIN), [&](int64_t begin, int64_t end) {
      each(&Made::first_tile, begin, end, [&](int64_t job, int64_t t) { sum(job, t, tables.get(), factors.data()); });
    });
  }

 private:
  static int64_t grain(int64_t tasks, int64_t work, int64_t least) { return std::max<int64_t>(1, least * tasks / (work + 1)); }

  // Calls f with a job and a task of it, for tasks of all jobs in a row.
  template <typename F>
  void each(int64_t Made::* first, int64_t begin, int64_t end, const F& f) const {
    int64_t job = int64_t(made.size()) - 1;
    while (made[job].*first > begin) --job;
    for (int64_t task = begin; task < end; ++task) {
      while (job + 1 < int64_t(made.size()) && made[job + 1].*first <= task) ++job;
      f(job, task - made[job].*first);
    }
  }
  void fill(int64_t job, int64_t task, uint8_t* tables, float* factors) const {
    const Made& of = made[job];
    const Tiled& held = jobs[job].held;
    const int64_t row = task / of.shape.blocks, block = task % of.shape.blocks;
    uint8_t* to = tables + of.tables + row * of.shape.bytes() + of.shape.first(block) * of.shape.stages * 2 * NIBBLE;
    const T* dims = held.template factors<T>(held.dims);
    of.shape.template fill<T>(of.lines, block, jobs[job].x + row * held.width(), dims, to, factors + of.scales + task);
  }
  void sum(int64_t job, int64_t t, const uint8_t* tables, const float* factors) const {
    const Made& of = made[job];
    const Tiled& held = jobs[job].held;
    const T* scale = held.template factors<T>(held.scale);
    const T* bias = jobs[job].bias;
    alignas(64) float sums[TILE_VECTORS];
    for (int64_t row = 0; row < rows; ++row) {
      sum_tile(of.shape, held.codes(t), tables + of.tables + row * of.shape.bytes(), factors + of.scales + row * of.shape.blocks, sums);
      const int64_t n = t * TILE_VECTORS, count = held.of_tile(t);
      for (int64_t j = 0; j < count; j += LANES) {
        const int64_t some = std::min(LANES, count - j);
        Vec value = load(sums + j, some);
        if (scale) value = value * load(scale + n + j, some);
        if (bias) value = value + load(bias + n + j, some);
        store(jobs[job].y + row * held.vectors + n + j, value, some);
      }
    }
  }
};

// An input of a product, contiguous, once it fits.
inline Tensor check_input(const Tensor& input, const Tiled& held) {
  TORCH_CHECK(!input._fw_grad(0).defined(), "forward-mode differentiation does not reach compiled kernels");
  check_place("x", input);
  const Tensor& books = held.codebooks;
  TORCH_CHECK_VALUE(input.dim() > 0 && input.size(-1) == held.width() && input.scalar_type() == books.scalar_type(), "x ",
                    input.sizes(), " of ", input.scalar_type(), " does not go with codebooks ", books.sizes(), " of ",
                    books.scalar_type(), " and tiles ", held.tiles.sizes());
  return input.contiguous();
}

inline Tensor empty_product(const Tensor& x, const Tiled& held) {
  c10::DimVector shape(x.sizes());
  shape.back() = held.vectors;
  return at::empty(shape, x.options());
}

inline int64_t in_halves(int64_t columns) { return (columns + HALF - 1) / HALF * HALF; }

// y [B, N] = x [B, D] @ W.T + bias through the expanded matrix. Each thread has some of the vectors, makes them a panel at
// a time and multiplies by it alone: threads that shared each panel would wait for each other twice a panel.
template <typename T>
void expanded_product(const Tiled& held, const Tensor& x, const Maybe& bias, const Tensor& y) {
  const Lines lines = prepared(held.codebooks);
  const Tensor dims = held.dims ? held.dims->to(at::kFloat) : Tensor();
  const int64_t parts = std::min<int64_t>(at::get_num_threads(), (held.vectors + HALF - 1) / HALF);
  const int64_t part = in_halves((held.vectors + parts - 1) / parts);
  const int64_t most = std::max(HALF, PANEL_BYTES / (held.width() * int64_t(sizeof(T))) / HALF * HALF);
  const int64_t panels = (part + most - 1) / most, panel = in_halves((part + panels - 1) / panels);
  const at::ThreadLocalState modes;  // inference mode, say, which each thread has its own of
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const at::ThreadLocalStateGuard same(modes);
    at::AutoDispatchBelowAutograd guard;
    const Tensor made = at::empty({held.width(), panel}, x.options());
    const int64_t stop = std::min(end * part, held.vectors);
    for (int64_t n = begin * part; n < stop; n += panel) {
      const int64_t some = std::min(panel, stop - n);
      expand_panel<T>(held, lines, held.dims ? dims.const_data_ptr<float>() : nullptr, held.template factors<T>(held.scale), n,
                      n + some, made.data_ptr<T>(), panel);
      Tensor result = y.narrow(1, n, some);
      if (bias) at::addmm_out(result, bias->narrow(0, n, some), x, made.narrow(1, 0, some));
      else at::mm_out(result, x, made.narrow(1, 0, some));
    }
  });
}

// Up to `most` rows (below zero: as many as that is faster for) go through tables.
inline bool by_tables(int64_t rows, int64_t most) { return rows <= (most < 0 ? TABLE_ROWS : most); }

// x [..., D] @ W.T + bias: [..., N], through tables, or through expanded tiles, a panel at a time.
inline Tensor tiled_product(const Tensor& input, const Tensor& codebooks, const Tensor& tiles, int64_t vectors,
                            const Maybe& dims, const Maybe& scale, const Maybe& given_bias, int64_t most) {
  const Tiled held(codebooks, tiles, vectors, dims, scale);
  const Tensor x = check_input(input, held);
  check_vector("bias", given_bias, input, vectors);
  const Maybe bias = given_bias ? Maybe(given_bias->contiguous()) : std::nullopt;
  Tensor y = empty_product(x, held);
  const int64_t rows = x.numel() / held.width();
  if (rows == 0) return y;
  by_float(x, [&](auto scalar) {
    using T = decltype(scalar);
    if (by_tables(rows, most)) {
      const T* shift = bias ? bias->const_data_ptr<T>() : nullptr;
      TableProducts<T>({{held, x.const_data_ptr<T>(), shift, y.data_ptr<T>()}}, rows).run();
      return;
    }
    expanded_product<T>(held, x.view({rows, held.width()}), bias, y.view({rows, vectors}));
  });
  return y;
}

// The same of several inputs, each with a matrix of its own, as one piece of work where they go through tables.
inline std::vector<Tensor> tiled_products(at::TensorList inputs, at::TensorList codebooks, at::TensorList tiles,
                                          at::IntArrayRef vectors, const c10::List<Maybe>& given_biases, int64_t most) {
  const size_t count = inputs.size();
  const bool fit = count > 0 && codebooks.size() == count && tiles.size() == count && vectors.size() == count &&
                   given_biases.size() == count;
  TORCH_CHECK_VALUE(fit, count, " inputs, ", codebooks.size(), " codebooks, ", tiles.size(), " tiles, ", vectors.size(),
                    " numbers of vectors and ", given_biases.size(), " biases");
  std::vector<Tiled> held;
  std::vector<Tensor> xs, ys;
  std::vector<Maybe> biases;
  bool together = true;
  held.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    held.emplace_back(codebooks[i], tiles[i], vectors[i], std::nullopt, std::nullopt);
    xs.push_back(check_input(inputs[i], held[i]));
    const Maybe bias = given_biases.get(i);
    check_vector("bias", bias, xs[i], vectors[i]);
    biases.push_back(bias ? Maybe(bias->contiguous()) : std::nullopt);
    const int64_t rows = xs[i].numel() / held[i].width();
    together = together && rows * held[0].width() == xs[0].numel() && by_tables(rows, most) && xs[i].scalar_type() == xs[0].scalar_type();
  }
  if (!together) {
    for (size_t i = 0; i < count; ++i)
      ys.push_back(tiled_product(xs[i], codebooks[i], tiles[i], vectors[i], std::nullopt, std::nullopt, biases[i], most));
    return ys;
  }
  for (size_t i = 0; i < count; ++i) ys.push_back(empty_product(xs[i], held[i]));
  by_float(xs[0], [&](auto scalar) {
    using T = decltype(scalar);
    std::vector<Job<T>> jobs;
    for (size_t i = 0; i < count; ++i) {
      const T* shift = biases[i] ? biases[i]->const_data_ptr<T>() : nullptr;
      jobs.push_back({held[i], xs[i].const_data_ptr<T>(), shift, ys[i].data_ptr<T>()});
    }
    if (xs[0].numel() > 0) TableProducts<T>(jobs, xs[0].numel() / held[0].width()).run();
  });
  return ys;
}

}  // namespace rpqfx
