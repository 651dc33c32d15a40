// The nearest of some centres for each point: the least |c|^2 - 2 x.c, without a matrix of points by centres.
//
// A centre's score is made by the same instructions in every lane and block, so that equal centres have equal scores,
// and of equal scores the first is taken.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <vector>

#include "codes.h"

namespace rpqfx {

// Vectors in the compiler's own terms: a comparison that selects is then two instructions, not a detour by memory.
typedef float Floats __attribute__((vector_size(sizeof(float) * LANES)));
typedef int32_t Ints __attribute__((vector_size(sizeof(int32_t) * LANES)));
inline constexpr int64_t POINTS = LANES >= 16 ? 8 : 4;  // whose sums, lowest and their places are held in registers
inline constexpr int64_t BATCH = 64;                    // points that meet a chunk of centres while it is in the cache
inline constexpr int64_t CHUNK_BYTES = 1 << 14;         // of centres, half a first-level cache
inline constexpr int64_t MOST_UNROLLED = 16;            // dimensions that inner loops are compiled for

template <typename V>
V load_as(const float* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

// Centres [K, d] in blocks of LANES: a line of squared norms, then a line for each dimension. Lines are filled up with
// centres at infinity. All are taken relative to their mean, the origin, as distances far from it would cancel.
struct Centres {
  Tensor entries, mean, kept;
  int64_t count, d, blocks;
  const float *given, *origin;
  float* lines;

  explicit Centres(const Tensor& centres)
      : entries(centres.contiguous()), mean(entries.mean(0)), count(entries.size(0)), d(entries.size(1)),
        blocks((count + LANES - 1) / LANES), given(entries.const_data_ptr<float>()),
        origin(mean.const_data_ptr<float>()) {
    kept = at::zeros({blocks * (d + 1) * LANES}, entries.options());
    lines = kept.data_ptr<float>();
    for (int64_t k = 0; k < count; ++k)
      for (int64_t i = 0; i < d; ++i)
        lines[(k / LANES * (d + 1) + i + 1) * LANES + k % LANES] = given[k * d + i] - origin[i];
    for (int64_t b = 0; b < blocks; ++b) {  // all lanes by the same instructions: equal centres have equal norms
      float* line = lines + b * (d + 1) * LANES;
      Floats norms{};
      for (int64_t i = 1; i <= d; ++i) norms += load_as<Floats>(line + i * LANES) * load_as<Floats>(line + i * LANES);
      __builtin_memcpy(line, &norms, sizeof(norms));
    }
    for (int64_t k = count; k < blocks * LANES; ++k)
      lines[k / LANES * (d + 1) * LANES + k % LANES] = std::numeric_limits<float>::infinity();
  }
};

// The lowest score of each lane so far, and the block it is from; lane 0 of block 0 while none is below infinity.
struct Lowest {
  Floats score;
  Ints block;
};

// POINTS points, given as -2 (x - origin), against blocks begin to end of the centres.
template <int64_t D>
void meet(const float* points, const Centres& centres, int64_t begin, int64_t end, Lowest* lowest) {
  const int64_t d = D ? D : centres.d;
  const float* line = centres.lines + begin * (d + 1) * LANES;
  Floats best[POINTS];
  Ints where[POINTS];
  for (int64_t j = 0; j < POINTS; ++j) best[j] = lowest[j].score, where[j] = lowest[j].block;
  Ints block = Ints{} + static_cast<int32_t>(begin);
  for (int64_t b = begin; b < end; ++b, ++block, line += (d + 1) * LANES) {
    Floats score[POINTS];
    const Floats norms = load_as<Floats>(line);
    for (int64_t j = 0; j < POINTS; ++j) score[j] = norms;
    for (int64_t i = 0; i < d; ++i) {
      const Floats part = load_as<Floats>(line + (i + 1) * LANES);
      for (int64_t j = 0; j < POINTS; ++j) score[j] += part * points[j * d + i];
    }
    for (int64_t j = 0; j < POINTS; ++j) {  // never true for NaN, so places stay in range
      const Ints less = score[j] < best[j];
      best[j] = less ? score[j] : best[j];
      where[j] = less ? block : where[j];
    }
  }
  for (int64_t j = 0; j < POINTS; ++j) lowest[j] = {best[j], where[j]};
}

// The centres of the lowest scores of LANES points, the first of them where there are several.
inline void pick(const Lowest* lowest, int32_t* codes) {
  alignas(64) float turned[2][LANES * LANES];
  constexpr int64_t stride = sizeof(Lowest) / sizeof(float);
  const float* first = reinterpret_cast<const float*>(lowest);
  for (int64_t half = 0; half < 2; ++half)
    at::vec::transpose_mxn<float>(first + half * LANES, stride, turned[half], LANES, LANES, LANES);
  Floats best = load_as<Floats>(turned[0]);
  Ints where = load_as<Ints>(turned[1]) * int32_t(LANES);
  for (int64_t i = 1; i < LANES; ++i) {
    const Floats score = load_as<Floats>(turned[0] + i * LANES);
    const Ints code = load_as<Ints>(turned[1] + i * LANES) * int32_t(LANES) + int32_t(i);
    const Ints less = (score < best) | ((score == best) & (code < where));
    best = less ? score : best;
    where = less ? code : where;
  }
  __builtin_memcpy(codes, &where, sizeof(where));
}

template <int64_t D>
void nearest_of(const float* x, int64_t begin, int64_t end, const Centres& centres, int64_t* codes, float* distances) {
  const int64_t d = D ? D : centres.d;
  const int64_t chunk = std::max<int64_t>(1, CHUNK_BYTES / ((d + 1) * LANES * int64_t(sizeof(float))));
  std::vector<float> turned(BATCH * d);
  Lowest lowest[BATCH];
  int32_t found[BATCH];
  for (int64_t first = begin; first < end; first += BATCH) {
    const int64_t count = std::min(BATCH, end - first);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < d; ++i) turned[j * d + i] = -2.0f * (x[(first + j) * d + i] - centres.origin[i]);
    for (Lowest& each : lowest) each = {Floats{} + std::numeric_limits<float>::infinity(), Ints{}};
    for (int64_t block = 0; block < centres.blocks; block += chunk) {
      const int64_t last = std::min(block + chunk, centres.blocks);
      for (int64_t j = 0; j < count; j += POINTS) meet<D>(&turned[j * d], centres, block, last, lowest + j);
    }
    for (int64_t j = 0; j < count; j += LANES) pick(lowest + j, found + j);
    for (int64_t j = 0; j < count; ++j) {
      const float *point = x + (first + j) * d, *centre = centres.given + found[j] * d;
      float sum = 0;
      for (int64_t i = 0; i < d; ++i) sum += (point[i] - centre[i]) * (point[i] - centre[i]);
      codes[first + j] = found[j];
      distances[first + j] = sum;
    }
  }
}

template <int64_t D = MOST_UNROLLED, typename Run>
void by_length(int64_t d, const Run& run) {
  if constexpr (D == 0) {
    run(std::integral_constant<int64_t, 0>{});
  } else {
    d == D ? run(std::integral_constant<int64_t, D>{}) : by_length<D - 1>(d, run);
  }
}

// Codes [N] of the nearest centres [K, d] of points [N, d], and the squared distances [N].
inline std::tuple<Tensor, Tensor> nearest(const Tensor& given, const Tensor& given_centres) {
  check_place("points", given);
  check_place("centres", given_centres);
  const bool fit = given.dim() == 2 && given_centres.dim() == 2 && given.size(1) == given_centres.size(1) &&
                   given_centres.size(0) > 0 && given_centres.size(0) < std::numeric_limits<int32_t>::max() - LANES;
  TORCH_CHECK_VALUE(fit, "points ", given.sizes(), " do not go with centres ", given_centres.sizes());
  TORCH_CHECK_TYPE(given.scalar_type() == at::kFloat && given_centres.scalar_type() == at::kFloat,
                   "points and centres are float32, got ", given.scalar_type(), " and ", given_centres.scalar_type());
  const Tensor points = given.contiguous();
  const Centres centres(given_centres);
  const int64_t count = points.size(0), d = points.size(1);
  Tensor codes = at::empty({count}, points.options().dtype(at::kLong));
  Tensor distances = at::empty({count}, points.options());
  const int64_t grain = std::max<int64_t>(BATCH, 8 * GRAIN / centres.kept.numel());
  decltype(&nearest_of<0>) search = nullptr;
  by_length(d, [&](auto length) { search = nearest_of<length.value>; });
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    search(points.const_data_ptr<float>(), begin, end, centres, codes.data_ptr<int64_t>(), distances.data_ptr<float>());
  });
  return {codes, distances};
}

}  // namespace rpqfx
