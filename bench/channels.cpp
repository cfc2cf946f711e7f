// How long does a product in channel order take beside lut_matmul? bench/channels.py builds and runs it and prints the table.
//
//     channels BITS N K GROUP THREADS TILES SHUFFLED ROUNDS SHARE...
//
// Each round runs lut_matmul and channel_matmul at every share of active channels, in random order, each on the next of many
// copies of the matrix, so that weights come from memory. A thread takes its part of the outputs, in calls of TILES tiles (0: one
// call). SHUFFLED: channels lie in random order, as they do where they were fetched one by one. The arena holds random bytes,
// which both orders read their own way. Output: a line each, lut_matmul first: the nanoseconds of each round.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>

#include "activations.h"
#include "layouts_crew.h"

namespace elute {
namespace {

constexpr int64_t kArena = int64_t{192} << 20;  // at least; 6 times the 32 MiB L3 of machine B
constexpr int kPatterns = 8;                    // of active channels, taken in turn
#ifdef __AVX512VNNI__
const KernelTable kKernels{"avx512", &matmul_kernels_avx512, nullptr, nullptr};
#else
const KernelTable kKernels{"avx2", &matmul_kernels_avx2, nullptr, nullptr};
#endif

uint8_t* huge_pages(int64_t n_bytes) {
  constexpr int64_t kHuge = 2 << 20;
  n_bytes = (n_bytes + kHuge - 1) / kHuge * kHuge;
  void* memory = mmap(nullptr, n_bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  auto* begin = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory) + kHuge - 1) / kHuge * kHuge);
  madvise(begin, n_bytes, MADV_HUGEPAGE);
  return begin;
}

// Activations with a share of the channels active.
struct Pattern {
  std::vector<uint64_t> active;
  std::unique_ptr<Activations> x;

  Pattern(int k, double share, bool tables, std::mt19937& random) : active((k + 63) / 64) {
    std::vector<int> channels(k);
    std::iota(channels.begin(), channels.end(), 0);
    std::shuffle(channels.begin(), channels.end(), random);
    std::vector<float> values(k);
    std::normal_distribution<float> normal;
    for (int i = 0; i < int(share * k + 0.5); ++i) {
      values[channels[i]] = normal(random);
      active[channels[i] / 64] |= uint64_t{1} << channels[i] % 64;
    }
    x = std::make_unique<Activations>(kKernels, values.data(), 1, k, tables);
  }
};

struct Variant {
  std::vector<Pattern> patterns;
  bool channels;
  std::vector<double> nanoseconds;
};

int run(int argc, char** argv) {
  if (argc < 10) return 2;
  const int bits = std::atoi(argv[1]), n = std::atoi(argv[2]), k = std::atoi(argv[3]), group = std::atoi(argv[4]);
  const int n_threads = std::atoi(argv[5]), tiles = std::atoi(argv[6]), rounds = std::atoi(argv[8]);
  const bool shuffled = std::atoi(argv[7]) != 0;
  std::mt19937 random(1);
  const MatrixView w{nullptr, nullptr, nullptr, n, k, bits, group, 1 << (bits - 1), Affine::symmetric};
  const int64_t plane_bytes = w.n_panels() * w.panel_bytes(), n_halves = int64_t{w.n_panels()} * w.n_groups() * kPanel;
  const int64_t copy_bytes = (plane_bytes + 2 * n_halves + kPlanesPadding + 4095) / 4096 * 4096;
  const int n_copies = int(kArena / copy_bytes) + 1;
  uint8_t* arena = huge_pages(n_copies * copy_bytes);
  for (int64_t i = 0; i < n_copies * copy_bytes / 4; ++i) reinterpret_cast<uint32_t*>(arena)[i] = random();
  std::vector<const uint8_t*> rows(int64_t{n_copies} * k);
  for (int copy = 0; copy < n_copies; ++copy) {
    uint8_t* begin = arena + copy * copy_bytes;
    for (int64_t i = 0; i < n_halves; ++i)
      reinterpret_cast<uint16_t*>(begin + plane_bytes)[i] = static_cast<uint16_t>(0x2000 + random() % 0x1000);
    const auto of_copy = rows.begin() + int64_t{copy} * k;
    for (int c = 0; c < k; ++c) of_copy[c] = begin + c * (plane_bytes / k);
    if (shuffled) std::shuffle(of_copy, of_copy + k, random);
  }

  std::vector<Variant> variants(argc - 8);
  for (size_t v = 0; v < variants.size(); ++v) {
    variants[v].channels = v > 0;
    for (int i = 0; i < kPatterns; ++i)
      variants[v].patterns.emplace_back(k, v ? std::atof(argv[8 + v]) : 1.0, v == 0, random);
  }
  Crew crew(n_threads);
  std::vector<float> y(w.n_panels() * kPanel);
  std::vector<int> order(variants.size());
  std::iota(order.begin(), order.end(), 0);
  int copy = 0;
  for (int round = 0; round < rounds; ++round) {
    std::shuffle(order.begin(), order.end(), random);
    for (int v : order) {
      Variant& variant = variants[v];
      const Pattern& pattern = variant.patterns[round % kPatterns];
      uint8_t* begin = arena + copy * copy_bytes;
      MatrixView mine = w;
      mine.planes = begin;
      mine.scales = reinterpret_cast<uint16_t*>(begin + plane_bytes);
      const ChannelMatrix by_channel{&rows[int64_t{copy} * k], 0, mine.scales, nullptr, n, k, bits, group, w.zero, w.affine};
      copy = (copy + 1) % n_copies;
      const double nanoseconds = crew.nanoseconds([&](int thread) {
        const int n_units = variant.channels ? by_channel.n_tiles() : w.n_panels();
        const int first = n_units * thread / n_threads, last = n_units * (thread + 1) / n_threads;
        if (!variant.channels) return kKernels.matmul->lut_matmul(mine, pattern.x->view, first, last, nullptr, y.data());
        const int step = tiles ? tiles : last - first;
        for (int tile = first; tile < last; tile += step)
          kKernels.matmul->channel_matmul(by_channel, pattern.x->view, pattern.active.data(), tile,
                                          std::min(tile + step, last), nullptr, y.data());
      });
      if (crew.undisturbed()) variant.nanoseconds.push_back(nanoseconds);
    }
  }
  for (const Variant& variant : variants) {
    for (double each : variant.nanoseconds) std::printf("%.0f ", each);
    std::printf("\n");
  }
  return 0;
}

}  // namespace
}  // namespace elute

int main(int argc, char** argv) { return elute::run(argc, argv); }
