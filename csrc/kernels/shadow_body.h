// The shadow kernels over any float vocabulary S. Contracts: shadow.h. Loops that round each operation by itself are plain:
// the compiler makes vectors of each level of them, and the bits stay the same.
#pragma once
#include "kernels/shadow.h"
#include "kernels/shadow_weights_body.h"

namespace elute {
namespace {

template <class S>
int64_t split_outliers(const float* x, int64_t k, float scale, int8_t* q, int32_t* channels, int32_t* residuals) {
  const auto step = S::set1(scale), most = S::set1(kMostSteps);
  int64_t count = 0;
  uint32_t refused = 0;
  const auto split = [&](int64_t at, typename S::Float values, int8_t* to) {
    const auto quotients = S::div(values, step);
    refused |= S::beyond(quotients, most);
    const auto codes = S::round_to_ints(quotients);
    S::store_saturated(to, codes);
    uint32_t outliers = S::outside_int8(codes);
    if (__builtin_expect(outliers == 0, 1)) return;
    int32_t lanes[S::kLanes];
    S::store_ints(lanes, codes);
    for (; outliers; outliers &= outliers - 1) {
      const int lane = __builtin_ctz(outliers);
      channels[count] = static_cast<int32_t>(at + lane);
      residuals[count++] = lanes[lane] > 127 ? lanes[lane] - 127 : lanes[lane] + 128;
    }
  };
  int64_t i = 0;
  for (; i + S::kLanes <= k; i += S::kLanes) split(i, S::load(x + i), q + i);
  if (i < k) {
    int8_t last[S::kLanes];
    split(i, S::load_n(x + i, static_cast<int>(k - i)), last);  // missing lanes are 0: no outliers
    __builtin_memcpy(q + i, last, k - i);
  }
  if (!refused) return count;
  for (i = 0;; ++i)
    if (!(__builtin_fabsf(x[i] / scale) <= kMostSteps)) return -1 - i;
}

// Outputs at .. at + 2 * V * kLanes of all rows. The bytes of two channels are interleaved in registers: laying pairs out
// beforehand would pay only where the same two meet in many rows.
template <class S, int V>
void product_columns(const ShadowPair* pairs, const int32_t* starts, int64_t n_rows, const int8_t* rows, int64_t n,
                     int32_t* out) {
  constexpr int kOutputs = 2 * S::kLanes;
  for (int64_t r = 0; r < n_rows; ++r, out += n) {
    typename S::Ints sums[2 * V];
#pragma GCC unroll 16
    for (int v = 0; v < 2 * V; ++v) sums[v] = S::zero_ints();
    for (int32_t p = starts[r]; p < starts[r + 1]; ++p) {
      const int8_t* first = rows + pairs[p].first * n;
      const int8_t* second = rows + pairs[p].second * n;
      const auto by = S::set1_pair(pairs[p].residuals);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        S::add_rows(first + v * kOutputs, second + v * kOutputs, by, sums[2 * v], sums[2 * v + 1]);
#pragma GCC unroll 16
      for (int v = 0; v < 2 * V; ++v) S::keep_in_register(sums[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) S::store_rows(out + v * kOutputs, sums[2 * v], sums[2 * v + 1]);
  }
}

// Columns in the widest runs that fit, so that a run's weights of all outliers stay in the nearest cache while the rows pass.
template <class S, int V>
int64_t product_from(int64_t at, const ShadowPair* pairs, const int32_t* starts, int64_t n_rows, const int8_t* rows,
                     int64_t n, int32_t* out) {
  for (; at + 2 * V * S::kLanes <= n; at += 2 * V * S::kLanes)
    product_columns<S, V>(pairs, starts, n_rows, rows + at, n, out + at);
  if constexpr (V > 1) return product_from<S, V / 2>(at, pairs, starts, n_rows, rows, n, out);
  return at;
}

template <class S>
void shadow_product(const ShadowPair* pairs, const int32_t* starts, int64_t n_rows, const int8_t* rows, int64_t n,
                    int32_t* out) {
  const int64_t at = product_from<S, S::kShadowVectors>(0, pairs, starts, n_rows, rows, n, out);
  if (at == n) return;
  for (int64_t r = 0; r < n_rows; ++r) {
    for (int64_t i = at; i < n; ++i) out[r * n + i] = 0;
    for (int32_t p = starts[r]; p < starts[r + 1]; ++p) {
      const ShadowPair& pair = pairs[p];
      for (int64_t i = at; i < n; ++i)
        out[r * n + i] += rows[pair.first * n + i] * pair.residuals[0] + rows[pair.second * n + i] * pair.residuals[1];
    }
  }
}

template <class S>
void shadow_row(const int32_t* slots, const int32_t* residuals, int64_t count, const int8_t* rows, int64_t n,
                int64_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = 0;
  for (int64_t o = 0; o < count; ++o) {
    const int8_t* row = rows + slots[o] * n;
    const int64_t by = residuals[o];
    for (int64_t i = 0; i < n; ++i) out[i] += by * row[i];
  }
}

constexpr int64_t kDotRun = 1 << 16;  // * 2^14 of two int8 at most: 2^30

template <class S>
int64_t full_product(const int8_t* q, const int8_t* w, int64_t k, const int32_t* channels, const int32_t* residuals,
                     int64_t count) {
  int64_t total = 0;
  for (int64_t at = 0; at < k; at += kDotRun) {
    const int64_t run = k - at < kDotRun ? k - at : kDotRun;
    int32_t sum = 0;
    for (int64_t i = 0; i < run; ++i) sum += q[at + i] * w[at + i];
    total += sum;
  }
  for (int64_t o = 0; o < count; ++o) total += int64_t{residuals[o]} * w[channels[o]];
  return total;
}

// y = base(i) + scale * float(shadow) + bias, from left to right; what is not there is not added.
template <class Base>
ELUTE_INLINE void finish_floats(const FinishedRow& row, Base base) {
  const float* scales = row.scales;
  const int32_t* shadow = row.shadow;
  const int64_t* wide = row.wide_shadow;
  float* y = row.y;
  if (shadow)
    for (int64_t i = 0; i < row.n; ++i) y[i] = base(i) + scales[i] * static_cast<float>(shadow[i]);
  else if (wide)
    for (int64_t i = 0; i < row.n; ++i) y[i] = base(i) + scales[i] * static_cast<float>(wide[i]);
  else
    for (int64_t i = 0; i < row.n; ++i) y[i] = base(i);
}

// y = scale * float(result + shadow): one rounding of the exact sum, however large.
ELUTE_INLINE void finish_sums(const FinishedRow& row) {
  const auto* result = static_cast<const int32_t*>(row.result);
  const float* scales = row.scales;
  float* y = row.y;
  if (row.wide_shadow) {
    for (int64_t i = 0; i < row.n; ++i) y[i] = scales[i] * static_cast<float>(result[i] + row.wide_shadow[i]);
  } else if (row.shadow) {
    const int32_t* shadow = row.shadow;
    int32_t overflow = 0;
    for (int64_t i = 0; i < row.n; ++i) {
      const auto sum = static_cast<int32_t>(static_cast<uint32_t>(result[i]) + static_cast<uint32_t>(shadow[i]));
      overflow |= (result[i] ^ sum) & (shadow[i] ^ sum);  // its sign: both have the other sign than the sum
      y[i] = scales[i] * static_cast<float>(sum);
    }
    if (overflow < 0)
      for (int64_t i = 0; i < row.n; ++i) y[i] = scales[i] * static_cast<float>(int64_t{result[i]} + shadow[i]);
  } else {
    for (int64_t i = 0; i < row.n; ++i) y[i] = scales[i] * static_cast<float>(result[i]);
  }
}

template <class S>
void finish(const FinishedRow& row) {
  if (row.type == DeviceOutput::int32) {
    finish_sums(row);
  } else if (row.type == DeviceOutput::int8) {
    const auto* result = static_cast<const int8_t*>(row.result);
    const float by = row.output_scale;
    finish_floats(row, [=](int64_t i) { return by * static_cast<float>(result[i]); });
  } else {
    const auto* result = static_cast<const float*>(row.result);
    finish_floats(row, [=](int64_t i) { return result[i]; });
  }
  if (row.bias)
    for (int64_t i = 0; i < row.n; ++i) row.y[i] += row.bias[i];
}

template <class S>
constexpr ShadowKernels shadow_kernels() {
  return {split_outliers<S>, shadow_product<S>,       shadow_row<S>,       full_product<S>,
          weight_column<S>,  weight_column_of_row<S>, quantize_weights<S>, finish<S>};
}

}  // namespace
}  // namespace elute
