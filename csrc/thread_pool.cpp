#include "thread_pool.h"

#include <sched.h>
#include <unistd.h>

#include <stdexcept>
#include <string>

namespace elute {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits for `value` to leave `old`: spinning first, since the others are usually microseconds away, then sleeping. It
// yields between spins, since the last one to arrive may be waiting for this very core. It sleeps late, since a core
// that falls idle takes longer to come back than most waits last, a virtual one above all.
void wait_for_change(std::atomic<uint32_t>& value, uint32_t old) {
  constexpr int kSpins = 1 << 17;  // some 5 ms: a barrier's late thread, the sampling between two tokens
  // Two threads, 240 barriers 14 us of work apart, on two cores of a Zen 3 of which other programs use one: 7.5 ms,
  // and 31 ms without yielding (one thread alone: 6.7); on both: 15 and 46. With 128 it is 7.9.
  constexpr int kSpinsToYield = 64;
  for (int i = 1; i <= kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    if (i % kSpinsToYield == 0) sched_yield();
    else pause();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int n_threads) : n_threads_(n_threads) { start(); }

ThreadPool::~ThreadPool() {
  if (process_ == getpid()) stop();
  else forget_parents_workers();
}

void ThreadPool::start() {
  stop_ = false;
  epoch_ = phase_ = 0;
  arrived_ = 0;
  try {
    for (int thread = 1; thread < n_threads_; ++thread) workers_.emplace_back([this, thread] { worker(thread); });
  } catch (const std::exception& error) {
    const std::string started = std::to_string(workers_.size() + 1);
    stop();
    throw std::runtime_error("threads: found room for " + started + " of " + std::to_string(n_threads_) + " (" +
                             error.what() + "); use fewer");
  }
  process_ = getpid();
}

void ThreadPool::stop() {
  stop_ = true;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& w : workers_) w.join();
  workers_.clear();
}

// Threads that exist only in the parent can be neither joined nor detached: their handles are left behind.
void ThreadPool::forget_parents_workers() { new std::vector<std::thread>(std::move(workers_)); }

void ThreadPool::run(const std::function<void(int)>& work) {
  if (process_ != getpid()) {
    forget_parents_workers();
    start();
  }
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
