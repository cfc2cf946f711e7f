// Integer matmuls on quads: lookup for few rows (T-MAC), dequantize-and-multiply for many (T-MAN), same result.
// docs/packed-format.md specifies the bytes; src/elute/kernels/*/reference.py the arithmetic, operation by operation.
// No kernel allocates, throws or knows of threads: callers split panels.
#pragma once
#include <cstdint>

// Shared headers are compiled once per ISA: an inline function that the linker could merge would take one ISA's code to
// a CPU that lacks it, so these are never emitted.
#define ELUTE_INLINE inline __attribute__((always_inline))

namespace elute {

constexpr int kLutWidth = 4;
constexpr int kPanel = 32;                       // outputs packed side by side
constexpr int kHalfPanel = kPanel / 2;           // low nibbles: outputs 0-15, high nibbles: 16-31
constexpr int kActBlock = 64;                    // activations that share a scale
constexpr int kBlockQuads = kActBlock / kLutWidth;
constexpr int kSumRun = 16;                      // activations whose sum is kept: the smallest weight group
constexpr int kTableBytes = 16;
constexpr int kPlanesPadding = 64;               // bytes that kernels may read past the planes
constexpr int kActPadding = 8;                   // and past q: lut_multiply loads 4 quads where it wants 2

enum class Affine : int { symmetric = 0, zero = 1, min = 2 };

struct MatrixView {
  const uint8_t* planes;    // kPlanesPadding readable bytes must follow
  const uint16_t* scales;   // f16 [n_panels][k / group_size][kPanel]
  const uint16_t* offsets;  // like scales; null when symmetric
  int n, k, bits, group_size, zero;
  Affine affine;

  ELUTE_INLINE int n_panels() const { return (n + kPanel - 1) / kPanel; }
  ELUTE_INLINE int64_t panel_bytes() const { return int64_t{k / kLutWidth} * kHalfPanel * bits; }
  ELUTE_INLINE int n_groups() const { return k / group_size; }
};

// Sums of q over channels 0 and 1 (low 16 bits of a word) and 2 and 3 (high 16 bits) of the quads of a block, of its
// halves and of its quarters: the columns that a weight group and a block can share.
struct PairSums {
  uint32_t whole, halves[2], quarters[4], unused;

  // Of `quads` quads from quad `first` of the block: 16, 8, 4, or what is left of the row.
  ELUTE_INLINE uint32_t of(int first, int quads) const {
    return quads > 8 ? whole : quads > 4 ? halves[first / 8] : quarters[first / 4];
  }
};
ELUTE_INLINE int32_t both_pairs(uint32_t word) { return static_cast<int16_t>(word) + (static_cast<int32_t>(word) >> 16); }

// Outputs that a row of the channel order (docs/packed-format.md) holds together.
constexpr int kChannelTile = 128;
constexpr int kTilePanels = kChannelTile / kPanel;
constexpr int kTileLane = 16;  // bytes of one plane of a channel and tile

// A matrix in channel order.
struct ChannelMatrix {
  const uint8_t* const* rows;  // [k] where each channel's row begins, anywhere; those of channels that are not active are not read
  int64_t offset;              // of this matrix within a row, which may hold several; nothing beyond its tiles is read
  const uint16_t* scales;      // as in MatrixView
  const uint16_t* offsets;
  int n, k, bits, group_size, zero;
  Affine affine;

  ELUTE_INLINE int n_tiles() const { return (n + kChannelTile - 1) / kChannelTile; }
  ELUTE_INLINE int64_t tile_bytes() const { return int64_t{kTileLane} * bits; }
  ELUTE_INLINE int64_t row_bytes() const { return n_tiles() * tile_bytes(); }
  // What both orders share.
  ELUTE_INLINE MatrixView without_planes() const { return {nullptr, scales, offsets, n, k, bits, group_size, zero, affine}; }
};

// One block of kTileRows rows, in the order in which lut_gemm's overlapped tiles read it: one stream instead of one a row.
constexpr int kTileRows = 6;  // 12 registers of sums, 12 of the segment before, 6 of activations, 1 of codes: of 32
struct alignas(64) ActTile {
  int8_t q[kBlockQuads][kTileRows][kLutWidth];
  float scales[8];                 // of the rows; 2 are unused
  uint32_t whole[8], halves[2][8]; // PairSums words of the rows

  // Of `quads` quads from quad `first`: the whole block or one of its halves.
  ELUTE_INLINE const uint32_t* words(int first, int quads) const { return quads > 8 ? whole : halves[first / 8]; }
};

// Rows of activations after quantize. K is padded with zeros to whole blocks.
struct ActivationsView {
  int8_t* q;        // [n_rows][n_blocks * kActBlock]; kActPadding readable bytes must follow
  float* scales;    // [n_rows][n_blocks]
  int32_t* sums;    // [n_rows][n_blocks * kActBlock / kSumRun]  of q
  PairSums* pairs;  // [n_rows][n_blocks]
  uint8_t* tables;  // [n_rows][n_blocks * kBlockQuads][kTableBytes], 64-byte aligned; null: not wanted
  int32_t* lows;    // [n_rows][n_blocks * kActBlock / kSumRun]  of the smallest subset sums; null with tables
  int n_blocks;
  ActTile* tiles = nullptr;  // [n_rows / kTileRows, rounded up][n_blocks]; null: not wanted
  int row = 0;               // which row of its tile's the view's first one is, counted from the first tile

  ELUTE_INLINE ActivationsView from_row(int n) const {
    ActivationsView view = from_block(int64_t{n} * n_blocks);
    view.tiles = tiles;
    view.row = row + n;
    return view;
  }
  // Rows begin n_blocks apart all the same.
  ELUTE_INLINE ActivationsView from_block(int64_t block) const {
    const int64_t runs = block * (kActBlock / kSumRun);
    return {q + block * kActBlock, scales + block, sums + runs, pairs + block,
            tables ? tables + block * kBlockQuads * kTableBytes : nullptr, lows ? lows + runs : nullptr, n_blocks,
            tiles ? tiles + block : nullptr, row};
  }
};

// Columns that lut_gemm dequantizes at a time: their codes, 16 KiB, and two rows of activations stay in a first-level
// cache of 32 KiB while all rows pass.
constexpr int kGemmColumns = 512;
constexpr int kGemmGroups = kGemmColumns / kSumRun + 1;
// Scratch of lut_gemm, 64-byte aligned: codes, scales and offsets of those columns, and the sums of all rows.
constexpr int64_t gemm_scratch_bytes(int n_rows) {
  return int64_t{kGemmColumns} * kPanel + 2 * kGemmGroups * kPanel * 4 + int64_t{n_rows} * (2 * kPanel + 1) * 4;
}
// The same of channel_gemm, which has the panels of a tile in work.
constexpr int64_t panel_scratch_bytes(int n_rows) { return (gemm_scratch_bytes(n_rows) + 63) / 64 * 64; }
constexpr int64_t channel_gemm_scratch_bytes(int n_rows) { return kTilePanels * panel_scratch_bytes(n_rows); }
// Codes of one panel as lut_dequant writes them.
constexpr int64_t panel_codes_bytes(int k) { return int64_t{(k + kActBlock - 1) / kActBlock} * kActBlock * kPanel; }

struct MatmulKernels {
  // One row x f32 [k] into row 0 of `out`; tables and tiles too when out.tables, out.tiles are set.
  void (*quantize)(const float* x, int k, const ActivationsView& out);
  // y[0, n) of one row for panels [panel_begin, panel_end); y and bias (null: none) point at output 0 of the matrix.
  void (*lut_matmul)(const MatrixView& w, const ActivationsView& x, int panel_begin, int panel_end, const float* bias,
                     float* y);
  // The same for n_rows rows; y has ldy floats a row. Bit for bit what lut_matmul gives for each row.
  void (*lut_gemm)(const MatrixView& w, const ActivationsView& x, int n_rows, int panel_begin, int panel_end,
                   const float* bias, float* y, int64_t ldy, uint8_t* scratch);
  // Level 1 of the two-level lookup: codes u8 [quad][kPanel][kLutWidth] of a panel, whole blocks; 64-byte aligned.
  void (*lut_dequant)(const MatrixView& w, int panel, uint8_t* codes);
  // lut_matmul in channel order: y[0, n) of one row for tiles [tile_begin, tile_end), of the channels whose bit is set: bit
  // c % 64 of word c / 64 of `active`. The q of others are 0. Wants no tables.
  void (*channel_matmul)(const ChannelMatrix& w, const ActivationsView& x, const uint64_t* active, int tile_begin,
                         int tile_end, const float* bias, float* y);
  // lut_gemm in channel order, reading all channels: bit for bit what channel_matmul gives for each row. scratch:
  // channel_gemm_scratch_bytes(n_rows).
  void (*channel_gemm)(const ChannelMatrix& w, const ActivationsView& x, int n_rows, int tile_begin, int tile_end,
                       const float* bias, float* y, int64_t ldy, uint8_t* scratch);
  // lut_gemm for few rows, without scratch: codes are unpacked in registers, again for every few rows. Null where the
  // instructions for that cost more than they save.
  void (*lut_multiply)(const MatrixView& w, const ActivationsView& x, int n_rows, int panel_begin, int panel_end,
                       const float* bias, float* y, int64_t ldy) = nullptr;
  // lut_gemm is faster with x.tiles.
  bool wants_tiles = false;
};

// One output row as f32 [k] (an embedding): scalar, the same bits as lut_dequant plus the affine map.
void dequant_row(const MatrixView& w, int row, float* out);

extern const MatmulKernels matmul_kernels_scalar;
#if defined(__x86_64__)
extern const MatmulKernels matmul_kernels_avx2;
extern const MatmulKernels matmul_kernels_avx512;
// Few rows in AVX-512 with GFNI.
void lut_multiply_gfni(const MatrixView& w, const ActivationsView& x, int n_rows, int panel_begin, int panel_end,
                       const float* bias, float* y, int64_t ldy);
#elif defined(__aarch64__)
extern const MatmulKernels matmul_kernels_neon;
extern const MatmulKernels matmul_kernels_neon_i8mm;
#endif

}  // namespace elute
