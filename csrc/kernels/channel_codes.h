// The codes of quads in channel order, as products of many rows read them.
#pragma once
#include "kernels/groups_body.h"

namespace elute {
namespace {

// Codes u8 [kPanel][kLutWidth] of panels First to First + Count - 1 of a tile, panel_stride bytes apart, of four channels;
// `at`: of the tile in their rows.
template <int Bits, int First, int Count>
ELUTE_INLINE void store_channel_codes(const uint8_t* const* rows, int64_t at, uint8_t* codes, int64_t panel_stride) {
  for_each_section<Bits>([&]<int FirstPlane, int Planes>() __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int part = 0; part < kTileParts; ++part) {
      Bytes channels[kLutWidth], positions[4];
#pragma GCC unroll 4
      for (int c = 0; c < kLutWidth; ++c)
        channels[c] = load_positions<Planes>(rows[c] + at + kTileLane * FirstPlane, part);
      interleave_channels(channels, positions);
      const auto store = [&](int output, Bytes found) __attribute__((always_inline)) {
        const int panel = output / kPanel - First;
        if (panel < 0 || panel >= Count) return;
        uint8_t* to = codes + panel * panel_stride + output % kPanel * kLutWidth;
        const Bytes shifted = shift_bytes_left<FirstPlane>(found);
        store_bytes(to, FirstPlane == 0 ? shifted : or_bytes(load_bytes(to), shifted));
      };
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int output = i * kHalfPanel + part * kLanes;
        store(output, position_codes<Planes, 0>(positions[i], part));
        store(output + kChannelTile / 2, position_codes<Planes, 1>(positions[i], part));
      }
    }
  });
}

}  // namespace
}  // namespace elute
