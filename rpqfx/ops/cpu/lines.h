// Codebooks of at most 16 entries with entries along the lanes, for look-ups within registers.
#pragma once

#include <vector>

#include "tiles.h"

namespace rpqfx {

// Codebooks [R, G, K, d] as float lines over entries, [G, R, d, 16]: entries that are not there are zero.
struct Lines {
  std::vector<float> data;
  int64_t stages, books, d;

  explicit Lines(const Tensor& codebooks)
      : stages(codebooks.size(0)), books(codebooks.size(1)), d(codebooks.size(3)) {
    const int64_t entries = codebooks.size(2);
    data.assign(stages * books * d * NIBBLE, 0.0f);
    by_float(codebooks, [&](auto scalar) {
      using T = decltype(scalar);
      const T* from = codebooks.const_data_ptr<T>();
      for (int64_t r = 0; r < stages; ++r)
        for (int64_t g = 0; g < books; ++g)
          for (int64_t k = 0; k < entries; ++k)
            for (int64_t i = 0; i < d; ++i)
              data[((g * stages + r) * d + i) * NIBBLE + k] = from[((r * books + g) * entries + k) * d + i];
    });
  }
  const float* at(int64_t g) const { return data.data() + g * stages * d * NIBBLE; }
};

}  // namespace rpqfx
