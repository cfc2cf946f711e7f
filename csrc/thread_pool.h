// Persistent workers that run one function side by side, with a barrier to meet at. Work is split by thread number, so
// results cannot depend on which thread was faster.
#pragma once
#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace elute {

class ThreadPool {
 public:
  // The caller is thread 0; n_threads - 1 workers are started. Throws std::runtime_error when they cannot be.
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int n_threads() const { return n_threads_; }

  // Runs work(thread) on every thread and returns when all have. One run at a time; work must not throw.
  // In a forked child, which inherits no workers, it starts them first, and throws as the constructor does.
  void run(const std::function<void(int)>& work);

  // Inside `work`: returns when all threads have called it equally often; what they wrote before is visible after.
  void barrier();

 private:
  void start();
  void stop();
  void forget_parents_workers();
  void worker(int thread);

  const int n_threads_;
  pid_t process_ = 0;  // whose workers these are
  const std::function<void(int)>* work_ = nullptr;
  alignas(64) std::atomic<uint32_t> epoch_{0};  // runs started
  alignas(64) std::atomic<uint32_t> phase_{0};  // barriers passed
  alignas(64) std::atomic<int> arrived_{0};
  bool stop_ = false;  // written before epoch_, read after it
  std::vector<std::thread> workers_;
};

// [begin, end) of `n` items for `thread` of `n_threads`.
struct Range {
  int begin, end;
};
inline Range share(int n, int thread, int n_threads) {
  return {static_cast<int>(int64_t{n} * thread / n_threads), static_cast<int>(int64_t{n} * (thread + 1) / n_threads)};
}

}  // namespace elute
