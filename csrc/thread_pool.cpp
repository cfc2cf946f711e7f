#include "thread_pool.h"

#include <sched.h>
#include <unistd.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <utility>
#if defined(__x86_64__)
#include <x86intrin.h>
#endif

namespace elute {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins, and after a while lets others have the core between spins: the thread that is waited for may need it. Not at
// once: with another program on the core, yielding gives it away for milliseconds.
class Spin {
 public:
  void once() {
    if (++count_ > kSpinsAlone && count_ % kSpinsToYield == 0) sched_yield();
    else pause();
  }
  bool is_long() const { return count_ > kSpins; }

 private:
  static constexpr int kSpinsAlone = 1 << 12;  // some 80 us on a Zen 3
  static constexpr int kSpinsToYield = 1 << 6;
  static constexpr int kSpins = 1 << 15;  // some 1 ms: longer than it takes to choose a token
  int count_ = 0;
};

}  // namespace

uint64_t ticks() {
#if defined(__x86_64__)
  return __rdtsc();
#else
  return std::chrono::steady_clock::now().time_since_epoch().count();
#endif
}

ThreadPool::ThreadPool(int n_threads, Work work)
    : n_threads_(n_threads), work_(std::move(work)), ranges_(n_threads), published_(kMaxChunks) {
  start();
}

ThreadPool::~ThreadPool() {
  if (process_ == getpid()) stop();
  else forget_parents_workers();
}

void ThreadPool::start() {
  const uint32_t epoch = epoch_;
  try {
    for (int thread = 1; thread < n_threads_; ++thread)
      workers_.emplace_back([this, thread, epoch] { work_on_jobs(thread, epoch); });
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
  epoch_.fetch_add(2, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& w : workers_) w.join();
  workers_.clear();
  stop_ = false;
}

// Threads that exist only in the parent can be neither joined nor detached: their handles are left behind.
void ThreadPool::forget_parents_workers() { new std::vector<std::thread>(std::move(workers_)); }

void ThreadPool::run(const Job& job) {
  if (process_ != getpid()) {
    forget_parents_workers();
    start();
  }
  if (n_threads_ > 1) {
    const uint32_t epoch = epoch_.load(std::memory_order_relaxed);
    epoch_.store(epoch + 1, std::memory_order_relaxed);
    // Release, each: none may be seen before the odd epoch is.
    for (size_t i = 0; i < job.size(); ++i) job_[i].store(job[i], std::memory_order_release);
    job_step_.store(last_step_, std::memory_order_release);
    epoch_.store(epoch + 2, std::memory_order_release);
    epoch_.notify_all();
  }
  Walk walk(*this, 0, last_step_);
  work_(walk, job);
  last_step_ = walk.step_;
}

void ThreadPool::work_on_jobs(int thread, uint32_t epoch) {
  while (true) {
    Job job;
    uint64_t step;
    epoch = next_job(epoch, job, step);
    if (stop_) return;
    Walk walk(*this, thread, step);
    work_(walk, job);
  }
}

uint32_t ThreadPool::next_job(uint32_t epoch, Job& job, uint64_t& step) const {
  Spin spin;
  while (true) {
    const uint32_t now = epoch_.load(std::memory_order_acquire);
    if (now != epoch && now % 2 == 0) {
      for (size_t i = 0; i < job.size(); ++i) job[i] = job_[i].load(std::memory_order_acquire);
      step = job_step_.load(std::memory_order_acquire);
      if (epoch_.load(std::memory_order_relaxed) == now) return now;
    }
    if (!spin.is_long()) spin.once();
    else epoch_.wait(now, std::memory_order_relaxed);
  }
}

int ThreadPool::take(int from, bool front, uint64_t step, int n_chunks) {
  std::atomic<uint64_t>& range = ranges_[from].word;
  uint64_t seen = range.load(std::memory_order_relaxed);
  while (true) {
    const int64_t age = Word::age(seen, step);
    if (age < 0) return -1;
    Range left{static_cast<int>(Word::low(seen)) & kMaxChunks, static_cast<int>(Word::low(seen) >> kEndBits)};
    if (age > 0) left = elute::share(n_chunks, from, n_threads_);  // the first to come
    if (left.begin >= left.end) return -1;
    const int chunk = front ? left.begin++ : --left.end;
    const uint64_t next = Word::pack(step, static_cast<uint32_t>(left.begin | left.end << kEndBits));
    // What the chunk reads was acquired when the step before was seen to be done.
    if (range.compare_exchange_weak(seen, next, std::memory_order_relaxed)) return chunk;
  }
}

bool ThreadPool::passed(uint64_t step, int n_chunks) const {
  const uint64_t done = done_.load(std::memory_order_acquire);
  const int64_t age = Word::age(done, step);
  return age < 0 || (age == 0 && static_cast<int>(Word::low(done)) >= n_chunks);
}

void ThreadPool::finish(uint64_t step, int n_done, int n_chunks) {
  uint64_t seen = done_.load(std::memory_order_relaxed);
  while (n_done > 0) {
    const int64_t age = Word::age(seen, step);
    if (age < 0) return;
    const int done = std::min(n_chunks, n_done + (age == 0 ? static_cast<int>(Word::low(seen)) : 0));
    // Every one adds to what it saw, so who reads the last value has acquired the chunks of all.
    if (done_.compare_exchange_weak(seen, Word::pack(step, done), std::memory_order_acq_rel, std::memory_order_relaxed))
      return;
  }
}

void ThreadPool::finish_when_published(uint64_t step, int n_chunks) {
  Spin spin;
  for (int c = 0; c < n_chunks; ++c)
    for (; !is_published(step, c); spin.once())
      if (passed(step, n_chunks)) return;
  finish(step, n_chunks, n_chunks);
}

void ThreadPool::wait(uint64_t step, int n_chunks) const {
  for (Spin spin; !passed(step, n_chunks); spin.once()) {}
}

bool ThreadPool::wait_for_ticks(uint64_t step, int n_chunks, uint64_t limit) const {
  const uint64_t started = ticks();
  while (!passed(step, n_chunks)) {
    if (ticks() - started > limit) return false;
    pause();
  }
  return true;
}

bool ThreadPool::is_published(uint64_t step, int chunk) const {
  return static_cast<int64_t>(published_[chunk].load(std::memory_order_acquire) - (step * 2 + kPublished)) >= 0;
}

bool ThreadPool::begin_publishing(uint64_t step, int chunk) {
  uint64_t seen = published_[chunk].load(std::memory_order_relaxed);
  return static_cast<int64_t>(seen - step * 2) < 0 &&
         published_[chunk].compare_exchange_strong(seen, step * 2, std::memory_order_relaxed);
}

void ThreadPool::end_publishing(uint64_t step, int chunk) {
  published_[chunk].store(step * 2 + kPublished, std::memory_order_release);
}

void Walk::meet() {
  if (alone()) return;
  const int n = pool_.n_threads_;
  pool_.take(thread_, true, ++step_, n);
  pool_.finish(step_, 1, n);
  pool_.wait(step_, n);
}

}  // namespace elute
