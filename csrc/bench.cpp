#include "bench.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "matmul_rows.h"
#include "thread_pool.h"

namespace elute {
namespace {

using Clock = std::chrono::steady_clock;

// Seconds of each of `repeats` times work(walk, i), of which no thread returns before all is done. They count from the
// first thread that begins to the first that returns: another may be held back at either moment, which is no part of it.
template <typename Work>
std::vector<double> timed(int n_threads, int repeats, const Work& work) {
  std::vector<Clock::time_point> began(int64_t{n_threads} * repeats), ended(began.size());  // [repeat][thread]
  ThreadPool pool(n_threads, [&](Walk& walk, const ThreadPool::Job&) {
    for (int i = 0; i < repeats; ++i) {
      const int64_t mine = int64_t{i} * n_threads + walk.thread();
      walk.meet();
      began[mine] = Clock::now();
      work(walk, i);
      ended[mine] = Clock::now();
    }
    walk.meet();  // the caller reads what all have written
  });
  pool.run({});
  std::vector<double> seconds;
  for (auto from = began.begin(), to = ended.begin(); from != began.end(); from += n_threads, to += n_threads) {
    const auto first = *std::min_element(from, from + n_threads), last = *std::min_element(to, to + n_threads);
    seconds.push_back(std::chrono::duration<double>(last - first).count());
  }
  return seconds;
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + values.size() / 2;
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Ceilings are medians over spans that are short as products are, so that another program's turn on a core, of some
// milliseconds, spoils a few of them and not the figure; and long against the microsecond in which threads meet.
constexpr int64_t kSpanBytes = 8 << 20;     // of a thread: 0.2 ms at 40 GB/s
constexpr double kLeastSpanSeconds = 3e-4;  // of multiply-adds
constexpr int kSpans = 32;

// Of all threads together, two operations a multiply-add.
double operations_a_nanosecond(int n_threads, float (*work)(int64_t), int multiply_adds_per_step) {
  std::vector<float> sums(n_threads);
  int64_t n_steps = 1024;
  const auto span = [&](Walk& walk, int) {
    sums[walk.thread()] = work(n_steps);
    walk.meet();
  };
  // One thread says how many steps that takes: of several, a single one that is held back would make it seem long.
  while (median(timed(1, 3, span)) < kLeastSpanSeconds) n_steps *= 2;
  const double seconds = median(timed(n_threads, kSpans, span));
  return 2.0 * multiply_adds_per_step * double(n_steps) * n_threads / seconds / 1e9;
}

}  // namespace

Read read(const KernelTable& kernels, int n_threads, const uint8_t* data, int64_t n_bytes, int n_streams) {
  const int runs = static_cast<int>(n_bytes / kReadRun);
  const int n_spans = static_cast<int>(std::max<int64_t>(1, n_bytes / (n_threads * kSpanBytes)));
  std::atomic<uint64_t> seen{0};
  std::vector<double> gb_s = timed(n_threads, n_spans, [&](Walk& walk, int i) {
    const Range span = share(runs, i, n_spans), mine = share(span.end - span.begin, walk.thread(), n_threads);
    seen |= kernels.ceilings->read(data + int64_t{span.begin + mine.begin} * kReadRun,
                                   int64_t{mine.end - mine.begin} * kReadRun, n_streams);
    walk.meet();
  });
  for (int i = 0; i < n_spans; ++i) {
    const Range span = share(runs, i, n_spans);
    gb_s[i] = double(span.end - span.begin) * kReadRun / gb_s[i] / 1e9;
  }
  return {median(gb_s), seen};
}

double multiply_gops(const KernelTable& kernels, int n_threads) {
  return operations_a_nanosecond(n_threads, kernels.ceilings->multiply, kernels.ceilings->multiplies_per_step);
}
double fma_gflops(const KernelTable& kernels, int n_threads) {
  return operations_a_nanosecond(n_threads, kernels.ceilings->fma, kernels.ceilings->fmas_per_step);
}

std::vector<double> matmul_seconds(const KernelTable& kernels, int n_threads, const std::vector<MatrixView>& copies,
                                   const Activations& x, int repeats, float* y) {
  const int n = copies[0].n, n_panels = copies[0].n_panels(), n_rows = x.rows;
  const bool lookup = x.view.tables != nullptr, alone = n_threads == 1;
  const int most = std::max(1, kResultRows / n_rows);  // panels of a chunk
  const int n_chunks = alone ? 1 : std::max(chunks(n_panels, n_threads), (n_panels + most - 1) / most);
  std::vector<AlignedArray<uint8_t>> scratch(n_threads);
  std::vector<AlignedArray<float>> results(n_threads);
  for (int thread = 0; thread < n_threads; ++thread) {
    if (!lookup) scratch[thread] = aligned<uint8_t>(gemm_scratch_bytes(n_rows));
    if (!alone) results[thread] = aligned<float>(int64_t{std::max(kResultRows, n_rows)} * kPanel);
  }
  const auto multiply = [&](const MatrixView& w, float* to, int thread) {
    const Range all{0, w.n_panels()};
    if (lookup) matmul_by_lookup(*kernels.matmul, w, x.view, n_rows, all, nullptr, to, w.n);
    else matmul_by_multiply(*kernels.matmul, w, x.view, n_rows, all, nullptr, to, w.n, scratch[thread].get());
  };
  return timed(n_threads, repeats, [&](Walk& walk, int i) {
    const MatrixView& w = copies[i % copies.size()];
    float* const own = results[walk.thread()].get();
    const auto compute = [&](int chunk) {
      multiply(part_of(w, share(n_panels, chunk, n_chunks)), alone ? y : own, walk.thread());
    };
    const auto publish = [&](int chunk) {
      if (alone) return;
      const Range panels = share(n_panels, chunk, n_chunks);
      const int width = part_of(w, panels).n;
      for (int r = 0; r < n_rows; ++r)
        std::memcpy(y + int64_t{r} * n + panels.begin * kPanel, own + int64_t{r} * width, width * sizeof(float));
    };
    walk.share(n_chunks, compute, publish);
  });
}

}  // namespace elute
