// quantize for levels whose lut_gemm reads tiles. Included after the level's own.
#pragma once

namespace elute {
namespace {

void quantize_tiled(const float* x, int k, const ActivationsView& out) {
  quantize(x, k, out);
  if (!out.tiles) return;
  const int lane = out.row % kTileRows;
  ActTile* tile = out.tiles + int64_t{out.row / kTileRows} * out.n_blocks;
  for (int block = 0; block < out.n_blocks; ++block, ++tile) {
    const int8_t* q = out.q + int64_t{block} * kActBlock;
#pragma GCC unroll 16
    for (int quad = 0; quad < kBlockQuads; ++quad) __builtin_memcpy(tile->q[quad][lane], q + quad * kLutWidth, kLutWidth);
    const PairSums& sums = out.pairs[block];
    tile->scales[lane] = out.scales[block];
    tile->whole[lane] = sums.whole;
    for (int half = 0; half < 2; ++half) tile->halves[half][lane] = sums.halves[half];
  }
}

}  // namespace
}  // namespace elute
