// Codes of residual stages by beam search: the best partial sums go on to the next stage, not only the best one.
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "nearest.h"

namespace rpqfx {

inline constexpr int64_t SMALL_BOOK = 64;  // entries up to which all scores of a stage are made before the best are taken
inline constexpr int64_t RANKED = 64;      // steps of a beam that are put in order by counting
inline constexpr int64_t BLOCKS = 4;  // of centres whose lowest scores are compared with the worst of the beam at once

// A partial sum that a stage may keep; of sums with the same score, the one of the first parent and the first code.
struct Step {
  float score;
  int32_t parent, code;

  bool operator<(const Step& other) const {
    if (score != other.score) return score < other.score;
    return parent != other.parent ? parent < other.parent : code < other.code;
  }
};

// The best steps so far, in no order.
struct Beam {
  std::vector<Step> steps;
  int64_t count = 0, most = 0, worst = 0;

  float limit() const { return count < most ? std::numeric_limits<float>::infinity() : steps[worst].score; }

  void add(const Step& step) {
    steps[count < most ? count++ : worst] = step;
    if (count < most) return;
    worst = 0;
    for (int64_t i = 1; i < most; ++i) worst = steps[worst] < steps[i] ? i : worst;
  }
};

// A bit for each lane that is below the limit.
inline uint64_t below(Floats scores, float limit) {
  const Floats gap = limit - scores, positive = gap > 0 ? gap : Floats{};
  float gaps[LANES];
  __builtin_memcpy(gaps, &positive, sizeof(positive));
  return ~static_cast<uint64_t>(load(gaps).zero_mask()) & ((uint64_t{1} << LANES) - 1);
}

// Puts the sums of one parent with each entry into the beam. `rest` is -2 (what the parent leaves - origin), and
// `error` the squared length of the latter.
template <int64_t D>
void extend(const float* rest, float error, int32_t parent, const Centres& centres, Beam& beam) {
  const int64_t d = D ? D : centres.d, size = (d + 1) * LANES;
  for (int64_t b = 0; b < centres.blocks; b += BLOCKS) {
    const int64_t blocks = std::min(BLOCKS, centres.blocks - b);
    Floats scores[BLOCKS];
    Floats low = Floats{} + std::numeric_limits<float>::infinity();
    for (int64_t j = 0; j < blocks; ++j) {
      const float* line = centres.lines + (b + j) * size;
      Floats score = load_as<Floats>(line) + error;
      for (int64_t i = 0; i < d; ++i) score += load_as<Floats>(line + (i + 1) * LANES) * rest[i];
      low = score < low ? score : low;
      scores[j] = score;
    }
    if (!below(low, beam.limit())) continue;
    for (int64_t j = 0; j < blocks; ++j)
      for (uint64_t lanes = below(scores[j], beam.limit()); lanes; lanes &= lanes - 1) {
        const int64_t lane = __builtin_ctzll(lanes);
        const float score = reinterpret_cast<const float*>(scores)[j * LANES + lane];
        if (score < beam.limit()) beam.add({score, parent, static_cast<int32_t>((b + j) * LANES + lane)});
      }
  }
}

// An integer that is as large as the number is, compared with others; what is no number is larger than all.
inline int32_t key_of(float score) {
  int32_t bits;
  __builtin_memcpy(&bits, &score, sizeof(bits));
  return score == score ? bits ^ (bits >> 31 & 0x7fffffff) : std::numeric_limits<int32_t>::max();
}

// What the beam's sums leave of a point, and their codes, from stage to stage.
struct Paths {
  std::vector<float> rests, next_rests, turned, scores;
  std::vector<int32_t> codes, next_codes, keys;
  std::vector<Step> ordered;
  Beam beam;

  Paths(int64_t most, int64_t stages, int64_t d)
      : rests(most * d), next_rests(most * d), turned(d), codes(most * stages), next_codes(most * stages), ordered(most) {
    beam.steps.resize(most);
  }

  // Puts the steps of keep_best in order, the best first. The place of each is how many are before it: for a few steps
  // that takes less time than comparing and moving them.
  void rank() {
    keys.resize(beam.count);
    for (int64_t i = 0; i < beam.count; ++i) keys[i] = key_of(beam.steps[i].score);
    for (int64_t i = 0; i < beam.count; ++i) {
      const int32_t key = keys[i];
      int32_t before = 0;
      for (int64_t j = 0; j < i; ++j) before += keys[j] <= key;
      for (int64_t j = i + 1; j < beam.count; ++j) before += keys[j] < key;
      ordered[before] = beam.steps[i];
    }
    beam.steps.swap(ordered);
  }
};

// The key that exactly `most` of them do not exceed, or the least one that more do not.
inline int32_t bound_of(const int32_t* keys, int64_t count, int64_t most) {
  int64_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();
  for (int64_t i = 0; i < count; ++i) low = std::min<int64_t>(low, keys[i]), high = std::max<int64_t>(high, keys[i]);
  --low;
  while (high - low > 1) {  // at most `most` keys are up to low, and as many or more up to high
    const int64_t middle = low + (high - low) / 2;
    const int32_t limit = static_cast<int32_t>(middle);
    int32_t up_to = 0;
    for (int64_t i = 0; i < count; ++i) up_to += keys[i] <= limit;
    if (up_to == most) return limit;
    (up_to > most ? high : low) = middle;
  }
  return static_cast<int32_t>(high);
}

// The scores of every parent's sums with each entry, blocks * LANES for each parent.
template <int64_t D>
void score_all(int64_t parents, const Centres& centres, Paths& paths) {
  const int64_t d = D ? D : centres.d, size = (d + 1) * LANES, width = centres.blocks * LANES;
  paths.scores.resize(parents * width);
  for (int64_t parent = 0; parent < parents; ++parent) {
    float error = 0;
    float* turned = paths.turned.data();
    for (int64_t i = 0; i < d; ++i) {
      const float x = paths.rests[parent * d + i] - centres.origin[i];
      error += x * x;
      turned[i] = -2.0f * x;
    }
    for (int64_t b = 0; b < centres.blocks; ++b) {
      const float* line = centres.lines + b * size;
      Floats score = load_as<Floats>(line) + error;
      for (int64_t i = 0; i < d; ++i) score += load_as<Floats>(line + (i + 1) * LANES) * turned[i];
      __builtin_memcpy(&paths.scores[parent * width + b * LANES], &score, sizeof(score));
    }
  }
}

// As extend for every parent, where codebooks are small: all scores first, then a search for the worst that stays. The
// same steps, but without a comparison for each that is in the beam.
inline void keep_best(int64_t parents, const Centres& centres, Paths& paths) {
  const int64_t entries = centres.count, width = centres.blocks * LANES, count = parents * width;
  paths.keys.resize(count);
  for (int64_t i = 0; i < count; ++i) paths.keys[i] = key_of(paths.scores[i]);
  for (int64_t parent = 0; parent < parents; ++parent)  // lanes behind the last entry
    for (int64_t k = entries; k < width; ++k) paths.keys[parent * width + k] = std::numeric_limits<int32_t>::max();
  Beam& beam = paths.beam;
  const int64_t most = std::min(beam.most, parents * entries);
  const int32_t bound = bound_of(paths.keys.data(), count, most);
  int64_t below = 0;
  for (int64_t i = 0; i < count; ++i) below += paths.keys[i] < bound;
  int64_t equal = most - below;  // of those at the bound the first ones
  for (int64_t parent = 0; parent < parents && beam.count < most; ++parent) {
    const int32_t* keys = &paths.keys[parent * width];
    for (int64_t k = 0; k < entries && beam.count < most; ++k) {
      if (keys[k] > bound || (keys[k] == bound && equal-- <= 0)) continue;
      const float score = paths.scores[parent * width + k];
      const float known = score == score ? score : std::numeric_limits<float>::infinity();
      beam.steps[beam.count++] = {known, int32_t(parent), int32_t(k)};
    }
  }
}

// The same where one is kept: the least score, of equal ones the first.
inline void keep_least(int64_t parents, const Centres& centres, Paths& paths) {
  const int64_t entries = centres.count, width = centres.blocks * LANES;
  Step best{std::numeric_limits<float>::infinity(), 0, 0};
  for (int64_t parent = 0; parent < parents; ++parent) {
    const float* scores = &paths.scores[parent * width];
    float least = std::numeric_limits<float>::infinity();
    for (int64_t k = 0; k < entries; ++k) least = scores[k] < least ? scores[k] : least;
    if (least < best.score) best = {least, int32_t(parent), int32_t(std::find(scores, scores + entries, least) - scores)};
  }
  paths.beam.steps[paths.beam.count++] = best;
}

template <int64_t D>
void beam_of(const float* point, const std::vector<Centres>& stages, int64_t most, Paths& paths, int64_t* codes,
             float* distance) {
  const int64_t d = D ? D : stages[0].d, count = stages.size();
  int64_t parents = 1;
  std::copy_n(point, d, paths.rests.data());
  Beam& beam = paths.beam;
  for (int64_t r = 0; r < count; ++r) {
    const Centres& centres = stages[r];
    beam.count = beam.worst = 0;
    beam.most = r + 1 < count ? most : 1;
    const bool small = centres.blocks * LANES <= SMALL_BOOK;
    if (small) {
      score_all<D>(parents, centres, paths);
      if (beam.most == 1) keep_least(parents, centres, paths);
      else keep_best(parents, centres, paths);
    }
    for (int64_t parent = 0; parent < parents && !small; ++parent) {
      float error = 0;
      for (int64_t i = 0; i < d; ++i) {
        const float x = paths.rests[parent * d + i] - centres.origin[i];
        error += x * x;
        paths.turned[i] = -2.0f * x;
      }
      extend<D>(paths.turned.data(), error, parent, centres, beam);
    }
    if (beam.count == 0) beam.add({0, 0, 0});  // nothing compares with NaN, and codes are in range all the same
    // The best goes first, as it lowers the limit of the next stage at once.
    if (small && beam.count <= RANKED) paths.rank();
    else std::sort(beam.steps.begin(), beam.steps.begin() + beam.count);
    parents = beam.count;
    for (int64_t j = 0; j < parents; ++j) {
      const Step& step = beam.steps[j];
      std::copy_n(&paths.codes[step.parent * count], r, &paths.next_codes[j * count]);
      paths.next_codes[j * count + r] = step.code;
      for (int64_t i = 0; i < d; ++i)
        paths.next_rests[j * d + i] = paths.rests[step.parent * d + i] - centres.given[step.code * d + i];
    }
    paths.codes.swap(paths.next_codes);
    paths.rests.swap(paths.next_rests);
  }
  std::copy_n(paths.codes.data(), count, codes);
  *distance = 0;
  for (int64_t i = 0; i < d; ++i) *distance += paths.rests[i] * paths.rests[i];
}

// Codes [N, R] of points [N, d] whose sums of entries of books [R, K, d] come near them, and the squared distances [N].
inline std::tuple<Tensor, Tensor> beam_search(const Tensor& given, const Tensor& books, int64_t most) {
  check_place("points", given);
  check_place("codebooks", books);
  const bool fit = given.dim() == 2 && books.dim() == 3 && given.size(1) == books.size(2) && books.size(0) > 0 &&
                   books.size(1) > 0 && books.size(1) < std::numeric_limits<int32_t>::max() - LANES && most > 0;
  TORCH_CHECK_VALUE(fit, "points ", given.sizes(), " do not go with codebooks ", books.sizes(), " and a beam of ", most);
  TORCH_CHECK_TYPE(given.scalar_type() == at::kFloat && books.scalar_type() == at::kFloat,
                   "points and codebooks are float32, got ", given.scalar_type(), " and ", books.scalar_type());
  const Tensor points = given.contiguous();
  const int64_t count = points.size(0), d = points.size(1), stages = books.size(0);
  int64_t sums = 1;  // that there can be before the last stage: a wider beam holds no more
  for (int64_t r = 1; r < stages && sums < most; ++r) sums *= books.size(1);
  most = std::min(most, sums);
  std::vector<Centres> centres;
  for (const Tensor& book : books.unbind(0)) centres.emplace_back(book);
  Tensor codes = at::empty({count, stages}, points.options().dtype(at::kLong));
  Tensor distances = at::empty({count}, points.options());
  decltype(&beam_of<0>) search = nullptr;
  by_length(d, [&](auto length) { search = beam_of<length.value>; });
  at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
    Paths paths(most, stages, d);
    for (int64_t n = begin; n < end; ++n)
      search(points.const_data_ptr<float>() + n * d, centres, most, paths, codes.data_ptr<int64_t>() + n * stages,
             distances.data_ptr<float>() + n);
  });
  return {codes, distances};
}

}  // namespace rpqfx
