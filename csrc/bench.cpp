#include "bench.h"

#include <atomic>
#include <chrono>

#include "thread_pool.h"

namespace elute {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point started) { return std::chrono::duration<double>(Clock::now() - started).count(); }

// Seconds from the moment when all threads are there to the moment when the last has done work(thread).
template <typename Work>
double timed(int n_threads, const Work& work) {
  double seconds = 0;
  ThreadPool pool(n_threads, [&](Walk& walk, const ThreadPool::Job&) {
    walk.meet();
    const Clock::time_point started = Clock::now();
    work(walk.thread());
    walk.meet();
    if (walk.thread() == 0) seconds = seconds_since(started);
  });
  pool.run({});
  return seconds;
}

// Of all threads together, two operations a multiply-add.
double operations_a_nanosecond(int n_threads, float (*work)(int64_t), int multiply_adds_per_step) {
  constexpr double kLeastSeconds = 0.004;  // a hundred times what threads need to meet
  std::vector<float> sums(n_threads);
  for (int64_t n_steps = 1024;; n_steps *= 2) {
    const double seconds = timed(n_threads, [&](int thread) { sums[thread] = work(n_steps); });
    if (seconds >= kLeastSeconds) return 2.0 * multiply_adds_per_step * double(n_steps) * n_threads / seconds / 1e9;
  }
}

}  // namespace

double read_gb_s(const KernelTable& kernels, int n_threads, const uint8_t* data, int64_t n_bytes) {
  const int runs = static_cast<int>(n_bytes / kReadRun);
  std::atomic<uint64_t> seen{0};
  const double seconds = timed(n_threads, [&](int thread) {
    const Range mine = share(runs, thread, n_threads);
    seen |= kernels.ceilings->read(data + int64_t{mine.begin} * kReadRun, int64_t{mine.end - mine.begin} * kReadRun);
  });
  return double(runs) * kReadRun / seconds / 1e9;
}

double multiply_gops(const KernelTable& kernels, int n_threads) {
  return operations_a_nanosecond(n_threads, kernels.ceilings->multiply, kernels.ceilings->multiplies_per_step);
}
double fma_gflops(const KernelTable& kernels, int n_threads) {
  return operations_a_nanosecond(n_threads, kernels.ceilings->fma, kernels.ceilings->fmas_per_step);
}

std::vector<double> matmul_seconds(const KernelTable& kernels, int n_threads, const std::vector<MatrixView>& copies,
                                   const Activations& x, int repeats, float* y) {
  const int n = copies[0].n;
  std::vector<AlignedArray<uint8_t>> scratch(n_threads);
  if (x.rows > 1)
    for (auto& codes : scratch) codes = aligned<uint8_t>(gemm_scratch_bytes(x.rows));
  std::vector<double> seconds(repeats);
  const int n_chunks = chunks(copies[0].n_panels(), n_threads);
  ThreadPool pool(n_threads, [&](Walk& walk, const ThreadPool::Job&) {
    for (int i = 0; i < repeats; ++i) {
      const MatrixView& w = copies[i % copies.size()];
      walk.meet();
      const Clock::time_point started = Clock::now();
      walk.share(n_chunks, [&](int chunk) {
        const Range panels = share(w.n_panels(), chunk, n_chunks);
        if (x.rows == 1) kernels.matmul->lut_matmul(w, x.view, panels.begin, panels.end, nullptr, y);
        else
          kernels.matmul->lut_gemm(w, x.view, x.rows, panels.begin, panels.end, nullptr, y, n,
                                   scratch[walk.thread()].get());
      });
      if (walk.thread() == 0) seconds[i] = seconds_since(started);
    }
  });
  pool.run({});
  return seconds;
}

}  // namespace elute
