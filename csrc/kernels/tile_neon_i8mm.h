// The register tile of lut_gemm on matrix products (FEAT_I8MM): 8 channels at a time, pairs of rows by pairs of outputs.
#pragma once
#include "kernels/channel_codes.h"
#include "kernels/dequant_neon.h"

namespace elute {
namespace {

// Half a panel: a step loads 8 vectors of codes and 2 of activations for 16 products; a whole one would load 17.
constexpr int kTileRows = 2 * kGemmRows;
constexpr int kTileVectors = kHalfPanel / kLanes;  // of a row
constexpr int kOperandChannels = 2 * kLutWidth;    // of an output side by side
template <int Bits>
constexpr int kCodeBias = 0;

// Codes u8 [pair of quads][kPanel][kOperandChannels]. A last quad without a partner gets one of zeros.
template <int Bits>
void dequant_operands(const uint8_t* planes, int n_quads, uint8_t* codes) {
  for (int first = 0; first < n_quads; first += kBlockQuads) {
    const int block_quads = smaller(kBlockQuads, n_quads - first);
    for (int quad = 0; quad < block_quads; quad += 2) {
      const Planes<Bits> own(planes, block_quads, quad);
      uint8x16_t first_outputs[Bits], later_outputs[Bits];  // 0-7 and 8-15 of each half: own byte, partner's byte, ..
      if (quad + 1 < block_quads) {
        const Planes<Bits> partner(planes, block_quads, quad + 1);
        for (int p = 0; p < Bits; ++p) {
          first_outputs[p] = vzip1q_u8(own.of[p], partner.of[p]);
          later_outputs[p] = vzip2q_u8(own.of[p], partner.of[p]);
        }
      } else {
        for (int p = 0; p < Bits; ++p) {
          first_outputs[p] = vzip1q_u8(own.of[p], vdupq_n_u8(0));
          later_outputs[p] = vzip2q_u8(own.of[p], vdupq_n_u8(0));
        }
      }
      constexpr int kQuarter = kPanel / 4 * kOperandChannels;
      const Codes first_codes = codes_of<Bits>(first_outputs);
      vst4q_u8(codes, first_codes.low);
      vst4q_u8(codes + 2 * kQuarter, first_codes.high);
      const Codes later_codes = codes_of<Bits>(later_outputs);
      vst4q_u8(codes + kQuarter, later_codes.low);
      vst4q_u8(codes + 3 * kQuarter, later_codes.high);
      codes += 4 * kQuarter;
    }
    planes += block_quads * kHalfPanel * Bits;
  }
}

// The same from channel order: of a panel of the tile that lies `at` bytes into each row.
template <int Bits, int Panel>
void channel_operands(const uint8_t* const* rows, int64_t at, int n_quads, uint8_t* codes) {
  for (int quad = 0; quad < n_quads; quad += 2, codes += 2 * kQuadCodes) {
    uint32_t both[2][kPanel] = {};  // a quad's codes of each output
    for (int i = 0; i < smaller(2, n_quads - quad); ++i)
      store_channel_codes<Bits, Panel, 1>(rows + (quad + i) * kLutWidth, at, reinterpret_cast<uint8_t*>(both[i]), 0);
    for (int output = 0; output < kPanel; output += kLanes)
      vst2q_u32(reinterpret_cast<uint32_t*>(codes) + 2 * output, {vld1q_u32(both[0] + output), vld1q_u32(both[1] + output)});
  }
}

// dot[r][v] = starts[r] + codes * q over `quads` quads, two at a time. A row without a partner is multiplied twice. A quad
// beyond `quads` has activations 0.
template <int Rows>
ELUTE_INLINE void multiply_quads(const uint8_t* codes, const int8_t* q, int64_t q_stride, int quads,
                                 const int32_t (&starts)[Rows], Ints (&dot)[Rows][kTileVectors]) {
  constexpr int kPairs = (Rows + 1) / 2, kOutputPairs = 2 * kTileVectors;
  Product::Partial sums[kPairs][kOutputPairs];
#pragma GCC unroll 4
  for (int p = 0; p < kPairs; ++p) {
    const int32_t pair[2] = {starts[2 * p], starts[smaller(2 * p + 1, Rows - 1)]};
    const int32x2_t start = vld1_s32(pair);
#pragma GCC unroll 16
    for (int o = 0; o < kOutputPairs; ++o) sums[p][o] = vcombine_s32(start, start);
  }
#pragma GCC unroll 1
  for (int quad = 0; quad < quads; quad += 2) {
    Bytes activations[kPairs];
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; ++p)
      activations[p] = vreinterpretq_u8_s8(
          vcombine_s8(vld1_s8(q + 2 * p * q_stride), vld1_s8(q + smaller(2 * p + 1, Rows - 1) * q_stride)));
#pragma GCC unroll 16
    for (int o = 0; o < kOutputPairs; ++o) {
      const Bytes c = load_bytes(codes + o * kBytes);
#pragma GCC unroll 4
      for (int p = 0; p < kPairs; ++p) Product::add(sums[p][o], c, activations[p]);
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; ++p)
#pragma GCC unroll 16
      for (int o = 0; o < kOutputPairs; ++o) keep_in_register(sums[p][o]);
    codes += kPanel * kOperandChannels;
    q += kOperandChannels;
  }
#pragma GCC unroll 4
  for (int p = 0; p < kPairs; ++p) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {  // [output 0, row 0 | row 1 | output 1, row 0 | row 1] -> by row
      dot[2 * p][v] = vuzp1q_s32(sums[p][2 * v], sums[p][2 * v + 1]);
      if (2 * p + 1 < Rows) dot[smaller(2 * p + 1, Rows - 1)][v] = vuzp2q_s32(sums[p][2 * v], sums[p][2 * v + 1]);
    }
  }
}

}  // namespace
}  // namespace elute
