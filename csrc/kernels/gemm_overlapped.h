// lut_gemm's tiles where there are registers for two: while a segment of columns is multiplied, the float end of the one
// before it runs between its quads. Otherwise the multipliers wait for it: Zen 5, one thread, 128 rows, groups
// of 64 0.79 of their peak instead of 0.71, of 32 0.70 instead of 0.59 (docs/log.md).
// Included by lut_gemm_body.h. Bit for bit what gemm_rows gives.
#pragma once

namespace elute {
namespace {

// Walks the segments of the columns in the scratch, for a tile of rows after the other.
template <int SegmentQuads>
struct TileCursor {
  const Gemm& g;
  const int n_quads, first_of_group;
  int row = 0, quad = 0;     // of the tile; of the columns in work
  int of_group;              // quads of the group before this segment
  int64_t group_at = 0;      // of the group's scales in the scratch
  const ActTile* tile;
  const uint8_t* codes;

  TileCursor(const Gemm& gemm, int block, int quads)
      : g(gemm),
        n_quads(quads),
        first_of_group(block * kBlockQuads % gemm.group_quads),
        of_group(first_of_group),
        tile(gemm.x.tiles + block),
        codes(gemm.scratch.codes) {}

  const int8_t* q() const { return &tile->q[quad % kBlockQuads][0][0]; }
  const uint32_t* pair_words() const { return tile->words(quad % kBlockQuads, SegmentQuads); }
  bool begins_group() const { return of_group == 0; }
  bool ends_group() const { return of_group + SegmentQuads == g.group_quads; }
  void next() {
    quad += SegmentQuads;
    codes += SegmentQuads * (kPanel * kLutWidth);
    if (quad % kBlockQuads == 0) ++tile;
    of_group += SegmentQuads;
    if (of_group == g.group_quads) {
      of_group = 0;
      group_at += kPanel;
    }
    if (quad < n_quads) return;
    tile += g.x.n_blocks - quad / kBlockQuads;
    quad = 0;
    codes = g.scratch.codes;
    row += kTileRows;
    of_group = first_of_group;
    group_at = 0;
  }
};

// What the float end of a segment reads and writes.
struct SegmentEnd {
  const float* act_scales;       // of the tile's rows
  const float *scale, *offset;   // [kPanel]
  float *sums, *group, *x_sums;  // of the tile's first row in the scratch
  bool ends_group;
  float own_x_sums[kTileRows];  // of the segment's activations, where it is a group
  alignas(32) float taken[8];   // centre * (sum of q) of the rows: what the products of uncentred codes have too much
};

template <class D, int SegmentQuads, Affine Kind, bool Whole>
ELUTE_INLINE void describe(const TileCursor<SegmentQuads>& at, SegmentEnd& end) {
  const GemmScratch& scratch = at.g.scratch;
  end.act_scales = at.tile->scales;
  end.scale = scratch.scales + at.group_at;
  end.offset = scratch.offsets + at.group_at;
  end.sums = scratch.sums + int64_t{at.row} * kPanel;
  end.group = scratch.group + int64_t{at.row} * kPanel;
  end.x_sums = scratch.x_sums + at.row;
  end.ends_group = at.ends_group();
  if constexpr (Kind == Affine::symmetric) {
    D::centre_sums(at.pair_words(), at.g.centre, end.taken);
  } else {
    for (int r = 0; r < kTileRows; ++r) {
      const float term = end.act_scales[r] * static_cast<float>(both_pairs(at.pair_words()[r]));
      if (Whole) end.own_x_sums[r] = term;
      else end.x_sums[r] = at.begins_group() ? term : end.x_sums[r] + term;
    }
  }
}

// The float end of output vector v in row r. A group of several segments gathers in its own sums, which start at 0.
template <Affine Kind, bool Whole>
ELUTE_INLINE void finish_vector(const SegmentEnd& end, int r, int v, Ints dot) {
  const int64_t at = r * kPanel + v * kLanes;
  // Integers below 2^24: their float difference is that of the integers, and its pipe has nothing to do. Sums that
  // begin at -taken would cost broadcasts before the first product.
  Floats centred = to_floats(dot);
  if constexpr (Kind == Affine::symmetric) centred = sub(centred, set_floats(end.taken[r]));
  const Floats part = mul(set_floats(end.act_scales[r]), centred);
  if constexpr (Whole) {
    add_group_vector<Kind>(end.sums + at, load_floats(end.scale + v * kLanes), end.offset + v * kLanes,
                           Kind == Affine::symmetric ? 0 : end.own_x_sums[r], part);
  } else {
    store_floats(end.group + at, add(load_floats(end.group + at), part));
  }
}

template <Affine Kind>
void finish_group(const SegmentEnd& end) {
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      float* group = end.group + r * kPanel + v * kLanes;
      add_group_vector<Kind>(end.sums + r * kPanel + v * kLanes, load_floats(end.scale + v * kLanes),
                             end.offset + v * kLanes, end.x_sums[r], load_floats(group));
      store_floats(group, zero_floats());
    }
  }
}

// All whole tiles times the columns from `block` that are in the scratch, which are whole segments; returns the first
// row that is left. Not Whole: groups of several segments.
template <class D, int SegmentQuads, Affine Kind, bool Whole>
[[gnu::noinline]] int gemm_overlapped(const Gemm& g, int block, int n_quads) {
  constexpr int kAll = kTileRows * kVectors;
  const int last = g.n_rows / kTileRows * kTileRows;
  TileCursor<SegmentQuads> at(g, block, n_quads);
  SegmentEnd before;
  Ints dots[kTileRows][kVectors];  // of the segment before
  const auto nothing = [](int) { return 0u; };
  multiply_quads<D, kTileRows>(at.codes, at.q(), kLutWidth, kTileRows * kLutWidth, SegmentQuads, nothing, 0, dots);
  describe<D, SegmentQuads, Kind, Whole>(at, before);
  const int n_segments = last / kTileRows * (n_quads / SegmentQuads);
  const int lines = static_cast<int>((g.ahead_bytes / kCacheLine + n_segments - 1) / n_segments);  // a segment
  const uint8_t *ahead = g.ahead, *const ahead_end = ahead + g.ahead_bytes;
  for (at.next(); at.row < last; at.next()) {
    for (int i = 0; i < lines && ahead < ahead_end; ++i, ahead += kCacheLine) prefetch(ahead);
    const uint8_t* codes = at.codes;
    const int8_t* q = at.q();
    typename D::Partial partial[kTileRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) partial[r][v] = typename D::Partial{};
#pragma GCC unroll 16
    for (int quad = 0; quad < SegmentQuads; ++quad) {
      add_quad<D>(partial, codes + quad * (kPanel * kLutWidth), q + quad * (kTileRows * kLutWidth), kLutWidth);
#pragma GCC unroll 8
      for (int i = quad * kAll / SegmentQuads; i < (quad + 1) * kAll / SegmentQuads; ++i)
        finish_vector<Kind, Whole>(before, i / kVectors, i % kVectors, dots[i / kVectors][i % kVectors]);
    }
    if (!Whole && before.ends_group) finish_group<Kind>(before);
    describe<D, SegmentQuads, Kind, Whole>(at, before);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) dots[r][v] = D::total(partial[r][v]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) finish_vector<Kind, Whole>(before, r, v, dots[r][v]);
  if (!Whole && before.ends_group) finish_group<Kind>(before);
  return last;
}

// The rows of whole tiles, where the columns suit; returns the first row that is left.
template <class D>
int gemm_overlapped_rows(const Gemm& g, int block, int n_quads) {
  const bool whole = g.segment_quads == g.group_quads;
  // Tiles are counted from the activations' first row.
  if (!g.x.tiles || g.x.row != 0 || g.n_rows < kTileRows || n_quads % g.segment_quads != 0 || g.rest != 0) return 0;
  int row = 0;
  with_affine(g.w.affine, [&]<Affine Kind>() {
    if (whole && g.segment_quads == kBlockQuads) row = gemm_overlapped<D, kBlockQuads, Kind, true>(g, block, n_quads);
    else if (whole && g.segment_quads == kBlockQuads / 2)
      row = gemm_overlapped<D, kBlockQuads / 2, Kind, true>(g, block, n_quads);
    else if (g.segment_quads == kBlockQuads) row = gemm_overlapped<D, kBlockQuads, Kind, false>(g, block, n_quads);
  });
  return row;
}

}  // namespace
}  // namespace elute
