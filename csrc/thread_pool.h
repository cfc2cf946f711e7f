// Persistent workers that walk side by side through the same steps. A step is cut into chunks: whoever comes takes the
// next one, and the step ends when its chunks are done, not when threads arrive. So a thread that the system keeps from
// running keeps nobody: the others take its chunks, and compute the one that it holds once more. Results must therefore
// not depend on who computes a chunk. docs/design.md, "Threads", has the argument.
#pragma once
#include <sys/types.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace elute {

// [begin, end) of `n` items for `part` of `parts`; the first parts are the larger ones.
struct Range {
  int begin, end;
};
inline Range share(int n, int part, int parts) {
  const auto edge = [&](int64_t i) { return static_cast<int>((n * i + parts - 1) / parts); };
  return {edge(part), edge(part + 1)};
}

// Chunks to cut n_items into: enough that a thread which ends early finds some to take.
inline int chunks(int n_items, int n_threads) { return n_threads == 1 ? 1 : std::min(n_items, 8 * n_threads); }

class ThreadPool;

// One thread's way through the steps of a run. All threads make the same calls in the same order, with an n_chunks that
// depends on the job alone.
class Walk {
 public:
  int thread() const { return thread_; }
  bool alone() const;  // the pool has no other thread

  // Runs chunk(c) once for each c of [0, n_chunks), on any thread. What earlier steps wrote is visible to it, and all
  // have run when this returns.
  template <typename Chunk>
  void share(int n_chunks, const Chunk& chunk);

  // The same in two parts. compute(c) may run on several threads, and late: it reads what is shared and writes only
  // what is this thread's own. publish(c) then writes the result where all see it, once for each c. A late compute may
  // read what later steps are writing; its result is dropped, so it has but to survive that.
  template <typename Compute, typename Publish>
  void share(int n_chunks, const Compute& compute, const Publish& publish);

  // Returns when all threads have called it.
  void meet();

 private:
  friend class ThreadPool;
  Walk(ThreadPool& pool, int thread, uint64_t step) : pool_(pool), thread_(thread), step_(step) {}
  template <typename Chunk>
  void take_all(int n_chunks, const Chunk& chunk);

  ThreadPool& pool_;
  const int thread_;
  uint64_t step_;                  // the last that was begun
  uint64_t patience_ = 1u << 16;  // ticks that the others' last chunks may take
};

class ThreadPool {
 public:
  using Job = std::array<uint64_t, 4>;  // what a run works on, as the caller encodes it
  using Work = std::function<void(Walk&, const Job&)>;

  // The caller of run is thread 0; n_threads - 1 workers are started. `work` must not throw, and what it refers to must
  // outlive the pool. Throws std::runtime_error when workers cannot be started.
  ThreadPool(int n_threads, Work work);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int n_threads() const { return n_threads_; }

  // Returns when the work of `job` is done. One run at a time. Workers that were held back may still be in an earlier
  // one; they change nothing and leave. In a forked child, which inherits no workers, it starts them first, and throws
  // as the constructor does.
  void run(const Job& job);

 private:
  friend class Walk;

  // A number that belongs to one step and is void to the others, so that a late thread changes nothing. Steps count
  // modulo 2^40: months of work, where a thread is late by seconds.
  struct Word {
    static constexpr int kLowBits = 24;
    static uint64_t pack(uint64_t step, uint32_t low) { return step << kLowBits | low; }
    static uint32_t low(uint64_t word) { return word & ((1u << kLowBits) - 1); }
    // Steps from the word's to `step`; negative when the word's is the later one.
    static int64_t age(uint64_t word, uint64_t step) {
      return static_cast<int64_t>((step << kLowBits) - (word >> kLowBits << kLowBits));
    }
  };
  static constexpr int kEndBits = Word::kLowBits / 2;
  static constexpr int kMaxChunks = (1 << kEndBits) - 1;  // the ends of a range go from 0 to this
  struct alignas(64) Shared {
    std::atomic<uint64_t> word{0};
  };
  static constexpr uint64_t kPublished = 1;

  int take(int from, bool front, uint64_t step, int n_chunks);
  bool passed(uint64_t step, int n_chunks) const;
  void finish(uint64_t step, int n_done, int n_chunks);
  void finish_when_published(uint64_t step, int n_chunks);
  void wait(uint64_t step, int n_chunks) const;
  bool wait_for_ticks(uint64_t step, int n_chunks, uint64_t ticks) const;
  bool begin_publishing(uint64_t step, int chunk);
  void end_publishing(uint64_t step, int chunk);
  bool is_published(uint64_t step, int chunk) const;

  void start();
  void stop();
  void forget_parents_workers();
  void work_on_jobs(int thread, uint32_t epoch);
  uint32_t next_job(uint32_t epoch, Job& job, uint64_t& step) const;

  const int n_threads_;
  const Work work_;
  pid_t process_ = 0;  // whose workers these are
  std::vector<std::thread> workers_;
  uint64_t last_step_ = 0;  // of the runs so far

  // The job, in a sequence lock: the epoch is odd while it is written.
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<bool> stop_{false};
  std::array<std::atomic<uint64_t>, std::tuple_size_v<Job>> job_{};
  std::atomic<uint64_t> job_step_{0};  // the last before it

  alignas(64) std::atomic<uint64_t> done_{0};      // Word: chunks of the step that are done
  std::vector<Shared> ranges_;                     // Word for each thread's share: begin and end of what is left
  std::vector<std::atomic<uint64_t>> published_;  // [chunk]: twice the step that is publishing it, + kPublished after
};

// The processor's clock: cheap enough to be read in every step.
uint64_t ticks();

inline bool Walk::alone() const { return pool_.n_threads_ == 1; }

// First its own share from the front, so that a thread walks through memory in order; then the others' from the back.
template <typename Chunk>
void Walk::take_all(int n_chunks, const Chunk& chunk) {
  for (int i = 0; i < pool_.n_threads_; ++i) {
    const int from = (thread_ + i) % pool_.n_threads_;
    for (int c; (c = pool_.take(from, i == 0, step_, n_chunks)) >= 0;) chunk(c);
  }
}

template <typename Chunk>
void Walk::share(int n_chunks, const Chunk& chunk) {
  for (int first = 0; first < n_chunks; first += ThreadPool::kMaxChunks) {
    const int n = std::min(n_chunks - first, ThreadPool::kMaxChunks);
    if (alone()) {
      for (int c = 0; c < n; ++c) chunk(first + c);
      continue;
    }
    if (pool_.passed(++step_, n)) continue;
    int n_done = 0;
    take_all(n, [&](int c) {
      chunk(first + c);
      ++n_done;
    });
    pool_.finish(step_, n_done, n);
    pool_.wait(step_, n);
  }
}

template <typename Compute, typename Publish>
void Walk::share(int n_chunks, const Compute& compute, const Publish& publish) {
  for (int first = 0; first < n_chunks; first += ThreadPool::kMaxChunks) {
    const int n = std::min(n_chunks - first, ThreadPool::kMaxChunks);
    if (alone()) {
      for (int c = 0; c < n; ++c) {
        compute(first + c);
        publish(first + c);
      }
      continue;
    }
    if (pool_.passed(++step_, n)) continue;
    int n_computed = 0, n_done = 0;
    const auto compute_and_publish = [&](int c) {
      compute(first + c);
      ++n_computed;
      if (!pool_.begin_publishing(step_, c)) return;
      publish(first + c);
      pool_.end_publishing(step_, c);
      ++n_done;
    };
    const uint64_t started = ticks();
    take_all(n, compute_and_publish);
    pool_.finish(step_, n_done, n);
    // Others that run hold a chunk each, and have begun it.
    if (n_computed > 0) patience_ = 2 * (ticks() - started) / n_computed;
    if (pool_.wait_for_ticks(step_, n, patience_)) continue;
    for (int c = 0; c < n && !pool_.passed(step_, n); ++c)
      if (!pool_.is_published(step_, c)) compute_and_publish(c);
    pool_.finish_when_published(step_, n);
  }
}

}  // namespace elute
