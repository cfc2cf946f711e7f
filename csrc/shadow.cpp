#include "shadow.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace elute {
namespace {

// To `room` values, the first `count` of which stay.
void grow(std::unique_ptr<int32_t[]>& values, int64_t count, int64_t room) {
  auto larger = std::make_unique_for_overwrite<int32_t[]>(room);
  std::copy(values.get(), values.get() + count, larger.get());
  values = std::move(larger);
}

// Residuals that pairs cannot hold, though the sums fit.
bool has_wide(const OutlierRows& o, int64_t row) {
  const auto wide = [](int32_t r) { return r != static_cast<int16_t>(r); };
  return std::any_of(o.residuals + o.starts[row], o.residuals + o.starts[row + 1], wide);
}

}  // namespace

SplitRows split_rows(const ShadowKernels& kernels, const float* x, int64_t n_rows, int64_t k, float scale) {
  SplitRows split{std::make_unique_for_overwrite<int8_t[]>(n_rows * k),
                  std::make_unique_for_overwrite<int32_t[]>(n_rows + 1), nullptr, nullptr, 0};
  int64_t room = 0;
  split.starts[0] = 0;
  for (int64_t r = 0; r < n_rows; ++r) {
    if (room < split.count + k) {
      room = std::max(2 * room, k + n_rows * k / 32);
      grow(split.channels, split.count, room);
      grow(split.residuals, split.count, room);
    }
    const int64_t found = kernels.split_outliers(x + r * k, k, scale, split.q.get() + r * k,
                                                 split.channels.get() + split.count, split.residuals.get() + split.count);
    if (found < 0) {
      const int64_t column = -1 - found;
      char text[160];
      std::snprintf(text, sizeof text, "x[%lld, %lld]: found %g, wanted a finite number of at most 2^24 steps of %g",
                    static_cast<long long>(r), static_cast<long long>(column), static_cast<double>(x[r * k + column]),
                    static_cast<double>(scale));
      throw std::invalid_argument(text);
    }
    split.count += found;
    split.starts[r + 1] = static_cast<int32_t>(split.count);
  }
  return split;
}

bool product_fits_int32(const OutlierRows& o) {
  for (int64_t row = 0; row < o.n_rows; ++row) {
    int64_t steps = 0;
    for (int32_t i = o.starts[row]; i < o.starts[row + 1]; ++i) steps += std::abs(int64_t{o.residuals[i]});
    if (steps >= int64_t{1} << 24) return false;
  }
  return true;
}

void shadow_product(const ShadowKernels& kernels, const OutlierRows& o, const int8_t* weights, int64_t n, int32_t* out) {
  std::vector<ShadowPair> pairs;
  std::vector<int32_t> starts(o.n_rows + 1);
  std::vector<int64_t> wide_rows;
  pairs.reserve((o.starts[o.n_rows] + o.n_rows) / 2 + 1);
  for (int64_t row = 0; row < o.n_rows; ++row) {
    if (has_wide(o, row)) {
      wide_rows.push_back(row);
    } else {
      for (int32_t i = o.starts[row]; i < o.starts[row + 1]; i += 2) {
        const bool two = i + 1 < o.starts[row + 1];
        pairs.push_back({o.at[i], o.at[two ? i + 1 : i],
                         {static_cast<int16_t>(o.residuals[i]), static_cast<int16_t>(two ? o.residuals[i + 1] : 0)}});
      }
    }
    starts[row + 1] = static_cast<int32_t>(pairs.size());
  }
  kernels.shadow_product(pairs.data(), starts.data(), o.n_rows, weights, n, out);
  std::vector<int64_t> sums(wide_rows.empty() ? 0 : n);
  for (int64_t row : wide_rows) {
    const int32_t first = o.starts[row];
    kernels.shadow_row(o.at + first, o.residuals + first, o.starts[row + 1] - first, weights, n, sums.data());
    for (int64_t i = 0; i < n; ++i) out[row * n + i] = static_cast<int32_t>(sums[i]);
  }
}

void shadow_product(const ShadowKernels& kernels, const OutlierRows& o, const int8_t* weights, int64_t n, int64_t* out) {
  for (int64_t row = 0; row < o.n_rows; ++row) {
    const int32_t first = o.starts[row];
    kernels.shadow_row(o.at + first, o.residuals + first, o.starts[row + 1] - first, weights, n, out + row * n);
  }
}

}  // namespace elute
