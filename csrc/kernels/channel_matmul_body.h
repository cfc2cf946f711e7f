// Decode in channel order: a row times the channels of a matrix that are active. Any four of a segment make a quad, whose
// bytes are interleaved in registers and multiplied. Included by matmul_body.h.
#pragma once
#include "kernels/groups_body.h"

namespace elute {
namespace {

// Tiles whose sums are kept, in the first-level cache, while all channels pass: 16 KiB. The longer the piece of a channel,
// the better it is fetched.
constexpr int kWalkTiles = 32;

// The active channels of a block in quads, segment by segment. The last quad of a segment is filled up with channels
// whose q is 0.
struct ActiveQuads {
  const uint8_t* rows[kActBlock];
  int8_t q[kActBlock];
  int ends[kBlockQuads];            // of the quads of each segment
  uint32_t pair_sums[kBlockQuads];  // of each segment, like the words of PairSums

  void gather(const ChannelMatrix& w, const ActivationsView& x, const uint64_t* active, int block, int segment_quads) {
    const int first = block * kActBlock, columns = smaller(kActBlock, w.k - first), step = segment_quads * kLutWidth;
    int at = 0;
    for (int segment = 0, channel = 0; channel < columns; ++segment, channel += step) {
      const int end = smaller(channel + step, columns);
      const uint64_t below_end = ~uint64_t{0} >> (kActBlock - end);
      int32_t pairs[2] = {};
      for (uint64_t left = active[block] & below_end >> channel << channel; left; left &= left - 1) {
        const int of_block = __builtin_ctzll(left);
        rows[at] = w.rows[first + of_block] + w.offset;
        q[at] = x.q[first + of_block];
        pairs[at % kLutWidth / 2] += q[at];
        ++at;
      }
      for (; at % kLutWidth != 0; ++at) {
        rows[at] = rows[at - 1];
        q[at] = 0;
      }
      ends[segment] = at / kLutWidth;
      pair_sums[segment] = static_cast<uint32_t>(pairs[0] & 0xffff) | static_cast<uint32_t>(pairs[1]) << 16;
    }
  }
};

// The quads of a segment.
struct QuadRange {
  const uint8_t* const* rows;  // [n * kLutWidth]
  const int8_t* q;
  int n;
  uint32_t pair_sums;

  QuadRange(const ActiveQuads& of, int segment) {
    const int begin = segment ? of.ends[segment - 1] : 0;
    rows = of.rows + begin * kLutWidth;
    q = of.q + begin * kLutWidth;
    n = of.ends[segment] - begin;
    pair_sums = of.pair_sums[segment];
  }
};

// dot += codes * q of a section of a tile, `at` bytes into each row; q_sum: of q.
template <int Planes, int Shift>
ELUTE_INLINE void multiply_positions(const QuadRange& quads, int64_t at, int32_t q_sum, Ints* dot) {
  using D = SectionDot<Planes>;
  const int centre = D::centre(Planes, 0);
#pragma GCC unroll 4
  for (int part = 0; part < kTileParts; ++part) {
    typename D::Partial sums[2][4];
    const auto start = D::start(quads.pair_sums, centre);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] = start;
    const uint8_t* const* rows = quads.rows;
    const int8_t* q = quads.q;
#pragma GCC unroll 1
    for (int quad = 0; quad < quads.n; ++quad, rows += kLutWidth, q += kLutWidth) {
      Bytes channels[kLutWidth], positions[4];
#pragma GCC unroll 4
      for (int c = 0; c < kLutWidth; ++c) channels[c] = load_positions<Planes>(rows[c] + at, part);
      interleave_channels(channels, positions);
      const Bytes activations = broadcast_quad(q);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        D::add(sums[0][i], position_codes<Planes, 0>(positions[i], part), activations);
        D::add(sums[1][i], position_codes<Planes, 1>(positions[i], part), activations);
      }
    }
    const Ints uncentred = set_ints(centre * q_sum);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      Ints& to = dot[i * kHalfPanel / kLanes + part];
      to = add_ints(to, shift_left<Shift>(add_ints(D::total(sums[i / 4][i % 4]), uncentred)));
    }
  }
}

// What the float end of a segment adds to and when.
struct SegmentSums {
  float act_scale, x_sum;  // of the group's activations so far
  int32_t q_sum;
  bool begins, ends;  // the group: whether this is the first segment that counts, and the last
};

// Sums of tiles while all channels pass.
struct WalkSums {
  alignas(64) float sums[kWalkTiles * kChannelTile];   // of finished groups
  alignas(64) float group[kWalkTiles * kChannelTile];  // of the one that is not
};

// A segment of a tile; group: the index of its scales.
template <int Bits>
[[gnu::noinline]] void add_segment(const MatrixView& w, int tile, const QuadRange& quads, int64_t at,
                                   const SegmentSums& segment, int group_index, float* sums, float* group) {
  Ints dot[kChannelTile / kLanes];
  const Ints constant = set_ints(w.affine == Affine::symmetric ? -w.zero * segment.q_sum : 0);
  for (Ints& of : dot) of = constant;
  for_each_section<Bits>([&]<int FirstPlane, int Planes>() __attribute__((always_inline)) {
    multiply_positions<Planes, FirstPlane>(quads, at + kTileLane * FirstPlane, segment.q_sum, dot);
  });
  const Floats act = set_floats(segment.act_scale);
  const int n_panels = smaller(kTilePanels, w.n_panels() - tile * kTilePanels);
  const int64_t panel_halves = int64_t{w.n_groups()} * kPanel;
  int64_t scales_at = int64_t{tile} * kTilePanels * panel_halves + int64_t{group_index} * kPanel;
  for (int panel = 0; panel < n_panels; ++panel, scales_at += panel_halves) {
    Floats part[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      part[v] = mul(act, to_floats(dot[panel * kVectors + v]));
      if (!segment.begins) part[v] = add(load_floats(group + panel * kPanel + v * kLanes), part[v]);
    }
    if (segment.ends) {
      Floats y[kVectors];
      for (int v = 0; v < kVectors; ++v) y[v] = load_floats(sums + panel * kPanel + v * kLanes);
      add_group(w, w.scales + scales_at, w.offsets ? w.offsets + scales_at : nullptr, part, segment.x_sum, y);
      for (int v = 0; v < kVectors; ++v) store_floats(sums + panel * kPanel + v * kLanes, y[v]);
    } else {
      for (int v = 0; v < kVectors; ++v) store_floats(group + panel * kPanel + v * kLanes, part[v]);
    }
  }
}

// Tiles [tile_begin, tile_begin + n_tiles), at most kWalkTiles.
template <int Bits>
void walk_channels(const ChannelMatrix& w, const ActivationsView& x, const uint64_t* active, int tile_begin, int n_tiles,
                   const float* bias, float* y) {
  const MatrixView shared = w.without_planes();
  const int segment_quads = Segments(shared).quads, n_quads = w.k / kLutWidth;
  const int group_quads = w.group_size / kLutWidth;
  WalkSums memory;
  for (int i = 0; i < n_tiles * kChannelTile; i += kLanes) store_floats(memory.sums + i, zero_floats());
  ActiveQuads found[2];
  found[0].gather(w, x, active, 0, segment_quads);
  SegmentSums segment{};
  segment.begins = true;
  int group_index = 0, of_group = 0;
  for (int block = 0; block < x.n_blocks; ++block) {
    const int block_quads = smaller(kBlockQuads, n_quads - block * kBlockQuads);
    segment.act_scale = x.scales[block];
    const bool finite = segment.act_scale * 0.0f == 0.0f;  // if not, the sums of a segment without channels are not either
    for (int i = 0, first = 0; first < block_quads; ++i, first += segment_quads) {
      const QuadRange quads(found[block % 2], i);
      const int count = smaller(segment_quads, block_quads - first);
      segment.q_sum = sum_runs(x, block, first, count).q;
      segment.x_sum += segment.act_scale * static_cast<float>(segment.q_sum);
      of_group += count;
      segment.ends = of_group == group_quads;
      // A group without channels would add 0.
      if (quads.n > 0 || !finite || (segment.ends && !segment.begins)) {
        for (int t = 0; t < n_tiles; ++t) {
          const int tile = tile_begin + t;
          add_segment<Bits>(shared, tile, quads, tile * w.tile_bytes(), segment, group_index,
                            memory.sums + t * kChannelTile, memory.group + t * kChannelTile);
        }
        segment.begins = false;
      }
      if (segment.ends) {
        segment.begins = true;
        segment.x_sum = 0;
        of_group = 0;
        ++group_index;
      }
    }
    if (block + 1 < x.n_blocks) found[(block + 1) % 2].gather(w, x, active, block + 1, segment_quads);
  }
  const int panel_end = smaller((tile_begin + n_tiles) * kTilePanels, shared.n_panels());
  for (int panel = tile_begin * kTilePanels; panel < panel_end; ++panel) {
    Floats sums[kVectors];
    const float* from = memory.sums + (panel - tile_begin * kTilePanels) * kPanel;
    for (int v = 0; v < kVectors; ++v) sums[v] = load_floats(from + v * kLanes);
    store_panel(shared, panel, sums, bias, y);
  }
}

void channel_matmul(const ChannelMatrix& w, const ActivationsView& x, const uint64_t* active, int tile_begin,
                    int tile_end, const float* bias, float* y) {
  with_bits(w.bits, [&]<int Bits>() {
    for (int tile = tile_begin; tile < tile_end; tile += kWalkTiles)
      walk_channels<Bits>(w, x, active, tile, smaller(kWalkTiles, tile_end - tile), bias, y);
  });
}

}  // namespace
}  // namespace elute
