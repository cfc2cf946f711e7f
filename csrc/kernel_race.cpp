#include "kernel_race.h"

#include <algorithm>
#include <chrono>

#include "activations.h"
#include "matmul_rows.h"

namespace elute {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point started) { return std::chrono::duration<double>(Clock::now() - started).count(); }

constexpr int kColumns = 2048;
constexpr int kGroup = 32;
constexpr int kMostPanels = 32;                 // of a product, as in small models: the tables of a row serve all of them
constexpr double kProductSeconds = 80e-6;       // a slow level gets fewer panels, to stay near this
// In all: as in a model, planes come from memory. Third-level caches of 32 MB do not hold it.
constexpr int64_t kPlanesBytes = 64 << 20;
constexpr int kLeastRounds = 5;

uint64_t next_random(uint64_t& state) {  // xorshift64: Marsaglia, "Xorshift RNGs", 2003
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}

class Track {
 public:
  Track(const KernelTable& kernels, int bits, int most_rows)
      : kernels_(*kernels.matmul),
        planes_(aligned<uint8_t>(kPlanesBytes + kPlanesPadding)),
        scales_(aligned<uint16_t>(kMostPanels * (kColumns / kGroup) * kPanel)),
        x_(aligned<float>(int64_t{most_rows} * kColumns)),
        y_(aligned<float>(int64_t{most_rows} * kMostPanels * kPanel)),
        scratch_(aligned<uint8_t>(gemm_scratch_bytes(most_rows))) {
    uint64_t state = 1;
    for (int64_t i = 0; i < kPlanesBytes; i += 8) {
      const uint64_t word = next_random(state);
      std::memcpy(planes_.get() + i, &word, 8);
    }
    for (int i = 0; i < kMostPanels * (kColumns / kGroup) * kPanel; ++i)
      scales_[i] = static_cast<uint16_t>(0x2000 + next_random(state) % 0x1000);  // halves from 2^-7 to 2^-3
    for (int i = 0; i < most_rows * kColumns; ++i)
      x_[i] = static_cast<float>(static_cast<int64_t>(next_random(state) >> 40) - (1 << 23)) * 0x1p-23f;
    activations_ = std::make_unique<Activations>(kernels, x_.get(), most_rows, kColumns, true);
    w_ = {planes_.get(), scales_.get(), nullptr, kPanel, kColumns, bits, kGroup, 1 << (bits - 1), Affine::symmetric};
    seconds(1, true);  // pages and instructions come in
    const double panel_s = std::max(seconds(1, true), 1e-9);
    w_.n = kPanel * static_cast<int>(std::clamp(kProductSeconds / panel_s, 1.0, double{kMostPanels}));
  }

  double seconds(int n_rows, bool lookup) {
    const int64_t n_bytes = w_.n_panels() * w_.panel_bytes();
    if (at_ + n_bytes > kPlanesBytes) at_ = 0;
    w_.planes = planes_.get() + at_;
    at_ += n_bytes;
    ActivationsView view = activations_->view;
    if (!lookup) view.tables = nullptr, view.lows = nullptr;
    if (lookup || n_rows < kTileRows) view.tiles = nullptr;
    const Range panels{0, w_.n_panels()};
    const Clock::time_point started = Clock::now();
    for (int r = 0; r < n_rows; ++r) kernels_.quantize(x_.get() + int64_t{r} * kColumns, kColumns, view.from_row(r));
    if (lookup) matmul_by_lookup(kernels_, w_, view, n_rows, panels, nullptr, y_.get(), w_.n);
    else matmul_by_multiply(kernels_, w_, view, n_rows, panels, nullptr, y_.get(), w_.n, scratch_.get());
    return seconds_since(started);
  }

 private:
  const MatmulKernels& kernels_;
  AlignedArray<uint8_t> planes_;
  AlignedArray<uint16_t> scales_;
  AlignedArray<float> x_, y_;
  AlignedArray<uint8_t> scratch_;
  std::unique_ptr<Activations> activations_;
  MatrixView w_{};
  int64_t at_ = 0;
};

}  // namespace

std::vector<double> race_seconds(const KernelTable& kernels, int bits, const std::vector<int>& rows, double budget_s) {
  Track track(kernels, bits, *std::max_element(rows.begin(), rows.end()));
  const Clock::time_point started = Clock::now();
  std::vector<double> seconds;
  for (int round = 0; round < kLeastRounds || seconds_since(started) < budget_s; ++round) {
    for (int n_rows : rows) {
      double took[2];
      for (int turn = 0; turn < 2; ++turn) {
        const bool lookup = (turn + round) % 2 == 0;  // neither always finds the other's lines in the cache
        took[lookup ? 0 : 1] = track.seconds(n_rows, lookup);
      }
      seconds.insert(seconds.end(), took, took + 2);
    }
  }
  return seconds;
}

}  // namespace elute
