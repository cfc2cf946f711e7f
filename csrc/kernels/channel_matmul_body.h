// Decode in channel order: a row times the channels of a matrix that are active. Any four of a segment make a quad, whose
// bytes are interleaved in registers and multiplied. Included by matmul_body.h.
#pragma once
#include "kernels/groups_body.h"

namespace elute {
namespace {

// Tiles whose sums are kept, in the first-level cache, while all channels pass: 16 KiB. The longer the piece of a channel, the
// better it is fetched; 86 tiles at once, 2 bits: 1.13 times the time of 32 and the rest.
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
    int at = 0, segment = 0;
    for (int channel = 0; channel < columns; ++segment, channel += step) {
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
    // Those beyond the last channel are empty: the block before asks ahead for as many as it has itself.
    for (; segment * segment_quads < kBlockQuads; ++segment) {
      ends[segment] = at / kLutWidth;
      pair_sums[segment] = 0;
    }
  }
};

// The quads of a segment.
struct QuadRange {
  const uint8_t* const* rows = nullptr;  // [n * kLutWidth]
  const int8_t* q = nullptr;
  int n = 0;
  uint32_t pair_sums = 0;

  QuadRange() = default;
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
        D::add(sums[0][i], D::template operand<0>(positions[i], part), activations);
        D::add(sums[1][i], D::template operand<1>(positions[i], part), activations);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) keep_in_register(sums[i / 4][i % 4]);
    }
    const Ints uncentred = set_ints(centre * q_sum);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      Ints *low = dot + i * kHalfPanel / kLanes + part, *high = low + kChannelTile / 2 / kLanes;
      *low = add_ints(*low, shift_left<Shift>(add_ints(D::template total<0>(sums[0][i]), uncentred)));
      *high = add_ints(*high, shift_left<Shift>(add_ints(D::template total<1>(sums[1][i]), uncentred)));
    }
  }
}

// Groups whose scales are fetched together, a line each; those of other panels lie far apart. Zen 5, 2 bits, 40 % active: with 2
// 1.15 times the time, with 8 1.02, with 16 1.2.
constexpr int kGroupsAhead = 4;

// Fetches the piece of each row of a segment that a walk reads, row by row, in equal steps: what is fetched in a row lets the
// hardware's own prefetch help. Zen 5, 4 bits, 40 % active: tile by tile across the rows instead 1.2 times the time.
class RowsAhead {
 public:
  RowsAhead(const QuadRange& quads, int64_t at, int64_t bytes, int n_steps)
      : row_(quads.rows),
        end_(quads.rows + quads.n * kLutWidth),
        at_(at),
        n_lines_((bytes + kCacheLine - 1) / kCacheLine),
        step_lines_((quads.n * kLutWidth * n_lines_ + n_steps - 1) / n_steps),
        left_(n_lines_) {}
  ELUTE_INLINE void fetch(int steps) {
    for (int64_t budget = step_lines_ * steps; budget > 0 && row_ != end_;) {
      const int64_t count = budget < left_ ? budget : left_;
      const uint8_t* from = *row_ + at_ + (n_lines_ - left_) * kCacheLine;
      // One instruction: unrolled, each would seem a stream of its own to the hardware. Zen 5: 1.3 times the time.
#pragma GCC unroll 1
      for (int64_t i = 0; i < count; ++i) {
        prefetch(from + i * kCacheLine);
        asm volatile("");
      }
      budget -= count;
      left_ -= count;
      if (left_ > 0) return;
      left_ = n_lines_;
      for (++row_; row_ != end_ && row_[0] == row_[-1];) ++row_;  // a quad filled up
    }
  }

 private:
  const uint8_t *const *row_, *const *end_;
  int64_t at_, n_lines_, step_lines_, left_;
};

// What the float end of a segment adds and when.
struct ChannelEnd {
  float act_scale, x_sum;  // x_sum: of the group's activations so far
  int32_t q_sum;
  bool begins, ends;  // the group: whether this is its first segment that counts, and its last
  int64_t scales_at;  // of the group in the walk's first panel
};

// What a walk over the channels keeps of some tiles.
struct Walk {
  const MatrixView w;
  const int n_panels;          // that the tiles hold
  const int64_t panel_halves;  // from one panel's scales to the next's
  alignas(64) float sums[kWalkTiles * kChannelTile];   // of finished groups
  alignas(64) float group[kWalkTiles * kChannelTile];  // of the one that is not

  Walk(const ChannelMatrix& matrix, int tile_begin, int n_tiles)
      : w(matrix.without_planes()),
        n_panels(smaller(n_tiles * kTilePanels, w.n_panels() - tile_begin * kTilePanels)),
        panel_halves(int64_t{w.n_groups()} * kPanel) {
    for (int i = 0; i < n_tiles * kChannelTile; i += kLanes) store_floats(sums + i, zero_floats());
  }

  // The float end of a panel.
  ELUTE_INLINE void add_panel(int panel, const ChannelEnd& end, const Ints* dot) {
    float *y = sums + panel * kPanel, *unfinished = group + panel * kPanel;
    const Floats act = set_floats(end.act_scale);
    Floats part[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      part[v] = mul(act, to_floats(dot[v]));
      if (!end.begins) part[v] = add(load_floats(unfinished + v * kLanes), part[v]);
    }
    if (end.ends) {
      const int64_t at = end.scales_at + panel * panel_halves;
      Floats total[kVectors];
      for (int v = 0; v < kVectors; ++v) total[v] = load_floats(y + v * kLanes);
      add_group(w, w.scales + at, w.offsets ? w.offsets + at : nullptr, part, end.x_sum, total);
      for (int v = 0; v < kVectors; ++v) store_floats(y + v * kLanes, total[v]);
    } else {
      for (int v = 0; v < kVectors; ++v) store_floats(unfinished + v * kLanes, part[v]);
    }
  }
  // Of all panels of a tile that are there; t: counted from the walk's first tile.
  ELUTE_INLINE void add_tile(int t, const ChannelEnd& end, const Ints* dot) {
    const int first = t * kTilePanels, last = smaller(first + kTilePanels, n_panels);
    for (int panel = first; panel < last; ++panel) add_panel(panel, end, dot + (panel - first) * kVectors);
  }
  // The sum that each product of codes starts from.
  ELUTE_INLINE Ints start(const ChannelEnd& end) const {
    return set_ints(w.affine == Affine::symmetric ? -w.zero * end.q_sum : 0);
  }
  // Fetches scales of the kGroupsAhead groups that follow those in work, the share of `count` of n_tiles tiles from t.
  ELUTE_INLINE void fetch_scales(int64_t first_panel, int group_index, int t, int count, int n_tiles) const {
    const int from = (group_index / kGroupsAhead + 1) * kGroupsAhead;
    const int first = (group_index % kGroupsAhead * n_tiles + t) * kTilePanels;
    for (int line = first; line < first + count * kTilePanels; ++line)
      fetch_scale(first_panel + line / kGroupsAhead, from + line % kGroupsAhead);
  }
  ELUTE_INLINE void fetch_scale(int64_t panel, int group_index) const {
    const int64_t at = panel * panel_halves + int64_t{group_index} * kPanel;
    prefetch(reinterpret_cast<const uint8_t*>(w.scales + at));
    if (w.offsets) prefetch(reinterpret_cast<const uint8_t*>(w.offsets + at));
  }
};

// A segment of a tile, whose codes are `at` bytes into each row. Takes two steps of `ahead`: many lines at once would hold up
// the loads behind them.
template <int Bits>
[[gnu::noinline]] void add_segment(Walk& walk, int t, const QuadRange& quads, int64_t at, const ChannelEnd& end, RowsAhead& ahead) {
  ahead.fetch(1);
  Ints dot[kChannelTile / kLanes];
  for (Ints& of : dot) of = walk.start(end);
  for_each_section<Bits>([&]<int FirstPlane, int Planes>() __attribute__((always_inline)) {
    multiply_positions<Planes, FirstPlane>(quads, at + kTileLane * FirstPlane, end.q_sum, dot);
  });
  ahead.fetch(1);
  walk.add_tile(t, end, dot);
}

// The same of two tiles at once, where one fills half a vector. Zen 5, 2 bits, in cache: 0.8 of the time.
template <int Bits>
[[gnu::noinline]] void add_segment_of_two(Walk& walk, int t, const QuadRange& quads, int64_t at, const ChannelEnd& end, RowsAhead& ahead) {
  ahead.fetch(2);
  typename SectionDot<Bits>::Pair sums;
  const uint8_t* const* rows = quads.rows;
  const int8_t* q = quads.q;
#pragma GCC unroll 1
  for (int quad = 0; quad < quads.n; ++quad, rows += kLutWidth, q += kLutWidth) {
    Bytes channels[kLutWidth], positions[4];
#pragma GCC unroll 4
    for (int c = 0; c < kLutWidth; ++c) channels[c] = load_bytes(rows[c] + at);
    interleave_channels(channels, positions);
    sums.add(positions, broadcast_quad(q));
  }
  Ints dot[2][kChannelTile / kLanes];
  sums.total(walk.start(end), dot);
  ahead.fetch(2);
  walk.add_tile(t, end, dot[0]);
  walk.add_tile(t + 1, end, dot[1]);
}

// Tiles [tile_begin, tile_begin + n_tiles), at most kWalkTiles.
template <int Bits>
void walk_channels(const ChannelMatrix& w, const ActivationsView& x, const uint64_t* active, int tile_begin, int n_tiles,
                   const float* bias, float* y) {
  Walk walk(w, tile_begin, n_tiles);
  const int segment_quads = Segments(walk.w).quads, n_quads = w.k / kLutWidth;
  const int group_quads = w.group_size / kLutWidth, n_groups = walk.w.n_groups();
  const int64_t first_panel = int64_t{tile_begin} * kTilePanels;
  const int64_t tile_bytes = w.tile_bytes(), at = tile_begin * tile_bytes;
  ActiveQuads found[2];
  found[0].gather(w, x, active, 0, segment_quads);
  for (int panel = 0; panel < walk.n_panels; ++panel)
    for (int i = 0; i < smaller(kGroupsAhead, n_groups); ++i) walk.fetch_scale(first_panel + panel, i);
  for (int i = 0, first = 0; first < smaller(kBlockQuads, n_quads); ++i, first += segment_quads)
    RowsAhead(QuadRange(found[0], i), at, n_tiles * tile_bytes, 1).fetch(1);
  ChannelEnd end{};
  end.begins = true;
  end.scales_at = first_panel * walk.panel_halves;
  int group_index = 0, of_group = 0;
  for (int block = 0; block < x.n_blocks; ++block) {
    const ActiveQuads& block_found = found[block % 2];
    ActiveQuads& next = found[(block + 1) % 2];
    const bool last = block + 1 == x.n_blocks;
    if (!last) next.gather(w, x, active, block + 1, segment_quads);
    const int block_quads = smaller(kBlockQuads, n_quads - block * kBlockQuads);
    end.act_scale = x.scales[block];
    const bool finite = end.act_scale * 0.0f == 0.0f;  // if not, the sums of a segment without channels are not either
    for (int i = 0, first = 0; first < block_quads; ++i, first += segment_quads) {
      const QuadRange quads(block_found, i);
      RowsAhead ahead(last ? QuadRange{} : QuadRange(next, i), at, n_tiles * tile_bytes, 2 * n_tiles);
      const int count = smaller(segment_quads, block_quads - first);
      end.q_sum = sum_runs(x, block, first, count).q;
      end.x_sum += end.act_scale * static_cast<float>(end.q_sum);
      of_group += count;
      end.ends = of_group == group_quads;
      const bool more_scales = end.ends && (group_index / kGroupsAhead + 1) * kGroupsAhead < n_groups;
      // A group without channels would add 0.
      if (quads.n > 0 || !finite || (end.ends && !end.begins)) {
        int t = 0;
        if constexpr (Bits == 2 && requires { typename SectionDot<Bits>::Pair; }) {
          for (; t + 1 < n_tiles; t += 2) {
            if (more_scales) walk.fetch_scales(first_panel, group_index, t, 2, n_tiles);
            add_segment_of_two<Bits>(walk, t, quads, at + t * tile_bytes, end, ahead);
          }
        }
        for (; t < n_tiles; ++t) {
          if (more_scales) walk.fetch_scales(first_panel, group_index, t, 1, n_tiles);
          add_segment<Bits>(walk, t, quads, at + t * tile_bytes, end, ahead);
        }
        end.begins = false;
      }
      if (end.ends) {
        end.begins = true;
        end.x_sum = 0;
        end.scales_at += kPanel;
        of_group = 0;
        ++group_index;
      }
    }
  }
  for (int panel = 0; panel < walk.n_panels; ++panel) {
    Floats sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = load_floats(walk.sums + panel * kPanel + v * kLanes);
    store_panel(walk.w, tile_begin * kTilePanels + panel, sums, bias, y);
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
