#include "thread_pool.h"

namespace elute {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits for `value` to leave `old`: spinning first, since the others are usually microseconds away, then sleeping, so
// that a thread without a core of its own does not keep the last one from arriving.
void wait_for_change(std::atomic<uint32_t>& value, uint32_t old) {
  constexpr int kSpins = 4000;  // about 50 us at 40 cycles a pause
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int n_threads) : n_threads_(n_threads) {
  for (int thread = 1; thread < n_threads_; ++thread) workers_.emplace_back([this, thread] { worker(thread); });
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& w : workers_) w.join();
}

void ThreadPool::run(const std::function<void(int)>& work) {
  work_ = &work;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  work(0);
  barrier();
}

void ThreadPool::worker(int thread) {
  uint32_t seen = 0;
  while (true) {
    wait_for_change(epoch_, seen);
    ++seen;
    if (stop_) return;
    (*work_)(thread);
    barrier();
  }
}

void ThreadPool::barrier() {
  if (n_threads_ == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_threads_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
  } else {
    wait_for_change(phase_, phase);
  }
}

}  // namespace elute
