// Contextual sparsity: which channels of a linear op's input count for a token. src/elute/flash/sparsity.py has the rule.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/matmul.h"

namespace elute {

// A channel counts unless its score |x| * importance is below the threshold. So a NaN counts, and nothing hides it.
struct ChannelMask {
  std::vector<float> importance;  // [width]; empty: all count
  float threshold = 0;

  float score(int channel, float x) const { return std::fabs(x) * importance[channel]; }
  float masked(int channel, float x) const { return masked(channel, x, threshold); }
  float masked(int channel, float x, float least) const { return score(channel, x) < least ? 0.0f : x; }
};

// The choice of marginal channels by what it costs to have them: thresholds of a channel whose weights are in memory, and of one
// whose weights would have to be read. At a share of 0 both are the mask's own.
struct CacheAware {
  float share = 0;  // 0 to 1

  // n_present of n channels are in memory: where most are, few remain that could make up for more of them.
  float present(float threshold, int n_present, int n) const {
    const float rest = 2 * n_present <= n ? 1.0f : static_cast<float>(n - n_present) / static_cast<float>(n_present);
    return threshold * static_cast<float>(1 - double{share} / 2 * rest);  // the product is exact, fused or not
  }
  float absent(float threshold) const { return threshold * (1.0f + share); }
};

// Histograms of scores: a bin for the exponent and the upper 4 bits of the fraction, so each is some 6 % wide.
constexpr int kScoreBins = 1 << 12;
inline int score_bin(float score) {  // a NaN may carry a sign
  return static_cast<int>((std::bit_cast<uint32_t>(score) & 0x7fffffffu) >> 19);
}

// squares[k]: the sum of w[n, k]^2 over the outputs; the same bits at every level of instructions. codes: scratch of
// panel_codes_bytes(w.k), 64-byte aligned.
void column_squares(const MatmulKernels& kernels, const MatrixView& w, uint8_t* codes, double* squares);

}  // namespace elute
