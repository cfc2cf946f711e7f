// Linear ops whose weights lie in banks, in channel order: only the channels that count for the token are there.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "executor.h"

namespace elute {
namespace {

// Tiles that a thread walks at once: with 4 a product of 2 bits takes 1.4 times as long (Zen 5, bench/channels.py).
constexpr int kLeastTiles = 16;

}  // namespace

// A channel whose activation is rounded to 0 adds nothing; one of a block that is not finite does.
void Executor::find_active(int width, const Slice& slice) {
  const Range channels = slice.channels(width);
  const ActivationsView x = activations(width, 1, false);
  for (int block = channels.begin / kActBlock; block * kActBlock < channels.end; ++block) {
    const int8_t* const q = x.q + int64_t{block} * kActBlock;
    uint64_t bits = 0;
    for (int i = 0; i < kActBlock; ++i) bits |= uint64_t{q[i] != 0} << i;
    const int n = std::min(kActBlock, width - block * kActBlock);
    if (!std::isfinite(x.scales[block])) bits = ~uint64_t{0} >> (kActBlock - n);
    active_.as<uint64_t>()[block] = bits;
  }
}

void Executor::multiply_channels(const LinearOp& op, const Call& call, Walk& walk) {
  int total = 0;
  for (int m : op.matrices) total += in_banks_[m].matrix.n_tiles();
  const int most = std::max(1, kResultTiles / call.n);
  const int wanted = walk.alone() ? 1 : std::clamp(total / kLeastTiles, 1, 4 * n_threads());
  const int n_chunks = walk.alone() ? 1 : std::max(wanted, (total + most - 1) / most);
  float* const results = results_[walk.thread()].as<float>();
  const ActivationsView x = activations(input_width(op), call.n, false);
  // The pieces of a chunk: matrix, tiles, and where this thread keeps their result.
  const auto for_each = [&](int chunk, const auto& body) {
    const Range mine = share(total, chunk, n_chunks);
    float* result = results;
    int first = 0;  // tiles of the matrices before this one
    for (size_t i = 0; i < op.matrices.size(); ++i) {
      const InBank& in = in_banks_[op.matrices[i]];
      const Range tiles{std::max(mine.begin - first, 0), std::min(mine.end - first, in.matrix.n_tiles())};
      first += in.matrix.n_tiles();
      if (tiles.begin >= tiles.end) continue;
      body(static_cast<int>(i), in, tiles, result);
      result += int64_t{call.n} * (tiles.end - tiles.begin) * kChannelTile;
    }
  };
  const auto compute = [&](int chunk) {
    for_each(chunk, [&](int i, const InBank& in, Range tiles, float* result) {
      ChannelMatrix w = in.matrix;
      w.rows = banks_->rows(in.bank);
      const float* const bias = op.biases[i].empty() ? nullptr : op.biases[i].data();
      // Kernels write where output 0 would be.
      const int64_t ldy = walk.alone() ? widths_[op.outputs[i]] : (tiles.end - tiles.begin) * kChannelTile;
      float* const y = walk.alone() ? row(op.outputs[i], 0) : result - tiles.begin * kChannelTile;
      if (call.n == 1)
        kernels_.matmul->channel_matmul(w, x, active_.as<uint64_t>(), tiles.begin, tiles.end, bias, y);
      else
        kernels_.matmul->channel_gemm(w, x, call.n, tiles.begin, tiles.end, bias, y, ldy,
                                      gemm_scratch_[walk.thread()].as<uint8_t>());
    });
  };
  walk.share(n_chunks, compute, [&](int chunk) {
    for_each(chunk, [&](int i, const InBank& in, Range tiles, float* result) {
      const int begin = tiles.begin * kChannelTile, end = std::min(tiles.end * kChannelTile, in.matrix.n);
      for (int r = 0; r < call.n; ++r) {
        float* const y = row(op.outputs[i], r) + begin;
        if (!walk.alone())
          std::memcpy(y, result + int64_t{r} * (tiles.end - tiles.begin) * kChannelTile, (end - begin) * sizeof(float));
        if (op.added_to >= 0) kernels_.floats->add(y, row(op.added_to, r) + begin, end - begin);
      }
    });
  });
}

}  // namespace elute
