// The register tile of lut_gemm on dot products of signed bytes (FEAT_DotProd).
#pragma once
#include "kernels/channel_codes.h"
#include "kernels/dequant_neon.h"

namespace elute {
namespace {

constexpr int kTileRows = kGemmRows;
constexpr int kTileVectors = kPanel / kLanes;   // of a row
constexpr int kTileQuads = 4;                   // multiplied in a step: a row's activations of a step are one vector
constexpr int kOperandChannels = kLutWidth;     // of an output side by side
template <int Bits>
constexpr int kCodeBias = Bits == 8 ? 128 : 0;  // codes are multiplied as code - kCodeBias

// Codes u8 [quad][kPanel][kLutWidth], less kCodeBias; zeros up to the next multiple of kTileQuads.
template <int Bits>
void dequant_operands(const uint8_t* planes, int n_quads, uint8_t* codes) {
  if constexpr (kCodeBias<Bits> == 0) {
    dequant_quads<Bits>(planes, n_quads, codes);
  } else {
    const uint8x16_t bias = vdupq_n_u8(kCodeBias<Bits>);
    for_each_quad<Bits>(planes, n_quads, [&](int quad, Codes of_quad) __attribute__((always_inline)) {
      for (int c = 0; c < 4; ++c) {
        of_quad.low.val[c] = veorq_u8(of_quad.low.val[c], bias);
        of_quad.high.val[c] = veorq_u8(of_quad.high.val[c], bias);
      }
      store_codes(of_quad, codes + int64_t{quad} * kQuadCodes);
    });
  }
  for (int quad = n_quads; quad % kTileQuads != 0; ++quad)
    for (int i = 0; i < kQuadCodes; i += kBytes) vst1q_u8(codes + quad * kQuadCodes + i, vdupq_n_u8(0));
}

// The same from channel order: of a panel of the tile that lies `at` bytes into each row.
template <int Bits, int Panel>
void channel_operands(const uint8_t* const* rows, int64_t at, int n_quads, uint8_t* codes) {
  const uint8x16_t bias = vdupq_n_u8(kCodeBias<Bits>);
  for (int quad = 0; quad < (n_quads + kTileQuads - 1) / kTileQuads * kTileQuads; ++quad, codes += kQuadCodes) {
    if (quad < n_quads) store_channel_codes<Bits, Panel, 1>(rows + quad * kLutWidth, at, codes, 0);
    for (int i = 0; i < kQuadCodes; i += kBytes)
      vst1q_u8(codes + i, quad < n_quads ? veorq_u8(vld1q_u8(codes + i), bias) : vdupq_n_u8(0));
  }
}

// dot[r][v] = starts[r] + codes * q over `quads` quads. Activations are taken from their lanes; those beyond a row are 0.
template <int Rows>
ELUTE_INLINE void multiply_quads(const uint8_t* codes, const int8_t* q, int64_t q_stride, int quads,
                                 const int32_t (&starts)[Rows], Ints (&dot)[Rows][kTileVectors]) {
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) dot[r][v] = vdupq_n_s32(starts[r]);
#pragma GCC unroll 1
  for (int quad = 0; quad < quads; quad += kTileQuads) {
    int8x16_t activations[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) activations[r] = vld1q_s8(q + r * q_stride);
    const auto add_quad = [&]<int Lane>() __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) {
        const int8x16_t c = vreinterpretq_s8_u8(load_bytes(codes + Lane * kQuadCodes + v * kBytes));
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) dot[r][v] = vdotq_laneq_s32(dot[r][v], c, activations[r], Lane);
      }
    };
    add_quad.template operator()<0>();
    add_quad.template operator()<1>();
    add_quad.template operator()<2>();
    add_quad.template operator()<3>();
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) keep_in_register(dot[r][v]);
    codes += kTileQuads * kQuadCodes;
    q += kTileQuads * kLutWidth;
  }
}

}  // namespace
}  // namespace elute
