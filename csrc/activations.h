// Memory for quantized activations, for callers outside the executor, which keeps its own.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "dispatch.h"

namespace elute {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <typename T>
using AlignedArray = std::unique_ptr<T[], Free>;

// Zeros, 64-byte aligned, with 64 more after them. Throws std::bad_alloc.
template <typename T>
AlignedArray<T> aligned(int64_t count) {
  const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64 + 64;
  void* p = std::aligned_alloc(64, bytes);
  if (!p) throw std::bad_alloc();
  std::memset(p, 0, bytes);
  return AlignedArray<T>(static_cast<T*>(p));
}

// Owns the quantized rows of x f32 [rows, k].
struct Activations {
  int rows, blocks;
  AlignedArray<int8_t> q;
  AlignedArray<float> scales;
  AlignedArray<int32_t> sums, lows;
  AlignedArray<PairSums> pairs;
  AlignedArray<uint8_t> tables;
  AlignedArray<ActTile> tiles;
  ActivationsView view;

  Activations(const KernelTable& kernels, const float* x, int n_rows, int k, bool with_tables)
      : rows(n_rows), blocks((k + kActBlock - 1) / kActBlock) {
    const int64_t width = int64_t{blocks} * kActBlock;
    q = aligned<int8_t>(rows * width);
    scales = aligned<float>(int64_t{rows} * blocks);
    sums = aligned<int32_t>(rows * width / kSumRun);
    pairs = aligned<PairSums>(int64_t{rows} * blocks);
    if (with_tables) {
      lows = aligned<int32_t>(rows * width / kSumRun);
      tables = aligned<uint8_t>(rows * width / kLutWidth * kTableBytes);
    }
    if (kernels.matmul->wants_tiles) tiles = aligned<ActTile>(int64_t{(rows + kTileRows - 1) / kTileRows} * blocks);
    view = {q.get(),   scales.get(), sums.get(), pairs.get(), tables.get(),
            lows.get(), blocks,       tiles.get()};
    for (int r = 0; r < rows; ++r) kernels.matmul->quantize(x + int64_t{r} * k, k, view.from_row(r));
  }
};

}  // namespace elute
