// Weights of single input channels as int8, over any float vocabulary S. Contracts: shadow.h; the bytes:
// docs/packed-format.md.
#pragma once
#include "kernels/shadow.h"

namespace elute {
namespace {

// round(w / scale) to nearest even, within +-kMostWeight; clipping first rounds to the same. Adding 1.5 * 2^23 leaves the
// whole number in the low bits. `broken` is set where the weight is not finite.
ELUTE_INLINE int8_t quantized_weight(float w, float scale, int32_t& broken) {
  int32_t exponent;
  __builtin_memcpy(&exponent, &w, 4);
  broken |= (exponent & 0x7f800000) == 0x7f800000;
  const float most = kMostWeight;
  float steps = w / scale;
  steps = steps < -most ? -most : steps;
  steps = steps > most ? most : steps;
  const float shifted = steps + 0x1.8p23f;
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  return static_cast<int8_t>(bits);
}

template <class S>
bool quantize_weights(const float* w, int64_t n, float weight_scale, int8_t* out) {
  int32_t broken = 0;
  for (int64_t i = 0; i < n; ++i) out[i] = quantized_weight(w[i], weight_scale, broken);
  return !broken;
}

// Codes of one panel, all of one group: -> i8 of its outputs below n.
template <class S>
ELUTE_INLINE bool quantize_panel(const MatrixView& w, int panel, int group, const uint8_t* codes,
                                 const float* weight_scales, int scale_step, int8_t* out) {
  const int64_t at = (int64_t{panel} * w.n_groups() + group) * kPanel;
  const int64_t first = int64_t{panel} * kPanel;
  const int outputs = w.n - first < kPanel ? static_cast<int>(w.n - first) : kPanel;
  float scales[kPanel], offsets[kPanel], repeated[kPanel], weights[kPanel];
  for (int j = 0; j < kPanel; j += S::kLanes) S::store(scales + j, S::load(w.scales + at + j));
  if (w.affine != Affine::symmetric)
    for (int j = 0; j < kPanel; j += S::kLanes) S::store(offsets + j, S::load(w.offsets + at + j));
  const float* steps = weight_scales + first;
  if (!scale_step) {
    for (int j = 0; j < kPanel; ++j) repeated[j] = *weight_scales;
    steps = repeated;
  } else if (outputs < kPanel) {
    for (int j = 0; j < kPanel; ++j) repeated[j] = weight_scales[first + (j < outputs ? j : 0)];
    steps = repeated;
  }
  // As dequant_row has it.
  if (w.affine == Affine::symmetric) {
    const auto zero = static_cast<float>(w.zero);
    for (int j = 0; j < kPanel; ++j) weights[j] = scales[j] * (static_cast<float>(codes[j]) - zero);
  } else if (w.affine == Affine::zero) {
    for (int j = 0; j < kPanel; ++j) weights[j] = scales[j] * (static_cast<float>(codes[j]) - offsets[j]);
  } else {
    for (int j = 0; j < kPanel; ++j) weights[j] = scales[j] * static_cast<float>(codes[j]) + offsets[j];
  }
  int8_t quantized[kPanel];
  int32_t broken = 0;
  for (int j = 0; j < kPanel; ++j) quantized[j] = quantized_weight(weights[j], steps[j], broken);
  if (outputs == kPanel) __builtin_memcpy(out + first, quantized, kPanel);
  else __builtin_memcpy(out + first, quantized, outputs);
  return !broken;
}

// One section of a quad, Planes of them: bit `channel` of each nibble, to bits First and on of the codes. An output's
// planes lie side by side, so that its bits are 8 apart in a word; a product brings them together:
//   plane            0        1        2        3
//   from bit         0        8        16       24
//   * 0x01020408     +24=24   +17=25   +10=26   +3=27    & 15 << 24; no two products meet in one bit
template <int Planes>
ELUTE_INLINE void gather_section(const uint8_t* quad, int channel, int first, uint8_t* codes) {
  for (int half = 0; half < 2; ++half) {
    const int shift = channel + 4 * half;
    uint8_t* to = codes + half * kHalfPanel;
    for (int j = 0; j < kHalfPanel; ++j) {
      uint32_t code;
      if constexpr (Planes == 4) {
        uint32_t word;
        __builtin_memcpy(&word, quad + 4 * j, 4);
        code = (word >> shift & 0x01010101u) * 0x01020408u >> 24 & 15u;
      } else if constexpr (Planes == 2) {
        uint16_t word;
        __builtin_memcpy(&word, quad + 2 * j, 2);
        const uint32_t bits = word >> shift & 0x0101u;
        code = (bits | bits >> 7) & 3u;
      } else {
        code = quad[j] >> shift & 1u;
      }
      to[j] = static_cast<uint8_t>(to[j] | code << first);
    }
  }
}

template <class S>
bool weight_column(const MatrixView& w, int column, const float* weight_scales, int scale_step, int8_t* out) {
  const int n_quads = w.k / kLutWidth, quad = column / kLutWidth, channel = column % kLutWidth;
  const int block = quad / kBlockQuads * kBlockQuads;
  const int quads = n_quads - block < kBlockQuads ? n_quads - block : kBlockQuads;
  bool finite = true;
  for (int panel = 0; panel < w.n_panels(); ++panel) {
    uint8_t codes[kPanel] = {};
    const uint8_t* section = w.planes + panel * w.panel_bytes() + int64_t{block} * kHalfPanel * w.bits;
    for (int first = 0; first < w.bits;) {
      const int planes = w.bits - first >= 4 ? 4 : w.bits - first >= 2 ? 2 : 1;
      const uint8_t* bytes = section + (quad - block) * kHalfPanel * planes;
      if (planes == 4) gather_section<4>(bytes, channel, first, codes);
      else if (planes == 2) gather_section<2>(bytes, channel, first, codes);
      else gather_section<1>(bytes, channel, first, codes);
      section += quads * kHalfPanel * planes;
      first += planes;
    }
    finite &= quantize_panel<S>(w, panel, column / w.group_size, codes, weight_scales, scale_step, out);
  }
  return finite;
}

// One section of a tile in channel order: field f of its bytes holds positions f * 16 * Planes and on.
template <int Planes>
ELUTE_INLINE void gather_fields(const uint8_t* section, int first, uint8_t* positions) {
  constexpr int kBytesOfSection = kTileLane * Planes;
  for (int field = 0; field < 8 / Planes; ++field)
    for (int i = 0; i < kBytesOfSection; ++i) {
      const int code = section[i] >> (field * Planes) & ((1 << Planes) - 1);
      uint8_t& to = positions[field * kBytesOfSection + i];
      to = static_cast<uint8_t>(to | code << first);
    }
}

template <class S>
bool weight_column_of_row(const ChannelMatrix& w, int channel, const uint8_t* codes, const float* weight_scales,
                          int scale_step, int8_t* out) {
  const MatrixView shared = w.without_planes();
  bool finite = true;
  for (int tile = 0; tile < w.n_tiles(); ++tile) {
    uint8_t positions[kChannelTile] = {}, outputs[kChannelTile];
    const uint8_t* section = codes + tile * w.tile_bytes();
    for (int first = 0; first < w.bits;) {
      const int planes = w.bits - first >= 4 ? 4 : w.bits - first >= 2 ? 2 : 1;
      if (planes == 4) gather_fields<4>(section, first, positions);
      else if (planes == 2) gather_fields<2>(section, first, positions);
      else gather_fields<1>(section, first, positions);
      section += planes * kTileLane;
      first += planes;
    }
    // Position 64h + 16L + 4i + m is output 64h + 16i + 4L + m.
    for (int h = 0; h < kChannelTile; h += 64)
      for (int lane = 0; lane < 4; ++lane)
        for (int i = 0; i < 4; ++i) __builtin_memcpy(outputs + h + 16 * i + 4 * lane, positions + h + 16 * lane + 4 * i, 4);
    for (int p = 0; p < kTilePanels && tile * kTilePanels + p < shared.n_panels(); ++p)
      finite &= quantize_panel<S>(shared, tile * kTilePanels + p, channel / w.group_size, outputs + p * kPanel,
                                  weight_scales, scale_step, out);
  }
  return finite;
}

}  // namespace
}  // namespace elute
